//! A guest for tests: memory, a driver that fills real rings through the register window, and the real device behind it.

use std::ops::Deref;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use cutover_snapshot::spec::{RateLimiterSpec, RngSpec, TokenBucketSpec};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use virtio_bindings::virtio_config::*;
use virtio_bindings::virtio_mmio::*;
use virtio_bindings::virtio_ring::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use vm_memory::bitmap::{AtomicBitmap, Bitmap};
use vm_memory::mmap::{MmapRegion, MmapRegionBuilder};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap};

use super::VirtioDevice;
use super::mmio::{MmioTransport, TransportState};
use super::rng::Rng;
use crate::GuestMemory;
use crate::bus::BusDevice;
use crate::event_loop::EventLoop;
use crate::guest_event::{Recorded, recorder};

/// Descriptors of every queue of the fake driver.
pub const QUEUE_SIZE: u16 = 16;
/// Where tests may put data: above the rings of up to four queues.
pub const DATA: u64 = 0x1_0000;
/// Guest memory from address 0 on; behind it there is none up to [`HIGH_START`].
pub const LOW_SIZE: usize = 0x40_0000;
/// A second region of guest memory.
pub const HIGH_START: u64 = 0x1000_0000;
/// Its size.
pub const HIGH_SIZE: usize = 0x1_0000;
/// Bytes before and behind each region that nobody may change.
const FENCE: usize = 0x1_0000;
const FENCE_BYTE: u8 = 0xfe;
/// A device that has not answered by then never will.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);

/// One piece of a descriptor chain.
#[derive(Clone, Copy)]
pub enum Piece {
    /// Device-readable: address, length.
    Out(u64, u32),
    /// Device-writable: address, length.
    In(u64, u32),
}

/// See the module.
pub struct Guest {
    pub memory: GuestMemory,
    pub transport: MmioTransport,
    pub events: Recorded,
    queues: Vec<DriverQueue>,
    fences: Vec<Fence>,
    event_loop: EventLoop,
}

/// The driver's side of one queue.
struct DriverQueue {
    base: u64,
    next_descriptor: u16,
    available: u16,
    used: u16,
}

impl DriverQueue {
    fn new(index: usize) -> Self {
        Self {
            base: 0x1000 + 0x1000 * index as u64,
            next_descriptor: 0,
            available: 0,
            used: 0,
        }
    }

    fn available_ring(&self) -> u64 {
        self.base + 0x400
    }

    fn used_ring(&self) -> u64 {
        self.base + 0x800
    }
}

/// A region's mapping with its fences.
struct Fence {
    whole: MmapRegion<()>,
    size: usize,
}

impl Guest {
    /// A guest with `device`, which its driver has not touched yet.
    pub fn with(device: impl VirtioDevice + 'static) -> Self {
        Self::sharing(Arc::new(Mutex::new(device)))
    }

    /// A guest with `device`, to which the test keeps a way.
    pub fn sharing(device: Arc<Mutex<impl VirtioDevice + 'static>>) -> Self {
        let (memory, fences) = fenced_memory(&[(0, LOW_SIZE), (HIGH_START, HIGH_SIZE)]);
        let event_loop = EventLoop::spawn("test-devices", || {}).unwrap();
        let queues = device.lock().unwrap().queue_sizes().len();
        let (transport, events) = transport(device, &memory, &event_loop);
        Self {
            memory,
            transport,
            events,
            queues: (0..queues).map(DriverQueue::new).collect(),
            fences,
            event_loop,
        }
    }

    /// Has `device`, new and in `state`, take the place of the one there is, of which the driver notices nothing.
    pub fn replace(
        &mut self,
        device: impl VirtioDevice + 'static,
        state: &TransportState,
    ) -> Result<(), super::DeviceError> {
        let device = Arc::new(Mutex::new(device));
        let (mut transport, events) = transport(device, &self.memory, &self.event_loop);
        transport.restore(state)?;
        (self.transport, self.events) = (transport, events);
        Ok(())
    }

    /// A guest whose driver has set `device` up, accepting `features`.
    pub fn started(device: impl VirtioDevice + 'static, features: u64) -> Self {
        let mut guest = Self::with(device);
        guest.start(features);
        guest
    }

    pub fn read_register(&mut self, offset: u32) -> u32 {
        let mut data = [0; 4];
        self.transport.read(offset.into(), &mut data);
        u32::from_le_bytes(data)
    }

    pub fn write_register(&mut self, offset: u32, value: u32) {
        self.transport.write(offset.into(), &value.to_le_bytes());
    }

