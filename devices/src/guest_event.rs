//! What a guest, through its devices, tells the monitor.

use std::sync::Arc;

/// Something the state driver has to act on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GuestEvent {
    /// The guest powered itself off (ACPI S5).
    Shutdown,
    /// The guest asked for a reset (ACPI reset register or keyboard controller).
    Reset,
    /// The guest's kernel reported a panic (pvpanic).
    Panic,
    /// The person at the console typed the escape that ends the VM.
    ConsoleQuit,
    /// A device stopped serving its guest; the VM goes on without it.
    DeviceFailed {
        /// Which device, such as `virtio-blk0`.
        device: String,
        /// Why.
        reason: String,
    },
}

/// Where devices send [`GuestEvent`]s; called from any thread, never blocks.
pub type GuestEventSink = Arc<dyn Fn(GuestEvent) + Send + Sync>;

/// A sink that keeps what it is sent, for tests of devices.
#[cfg(test)]
pub(crate) fn recorder() -> (GuestEventSink, Recorded) {
    let recorded = Recorded::default();
    let events = recorded.clone();
    (Arc::new(move |event| events.0.lock().unwrap().push(event)), recorded)
}

/// What a [`recorder`] was sent.
#[cfg(test)]
#[derive(Clone, Default)]
pub(crate) struct Recorded(Arc<std::sync::Mutex<Vec<GuestEvent>>>);

#[cfg(test)]
impl Recorded {
    /// The events since the last call.
    pub(crate) fn take(&self) -> Vec<GuestEvent> {
        std::mem::take(&mut self.0.lock().unwrap())
    }
}
