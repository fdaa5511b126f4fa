//! Writing snapshots to a bucket: objects in parallel parts, of each snapshot the manifest last, of a chain the oldest
//! first. So whatever is interrupted, each snapshot that has a manifest has everything it needs.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::mpsc as blocking;
use std::sync::{Arc, Mutex, PoisonError};

use object_store::aws::AmazonS3;
use object_store::path::Path as Key;
use object_store::{Error as StoreError, ObjectStoreExt, WriteMultipart};
use tokio::sync::mpsc;

use super::cluster::{Cluster, Failure};
use super::{Access, RemoteDir, Url};
use crate::blob::Blob;
use crate::chain::Chain;
use crate::error::Error;
use crate::files::{NewFile, NewFiles};
use crate::image::{Layout, PageSource, Progress, Scan};
use crate::manifest;
use crate::merge::write_merged;
use crate::source::{self, Source};
use crate::store::Snapshot;
use crate::verify::verify;

/// Bytes that are handed from file to upload at a time.
const BLOCK_BYTES: usize = 1 << 20;
/// Blocks that wait for being uploaded.
const BLOCKS: usize = 8;
/// Bytes of a part, if the object is not so large that it would have more parts than are allowed.
const PART_BYTES: u64 = 8 << 20;
/// Most parts of an object: S3 allows 10000.
const PARTS_MAX: u64 = 9000;
/// Parts of one object that are under way at a time.
const PARALLEL: usize = 4;

/// What was uploaded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Uploaded {
    /// Where the snapshot is now.
    pub path: PathBuf,
    /// How many snapshots were uploaded.
    pub snapshots: usize,
    /// How many were there already.
    pub present: usize,
    /// Bytes of what was uploaded.
    pub bytes: u64,
}

/// Uploads the snapshots of `chain` as they are, as far as they are not there yet, the newest to `to`, which begins with
/// `s3://`, the others beside it. All are verified first, which counts as progress too.
///
/// # Errors
/// Part of the chain is damaged, a name is taken by another snapshot, or an endpoint fails. What was uploaded by then
/// stays, and is no snapshot without its manifest.
pub fn upload_chain(
    chain: &Chain,
    to: &Path,
    access: &Access,
    progress: &mut dyn FnMut(Progress),
) -> Result<Uploaded, Error> {
    let (dir, newest_name) = target(to, access)?;
    let mut missing = Vec::new();
    for (number, snapshot) in chain.snapshots().iter().enumerate() {
        let name = if number == 0 { &newest_name } else { &snapshot.name };
        if !is_there(&dir, name, snapshot)? {
            missing.push((name, snapshot));
        }
    }
    let bytes_of = |snapshot: &Snapshot| -> u64 { snapshot.sealed.manifest.files().map(|(_, bytes)| bytes).sum() };
    let bytes: u64 = missing.iter().map(|(_, snapshot)| bytes_of(snapshot)).sum();
    let before: u64 = chain.snapshots().iter().map(bytes_of).sum();
    let total = before + bytes;
    let verified = verify(chain, &mut |Progress { done, .. }| progress(Progress { done, total }));
    if let Some(damage) = verified.damage.into_iter().next() {
        return Err(damage);
    }
    let mut done = before;
    for (name, snapshot) in missing.iter().rev() {
        let files = snapshot.sealed.manifest.files().map(|(file, _)| file);
        for file in files.chain([manifest::FILE.to_owned()]) {
            let Some(blob) = chain.source().open(&snapshot.name, &file)? else {
                return Err(Error::invalid(&snapshot.path.join(&file), "is missing"));
            };
            let mut object = Object::begin(&dir, name, &file, blob.bytes());
            copy(&*blob, &mut object, &mut |bytes| {
                // The manifest is small, and its length is known to nobody beforehand.
                done = total.min(done + bytes);
                progress(Progress { done, total });
            })?;
        }
    }
    Ok(Uploaded {
        path: dir.path_of(&newest_name),
        snapshots: missing.len(),
        present: chain.snapshots().len() - missing.len(),
        bytes,
    })
}

/// Uploads what `chain` amounts to as one complete snapshot to `to`, which begins with `s3://`.
///
/// # Errors
/// Part of the chain is damaged, the name is taken, `layout` is one with holes, or an endpoint fails.
pub fn upload_merged(
    chain: &Chain,
    to: &Path,
    access: &Access,
    layout: Layout,
    progress: &mut dyn FnMut(Progress),
) -> Result<Uploaded, Error> {
    let (dir, name) = target(to, access)?;
    let path = dir.path_of(&name);
    match source::snapshot(&dir, &name) {
        Err(Error::Absent(_)) => {}
        Err(error) => return Err(error),
        Ok(_) => return Err(Error::Exists(path)),
    }
    let mut largest = 0;
    for entry in &chain.newest().sealed.manifest.images {
        largest = largest.max(Scan::new(chain.image(&entry.name)?.reader()?).bytes_total());
    }
    let objects = Objects {
        dir,
        name,
        // As much again is more than enough for an index.
        bytes: 2 * largest,
    };
    let sealed = write_merged(chain, path.clone(), &objects, layout, progress)?;
    Ok(Uploaded {
        path,
        snapshots: 1,
        present: 0,
        bytes: sealed.manifest.files().map(|(_, bytes)| bytes).sum(),
    })
}

/// The store and the name that `to` says.
fn target(to: &Path, access: &Access) -> Result<(RemoteDir, String), Error> {
    let url = Url::parse(to).unwrap_or_else(|| Err(Error::invalid(to, "does not begin with s3://")))?;
    let (above, name) = url.split()?;
    Ok((RemoteDir::new(above, access)?, name))
}

