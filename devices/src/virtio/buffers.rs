//! Guest memory handed to the host's kernel: the buffers of one descriptor chain as an I/O vector.
//!
//! Data goes between a file or tap and guest memory without a copy in the monitor. Such a transfer does not pass through
//! vm-memory, so its dirty bitmap is marked here, in [`GuestBuffers::mark_written`], and nowhere else.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;

use vm_memory::bitmap::Bitmap;
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryRegion};

use crate::GuestMemory;

/// Most segments of one [`GuestBuffers`]: the kernel's limit for an I/O vector (`IOV_MAX`).
pub const SEGMENTS_MAX: usize = 1024;

/// A sequence of ranges of guest memory, each also known by its address in the monitor.
pub struct GuestBuffers {
    /// Keeps mapped what `segments` point to.
    memory: Arc<GuestMemory>,
    /// Host address and length of each range, inside guest memory by construction.
    segments: Vec<libc::iovec>,
    /// Guest address of each segment.
    addresses: Vec<GuestAddress>,
    /// Segments before this one are used up.
    first: usize,
    /// Bytes of all segments from `first` on.
    len: usize,
}

// SAFETY: the pointers in `segments` point into a mapping shared by all threads, which `memory` keeps alive.
unsafe impl Send for GuestBuffers {}

/// Why a range cannot be part of [`GuestBuffers`].
#[derive(Debug, thiserror::Error)]
pub enum BuffersError {
    /// Not all of it is guest memory.
    #[error("{len} bytes at {address:#x} are not all guest memory: {source}")]
    Outside {
        /// Guest address.
        address: u64,
        /// Bytes.
        len: usize,
        /// From vm-memory.
        source: GuestMemoryError,
    },
    /// More than [`SEGMENTS_MAX`].
    #[error("more than {SEGMENTS_MAX} segments")]
    TooMany,
}

impl GuestBuffers {
    /// No buffers yet.
    pub fn new(memory: Arc<GuestMemory>) -> Self {
        Self {
            memory,
            segments: Vec::new(),
            addresses: Vec::new(),
            first: 0,
            len: 0,
        }
    }

    /// Forgets the buffers; the space for them is kept.
    pub fn clear(&mut self) {
        self.segments.clear();
        self.addresses.clear();
        (self.first, self.len) = (0, 0);
    }

    /// Appends `len` bytes at guest address `address`.
    pub fn push(&mut self, address: GuestAddress, len: usize) -> Result<(), BuffersError> {
        let outside = |source| BuffersError::Outside {
            address: address.raw_value(),
            len,
            source,
        };
        let mut next = address;
        for slice in self.memory.get_slices(address, len) {
            let slice = slice.map_err(outside)?;
            if self.iovecs().len() == SEGMENTS_MAX {
                return Err(BuffersError::TooMany);
            }
            let iov_base = slice.ptr_guard_mut().as_ptr().cast();
            self.segments.push(libc::iovec {
                iov_base,
                iov_len: slice.len(),
            });
            self.addresses.push(next);
            // The slice ends inside a region, so its end is an address too; at most one past the last.
            next = next.unchecked_add(slice.len() as u64);
            self.len += slice.len();
        }
        Ok(())
    }

    /// Appends the buffers of `other`, which are of the same memory.
    pub fn extend(&mut self, other: &GuestBuffers) -> Result<(), BuffersError> {
        // Used up segments are dropped when they are half of all, so that a segment is moved once on average.
        if self.first * 2 >= self.segments.len() {
            self.segments.drain(..self.first);
            self.addresses.drain(..self.first);
            self.first = 0;
        }
        if self.iovecs().len() + other.iovecs().len() > SEGMENTS_MAX {
            return Err(BuffersError::TooMany);
        }
        self.segments.extend_from_slice(other.iovecs());
        self.addresses.extend_from_slice(&other.addresses[other.first..]);
        self.len += other.len;
        Ok(())
    }

    /// Bytes left.
    pub fn len(&self) -> usize {
        self.len
    }

    /// The I/O vector of what is left. It stays where it is until the next call of a `&mut self` method.
    pub fn iovecs(&self) -> &[libc::iovec] {
        &self.segments[self.first..]
    }

