//! What a guest asks of its disk: the request header and its checks (virtio 1.2 §5.2.6).

use std::ops::Range;

use virtio_bindings::virtio_blk::*;
use vm_memory::{ByteValued, Le32, Le64};

use super::config::CLEAR_SECTORS_MAX;
use super::disk::{Disk, SECTOR_SIZE};
use crate::stats::DiskCounters;
use crate::virtio::buffers::GuestBuffers;
use crate::virtio::queue::Chain;

/// `VIRTIO_BLK_S_*`: how a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Status {
    /// Done.
    Ok = 0,
    /// Not done: the host's disk failed, or the request makes no sense.
    IoError = 1,
    /// Not done: this disk cannot.
    Unsupported = 2,
}

/// A request within the bounds of its disk. Offsets and lengths are in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// Fill the chain's writable part.
    Read {
        /// Where from.
        offset: u64,
        /// How much.
        len: u64,
    },
    /// Store the chain's readable part.
    Write {
        /// Where to.
        offset: u64,
        /// How much.
        len: u64,
    },
    /// Make everything written so far durable.
    Flush,
    /// Give the serial number.
    GetId,
    /// Forget the contents of a range.
    Discard {
        /// Where.
        offset: u64,
        /// How much.
        len: u64,
    },
    /// Make a range read as zeroes.
    WriteZeroes {
        /// Where.
        offset: u64,
        /// How much.
        len: u64,
        /// Whether its space may be given back.
        unmap: bool,
    },
}

/// `struct virtio_blk_req` up to its data.
#[derive(Clone, Copy, Default)]
#[repr(C)]
struct Header {
    kind: Le32,
    reserved: Le32,
    sector: Le64,
}

/// `struct virtio_blk_discard_write_zeroes`.
#[derive(Clone, Copy, Default)]
#[repr(C)]
struct Segment {
    sector: Le64,
    num_sectors: Le32,
    flags: Le32,
}

// SAFETY: integers without padding, any bytes of which are valid.
unsafe impl ByteValued for Header {}
// SAFETY: as above.
unsafe impl ByteValued for Segment {}

impl Request {
    /// Takes the header off `chain`, of which the status byte is off already; what is left is data.
    ///
    /// # Errors
    /// How the request ended before it began.
    pub fn parse(chain: &mut Chain, disk: &Disk) -> Result<Self, Status> {
        let header: Header = take(&mut chain.readable)?;
        match u32::from(header.kind) {
            VIRTIO_BLK_T_IN => {
                let (offset, len) = range_of(disk, header.sector, &chain.writable)?;
                Ok(Self::Read { offset, len })
            }
            VIRTIO_BLK_T_OUT if disk.readonly() => Err(Status::IoError),
            VIRTIO_BLK_T_OUT => {
                let (offset, len) = range_of(disk, header.sector, &chain.readable)?;
                Ok(Self::Write { offset, len })
            }
            VIRTIO_BLK_T_FLUSH => Ok(Self::Flush),
            VIRTIO_BLK_T_GET_ID => Ok(Self::GetId),
            VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES if disk.readonly() => Err(Status::IoError),
            VIRTIO_BLK_T_DISCARD => {
                let (offset, len, flags) = parse_segment(&mut chain.readable, disk)?;
                if flags == 0 {
                    Ok(Self::Discard { offset, len })
                } else {
                    Err(Status::Unsupported)
                }
            }
            VIRTIO_BLK_T_WRITE_ZEROES => {
                let (offset, len, flags) = parse_segment(&mut chain.readable, disk)?;
                let unmap = flags == VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP;
                if unmap || flags == 0 {
                    Ok(Self::WriteZeroes { offset, len, unmap })
                } else {
                    Err(Status::Unsupported)
                }
            }
            _ => Err(Status::Unsupported),
        }
    }

    /// Bytes that go between guest and disk: what a rate limiter counts.
    pub fn data_len(&self) -> u64 {
        match *self {
            Self::Read { len, .. } | Self::Write { len, .. } => len,
            Self::Flush | Self::GetId | Self::Discard { .. } | Self::WriteZeroes { .. } => 0,
        }
    }

    /// What of the disk it is about.
    pub fn bytes(&self) -> Range<u64> {
        match *self {
            Self::Read { offset, len }
            | Self::Write { offset, len }
            | Self::Discard { offset, len }
            | Self::WriteZeroes { offset, len, .. } => offset..offset + len,
            Self::Flush | Self::GetId => 0..0,
        }
    }

    /// Whether these bytes may be others afterwards.
    pub fn changes_disk(&self) -> bool {
        matches!(
            self,
            Self::Write { .. } | Self::Discard { .. } | Self::WriteZeroes { .. }
        )
    }

    /// Counts it as done.
    pub fn count(&self, counters: &DiskCounters) {
        match *self {
            Self::Read { len, .. } => {
                counters.reads.add(1);
                counters.read_bytes.add(len);
            }
            Self::Write { len, .. } => {
                counters.writes.add(1);
                counters.written_bytes.add(len);
            }
            Self::Flush => counters.flushes.add(1),
            Self::Discard { .. } | Self::WriteZeroes { .. } => counters.discards.add(1),
            Self::GetId => {}
        }
    }
}

/// Offset, length and flags of the one segment that the configuration space allows.
fn parse_segment(data: &mut GuestBuffers, disk: &Disk) -> Result<(u64, u64, u32), Status> {
    let segment: Segment = take(data)?;
    let sectors = u32::from(segment.num_sectors);
    let len = u64::from(sectors) * u64::from(SECTOR_SIZE);
    let offset = disk.offset_of(segment.sector.into(), len).ok_or(Status::IoError)?;
    if data.len() > 0 || sectors > CLEAR_SECTORS_MAX {
        return Err(Status::IoError);
    }
    Ok((offset, len, segment.flags.into()))
}

/// Offset and length of `data` on the disk.
fn range_of(disk: &Disk, sector: Le64, data: &GuestBuffers) -> Result<(u64, u64), Status> {
    let len = data.len() as u64;
    let offset = disk.offset_of(sector.into(), len).ok_or(Status::IoError)?;
    Ok((offset, len))
}

fn take<T: ByteValued + Default>(data: &mut GuestBuffers) -> Result<T, Status> {
    let mut value = T::default();
    let size = value.as_slice().len();
    match data.copy_to(value.as_mut_slice()) {
        Ok(copied) if copied == size => {
            data.advance(size);
            Ok(value)
        }
        _ => Err(Status::IoError),
    }
}