/// Whether `snapshot` is in `dir` already, under this name.
fn is_there(dir: &RemoteDir, name: &str, snapshot: &Snapshot) -> Result<bool, Error> {
    match source::snapshot(dir, name) {
        Ok(there) if there.sealed.checksum == snapshot.sealed.checksum => Ok(true),
        Ok(there) => Err(Error::Exists(there.path)),
        Err(Error::Absent(_)) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Copies all of `blob`; `count` is told how much, again and again.
fn copy(blob: &dyn Blob, object: &mut Object, count: &mut dyn FnMut(u64)) -> Result<(), Error> {
    let mut block = vec![0; BLOCK_BYTES];
    let mut at = 0;
    while at < blob.bytes() {
        let length = usize::try_from(blob.bytes() - at).map_or(BLOCK_BYTES, |rest| rest.min(BLOCK_BYTES));
        blob.read_at(&mut block[..length], at)?;
        let written = object.write_all_at(&block[..length], at);
        written.map_err(Error::io("upload it", &object.path))?;
        at += length as u64;
        count(length as u64);
    }
    object.sync().map_err(Error::io("upload it", &object.path))
}

/// Where the files of a snapshot become objects.
struct Objects {
    dir: RemoteDir,
    /// Name of the snapshot.
    name: String,
    /// More than any of the objects has.
    bytes: u64,
}

impl NewFiles for Objects {
    fn create(&self, path: &Path) -> io::Result<Box<dyn NewFile>> {
        let file = path.file_name().and_then(|file| file.to_str());
        let file = file.ok_or(io::ErrorKind::InvalidInput)?;
        Ok(Box::new(Object::begin(&self.dir, &self.name, file, self.bytes)))
    }
}

/// What is told to the task that uploads an object.
enum Step {
    Bytes(Vec<u8>),
    /// That was all. An upload that is not told so is given up.
    End,
}

/// An object being uploaded, from front to back.
struct Object {
    path: PathBuf,
    at: u64,
    steps: mpsc::Sender<Step>,
    result: Mutex<blocking::Receiver<Result<(), Failure>>>,
    /// Keeps the threads that upload.
    _cluster: Arc<Cluster>,
}

impl Object {
    /// Begins an object that has at most `bytes`.
    fn begin(dir: &RemoteDir, name: &str, file: &str, bytes: u64) -> Self {
        let (steps, receiver) = mpsc::channel(BLOCKS);
        let (done, result) = blocking::sync_channel(1);
        let cluster = dir.cluster().clone();
        let (store, key) = (cluster.preferred(), dir.key_of(name, file));
        let part_bytes = PART_BYTES.max(bytes.div_ceil(PARTS_MAX));
        let part_bytes = usize::try_from(part_bytes).unwrap_or(usize::MAX);
        cluster.spawn(async move {
            let result = upload(&store, &key, part_bytes, receiver).await;
            // Nobody waits for an upload that was given up.
            let _ = done.send(result.map_err(Failure::from));
        });
        Self {
            path: dir.path_of(name).join(file),
            at: 0,
            steps,
            result: Mutex::new(result),
            _cluster: cluster,
        }
    }

    /// Tells the task; if it has ended already, that is for the reason which is the error.
    fn tell(&self, step: Step) -> io::Result<()> {
        match self.steps.blocking_send(step) {
            Ok(()) => Ok(()),
            Err(_) => Err(self.wait().err().unwrap_or_else(|| io::ErrorKind::BrokenPipe.into())),
        }
    }

    /// Waits for the end of the task.
    fn wait(&self) -> io::Result<()> {
        let result = self.result.lock().unwrap_or_else(PoisonError::into_inner);
        match result.recv() {
            Ok(result) => result.map_err(io::Error::other),
            Err(_) => Err(io::ErrorKind::BrokenPipe.into()),
        }
    }
}

impl NewFile for Object {
    fn write_all_at(&mut self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let gap = offset.checked_sub(self.at);
        let mut gap = gap.ok_or_else(|| io::Error::other("objects are written from front to back"))?;
        self.at = offset + bytes.len() as u64;
        while gap > 0 {
            let zeros = usize::try_from(gap).map_or(BLOCK_BYTES, |gap| gap.min(BLOCK_BYTES));
            self.tell(Step::Bytes(vec![0; zeros]))?;
            gap -= zeros as u64;
        }
        self.tell(Step::Bytes(bytes.to_vec()))
    }

    fn sync(&mut self) -> io::Result<()> {
        self.tell(Step::End)?;
        self.wait()
    }
}

/// Uploads what is told through `steps`: at once if it is less than a part, in parts otherwise.
async fn upload(
    store: &AmazonS3,
    key: &Key,
    part_bytes: usize,
    mut steps: mpsc::Receiver<Step>,
) -> Result<(), StoreError> {
    let mut first = Vec::new();
    loop {
        match steps.recv().await {
            Some(Step::Bytes(bytes)) => first.extend(bytes),
            Some(Step::End) => return store.put(key, first.into()).await.map(|_| ()),
            None => return Ok(()),
        }
        if first.len() >= part_bytes {
            break;
        }
    }
    let mut parts = WriteMultipart::new_with_chunk_size(store.put_multipart(key).await?, part_bytes);
    parts.write(&first);
    drop(first);
    loop {
        if let Err(error) = parts.wait_for_capacity(PARALLEL).await {
            // Why it failed matters more than whether the rest could be cleaned up.
            let _ = parts.abort().await;
            return Err(error);
        }
        match steps.recv().await {
            Some(Step::Bytes(bytes)) => parts.write(&bytes),
            Some(Step::End) => return parts.finish().await.map(|_| ()),
            None => return parts.abort().await,
        }
    }
}