    /// Uses up the first `count` bytes, or all if there are fewer.
    pub fn advance(&mut self, mut count: usize) {
        while let Some(segment) = self.segments.get_mut(self.first) {
            let step = count.min(segment.iov_len);
            segment.iov_base = segment.iov_base.wrapping_byte_add(step);
            segment.iov_len -= step;
            self.addresses[self.first] = self.addresses[self.first].unchecked_add(step as u64);
            self.len -= step;
            count -= step;
            if segment.iov_len > 0 {
                break;
            }
            self.first += 1;
        }
    }

    /// Takes the last byte off and returns its address.
    pub fn pop_byte(&mut self) -> Option<GuestAddress> {
        let segment = self.segments[self.first..].last_mut()?;
        segment.iov_len -= 1;
        self.len -= 1;
        let address = self.addresses.last()?.unchecked_add(segment.iov_len as u64);
        if segment.iov_len == 0 {
            self.segments.pop();
            self.addresses.pop();
        }
        Some(address)
    }

    /// Copies the first bytes into `data`; returns how many there were.
    pub fn copy_to(&self, data: &mut [u8]) -> Result<usize, GuestMemoryError> {
        let mut done = 0;
        for (address, len) in self.ranges(0, data.len()) {
            self.memory.read_slice(&mut data[done..done + len], address)?;
            done += len;
        }
        Ok(done)
    }

    /// Copies `data` to the bytes from `offset` on; returns how many there was room for.
    pub fn copy_from(&self, offset: usize, data: &[u8]) -> Result<usize, GuestMemoryError> {
        let mut done = 0;
        for (address, len) in self.ranges(offset, data.len()) {
            self.memory.write_slice(&data[done..done + len], address)?;
            done += len;
        }
        Ok(done)
    }

    /// Marks the first `count` bytes dirty: the kernel wrote them behind vm-memory's back.
    pub fn mark_written(&self, count: usize) {
        for (address, len) in self.ranges(0, count) {
            if let Some((region, offset)) = self.memory.to_region_addr(address)
                && let Ok(offset) = usize::try_from(offset.raw_value())
            {
                region.bitmap().mark_dirty(offset, len);
            }
        }
    }

    /// Reads once from `file` into the buffers; returns how many bytes.
    pub fn read_from(&self, file: BorrowedFd<'_>) -> io::Result<usize> {
        let iovecs = self.iovecs();
        // SAFETY: the vector's ranges are guest memory, which `self.memory` keeps mapped and Rust holds no reference to.
        let count = unsafe { libc::readv(file.as_raw_fd(), iovecs.as_ptr(), count_of(iovecs)) };
        let count = usize::try_from(count).map_err(|_| io::Error::last_os_error())?;
        self.mark_written(count);
        Ok(count)
    }

    /// Writes the buffers to `file` once; returns how many bytes.
    pub fn write_to(&self, file: BorrowedFd<'_>) -> io::Result<usize> {
        let iovecs = self.iovecs();
        // SAFETY: the vector's ranges are guest memory, which `self.memory` keeps mapped.
        let count = unsafe { libc::writev(file.as_raw_fd(), iovecs.as_ptr(), count_of(iovecs)) };
        usize::try_from(count).map_err(|_| io::Error::last_os_error())
    }

    /// Reads once from `file` into the `count` bytes from `offset` on, or as many as there are; returns how many bytes.
    /// What is before them counts as written too.
    pub fn read_part_from(&self, file: BorrowedFd<'_>, offset: usize, count: usize) -> io::Result<usize> {
        let iovecs = self.part(offset, count);
        // SAFETY: as in `read_from`.
        let count = unsafe { libc::readv(file.as_raw_fd(), iovecs.as_ptr(), count_of(&iovecs)) };
        let count = usize::try_from(count).map_err(|_| io::Error::last_os_error())?;
        self.mark_written(offset + count);
        Ok(count)
    }

