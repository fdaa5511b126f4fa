//! The pvpanic port: a guest kernel that panics says so, instead of just standing still.
//!
//! The interface is QEMU's (docs/specs/pvpanic): a read gives the events the monitor understands, a write reports some
//! of them. A stock Linux finds the port through the ACPI device `QEMU0001`.

use crate::bus::BusDevice;
use crate::guest_event::{GuestEvent, GuestEventSink};

/// The kernel has panicked and will not go on.
const PANICKED: u8 = 1 << 0;
/// The kernel has panicked and is about to run its own crash kernel, which is to be left alone.
const CRASH_LOADED: u8 = 1 << 1;

/// Takes the guest's report of a panic.
pub struct Pvpanic {
    events: GuestEventSink,
    crash_kernel_logged: bool,
}

impl Pvpanic {
    /// A port that reports to `events`.
    pub fn new(events: GuestEventSink) -> Self {
        Self {
            events,
            crash_kernel_logged: false,
        }
    }
}

impl BusDevice for Pvpanic {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(PANICKED | CRASH_LOADED);
    }

    fn write(&mut self, _offset: u64, data: &[u8]) {
        let Some(&reported) = data.first() else {
            return;
        };
        if reported & PANICKED != 0 {
            (self.events)(GuestEvent::Panic);
        } else if reported & CRASH_LOADED != 0 && !self.crash_kernel_logged {
            // Once, since a guest could fill the log.
            self.crash_kernel_logged = true;
            tracing::warn!("the guest's kernel panicked and starts its crash kernel");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest_event::recorder;

    #[test]
    fn a_panic_is_reported() {
        let (sink, events) = recorder();
        Pvpanic::new(sink).write(0, &[PANICKED]);
        assert_eq!(events.take(), [GuestEvent::Panic]);
    }

    #[test]
    fn a_guest_with_a_crash_kernel_goes_on() {
        let (sink, events) = recorder();
        let mut pvpanic = Pvpanic::new(sink);
        pvpanic.write(0, &[CRASH_LOADED]);
        pvpanic.write(0, &[0]);
        pvpanic.write(0, &[]);
        assert_eq!(events.take(), []);
    }

    #[test]
    fn a_read_tells_which_events_are_understood() {
        let (sink, _) = recorder();
        let mut data = [0];
        Pvpanic::new(sink).read(0, &mut data);
        assert_eq!(data, [0b11]);
    }
}
