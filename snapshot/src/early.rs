//! Which pages of memory a guest wanted first when it was restored: a note beside the snapshot, so that they are there
//! when the next one wants them.
//!
//! ```text
//!  memory.early:  [ "cutover-early-1\n" ][ checksum of what follows ][ bytes of the list, u32 LE ][ list of runs ] …
//! ```
//!
//! It is no part of the snapshot: no manifest names it, and what it says decides only about the order in which pages are
//! read, all of which are verified. It is written where it lies, while others may read it: whoever finds one that is
//! damaged has none.

use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::OFlags;

use crate::chain::Chain;
use crate::checksum::Checksum;

/// The note, in the directory of the snapshot.
const FILE: &str = "memory.early";
/// What it begins with.
const MAGIC: &[u8; 16] = b"cutover-early-1\n";
/// Bytes before the list: what the note begins with, a checksum, and a length.
const HEAD: usize = 16 + 16 + 4;
/// Most bytes of a note.
const BYTES_MAX: usize = 64 << 10;
/// Most pages that are noted: with 4 KiB each, as much as can be read before a guest comes to life.
pub const EARLY_PAGES_MAX: u64 = 4096;

/// What is noted of a snapshot, and where it can be.
#[derive(Debug, Default)]
pub struct EarlyPages {
    /// The pages by their numbers, in order and without overlaps, at most [`EARLY_PAGES_MAX`].
    pages: Vec<Range<u64>>,
    /// The note of the newest snapshot, if it can be written.
    note: Option<File>,
}

impl EarlyPages {
    /// What is noted of the newest snapshot of `chain`, or else of the next one that it is built on.
    pub fn of(chain: &Chain) -> Self {
        let mut directories = chain.snapshots().iter().map(|snapshot| snapshot.path.as_path());
        let newest = directories.next().filter(|path| path.is_absolute());
        let note = newest.and_then(|path| open(path, true).ok());
        let mut pages = note.as_ref().and_then(read);
        if pages.is_none() && note.is_none() {
            pages = newest.and_then(|path| read(&open(path, false).ok()?));
        }
        let above = || directories.find_map(|path| read(&open(path, false).ok()?));
        Self {
            pages: pages.or_else(above).unwrap_or_default(),
            note,
        }
    }

    /// The pages by their numbers, in order and without overlaps, at most [`EARLY_PAGES_MAX`].
    pub fn pages(&self) -> &[Range<u64>] {
        &self.pages
    }

    /// Notes that besides those pages these were wanted, of which there are at most [`EARLY_PAGES_MAX`].
    ///
    /// # Errors
    /// The note cannot be written.
    pub fn note(self, wanted: impl IntoIterator<Item = u64>) -> io::Result<()> {
        let Some(note) = self.note else {
            return Ok(());
        };
        let wanted = runs(wanted.into_iter().collect());
        let all = runs(
            self.pages
                .into_iter()
                .flatten()
                .chain(wanted.iter().cloned().flatten())
                .collect(),
        );
        // Those noted before may be wanted no more.
        let noted = Some(all).filter(|all| count(all) <= EARLY_PAGES_MAX).unwrap_or(wanted);
        match encode(&noted) {
            Some(bytes) => note.write_all_at(&bytes, 0),
            None => Ok(()),
        }
    }
}

/// Opens the note in `directory`, to write it or not. Nothing else that has its name is opened, or made another.
fn open(directory: &Path, write: bool) -> io::Result<File> {
    let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK;
    let flags = i32::try_from(flags.bits()).map_err(io::Error::other)?;
    let mut options = OpenOptions::new();
    let options = options.read(true).write(write).create(write).custom_flags(flags);
    let file = options.open(directory.join(FILE))?;
    let metadata = file.metadata()?;
    let mut begin = [0; MAGIC.len()];
    let is_note = metadata.len() == 0 || (file.read_exact_at(&mut begin, 0).is_ok() && begin == *MAGIC);
    if !metadata.is_file() || metadata.nlink() != 1 || !is_note {
        return Err(io::ErrorKind::InvalidData.into());
    }
    Ok(file)
}

/// The pages that `note` has, if it is whole.
fn read(note: &File) -> Option<Vec<Range<u64>>> {
    let mut bytes = vec![0; HEAD];
    note.read_exact_at(&mut bytes, 0).ok()?;
    let (rest, length) = bytes.split_last_chunk::<4>()?;
    let (magic, checksum) = rest.split_at(MAGIC.len());
    let length = usize::try_from(u32::from_le_bytes(*length)).ok()?;
    if magic != MAGIC || length > BYTES_MAX {
        return None;
    }
    let mut list = vec![0; length];
    note.read_exact_at(&mut list, HEAD as u64).ok()?;
    if Checksum::of(&list).to_bytes() != checksum {
        return None;
    }
    let list: Vec<(u64, u64)> = postcard::from_bytes(&list).ok()?;
    let mut pages: Vec<Range<u64>> = Vec::with_capacity(list.len());
    for (first, count) in list {
        let is_next = pages.last().is_none_or(|last| last.end < first);
        let end = first.checked_add(count).filter(|_| is_next && count > 0)?;
        pages.push(first..end);
    }
    Some(pages).filter(|pages| count(pages) <= EARLY_PAGES_MAX)
}

