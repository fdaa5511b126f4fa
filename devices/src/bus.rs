//! Address buses: which device answers at an address. Used once for port I/O and once for memory-mapped I/O.
//!
//! Dispatch looks the device up, then calls it under its own lock only: one slow device does not hold up another.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

/// A device that answers reads and writes in a range of addresses.
pub trait BusDevice: Send {
    /// Fills `data` from `offset` bytes into the device's range. Offsets and lengths are guest-chosen.
    fn read(&mut self, offset: u64, data: &mut [u8]);
    /// Takes `data` at `offset` bytes into the device's range. Offsets and lengths are guest-chosen.
    fn write(&mut self, offset: u64, data: &[u8]);
}

/// Why a device could not be placed on a bus.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum BusError {
    /// The range is empty or runs past the end of the address space.
    #[error("range of {len:#x} bytes at {base:#x} is empty or runs past the end of the address space")]
    Range {
        /// First address.
        base: u64,
        /// Bytes.
        len: u64,
    },
    /// Another device answers in the range.
    #[error("range of {len:#x} bytes at {base:#x} overlaps the device at {other:#x}")]
    Overlap {
        /// First address.
        base: u64,
        /// Bytes.
        len: u64,
        /// First address of the device that is there already.
        other: u64,
    },
}

#[derive(Clone)]
struct Entry {
    len: u64,
    device: Arc<Mutex<dyn BusDevice>>,
}

/// A set of devices at disjoint address ranges, fixed once the VM runs.
#[derive(Clone, Default)]
pub struct Bus {
    entries: BTreeMap<u64, Entry>,
}

impl Bus {
    /// Places `device` at `base`, where it answers for `len` addresses.
    ///
    /// # Errors
    /// The range is empty, wraps around, or is taken.
    pub fn insert(&mut self, base: u64, len: u64, device: Arc<Mutex<dyn BusDevice>>) -> Result<(), BusError> {
        let last = len
            .checked_sub(1)
            .and_then(|reach| base.checked_add(reach))
            .ok_or(BusError::Range { base, len })?;
        if let Some((&other, entry)) = self.entries.range(..=last).next_back()
            && other + (entry.len - 1) >= base
        {
            return Err(BusError::Overlap { base, len, other });
        }
        self.entries.insert(base, Entry { len, device });
        Ok(())
    }

    /// Reads from whichever device answers at `address`; false, and `data` untouched, if none does.
    pub fn read(&self, address: u64, data: &mut [u8]) -> bool {
        self.with_device(address, |device, offset| device.read(offset, data))
    }

    /// Writes to whichever device answers at `address`; false if none does.
    pub fn write(&self, address: u64, data: &[u8]) -> bool {
        self.with_device(address, |device, offset| device.write(offset, data))
    }

    fn with_device(&self, address: u64, call: impl FnOnce(&mut dyn BusDevice, u64)) -> bool {
        let Some((&base, entry)) = self.entries.range(..=address).next_back() else {
            return false;
        };
        let offset = address - base;
        if offset >= entry.len {
            return false;
        }
        call(
            &mut *entry.device.lock().unwrap_or_else(PoisonError::into_inner),
            offset,
        );
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Echo(u8);

    impl BusDevice for Echo {
        fn read(&mut self, offset: u64, data: &mut [u8]) {
            data.fill(self.0 + u8::try_from(offset).expect("test ranges are small"));
        }

        fn write(&mut self, _offset: u64, data: &[u8]) {
            self.0 = data[0];
        }
    }

    fn echo(value: u8) -> Arc<Mutex<dyn BusDevice>> {
        Arc::new(Mutex::new(Echo(value)))
    }

    #[test]
    fn an_access_reaches_the_device_whose_range_holds_the_address() {
        let mut bus = Bus::default();
        bus.insert(0x10, 4, echo(1)).expect("free range");
        bus.insert(0x14, 4, echo(50)).expect("adjacent range");
        let mut data = [0];
        assert!(bus.read(0x13, &mut data));
        assert_eq!(data, [4]);
        assert!(bus.write(0x14, &[90]));
        assert!(bus.read(0x15, &mut data));
        assert_eq!(data, [91]);
    }

    #[test]
    fn an_access_outside_every_range_changes_nothing() {
        let mut bus = Bus::default();
        bus.insert(0x10, 4, echo(1)).expect("free range");
        let mut data = [7];
        assert!(!bus.read(0xf, &mut data));
        assert!(!bus.read(0x14, &mut data));
        assert!(!bus.write(u64::MAX, &[1]));
        assert_eq!(data, [7]);
    }

    #[test]
    fn empty_wrapping_and_overlapping_ranges_are_refused() {
        let mut bus = Bus::default();
        bus.insert(0x10, 0x10, echo(1)).expect("free range");
        assert_eq!(
            bus.insert(0x40, 0, echo(1)),
            Err(BusError::Range { base: 0x40, len: 0 })
        );
        assert_eq!(
            bus.insert(u64::MAX, 2, echo(1)),
            Err(BusError::Range { base: u64::MAX, len: 2 })
        );
        for (base, len) in [(0x1f, 1), (0x8, 9), (0x0, 0x100), (0x12, 2)] {
            assert_eq!(
                bus.insert(base, len, echo(1)),
                Err(BusError::Overlap { base, len, other: 0x10 })
            );
        }
        bus.insert(u64::MAX, 1, echo(1))
            .expect("the last address is a valid range");
    }
}