    /// Writes the first `count` bytes, or as many as there are, to `file` once; returns how many bytes.
    pub fn write_part_to(&self, file: BorrowedFd<'_>, count: usize) -> io::Result<usize> {
        let iovecs = self.part(0, count);
        // SAFETY: as in `write_to`.
        let count = unsafe { libc::writev(file.as_raw_fd(), iovecs.as_ptr(), count_of(&iovecs)) };
        usize::try_from(count).map_err(|_| io::Error::last_os_error())
    }

    /// The I/O vector of `count` bytes from `offset` on, or as much as there is.
    fn part(&self, offset: usize, count: usize) -> Vec<libc::iovec> {
        let (mut skip, mut left) = (offset, count);
        let parts = self.iovecs().iter().filter_map(|segment| {
            let start = skip.min(segment.iov_len);
            let len = left.min(segment.iov_len - start);
            skip -= start;
            left -= len;
            (len > 0).then(|| libc::iovec {
                iov_base: segment.iov_base.wrapping_byte_add(start),
                iov_len: len,
            })
        });
        parts.collect()
    }

    /// The guest ranges that make up what is left, with their bytes.
    pub fn guest_ranges(&self) -> impl Iterator<Item = (GuestAddress, usize)> {
        self.ranges(0, usize::MAX)
    }

    /// The guest ranges that make up `count` bytes from `offset` on, or as much as there is.
    fn ranges(&self, offset: usize, count: usize) -> impl Iterator<Item = (GuestAddress, usize)> {
        let (mut skip, mut left) = (offset, count);
        self.iovecs()
            .iter()
            .zip(&self.addresses[self.first..])
            .filter_map(move |(segment, address)| {
                let start = skip.min(segment.iov_len);
                let len = left.min(segment.iov_len - start);
                skip -= start;
                left -= len;
                (len > 0).then(|| (address.unchecked_add(start as u64), len))
            })
    }
}

