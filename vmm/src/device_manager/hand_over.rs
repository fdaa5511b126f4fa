//! What devices hold that only one monitor may have, or can share, when a VM goes from one to another: locks of disks, the
//! path of its socket device, taps, and the guest's place in its LAN.

use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};

use cutover_devices::virtio::block::Block;

use super::{DeviceManager, lock};
use crate::Error;

/// The disks of a VM, to be flushed.
pub struct DiskFlusher(Vec<Arc<Mutex<Block>>>);

impl DiskFlusher {
    /// Makes permanent what the guest has written to its disks up to now, so that another host sees it.
    ///
    /// # Errors
    /// The image of one could not be made permanent.
    pub fn flush(&self) -> Result<(), Error> {
        for device in &self.0 {
            // Not under the lock: it may take long, and requests of the guest need that.
            let disk = lock(device).disk().clone();
            disk.flush()?;
        }
        Ok(())
    }
}

impl DeviceManager {
    /// What flushes the disks, from any thread, also while the guest uses them.
    pub fn disk_flusher(&self) -> DiskFlusher {
        DiskFlusher(self.disks.iter().map(|disk| disk.device.clone()).collect())
    }

    /// Locks the disks against other users, and has clients of the socket device, after
    /// [`DiskLocks::Later`](super::DiskLocks::Later) or [`let_go`](Self::let_go); all of that or nothing. The devices are
    /// paused.
    ///
    /// # Errors
    /// Somebody uses a disk, or its size has changed since it was opened; somebody listens at the socket device's path.
    pub fn take_over(&self) -> Result<(), Error> {
        self.take_disks()?;
        if let Some((vsock, _)) = &self.vsock
            && let Err(error) = lock(vsock).listen()
        {
            self.release_disks(self.disks.len());
            return Err(error.into());
        }
        Ok(())
    }

    fn take_disks(&self) -> Result<(), Error> {
        for (taken, disk) in self.disks.iter().enumerate() {
            if let Err(error) = lock(&disk.device).disk().lock() {
                self.release_disks(taken);
                return Err(error.into());
            }
        }
        Ok(())
    }

    /// Lets others have the first `count` disks, which nobody has used.
    fn release_disks(&self, count: usize) {
        for disk in &self.disks[..count] {
            if let Err(error) = lock(&disk.device).disk().release() {
                tracing::warn!(disk = disk.id, %error, "the disk stays locked");
            }
        }
    }

    /// Lets others have the disks and the socket device's path, or none of them. The devices are paused, and stay so until
    /// these are [taken](Self::take_over) again. Other hosts only see what was [flushed](Self::disk_flusher) before.
    ///
    /// # Errors
    /// The system refused.
    pub fn let_go(&self) -> Result<(), Error> {
        for disk in &self.disks {
            if let Err(error) = lock(&disk.device).disk().release() {
                // Nobody was told that they can be had, and what is locked already can be locked again.
                self.take_disks()?;
                return Err(error.into());
            }
        }
        if let Some((vsock, _)) = &self.vsock {
            lock(vsock).stop_listening();
        }
        Ok(())
    }

    /// The tap devices for another process, with the ids of their network interfaces.
    ///
    /// # Errors
    /// There are no descriptors left.
    pub fn share_taps(&self) -> Result<Vec<(String, OwnedFd)>, Error> {
        let shared = self.nets.iter().map(|net| {
            let tap = lock(&net.device).share_tap()?;
            Ok((net.id.clone(), tap))
        });
        shared.collect()
    }

    /// Has every network interface tell its LAN, over the next half second, that the guest is behind it now.
    pub fn announce(&self) {
        for net in &self.nets {
            lock(&net.device).announce();
        }
    }
}
