//! How much memory a process has resident, the guest's and its own told apart.

use std::fs;

use anyhow::{Context, Result};

use crate::Monitor;

/// Resident memory of a virtual machine monitor.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Resident {
    /// Bytes of mappings large enough to hold all of the guest's memory.
    pub guest: u64,
    /// Bytes of everything else: the monitor's own code, data, stacks and libraries.
    pub overhead: u64,
}

impl Resident {
    /// Of a monitor whose guest has `guest_memory` bytes in one piece.
    pub fn of(monitor: &Monitor, guest_memory: u64) -> Result<Self> {
        let path = monitor.proc("smaps");
        let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        Self::parse(&text, guest_memory).with_context(|| format!("{} has an unknown form", path.display()))
    }

    /// Reads `/proc/PID/smaps` (proc_pid_smaps(5)): per mapping a line with its addresses, then lines of attributes.
    fn parse(smaps: &str, guest_memory: u64) -> Option<Self> {
        let mut resident = Self::default();
        let mut mapping_length = 0;
        for line in smaps.lines() {
            let mut words = line.split_whitespace();
            match words.next()? {
                "Rss:" => {
                    let bytes = words.next()?.parse::<u64>().ok()? << 10;
                    if mapping_length >= guest_memory {
                        resident.guest += bytes;
                    } else {
                        resident.overhead += bytes;
                    }
                }
                attribute if attribute.ends_with(':') => {}
                addresses => {
                    let (start, end) = addresses.split_once('-')?;
                    let start = u64::from_str_radix(start, 16).ok()?;
                    mapping_length = u64::from_str_radix(end, 16).ok()?.checked_sub(start)?;
                }
            }
        }
        Some(resident)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_mappings_as_large_as_the_guests_memory_are_the_guests() {
        let smaps = "\
00400000-00500000 r-xp 00000000 00:1a 12    /bin/monitor
Size:               1024 kB
Rss:                 600 kB
VmFlags: rd ex
7f0000000000-7f0008000000 rw-p 00000000 00:00 0
Size:             131072 kB
Rss:               90000 kB
7ffe00000000-7ffe00021000 rw-p 00000000 00:00 0    [stack]
Rss:                  16 kB
";
        let resident = Resident::parse(smaps, 128 << 20).unwrap();
        assert_eq!(
            resident,
            Resident {
                guest: 90_000 << 10,
                overhead: 616 << 10
            }
        );
    }
}