/// Length of an I/O vector as the system calls want it.
fn count_of(iovecs: &[libc::iovec]) -> libc::c_int {
    libc::c_int::try_from(iovecs.len()).expect("SEGMENTS_MAX fits")
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    const PAGE: u64 = 4096;

    fn memory() -> Arc<GuestMemory> {
        Arc::new(GuestMemory::from_ranges(&[(GuestAddress(0), 0x10_0000), (GuestAddress(0x10_0000), 0x1000)]).unwrap())
    }

    fn buffers(memory: &Arc<GuestMemory>, ranges: &[(u64, usize)]) -> GuestBuffers {
        let mut buffers = GuestBuffers::new(memory.clone());
        for &(address, len) in ranges {
            buffers.push(GuestAddress(address), len).unwrap();
        }
        buffers
    }

    /// The guest ranges left, and that the I/O vector says the same.
    fn ranges(buffers: &GuestBuffers) -> Vec<(u64, usize)> {
        let ranges: Vec<_> = buffers.ranges(0, usize::MAX).collect();
        let hosts = ranges
            .iter()
            .map(|&(address, len)| (buffers.memory.get_host_address(address).unwrap(), len));
        let iovecs = buffers.iovecs().iter().filter(|iovec| iovec.iov_len > 0);
        assert!(hosts.eq(iovecs.map(|iovec| (iovec.iov_base.cast(), iovec.iov_len))));
        assert_eq!(ranges.iter().map(|&(_, len)| len).sum::<usize>(), buffers.len());
        ranges.into_iter().map(|(address, len)| (address.0, len)).collect()
    }

    #[test]
    fn a_range_across_two_regions_makes_two_segments() {
        let buffers = buffers(&memory(), &[(0x10_0000 - 10, 30)]);
        assert_eq!(ranges(&buffers), [(0x10_0000 - 10, 10), (0x10_0000, 20)]);
    }

    #[test]
    fn a_range_outside_memory_is_refused() {
        let mut buffers = GuestBuffers::new(memory());
        for (address, len) in [(0x10_1000 - 1, 2), (u64::MAX, 1), (u64::MAX, 2), (0, usize::MAX)] {
            assert!(matches!(
                buffers.push(GuestAddress(address), len),
                Err(BuffersError::Outside { .. })
            ));
        }
    }

    #[test]
    fn more_segments_than_the_kernel_takes_are_refused() {
        let mut all = GuestBuffers::new(memory());
        for _ in 0..SEGMENTS_MAX {
            all.push(GuestAddress(0), 1).unwrap();
        }
        assert!(matches!(all.push(GuestAddress(0), 1), Err(BuffersError::TooMany)));
        let one = buffers(&memory(), &[(0, 1)]);
        assert!(matches!(all.extend(&one), Err(BuffersError::TooMany)));
        all.advance(1);
        all.extend(&one).unwrap();
    }

    #[test]
    fn bytes_are_used_up_from_both_ends() {
        let memory = memory();
        let mut buffers = buffers(&memory, &[(0, 10), (100, 10), (200, 1)]);
        assert_eq!(buffers.pop_byte(), Some(GuestAddress(200)));
        assert_eq!(buffers.pop_byte(), Some(GuestAddress(109)));
        buffers.advance(0);
        buffers.advance(3);
        assert_eq!(ranges(&buffers), [(3, 7), (100, 9)]);
        buffers.advance(7);
        assert_eq!(ranges(&buffers), [(100, 9)]);
        buffers.advance(8);
        assert_eq!(buffers.pop_byte(), Some(GuestAddress(108)));
        assert_eq!((buffers.pop_byte(), buffers.len()), (None, 0));
        buffers.advance(5);
        buffers.push(GuestAddress(7), 2).unwrap();
        assert_eq!(ranges(&buffers), [(7, 2)]);
    }

    #[test]
    fn what_is_appended_follows_what_is_left() {
        let memory = memory();
        let mut buffers = buffers(&memory, &[(0, 10), (100, 10)]);
        for round in 0..100 {
            let mut other = super::tests::buffers(&memory, &[(1000, 5), (1000 + round, 10)]);
            other.advance(5);
            buffers.advance(10);
            buffers.extend(&other).unwrap();
            let last = if round == 0 { (100, 10) } else { (1000 + round - 1, 10) };
            assert_eq!(ranges(&buffers), [last, (1000 + round, 10)]);
        }
        assert!(buffers.segments.len() <= 4);
    }

    #[test]
    fn copies_stop_where_the_buffers_end() {
        let memory = memory();
        let buffers = buffers(&memory, &[(0, 2), (100, 3)]);
        assert_eq!(buffers.copy_from(1, b"abcdefgh").unwrap(), 4);
        let mut data = [0; 8];
        assert_eq!(buffers.copy_to(&mut data).unwrap(), 5);
        assert_eq!(data, *b"\0abcd\0\0\0");
        assert_eq!(buffers.copy_from(5, b"x").unwrap(), 0);
    }

    #[test]
    fn a_part_is_read_and_written_and_no_more() {
        let memory = memory();
        let buffers = buffers(&memory, &[(0, 4), (100, 4), (200, 4)]);
        let (near, far) = std::os::unix::net::UnixStream::pair().unwrap();
        io::Write::write_all(&mut &far, b"abcdefgh").unwrap();
        assert_eq!(buffers.read_part_from(near.as_fd(), 3, 6).unwrap(), 6);
        let mut data = [0; 12];
        buffers.copy_to(&mut data).unwrap();
        assert_eq!(&data, b"\0\0\0abcdef\0\0\0");
        assert_eq!(buffers.write_part_to(near.as_fd(), 5).unwrap(), 5);
        let mut written = [0; 5];
        io::Read::read_exact(&mut &far, &mut written).unwrap();
        assert_eq!(&written, b"\0\0\0ab");
        assert_eq!(buffers.read_part_from(near.as_fd(), 12, 1).unwrap(), 0);
    }

    #[test]
    fn only_the_pages_of_the_bytes_written_are_marked() {
        let memory = memory();
        let buffers = buffers(&memory, &[(PAGE - 1, 2), (5 * PAGE, 100), (7 * PAGE, 100)]);
        buffers.mark_written(3);
        let region = memory.iter().next().unwrap();
        let dirty: Vec<_> = (0..10).filter(|page| region.bitmap().dirty_at(page * 4096)).collect();
        assert_eq!(dirty, [0, 1, 5]);
    }
}
