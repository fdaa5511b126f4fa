//! The disks of a protected VM, all at once: what each epoch wrote, and the way back to a cut. Those that the guest can
//! only read are left alone.

use std::sync::MutexGuard;

use cutover_devices::virtio::block::chunks::ChunkSet;
use cutover_devices::virtio::block::{Block, DiskCut};
use cutover_devices::{CheckpointSoon, OnThread};

use super::{DeviceManager, lock};
use crate::Error;

/// The disks that a guest can write as they were at a cut, with their ids, in the order the guest sees them.
pub type DiskCuts = Vec<(String, DiskCut)>;

impl DeviceManager {
    /// Protects the disks, which are paused, from `cut` on; see [`Block::begin_epochs`]. `written` says what of the disk
    /// with an id and so many bytes is news to whoever has a copy of it.
    ///
    /// # Errors
    /// A restore still fills one of them, or a thread cannot be created. None is protected.
    pub fn begin_disk_epochs(
        &self,
        cut: u64,
        mut written: impl FnMut(&str, u64) -> ChunkSet,
        soon: &CheckpointSoon,
        on_thread: &OnThread,
    ) -> Result<DiskCuts, Error> {
        let begun = self.writable().map(|(id, mut block)| {
            let written = written(id, block.disk().size());
            let cut = block.begin_epochs(cut, written, soon.clone(), on_thread)?;
            Ok((id.to_owned(), cut))
        });
        let begun: Result<DiskCuts, Error> = begun.collect();
        if begun.is_err() {
            self.end_disk_epochs();
        }
        begun
    }

    /// Ends the epoch of the disks, which are paused and protected, with `cut`.
    ///
    /// # Errors
    /// They are not protected.
    pub fn cut_disks(&self, cut: u64) -> Result<DiskCuts, Error> {
        let cuts = self
            .writable()
            .map(|(id, mut block)| Ok((id.to_owned(), block.cut(cut)?)));
        cuts.collect()
    }

    /// Has `cut` be as if it had never been; see [`Block::invalidate`].
    pub fn invalidate_disk_cut(&self, cut: u64) {
        self.writable().for_each(|(_, block)| block.invalidate(cut));
    }

    /// Forgets what the disks had before `cut`, which is permanent.
    pub fn make_disk_cut_permanent(&self, cut: u64) {
        self.writable().for_each(|(_, block)| block.make_permanent(cut));
    }

    /// Has the disks, which are paused, be as they were at `cut`.
    ///
    /// # Errors
    /// One of them cannot be; see [`Block::roll_back`]. Others are, and it can be tried again.
    pub fn roll_back_disks(&self, cut: u64) -> Result<(), Error> {
        for (_, mut block) in self.writable() {
            block.roll_back(cut)?;
        }
        Ok(())
    }

    /// Protects the disks no more.
    pub fn end_disk_epochs(&self) {
        self.writable().for_each(|(_, mut block)| block.end_epochs());
    }

    fn writable(&self) -> impl Iterator<Item = (&str, MutexGuard<'_, Block>)> {
        let disks = self.disks.iter().map(|disk| (disk.id.as_str(), lock(&disk.device)));
        disks.filter(|(_, block)| !block.disk().readonly())
    }
}
