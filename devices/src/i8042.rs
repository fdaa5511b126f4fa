//! The one thing of the PC's keyboard controller that guests use without a keyboard: its reset line.
//!
//! A kernel told to reboot "by keyboard" (Linux's `reboot=k`, and its last resort) waits until the status register's
//! input buffer is empty, then writes the command that pulses the processor's reset line.

use crate::bus::BusDevice;
use crate::guest_event::{GuestEvent, GuestEventSink};

/// First port, the controller's data register.
pub const FIRST_PORT: u16 = 0x60;
/// Ports from the data register (0x60) to the status and command register (0x64).
pub const PORTS: u16 = 5;

/// Offset of the status (read) and command (write) register.
const COMMAND: u64 = 4;
/// Command that pulses output line 0, which is wired to the processor's reset.
const PULSE_RESET: u8 = 0xfe;

/// A keyboard controller with nothing attached but the reset line.
pub struct I8042 {
    events: GuestEventSink,
}

impl I8042 {
    /// A controller that reports to `events`.
    pub fn new(events: GuestEventSink) -> Self {
        Self { events }
    }
}

impl BusDevice for I8042 {
    /// Both buffers of the status register are always empty, and there is nothing to read.
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if offset == COMMAND && data.first() == Some(&PULSE_RESET) {
            (self.events)(GuestEvent::Reset);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest_event::recorder;

    #[test]
    fn the_reset_command_on_the_command_port_asks_for_a_reset() {
        let (sink, events) = recorder();
        I8042::new(sink).write(4, &[0xfe]);
        assert_eq!(events.take(), [GuestEvent::Reset]);
    }

    #[test]
    fn nothing_else_written_has_an_effect() {
        let (sink, events) = recorder();
        let mut controller = I8042::new(sink);
        controller.write(0, &[0xfe]);
        controller.write(4, &[0x20]);
        controller.write(4, &[]);
        assert_eq!(events.take(), []);
    }

    #[test]
    fn the_input_buffer_always_reads_as_empty() {
        let (sink, _) = recorder();
        let mut data = [0xff];
        I8042::new(sink).read(4, &mut data);
        assert_eq!(data, [0]);
    }
}
