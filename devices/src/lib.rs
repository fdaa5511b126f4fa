//! Device models: buses, the virtio transport and devices, the serial port and the small platform devices.
//!
//! Knows no KVM: an interrupt is an `EventFd` somebody else wires up, a doorbell is an `EventFd` somebody else rings.
//! Knows no peers: a device does not know why it is stopped (DESIGN invariant 2).

pub mod bus;
pub mod console;
pub mod event_loop;
pub mod guest_event;
pub mod i8042;
pub mod listener;
pub mod mmds;
pub mod power;
pub mod pvpanic;
pub mod serial;
pub mod stats;
mod timer;
pub mod virtio;

/// Called first on every thread that a device starts, to confine it.
pub type OnThread = std::sync::Arc<dyn Fn() + Send + Sync>;

/// Asks for a checkpoint before it is due, as a device of a protected VM runs out of what it may keep until then. It is
/// called under the device's lock: it neither waits nor calls into a device.
pub type CheckpointSoon = std::sync::Arc<dyn Fn() + Send + Sync>;

/// Stack of every thread of the monitor, in bytes. More than any of them needs, and less than a huge page: a stack that
/// happened to lie on a huge page boundary would have all of one resident from its first use.
pub const THREAD_STACK_SIZE: usize = 256 << 10;

/// Guest memory as the devices see it: every write through it marks the region's dirty bitmap.
pub type GuestMemory = vm_memory::GuestMemoryMmap<vm_memory::bitmap::AtomicBitmap>;
