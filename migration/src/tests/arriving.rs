//! Memory of a made-up VM that arrives while its guest runs.

use std::io;
use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use super::made_up::{Bytes, bytes_of};
use crate::pages::PageBits;
use crate::vm::ArrivingMemory;

/// Memory whose guest runs before all of it is there.
pub struct Arriving {
    memory: Arc<Bytes>,
    state: Mutex<ArrivingState>,
    changed: Condvar,
}

struct ArrivingState {
    missing: PageBits,
    wanted: Vec<u64>,
    ended: Option<Result<(), String>>,
}

impl Arriving {
    pub fn new(memory: &Arc<Bytes>, missing: PageBits) -> Arc<Self> {
        for page in missing.iter() {
            // What was there before is not what the guest may see.
            memory.poke(page, |bytes| bytes.fill(0xee));
        }
        Arc::new(Self {
            memory: Arc::clone(memory),
            state: Mutex::new(ArrivingState {
                missing,
                wanted: Vec::new(),
                ended: None,
            }),
            changed: Condvar::new(),
        })
    }

    /// What the guest does: waits until `page` is there.
    pub fn touch(&self, page: u64) {
        let mut state = self.state.lock().unwrap();
        if state.missing.contains(page) {
            state.wanted.push(page);
            self.changed.notify_all();
        }
        let here = |state: &mut ArrivingState| state.missing.contains(page) && state.ended.is_none();
        drop(self.changed.wait_while(state, here).unwrap());
    }

    pub fn wait(&self) -> Result<(), String> {
        let state = self.state.lock().unwrap();
        let state = self.changed.wait_while(state, |state| state.ended.is_none()).unwrap();
        state.ended.clone().unwrap()
    }

    fn bring(&self, pages: Range<u64>, put: impl Fn(u64)) {
        let mut state = self.state.lock().unwrap();
        for page in pages {
            if state.missing.contains(page) {
                put(page);
                state.missing.remove(page);
            }
        }
        self.changed.notify_all();
    }
}

impl ArrivingMemory for Arriving {
    fn wanted(&self, patience: Duration) -> Vec<u64> {
        let state = self.state.lock().unwrap();
        let none = |state: &mut ArrivingState| state.wanted.is_empty();
        let (mut state, _) = self.changed.wait_timeout_while(state, patience, none).unwrap();
        std::mem::take(&mut state.wanted)
    }

    fn arrive(&self, pages: Range<u64>, content: &[u8]) -> io::Result<()> {
        let first = pages.start;
        self.bring(pages, |page| {
            let own = bytes_of(page - first..page - first + 1);
            self.memory.poke(page, |bytes| bytes.copy_from_slice(&content[own]));
        });
        Ok(())
    }

    fn arrive_zero(&self, pages: Range<u64>) -> io::Result<()> {
        self.bring(pages, |page| self.memory.poke(page, |bytes| bytes.fill(0)));
        Ok(())
    }

    fn complete(&self) {
        let mut state = self.state.lock().unwrap();
        assert!(
            state.missing.is_empty(),
            "complete without {} pages",
            state.missing.len()
        );
        state.ended = Some(Ok(()));
        self.changed.notify_all();
    }

    fn lost(&self, reason: &str) {
        self.state.lock().unwrap().ended = Some(Err(reason.to_owned()));
        self.changed.notify_all();
    }
}