/// The note of `pages`, unless it gets too long.
fn encode(pages: &[Range<u64>]) -> Option<Vec<u8>> {
    let list: Vec<(u64, u64)> = pages.iter().map(|run| (run.start, run.end - run.start)).collect();
    let list = postcard::to_stdvec(&list).ok().filter(|list| list.len() <= BYTES_MAX)?;
    let length = u32::try_from(list.len()).ok()?;
    Some(
        [
            &MAGIC[..],
            &Checksum::of(&list).to_bytes(),
            &length.to_le_bytes(),
            &list,
        ]
        .concat(),
    )
}

/// Pages in any order as runs in order.
fn runs(mut pages: Vec<u64>) -> Vec<Range<u64>> {
    pages.sort_unstable();
    let mut runs: Vec<Range<u64>> = Vec::new();
    for page in pages {
        match runs.last_mut() {
            Some(last) if page < last.end => {}
            Some(last) if page == last.end => last.end += 1,
            _ => runs.push(page..page.saturating_add(1)),
        }
    }
    runs
}

/// How many pages there are.
fn count(pages: &[Range<u64>]) -> u64 {
    pages
        .iter()
        .fold(0, |sum: u64, run| sum.saturating_add(run.end - run.start))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    /// Notes pages in `directory`, and reads what is noted then.
    fn note(directory: &Path, wanted: &[u64]) -> Vec<Range<u64>> {
        let file = open(directory, true).unwrap();
        let early = EarlyPages {
            pages: read(&file).unwrap_or_default(),
            note: Some(file),
        };
        early.note(wanted.iter().copied()).unwrap();
        read(&open(directory, false).unwrap()).unwrap()
    }

    #[test]
    fn pages_that_are_noted_are_read_in_order_with_those_noted_before() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(note(dir.path(), &[9, 3, 4, 9, 7]), [3..5, 7..8, 9..10]);
        assert_eq!(note(dir.path(), &[8, 100]), [3..5, 7..10, 100..101]);
    }

    #[test]
    fn there_are_no_more_than_can_be_read_in_time_and_the_latest_stay() {
        let dir = tempfile::tempdir().unwrap();
        let all: Vec<u64> = (0..EARLY_PAGES_MAX).collect();
        assert_eq!(note(dir.path(), &all).first(), Some(&(0..EARLY_PAGES_MAX)));
        let latest = EARLY_PAGES_MAX + 5;
        assert_eq!(note(dir.path(), &[latest, 3]), [3..4, latest..latest + 1]);
    }

    #[test]
    fn a_note_that_is_damaged_or_cut_anywhere_is_none() {
        let dir = tempfile::tempdir().unwrap();
        note(dir.path(), &[1, 2, 5]);
        let path = dir.path().join(FILE);
        let whole = fs::read(&path).unwrap();
        for position in 0..whole.len() {
            let mut bytes = whole.clone();
            bytes[position] ^= 1;
            fs::write(&path, &bytes).unwrap();
            assert!(
                open(dir.path(), false).ok().and_then(|file| read(&file)).is_none(),
                "{position}"
            );
            fs::write(&path, &whole[..position]).unwrap();
            assert!(
                open(dir.path(), false).ok().and_then(|file| read(&file)).is_none(),
                "{position}"
            );
        }
    }

    #[test]
    fn a_note_that_says_what_cannot_be_is_none() {
        let dir = tempfile::tempdir().unwrap();
        for list in [
            vec![(5, 0)],
            vec![(7, 1), (5, 1)],
            vec![(5, 4), (8, 1)],
            vec![(u64::MAX, 2)],
            vec![(0, 4097)],
        ] {
            let list = postcard::to_stdvec(&list).unwrap();
            let length = u32::try_from(list.len()).unwrap().to_le_bytes();
            let bytes = [&MAGIC[..], &Checksum::of(&list).to_bytes(), &length, &list].concat();
            fs::write(dir.path().join(FILE), bytes).unwrap();
            assert_eq!(read(&open(dir.path(), false).unwrap()), None);
        }
    }

    #[test]
    fn what_is_no_note_is_neither_read_nor_overwritten() {
        let dir = tempfile::tempdir().unwrap();
        let (other, path) = (dir.path().join("other"), dir.path().join(FILE));
        fs::write(&other, [&MAGIC[..], &[0; 100]].concat()).unwrap();
        std::os::unix::fs::symlink(&other, &path).unwrap();
        assert!(open(dir.path(), true).is_err(), "a link");
        fs::remove_file(&path).unwrap();
        fs::hard_link(&other, &path).unwrap();
        assert!(open(dir.path(), true).is_err(), "another file");
        fs::remove_file(&path).unwrap();
        fs::write(&path, "somebody's").unwrap();
        assert!(open(dir.path(), true).is_err(), "something else");
        fs::remove_file(&path).unwrap();
        fs::create_dir(&path).unwrap();
        assert!(open(dir.path(), true).is_err(), "a directory");
    }
}
