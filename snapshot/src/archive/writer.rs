//! Writing an archive: each member where the one before ended, its header when its length is known.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use jiff::Timestamp;
use tar::{EntryType, Header};

use super::{BLOCK, END};
use crate::chain::Chain;
use crate::error::Error;
use crate::files::{Files, NewFile, NewFiles, publish};
use crate::image::{Layout, Progress};
use crate::merge::write_merged;

/// Writes what `chain` amounts to as the single file `path`, its images laid out as `layout` says.
///
/// # Errors
/// Part of the chain is damaged, there is something at `path`, or the file cannot be written; then there is nothing
/// of it.
pub fn write_archive(
    chain: &Chain,
    files: &dyn Files,
    path: &Path,
    layout: Layout,
    progress: &mut dyn FnMut(Progress),
) -> Result<(), Error> {
    if path.try_exists().map_err(Error::io("examine it", path))? {
        return Err(Error::Exists(path.to_owned()));
    }
    publish(files, path, |partial| {
        write_members(chain, files, partial, layout, progress)
    })
}

fn write_members(
    chain: &Chain,
    files: &dyn Files,
    path: &Path,
    layout: Layout,
    progress: &mut dyn FnMut(Progress),
) -> Result<(), Error> {
    let file = files.create(path).map_err(Error::io("create it", path))?;
    let created = chain.newest().sealed.manifest.created;
    let members = Members(Arc::new(Mutex::new(Whole { file, end: 0, created })));
    write_merged(chain, PathBuf::new(), &members, layout, progress)?;
    let mut whole = members.whole();
    let end = whole.end;
    whole
        .file
        .write_all_at(END, end)
        .and_then(|()| whole.file.sync())
        .map_err(Error::io("write it", path))
}

/// The archive, in which members are created one after the other.
struct Members(Arc<Mutex<Whole>>);

struct Whole {
    file: Box<dyn NewFile>,
    /// Where the next member begins.
    end: u64,
    /// What members have as their time.
    created: Timestamp,
}

/// A member being written.
struct Member {
    whole: Arc<Mutex<Whole>>,
    name: PathBuf,
    /// Where its header is.
    start: u64,
    /// Bytes up to the last that was written.
    bytes: u64,
}

fn lock(whole: &Mutex<Whole>) -> MutexGuard<'_, Whole> {
    // Nothing in here panics half-way.
    whole.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Members {
    fn whole(&self) -> MutexGuard<'_, Whole> {
        lock(&self.0)
    }
}

impl NewFiles for Members {
    fn create(&self, path: &Path) -> io::Result<Box<dyn NewFile>> {
        Ok(Box::new(Member {
            whole: self.0.clone(),
            name: path.to_owned(),
            start: self.whole().end,
            bytes: 0,
        }))
    }
}

impl Member {
    fn header(&self, created: Timestamp) -> io::Result<Header> {
        let mut header = Header::new_gnu();
        header.set_path(&self.name)?;
        header.set_entry_type(EntryType::Regular);
        header.set_mode(0o600);
        header.set_mtime(u64::try_from(created.as_second()).unwrap_or(0));
        header.set_size(self.bytes);
        header.set_cksum();
        Ok(header)
    }
}

impl NewFile for Member {
    fn write_all_at(&mut self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let mut whole = lock(&self.whole);
        if whole.end != self.start {
            return Err(io::Error::other(
                "the members of an archive are written one after the other",
            ));
        }
        self.bytes = self.bytes.max(offset + bytes.len() as u64);
        whole.file.write_all_at(bytes, self.start + BLOCK + offset)
    }

    /// Writes the header: only now the length is known. What pads the member is what a file has where nothing was
    /// written; all is made permanent when the archive is complete.
    fn sync(&mut self) -> io::Result<()> {
        let mut whole = lock(&self.whole);
        let header = self.header(whole.created)?;
        whole.file.write_all_at(header.as_bytes(), self.start)?;
        whole.end = self.start + BLOCK + self.bytes.next_multiple_of(BLOCK);
        Ok(())
    }
}
