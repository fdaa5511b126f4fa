//! Reading an object: by requests for ranges of it, which are larger than what is asked for.
//!
//! ```text
//!  reader ──► block 7 ──► kept, or on its way: waits for it
//!                    └──► asked for; and as block 6 was wanted before, 8 to 11 are asked for too
//! ```
//! A flat image has a chunk for each run of pages that are not zero, and in a guest's memory most of these are short. One
//! request for each of them would take hours; so whole blocks are read, and the last few are kept. Who reads in order
//! has requests under way for what comes next: one at a time would wait for the network most of the time.

use std::collections::VecDeque;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use object_store::ObjectStoreExt;
use object_store::path::Path as Key;

use super::cluster::{Cluster, Failure};
use crate::blob::{Blob, check_within, ends_early};
use crate::error::Error;

/// Bytes of a block: the most that one request asks for.
const BLOCK_BYTES: u64 = 1 << 20;
/// Readers at a time that are of use where they do not read in order: one alone waits most of the time, and a network
/// carries no more for more than a few.
const READERS: usize = 8;
/// Blocks that are asked for ahead of one that reads in order.
const AHEAD: usize = 4;
/// Blocks of an object that are kept: what each reader is at, and the one it comes from.
const KEPT_BLOCKS: usize = 2 * READERS;

/// An object.
#[derive(Debug)]
pub(super) struct Object {
    cluster: Arc<Cluster>,
    key: Key,
    path: PathBuf,
    bytes: u64,
    /// Blocks that were asked for last; the newest is at the end.
    kept: Mutex<VecDeque<Kept>>,
}

/// A block that was asked for.
#[derive(Debug)]
struct Kept {
    number: u64,
    answer: Answer,
}

/// What came of a request, once that is known.
type Answer = Arc<OnceLock<Result<Arc<[u8]>, Failure>>>;

/// A request that is under way: dropped, it is answered, so that nobody waits for ever.
struct UnderWay(Answer);

impl UnderWay {
    fn end(self, answer: Result<Arc<[u8]>, Failure>) {
        self.0.get_or_init(|| answer);
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        let given_up = || Err(Failure::Failed("the request was given up".to_owned()));
        self.0.get_or_init(given_up);
    }
}

impl Object {
    /// The object under `key`, which messages call `path`, and which has `bytes`.
    pub fn new(cluster: &Arc<Cluster>, key: Key, path: PathBuf, bytes: u64) -> Self {
        Self {
            cluster: cluster.clone(),
            key,
            path,
            bytes,
            kept: Mutex::default(),
        }
    }

    fn kept(&self) -> MutexGuard<'_, VecDeque<Kept>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A block, from an endpoint if it is not kept.
    fn block(&self, number: u64) -> Result<Arc<[u8]>, Error> {
        let (answer, is_new) = self.look_up(number);
        let mut read = answer.wait().clone();
        if read.is_err() && !is_new {
            // That was perhaps long ago, and only in case somebody wants the block: now somebody does.
            read = self.request(&mut self.kept(), number).wait().clone();
        }
        let block = read.map_err(Error::remote("read it", &self.path))?;
        if block.len() as u64 != self.bytes_of(number) {
            return Err(ends_early(&self.path, number * BLOCK_BYTES));
        }
        Ok(block)
    }

    /// What comes of a block that somebody wants now, and whether it had to be asked for. If it is the one after another
    /// that was wanted, the next ones will be wanted too.
    fn look_up(&self, number: u64) -> (Answer, bool) {
        let mut kept = self.kept();
        let is_next = number > 0 && find(&kept, number - 1).is_some();
        let found = find(&kept, number);
        let is_new = found.is_none();
        let answer = found.unwrap_or_else(|| self.request(&mut kept, number));
        let blocks = self.bytes.div_ceil(BLOCK_BYTES);
        let ahead = if is_next { AHEAD } else { 0 };
        for next in (number + 1..blocks).take(ahead) {
            if find(&kept, next).is_none() {
                self.request(&mut kept, next);
            }
        }
        (answer, is_new)
    }

    /// Asks for a block.
    fn request(&self, kept: &mut VecDeque<Kept>, number: u64) -> Answer {
        let start = number * BLOCK_BYTES;
        let range = start..start + self.bytes_of(number);
        let key = self.key.clone();
        let asking = self.cluster.asking(move |store| {
            let (key, range) = (key.clone(), range.clone());
            async move { store.get_range(&key, range).await }
        });
        let answer = Answer::default();
        let under_way = UnderWay(answer.clone());
        self.cluster.spawn(async move {
            let read = asking.await;
            under_way.end(read.map(|bytes| Arc::from(&bytes[..])));
        });
        kept.retain(|kept| kept.number != number);
        if kept.len() == KEPT_BLOCKS {
            kept.pop_front();
        }
        kept.push_back(Kept {
            number,
            answer: answer.clone(),
        });
        answer
    }

    /// Bytes of a block: all have as many, but for the last one.
    fn bytes_of(&self, number: u64) -> u64 {
        BLOCK_BYTES.min(self.bytes - number * BLOCK_BYTES)
    }
}

/// What was asked for of a block.
fn find(kept: &VecDeque<Kept>, number: u64) -> Option<Answer> {
    let kept = kept.iter().find(|kept| kept.number == number);
    kept.map(|kept| kept.answer.clone())
}

impl Blob for Object {
    fn path(&self) -> &Path {
        &self.path
    }

    fn bytes(&self) -> u64 {
        self.bytes
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<(), Error> {
        check_within(self, buffer.len(), offset)?;
        let (mut at, mut rest) = (offset, buffer);
        while !rest.is_empty() {
            let block = self.block(at / BLOCK_BYTES)?;
            let within = usize::try_from(at % BLOCK_BYTES).expect("less than a block");
            let length = rest.len().min(block.len() - within);
            let (part, others) = rest.split_at_mut(length);
            part.copy_from_slice(&block[within..][..length]);
            at += length as u64;
            rest = others;
        }
        Ok(())
    }

    fn file(&self) -> Option<&File> {
        None
    }

    fn useful_readers(&self) -> usize {
        READERS
    }
}