    pub fn status(&mut self) -> u32 {
        self.read_register(VIRTIO_MMIO_STATUS)
    }

    /// Climbs to FEATURES_OK, as far as the device lets it; returns the status.
    pub fn negotiate(&mut self, features: u64) -> u32 {
        self.write_register(VIRTIO_MMIO_STATUS, 0);
        self.write_register(VIRTIO_MMIO_STATUS, 1);
        self.write_register(VIRTIO_MMIO_STATUS, 3);
        for (half, bits) in [(0, features & 0xffff_ffff), (1, features >> 32)] {
            self.write_register(VIRTIO_MMIO_DRIVER_FEATURES_SEL, half);
            self.write_register(VIRTIO_MMIO_DRIVER_FEATURES, u32::try_from(bits).unwrap());
        }
        self.write_register(VIRTIO_MMIO_STATUS, 11);
        self.status()
    }

    /// Sets every queue up, empty.
    pub fn set_queues_up(&mut self) {
        self.set_first_queues_up(self.queues.len());
    }

    /// Sets the first `count` queues up, empty.
    pub fn set_first_queues_up(&mut self, count: usize) {
        for index in 0..count {
            self.queues[index] = DriverQueue::new(index);
            let queue = &self.queues[index];
            let (descriptors, available, used) = (queue.base, queue.available_ring(), queue.used_ring());
            self.memory
                .write_slice(&[0; 0x1000], GuestAddress(descriptors))
                .unwrap();
            let low = |address: u64| u32::try_from(address).unwrap();
            for (register, value) in [
                (VIRTIO_MMIO_QUEUE_SEL, u32::try_from(index).unwrap()),
                (VIRTIO_MMIO_QUEUE_NUM, QUEUE_SIZE.into()),
                (VIRTIO_MMIO_QUEUE_DESC_LOW, low(descriptors)),
                (VIRTIO_MMIO_QUEUE_DESC_HIGH, 0),
                (VIRTIO_MMIO_QUEUE_AVAIL_LOW, low(available)),
                (VIRTIO_MMIO_QUEUE_AVAIL_HIGH, 0),
                (VIRTIO_MMIO_QUEUE_USED_LOW, low(used)),
                (VIRTIO_MMIO_QUEUE_USED_HIGH, 0),
                (VIRTIO_MMIO_QUEUE_READY, 1),
            ] {
                self.write_register(register, value);
            }
        }
    }

    /// Resets the device and sets it up anew.
    pub fn start(&mut self, features: u64) {
        assert_eq!(self.negotiate(features | 1 << VIRTIO_F_VERSION_1), 11);
        self.set_queues_up();
        self.write_register(VIRTIO_MMIO_STATUS, 15);
        assert_eq!(self.status(), 15);
    }

    /// Whether the device has given up.
    pub fn needs_reset(&mut self) -> bool {
        self.status() & VIRTIO_CONFIG_S_NEEDS_RESET != 0
    }

