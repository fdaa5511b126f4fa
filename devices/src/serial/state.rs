//! What is saved of the serial port: the registers of the 16550 and the bytes the guest has not read yet.
//!
//! What the guest has written belongs to the console, and stays behind there; so does input that had no room in the
//! FIFO.

use cutover_snapshot::error::SectionError;
use cutover_snapshot::section::{Payload, Section};
use serde::{Deserialize, Serialize};
use vm_superio::Serial;
use vm_superio::serial::SerialState as Uart;

use super::{Interrupt, SerialPort, Traffic};
use crate::virtio::DeviceError;

/// Bit of the interrupt identification register that says that there is none (16550D data sheet, 8.6).
const NO_INTERRUPT: u8 = 1;

/// The state of a serial port, as it is saved. Not to be trusted when it is read back.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SerialState {
    divisor_low: u8,
    divisor_high: u8,
    interrupt_enable: u8,
    interrupt_identification: u8,
    line_control: u8,
    line_status: u8,
    modem_control: u8,
    modem_status: u8,
    scratch: u8,
    /// The receiver's FIFO, oldest first.
    pub(super) received: Vec<u8>,
}

impl Section for SerialState {
    const VERSION: u16 = 1;

    fn read(payload: &Payload<'_>) -> Result<Self, SectionError> {
        match payload.version {
            1 => payload.decode(),
            _ => Err(payload.unknown_version::<Self>()),
        }
    }
}

impl From<Uart> for SerialState {
    fn from(uart: Uart) -> Self {
        Self {
            divisor_low: uart.baud_divisor_low,
            divisor_high: uart.baud_divisor_high,
            interrupt_enable: uart.interrupt_enable,
            interrupt_identification: uart.interrupt_identification,
            line_control: uart.line_control,
            line_status: uart.line_status,
            modem_control: uart.modem_control,
            modem_status: uart.modem_status,
            scratch: uart.scratch,
            received: uart.in_buffer,
        }
    }
}

impl From<&SerialState> for Uart {
    fn from(state: &SerialState) -> Self {
        Self {
            baud_divisor_low: state.divisor_low,
            baud_divisor_high: state.divisor_high,
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            in_buffer: state.received.clone(),
        }
    }
}

impl SerialPort {
    /// The state of the port.
    pub fn save(&self) -> SerialState {
        self.uart.state().into()
    }

    /// Puts the port, which is not on the event loop yet, into `state`.
    ///
    /// # Errors
    /// It has more input than there is room for.
    pub fn restore(&mut self, state: &SerialState) -> Result<(), DeviceError> {
        let refused = |reason| DeviceError::SavedState {
            device: "the serial port".to_owned(),
            reason,
        };
        if state.received.len() > self.fifo_size {
            let (found, room) = (state.received.len(), self.fifo_size);
            return Err(refused(format!("{found} bytes are received, there is room for {room}")));
        }
        let interrupt = Interrupt(self.uart.interrupt_evt().0.clone());
        let output = std::mem::take(self.uart.writer_mut());
        let uart = Serial::from_state(&state.into(), interrupt, Traffic(self.counters.clone()), output);
        self.uart = uart.map_err(|error| refused(error.to_string()))?;
        Ok(())
    }

    /// Interrupts the guest again if there is something it was interrupted for and has not seen: the interrupt may have
    /// been on its way when the interrupt controllers were saved.
    pub fn raise_again(&self) {
        if self.uart.state().interrupt_identification & NO_INTERRUPT == 0
            && let Err(error) = self.uart.interrupt_evt().0.write(1)
        {
            tracing::error!(%error, "cannot interrupt the guest for the serial port");
        }
    }
}
