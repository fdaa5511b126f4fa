//! A guest's memory as the host sees it, through `/proc`.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;

use crate::Monitor;

/// Name of the memfd that holds shared guest memory.
const MEMFD: &str = "/memfd:cutover-guest-memory";

/// Bytes of a guest's page.
pub const PAGE_SIZE: usize = 4096;

/// A copy of a guest's memory. Two copies of one VM can be compared.
#[derive(PartialEq, Eq)]
pub struct GuestMemory {
    bytes: Vec<u8>,
}

/// One line of `/proc/PID/maps`.
struct Mapping {
    start: u64,
    length: usize,
    writable: bool,
    name: String,
}

impl GuestMemory {
    #[track_caller]
    pub(crate) fn read(monitor: &Monitor) -> Self {
        let maps = fs::read_to_string(monitor.proc("maps")).expect("a living process has mappings");
        let mappings: Vec<Mapping> = maps
            .lines()
            .filter_map(Mapping::parse)
            .filter(|mapping| mapping.writable)
            .collect();
        let shared: Vec<&Mapping> = mappings
            .iter()
            .filter(|mapping| mapping.name.starts_with(MEMFD))
            .collect();
        // Private guest memory is anonymous, and much larger than anything else the monitor maps.
        let private = || {
            mappings
                .iter()
                .filter(|mapping| mapping.name.is_empty())
                .max_by_key(|mapping| mapping.length)
        };
        let chosen = if shared.is_empty() {
            private().into_iter().collect()
        } else {
            shared
        };
        let memory = File::open(monitor.proc("mem")).expect("the tests may read the monitor's memory");
        let mut bytes = Vec::new();
        for mapping in chosen {
            let mut part = vec![0; mapping.length];
            memory
                .read_exact_at(&mut part, mapping.start)
                .unwrap_or_else(|error| panic!("cannot read guest memory at {:#x}: {error}", mapping.start));
            bytes.append(&mut part);
        }
        Self { bytes }
    }

    /// Bytes in it.
    #[expect(clippy::len_without_is_empty, reason = "no guest is without memory")]
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// How many pages have exactly these contents.
    pub fn count_pages(&self, contents: &[u8; PAGE_SIZE]) -> usize {
        self.bytes.chunks(PAGE_SIZE).filter(|page| page == contents).count()
    }
}

impl Mapping {
    fn parse(line: &str) -> Option<Self> {
        let mut fields = line.split_whitespace();
        let (start, end) = fields.next()?.split_once('-')?;
        let start = u64::from_str_radix(start, 16).ok()?;
        let end = u64::from_str_radix(end, 16).ok()?;
        Some(Self {
            start,
            length: usize::try_from(end.checked_sub(start)?).ok()?,
            writable: fields.next()?.starts_with("rw"),
            name: fields.nth(3).unwrap_or_default().to_owned(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mappings_are_read_with_and_without_names() {
        let named =
            Mapping::parse("7f00-8f00 rw-s 00000000 00:01 2054  /memfd:cutover-guest-memory (deleted)").unwrap();
        assert_eq!((named.start, named.length, named.writable), (0x7f00, 0x1000, true));
        assert_eq!(named.name, MEMFD);
        let anonymous = Mapping::parse("1000-3000 r--p 00000000 00:00 0").unwrap();
        assert_eq!(
            (anonymous.length, anonymous.writable, anonymous.name.as_str()),
            (0x2000, false, "")
        );
    }
}