    /// Runs `task` on the event loop, between its other work.
    pub fn on_loop<T: Send + 'static>(&self, task: impl FnOnce() -> T + Send + 'static) -> T {
        self.event_loop.handle().call(|_| task()).unwrap()
    }

    /// Lets the event loop work until `condition` holds.
    pub fn until(&self, condition: impl Fn() -> bool) {
        let end = Instant::now() + ANSWER_TIMEOUT;
        while !condition() {
            assert!(Instant::now() < end, "the device does not do it");
            self.on_loop(|| ());
        }
    }

    /// Waits until the device gives up.
    pub fn wait_for_failure(&mut self) {
        while !self.needs_reset() {
            self.wait_for_interrupt();
        }
    }

    /// Offers a chain, and returns the index of its first descriptor; the device is told by [`kick`](Self::kick).
    pub fn offer(&mut self, queue: usize, pieces: &[Piece]) -> u16 {
        let head = self.take_descriptors(queue, pieces.len());
        self.write_chain(self.queues[queue].base, head, pieces);
        self.offer_head(queue, head);
        head
    }

    /// Offers a chain whose descriptors are in an indirect table at `table`.
    pub fn offer_indirect(&mut self, queue: usize, table: u64, pieces: &[Piece]) -> u16 {
        self.write_chain(table, 0, pieces);
        let head = self.take_descriptors(queue, 1);
        let len = 16 * u32::try_from(pieces.len()).unwrap();
        self.write_descriptor(
            self.descriptor_address(queue, head),
            table,
            len,
            VRING_DESC_F_INDIRECT,
            0,
        );
        self.offer_head(queue, head);
        head
    }

    fn take_descriptors(&mut self, queue: usize, count: usize) -> u16 {
        let next = &mut self.queues[queue].next_descriptor;
        let first = *next;
        *next = (first + u16::try_from(count).unwrap()) % QUEUE_SIZE;
        first
    }

    fn write_chain(&self, table: u64, first: u16, pieces: &[Piece]) {
        let count = u16::try_from(pieces.len()).unwrap();
        for (position, piece) in (0..count).zip(pieces) {
            let index = (first + position) % QUEUE_SIZE;
            let more = if position + 1 < count { VRING_DESC_F_NEXT } else { 0 };
            let (address, len, flags) = match *piece {
                Piece::Out(address, len) => (address, len, more),
                Piece::In(address, len) => (address, len, more | VRING_DESC_F_WRITE),
            };
            self.write_descriptor(
                table + 16 * u64::from(index),
                address,
                len,
                flags,
                (index + 1) % QUEUE_SIZE,
            );
        }
    }

    /// Guest address of descriptor `index`.
    pub fn descriptor_address(&self, queue: usize, index: u16) -> u64 {
        self.queues[queue].base + 16 * u64::from(index)
    }

    /// Guest address of the available ring.
    pub fn available_ring(&self, queue: usize) -> u64 {
        self.queues[queue].available_ring()
    }

    pub fn write_descriptor(&self, at: u64, address: u64, len: u32, flags: u32, next: u16) {
        self.write(at, &address.to_le_bytes());
        self.write(at + 8, &len.to_le_bytes());
        self.write(at + 12, &u16::try_from(flags).unwrap().to_le_bytes());
        self.write(at + 14, &next.to_le_bytes());
    }

    /// Puts `head` into the available ring.
    pub fn offer_head(&mut self, queue: usize, head: u16) {
        let state = &mut self.queues[queue];
        let slot = state.available_ring() + 4 + 2 * u64::from(state.available % QUEUE_SIZE);
        state.available = state.available.wrapping_add(1);
        let (ring, index) = (state.available_ring(), state.available);
        self.write(slot, &head.to_le_bytes());
        self.write(ring + 2, &index.to_le_bytes());
    }

    pub fn kick(&mut self, queue: usize) {
        self.write_register(VIRTIO_MMIO_QUEUE_NOTIFY, u32::try_from(queue).unwrap());
    }

    /// The next chain the device gave back, if it has: index of its first descriptor, and bytes written.
    pub fn try_take_used(&mut self, queue: usize) -> Option<(u16, u32)> {
        let state = &mut self.queues[queue];
        let ring = state.used_ring();
        let index: u16 = self.memory.read_obj(GuestAddress(ring + 2)).unwrap();
        if index == state.used {
            return None;
        }
        let element = ring + 4 + 8 * u64::from(state.used % QUEUE_SIZE);
        state.used = state.used.wrapping_add(1);
        let head: u32 = self.memory.read_obj(GuestAddress(element)).unwrap();
        let len: u32 = self.memory.read_obj(GuestAddress(element + 4)).unwrap();
        Some((u16::try_from(head).unwrap(), len))
    }

    /// Waits for the next chain the device gives back.
    pub fn take_used(&mut self, queue: usize) -> (u16, u32) {
        loop {
            if let Some(used) = self.try_take_used(queue) {
                return used;
            }
            self.wait_for_interrupt();
        }
    }

    /// Offers a chain and waits for it; returns the bytes written.
    pub fn request(&mut self, queue: usize, pieces: &[Piece]) -> u32 {
        let head = self.offer(queue, pieces);
        self.kick(queue);
        let (used, written) = self.take_used(queue);
        assert_eq!(used, head);
        written
    }

    pub fn write(&self, address: u64, data: &[u8]) {
        self.memory.write_slice(data, GuestAddress(address)).unwrap();
    }

    pub fn read(&self, address: u64, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        self.memory.read_slice(&mut data, GuestAddress(address)).unwrap();
        data
    }

    /// Forgets which pages were written.
    pub fn clean(&self) {
        self.memory.iter().for_each(|region| region.deref().bitmap().reset());
    }

    /// Whether the page at `address` was written by the device since [`clean`](Self::clean).
    pub fn is_dirty(&self, address: u64) -> bool {
        let (region, offset) = self.memory.to_region_addr(GuestAddress(address)).unwrap();
        region.bitmap().dirty_at(usize::try_from(offset.0).unwrap())
    }

    /// Nothing was written outside guest memory, as far as the eye reaches.
    pub fn assert_fences_hold(&self) {
        assert!(
            self.fences.iter().all(Fence::holds),
            "memory outside the guest's was written"
        );
    }

    fn wait_for_interrupt(&self) {
        let interrupt = self.transport.interrupt();
        // SAFETY: the transport owns the descriptor and outlives the borrow.
        wait_readable(unsafe { BorrowedFd::borrow_raw(interrupt.as_raw_fd()) });
        interrupt.read().unwrap();
    }
}

