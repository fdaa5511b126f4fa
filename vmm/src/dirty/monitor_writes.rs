//! The pages the monitor itself writes: devices filling guest buffers, the boot image being loaded.
//!
//! Every such write marks the bitmap that guest memory carries (ARCHITECTURE.md, invariant 4), always: a mark is one
//! atomic instruction, and deciding whether it is needed would cost as much.

use std::sync::Arc;

use cutover_devices::GuestMemory;
use cutover_migration::pages::set_words;
use vm_memory::GuestMemoryBackend;

use super::page_set::Layout;
use super::{DirtySource, Report};
use crate::Error;

/// The bitmaps of a VM's guest memory.
pub struct MonitorWrites {
    memory: GuestMemory,
    layout: Arc<Layout>,
}

impl MonitorWrites {
    /// Those of `memory`, whose layout is `layout`.
    pub fn new(memory: &GuestMemory, layout: &Arc<Layout>) -> Self {
        Self {
            memory: memory.clone(),
            layout: layout.clone(),
        }
    }
}

impl DirtySource for MonitorWrites {
    fn start(&mut self) -> Result<(), Error> {
        Ok(())
    }

    fn stop(&mut self) -> Result<(), Error> {
        Ok(())
    }

    fn collect(&mut self, report: Report<'_>) -> Result<(), Error> {
        for (slot, region) in self.layout.slots().iter().zip(self.memory.iter()) {
            for (word, bits) in set_words(&(**region).bitmap().get_and_reset()) {
                report(slot.first_word + word, bits);
            }
        }
        Ok(())
    }
}
