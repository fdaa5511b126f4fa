//! The ACPI power control port: reset register, sleep control and sleep status of hardware-reduced ACPI on one I/O port.
//!
//! The FADT names the same port for all three registers (ACPI 6.5 §4.8.3.6, §4.8.3.7), so the values written tell them
//! apart: a reset is the value the FADT gives as `RESET_VALUE`, a power-off is sleep type 5 with the sleep enable bit.

use crate::bus::BusDevice;
use crate::guest_event::{GuestEvent, GuestEventSink};

/// Value that resets the machine: `RESET_VALUE` of the FADT.
pub const RESET_VALUE: u8 = 1;
/// Sleep type of S5 (soft off): what the DSDT's `_S5_` package gives.
pub const SLEEP_TYPE_S5: u8 = 5;
/// Value that powers the machine off: `SLP_EN` and the sleep type from bit 2 on (ACPI 6.5 table 4.15).
pub const POWER_OFF_VALUE: u8 = SLEEP_ENABLE | SLEEP_TYPE_S5 << 2;

const SLEEP_ENABLE: u8 = 1 << 5;
/// `WAK_STS` of the sleep status register, which the guest clears by writing it before it sleeps.
const WAKE_STATUS: u8 = 1 << 7;

/// Takes the guest's requests to reset and to power off.
pub struct PowerControl {
    events: GuestEventSink,
}

impl PowerControl {
    /// A port that reports to `events`.
    pub fn new(events: GuestEventSink) -> Self {
        Self { events }
    }
}

impl BusDevice for PowerControl {
    /// Sleep status: the wake bit is never set, since the machine never sleeps.
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&mut self, _offset: u64, data: &[u8]) {
        match data.first() {
            Some(&RESET_VALUE) => (self.events)(GuestEvent::Reset),
            Some(&POWER_OFF_VALUE) => (self.events)(GuestEvent::Shutdown),
            Some(&WAKE_STATUS) => {}
            _ => tracing::debug!(?data, "value without meaning written to the power control port"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest_event::recorder;

    #[test]
    fn only_the_two_values_with_a_meaning_are_reported() {
        let (sink, events) = recorder();
        let mut power = PowerControl::new(sink);
        for value in [0, 0x20, 0x14, 0xff] {
            power.write(0, &[value]);
        }
        power.write(0, &[]);
        assert_eq!(events.take(), []);
        power.write(0, &[1]);
        assert_eq!(events.take(), [GuestEvent::Reset]);
        power.write(0, &[0x34]);
        assert_eq!(events.take(), [GuestEvent::Shutdown]);
    }

    #[test]
    fn the_sleep_status_reads_as_zero() {
        let (sink, _) = recorder();
        let mut data = [0xff; 4];
        PowerControl::new(sink).read(0, &mut data);
        assert_eq!(data, [0; 4]);
    }
}
