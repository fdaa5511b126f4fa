//! Reading an object: by requests for ranges of it, which are larger than what is asked for.
//!
//! A flat image has a chunk for each run of pages that are not zero, and in a guest's memory most of these are short. One
//! request for each of them would take hours; so whole blocks are read, and the last few are kept.

use std::collections::VecDeque;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use object_store::ObjectStoreExt;
use object_store::path::Path as Key;

use super::cluster::Cluster;
use crate::blob::{Blob, check_within, ends_early};
use crate::error::Error;

/// Bytes of a block: the most that one request asks for.
const BLOCK_BYTES: u64 = 1 << 20;
/// Requests that should be under way at a time: one alone waits most of the time, and a network carries no more for more
/// than a few.
const READERS: usize = 8;
/// Blocks of an object that are kept: what each reader is at, and the one it comes from.
const KEPT_BLOCKS: usize = 2 * READERS;

/// An object.
#[derive(Debug)]
pub(super) struct Object {
    cluster: Arc<Cluster>,
    key: Key,
    path: PathBuf,
    bytes: u64,
    /// Blocks that were read last, by number; the newest is at the end.
    kept: Mutex<VecDeque<(u64, Arc<[u8]>)>>,
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

    fn kept(&self) -> MutexGuard<'_, VecDeque<(u64, Arc<[u8]>)>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A block, from an endpoint if it is not kept.
    fn block(&self, number: u64) -> Result<Arc<[u8]>, Error> {
        if let Some((_, block)) = self.kept().iter().find(|(kept, _)| *kept == number) {
            return Ok(block.clone());
        }
        let start = number * BLOCK_BYTES;
        let range = start..self.bytes.min(start + BLOCK_BYTES);
        let (key, wanted) = (self.key.clone(), range.clone());
        let read = self.cluster.ask(move |store| {
            let (key, wanted) = (key.clone(), wanted.clone());
            async move { store.get_range(&key, wanted).await }
        });
        let read = read.map_err(Error::remote("read it", &self.path))?;
        if read.len() as u64 != range.end - range.start {
            return Err(ends_early(&self.path, start));
        }
        let block: Arc<[u8]> = Arc::from(&read[..]);
        let mut kept = self.kept();
        if kept.len() == KEPT_BLOCKS {
            kept.pop_front();
        }
        kept.push_back((number, block.clone()));
        Ok(block)
    }
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