fn transport(
    device: Arc<Mutex<impl VirtioDevice + 'static>>,
    memory: &GuestMemory,
    event_loop: &EventLoop,
) -> (MmioTransport, Recorded) {
    let (sink, events) = recorder();
    let name = "virtio-test".to_owned();
    let transport = MmioTransport::new(name, device, memory.clone(), event_loop.handle(), sink);
    (transport.unwrap(), events)
}

/// An entropy device without limits: the simplest device there is.
pub fn entropy() -> Rng {
    Rng::new(&RngSpec::default()).unwrap()
}

/// A bucket of `size` tokens that fills again in `refill_time_ms`.
pub fn bucket(size: u64, refill_time_ms: u64) -> Option<TokenBucketSpec> {
    Some(TokenBucketSpec {
        size,
        one_time_burst: None,
        refill_time_ms,
    })
}

/// Two operations, and no more while any test runs.
pub const TWO_OPERATIONS: RateLimiterSpec = RateLimiterSpec {
    bandwidth: None,
    ops: Some(TokenBucketSpec {
        size: 2,
        one_time_burst: None,
        refill_time_ms: 3_600_000,
    }),
};

/// As an update, takes every limit off.
pub const NO_LIMITS: RateLimiterSpec = RateLimiterSpec {
    bandwidth: Some(NO_LIMIT),
    ops: Some(NO_LIMIT),
};

const NO_LIMIT: TokenBucketSpec = TokenBucketSpec {
    size: 0,
    one_time_burst: None,
    refill_time_ms: 0,
};

/// Limits that hold a guest up every few requests, for no longer than a moment.
pub fn tight_limits() -> RateLimiterSpec {
    RateLimiterSpec {
        bandwidth: bucket(1 << 20, 1),
        ops: bucket(4, 1),
    }
}

/// Waits until `file` can be read.
pub fn wait_readable(file: BorrowedFd<'_>) {
    let mut ready = [PollFd::from_borrowed_fd(file, PollFlags::IN)];
    let timeout = Timespec::try_from(ANSWER_TIMEOUT).unwrap();
    assert_eq!(poll(&mut ready, Some(&timeout)), Ok(1), "the device does not answer");
}

impl Fence {
    fn new(size: usize) -> Self {
        let whole = MmapRegion::<()>::new(size + 2 * FENCE).unwrap();
        let fence = Self { whole, size };
        for start in [0, FENCE + size] {
            // SAFETY: the range is inside the mapping, to which nobody has a reference.
            unsafe { fence.whole.as_ptr().add(start).write_bytes(FENCE_BYTE, FENCE) };
        }
        fence
    }

    fn holds(&self) -> bool {
        [0, FENCE + self.size].iter().all(|&start| {
            // SAFETY: the range is inside the mapping; what is between the fences is not looked at.
            let fence = unsafe { std::slice::from_raw_parts(self.whole.as_ptr().add(start), FENCE) };
            fence.iter().all(|&byte| byte == FENCE_BYTE)
        })
    }
}

fn fenced_memory(regions: &[(u64, usize)]) -> (GuestMemory, Vec<Fence>) {
    let fences: Vec<_> = regions.iter().map(|&(_, size)| Fence::new(size)).collect();
    let regions = regions.iter().zip(&fences).map(|(&(start, size), fence)| {
        let page = std::num::NonZeroUsize::new(4096).unwrap();
        let builder = MmapRegionBuilder::new_with_bitmap(size, AtomicBitmap::new(size, page))
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: the range is inside the fence's mapping, which the guest keeps as long as its memory.
        let builder = unsafe { builder.with_raw_mmap_pointer(fence.whole.as_ptr().add(FENCE)) };
        GuestRegionMmap::new(builder.build().unwrap(), GuestAddress(start)).unwrap()
    });
    (GuestMemory::from_regions(regions.collect()).unwrap(), fences)
}
