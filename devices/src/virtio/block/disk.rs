//! The host's side of a disk: the open image, its size and what may be done to it.

use std::fs::{self, File, Metadata, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use cutover_snapshot::spec::DiskSpec;
use virtio_bindings::virtio_blk::VIRTIO_BLK_ID_BYTES;

use super::DeviceError;
use super::lock::{lock, unlock};

/// Bytes of a sector, the unit of requests whatever the disk (virtio 1.2 §5.2.4).
pub const SECTOR_SIZE: u32 = 512;
/// Bytes of a serial number.
const SERIAL_SIZE: usize = VIRTIO_BLK_ID_BYTES as usize;

/// What to do about an image that cannot be written, when a VM is built with it and when it is to replace another.
const USE_READONLY: &str = "; add 'readonly' if the guest need not write to it";
const STAYS_WRITABLE: &str = "; whether a disk can be written is settled when the VM is built";

/// An open disk image. A clone is the same open image.
#[derive(Clone)]
pub struct Disk {
    file: Arc<File>,
    path: PathBuf,
    sectors: u64,
    readonly: bool,
    serial: [u8; SERIAL_SIZE],
}

impl Disk {
    /// Opens the image of `spec`, which is not [locked](Self::lock) yet.
    pub(super) fn open(spec: &DiskSpec) -> Result<Self, DeviceError> {
        let serial = serial_bytes(spec.serial.as_deref().unwrap_or_default())?;
        let image = Image {
            path: &spec.path,
            readonly: spec.readonly,
            advice: USE_READONLY,
        };
        let (file, sectors) = image.open()?;
        Ok(Self {
            file: Arc::new(file),
            path: spec.path.clone(),
            sectors,
            readonly: spec.readonly,
            serial,
        })
    }

    /// Keeps others off the image, for as long as it is open or until it is [released](Self::release).
    ///
    /// # Errors
    /// Somebody else has it, or its size has changed since it was opened; it is not locked then.
    pub fn lock(&self) -> Result<(), DeviceError> {
        lock(&self.file, &self.path, self.readonly)?;
        let now = self.image().sectors(&self.file)?;
        if now != self.sectors {
            self.release()?;
            return Err(DeviceError::DiskResized {
                path: self.path.clone(),
                then: self.size(),
                now: now * u64::from(SECTOR_SIZE),
            });
        }
        Ok(())
    }

    /// Makes permanent what was written.
    ///
    /// # Errors
    /// The system refused.
    pub fn flush(&self) -> Result<(), DeviceError> {
        if self.readonly {
            return Ok(());
        }
        self.file.sync_data().map_err(|source| self.not_released(source))
    }

    /// Lets others have the image. No request is under way, nor will be before it is locked again. Other hosts only see
    /// what was [flushed](Self::flush).
    ///
    /// # Errors
    /// The system refused; it is still locked, or not.
    pub fn release(&self) -> Result<(), DeviceError> {
        unlock(&self.file).map_err(|source| self.not_released(source))
    }

    fn not_released(&self, source: io::Error) -> DeviceError {
        DeviceError::DiskNotReleased {
            path: self.path.clone(),
            source,
        }
    }

    fn image(&self) -> Image<'_> {
        Image {
            path: &self.path,
            readonly: self.readonly,
            advice: USE_READONLY,
        }
    }

    /// The disk that can take this one's place: the image at `path`, opened, locked and as writable as this one, under
    /// the same serial number. The image of this disk stays open, and is measured anew, if `path` leads to it.
    ///
    /// # Errors
    /// As if a VM were built with it. This disk is as before.
    pub fn successor(&self, path: &Path) -> Result<Self, DeviceError> {
        let image = Image {
            path,
            readonly: self.readonly,
            advice: STAYS_WRITABLE,
        };
        let (file, sectors) = if self.is_at(path) {
            (self.file.clone(), image.sectors(&self.file)?)
        } else {
            let (file, sectors) = image.open()?;
            lock(&file, path, self.readonly)?;
            (Arc::new(file), sectors)
        };
        Ok(Self {
            file,
            path: path.to_owned(),
            sectors,
            ..self.clone()
        })
    }

    /// Whether `path` leads to this image. Opened twice it would be locked against itself.
    fn is_at(&self, path: &Path) -> bool {
        let identity = |metadata: Metadata| (metadata.dev(), metadata.ino());
        let (own, other) = (self.file.metadata().map(identity), fs::metadata(path).map(identity));
        matches!((own, other), (Ok(own), Ok(other)) if own == other)
    }

    /// The image. What requests have written is there for whoever reads it: neither engine goes past the page cache.
    pub fn file(&self) -> &Arc<File> {
        &self.file
    }

    /// Size in sectors.
    pub fn sectors(&self) -> u64 {
        self.sectors
    }

    /// Size in bytes.
    pub fn size(&self) -> u64 {
        self.sectors * u64::from(SECTOR_SIZE)
    }

    /// Whether the guest may only read.
    pub fn readonly(&self) -> bool {
        self.readonly
    }

    /// Serial number, padded with zero bytes.
    pub(super) fn serial(&self) -> &[u8] {
        &self.serial
    }

    /// Offset in bytes of `len` bytes from `sector` on, if these are whole sectors of the disk.
    pub(super) fn offset_of(&self, sector: u64, len: u64) -> Option<u64> {
        let sector_size = u64::from(SECTOR_SIZE);
        let end = sector.checked_add(len / sector_size)?;
        (len.is_multiple_of(sector_size) && end <= self.sectors).then(|| sector * sector_size)
    }
}

/// An image to be opened.
pub(super) struct Image<'a> {
    pub path: &'a Path,
    pub readonly: bool,
    /// What the user can do if it cannot be written, with its leading punctuation.
    pub advice: &'static str,
}

impl Image<'_> {
    /// Opens it; returns its size in sectors too.
    fn open(&self) -> Result<(File, u64), DeviceError> {
        let file = OpenOptions::new()
            .read(true)
            .write(!self.readonly)
            .open(self.path)
            .map_err(|source| self.open_error(source))?;
        let sectors = self.sectors(&file)?;
        Ok((file, sectors))
    }

    /// Size of `file`, which is the image.
    fn sectors(&self, mut file: &File) -> Result<u64, DeviceError> {
        let metadata = file.metadata().map_err(|source| self.open_error(source))?;
        let size = if metadata.is_file() {
            metadata.len()
        } else if metadata.file_type().is_block_device() {
            file.seek(SeekFrom::End(0)).map_err(|source| self.open_error(source))?
        } else {
            return Err(DeviceError::DiskKind(self.path.to_owned()));
        };
        if size == 0 || size % u64::from(SECTOR_SIZE) != 0 {
            return Err(DeviceError::DiskSize {
                path: self.path.to_owned(),
                size,
            });
        }
        Ok(size / u64::from(SECTOR_SIZE))
    }

    /// The refusal for what the system said, with what to do about it.
    pub fn open_error(&self, source: io::Error) -> DeviceError {
        let access = if self.readonly {
            "reading"
        } else {
            "reading and writing"
        };
        let unwritable = matches!(
            source.kind(),
            io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem
        );
        DeviceError::OpenDisk {
            path: self.path.to_owned(),
            access,
            source,
            hint: if unwritable && !self.readonly { self.advice } else { "" },
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
