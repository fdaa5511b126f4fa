//! The host's side of a disk: the open image, its size and what may be done to it.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::sync::Arc;

use cutover_snapshot::spec::DiskSpec;
use rustix::fs::{FlockOperation, flock};
use virtio_bindings::virtio_blk::VIRTIO_BLK_ID_BYTES;

use super::DeviceError;

/// Bytes of a sector, the unit of requests whatever the disk (virtio 1.2 §5.2.4).
pub const SECTOR_SIZE: u32 = 512;
/// Bytes of a serial number.
const SERIAL_SIZE: usize = VIRTIO_BLK_ID_BYTES as usize;

/// An open disk image.
pub struct Disk {
    file: Arc<File>,
    sectors: u64,
    readonly: bool,
    serial: [u8; SERIAL_SIZE],
}

impl Disk {
    /// Opens and locks the image of `spec`.
    pub fn open(spec: &DiskSpec) -> Result<Self, DeviceError> {
        let serial = serial_bytes(spec.serial.as_deref().unwrap_or_default())?;
        let file = open_image(spec)?;
        let size = image_size(&file, &spec.path).map_err(|error| match error {
            Ok(device_error) => device_error,
            Err(source) => open_error(spec, source),
        })?;
        if size == 0 || size % u64::from(SECTOR_SIZE) != 0 {
            return Err(DeviceError::DiskSize {
                path: spec.path.clone(),
                size,
            });
        }
        lock(&file, spec)?;
        let sectors = size / u64::from(SECTOR_SIZE);
        Ok(Self {
            file: Arc::new(file),
            sectors,
            readonly: spec.readonly,
            serial,
        })
    }

    /// The image.
    pub fn file(&self) -> &Arc<File> {
        &self.file
    }

    /// Size in sectors.
    pub fn sectors(&self) -> u64 {
        self.sectors
    }

    /// Whether the guest may only read.
    pub fn readonly(&self) -> bool {
        self.readonly
    }

    /// Serial number, padded with zero bytes.
    pub fn serial(&self) -> &[u8] {
        &self.serial
    }

    /// Offset in bytes of `len` bytes from `sector` on, if these are whole sectors of the disk.
    pub fn offset_of(&self, sector: u64, len: u64) -> Option<u64> {
        let sector_size = u64::from(SECTOR_SIZE);
        let end = sector.checked_add(len / sector_size)?;
        (len.is_multiple_of(sector_size) && end <= self.sectors).then(|| sector * sector_size)
    }
}

fn open_image(spec: &DiskSpec) -> Result<File, DeviceError> {
    OpenOptions::new()
        .read(true)
        .write(!spec.readonly)
        .open(&spec.path)
        .map_err(|source| open_error(spec, source))
}

/// The refusal for what the system said, with what to do about it.
pub fn open_error(spec: &DiskSpec, source: io::Error) -> DeviceError {
    let access = if spec.readonly {
        "reading"
    } else {
        "reading and writing"
    };
    let unwritable = matches!(
        source.kind(),
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem
    );
    let hint = if unwritable && !spec.readonly {
        "; add 'readonly' if the guest need not write to it"
    } else {
        ""
    };
    DeviceError::OpenDisk {
        path: spec.path.clone(),
        access,
        source,
        hint,
    }
}

fn image_size(mut file: &File, path: &Path) -> Result<u64, Result<DeviceError, io::Error>> {
    let metadata = file.metadata().map_err(Err)?;
    if metadata.is_file() {
        Ok(metadata.len())
    } else if metadata.file_type().is_block_device() {
        file.seek(SeekFrom::End(0)).map_err(Err)
    } else {
        Err(Ok(DeviceError::DiskKind(path.to_owned())))
    }
}

/// Keeps other monitors off the image for as long as it is open: all of them while it is written, writers while it is
/// read.
fn lock(file: &File, spec: &DiskSpec) -> Result<(), DeviceError> {
    let operation = if spec.readonly {
        FlockOperation::NonBlockingLockShared
    } else {
        FlockOperation::NonBlockingLockExclusive
    };
    match flock(file, operation) {
        Ok(()) => Ok(()),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(DeviceError::DiskInUse {
            path: spec.path.clone(),
        }),
        Err(error) => {
            tracing::warn!(path = %spec.path.display(), %error, "the disk image cannot be locked against other users");
            Ok(())
        }
    }
}

fn serial_bytes(serial: &str) -> Result<[u8; SERIAL_SIZE], DeviceError> {
    let mut bytes = [0; SERIAL_SIZE];
    bytes
        .get_mut(..serial.len())
        .ok_or_else(|| DeviceError::Serial {
            serial: serial.to_owned(),
        })?
        .copy_from_slice(serial.as_bytes());
    Ok(bytes)
}
