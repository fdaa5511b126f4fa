//! The pages vCPUs write, and KVM for them: the dirty bitmap of each memory slot.
//!
//! ```text
//!  collect:  GET_DIRTY_LOG of a slot ─► for each chunk with dirty pages:  report them ─► CLEAR_DIRTY_LOG
//! ```
//! Reading does not clear (manual protection): a page is protected again only after it was reported, and a write in
//! between is in what the reporter reads afterwards. It also spares KVM from holding its MMU lock for a whole slot:
//! it is let go after each chunk. Kernels that lack manual protection clear and protect as they are read.

use std::sync::Arc;

use cutover_migration::pages::set_words;
use kvm_bindings::KVM_MEM_LOG_DIRTY_PAGES;

use super::page_set::{Layout, Slot, WORD_PAGES};
use super::{DirtySource, Report, ioctl};
use crate::Error;
use crate::kvm::MemorySlots;

/// Words that are cleared by one call: 64 MiB of guest memory, which takes KVM about a millisecond at worst.
const CLEAR_CHUNK: usize = 256;

/// The dirty log of a VM's memory slots.
pub struct KvmLog {
    slots: MemorySlots,
    layout: Arc<Layout>,
    protection: Protection,
    /// Where KVM's bitmap of one slot goes; empty while there is no log.
    buffer: Vec<u64>,
}

/// When pages that were written are protected again, so that the next write is noticed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Protection {
    /// As the log is read.
    OnRead,
    /// When told to.
    OnClear,
}

impl KvmLog {
    /// The log of `slots`, switched off. `layout` is that of their memory.
    ///
    /// # Errors
    /// KVM refused what it offers.
    pub fn new(slots: &MemorySlots, layout: &Arc<Layout>) -> Result<Self, Error> {
        let offered = ioctl::manual_protection(&slots.vm);
        let protection = if offered == 0 {
            Protection::OnRead
        } else {
            ioctl::enable_manual_protection(&slots.vm, offered)
                .map_err(Error::kvm("leave its dirty log as it is read"))?;
            Protection::OnClear
        };
        Ok(Self {
            slots: slots.clone(),
            layout: layout.clone(),
            protection,
            buffer: Vec::new(),
        })
    }

    fn collect_slot(&mut self, number: u32, slot: Slot, report: Report<'_>) -> Result<(), Error> {
        let log = &mut self.buffer[..slot.words()];
        // SAFETY: the slots are those of the layout, and one has a bit per page in as many words.
        unsafe { ioctl::get_dirty_log(&self.slots.vm, number, log) }.map_err(Error::kvm("read its dirty log"))?;
        for (first_word, chunk) in (0..).step_by(CLEAR_CHUNK).zip(log.chunks(CLEAR_CHUNK)) {
            let mut dirty = false;
            for (word, bits) in set_words(chunk) {
                report(slot.first_word + first_word + word, bits);
                dirty = true;
            }
            if dirty && self.protection == Protection::OnClear {
                let first_page = first_word as u64 * WORD_PAGES;
                let pages = (slot.pages - first_page).min(chunk.len() as u64 * WORD_PAGES);
                let pages = u32::try_from(pages).expect("a chunk has few pages");
                ioctl::clear_dirty_log(&self.slots.vm, number, first_page, pages, chunk)
                    .map_err(Error::kvm("clear its dirty log"))?;
            }
        }
        Ok(())
    }
}

impl DirtySource for KvmLog {
    fn start(&mut self) -> Result<(), Error> {
        self.slots.set_flags(KVM_MEM_LOG_DIRTY_PAGES)?;
        let longest = self.layout.slots().iter().map(Slot::words).max();
        self.buffer = vec![0; longest.unwrap_or(0)];
        Ok(())
    }

    fn stop(&mut self) -> Result<(), Error> {
        self.buffer = Vec::new();
        self.slots.set_flags(0)
    }

    fn collect(&mut self, report: Report<'_>) -> Result<(), Error> {
        let layout = self.layout.clone();
        for (number, slot) in (0..).zip(layout.slots()) {
            self.collect_slot(number, *slot, report)?;
        }
        Ok(())
    }
}
