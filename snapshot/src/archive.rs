//! A snapshot in a single file: a tar archive whose members are the files of a complete snapshot, read where they are.
//!
//! ```text
//!  [ header │ memory.pages … ][ header │ state.bin … ][ header │ manifest.json … ][ 1024 zero bytes, or more ]
//!     512      padded to 512
//! ```
//!
//! Only plain members are read, as `tar` makes of files with short names: no links, no sparse files, no extensions.
//! Every byte is covered, by the checksums of snapshots or by being what it must be.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tar::{EntryType, Header};

use crate::blob::{Blob, LocalFile, Part};
use crate::error::Error;
use crate::manifest::IMAGES_MAX;
use crate::source::Source;

mod writer;

pub use writer::write_archive;

/// Bytes of a header, and what members are padded to.
const BLOCK: u64 = 512;
/// What an archive ends with at least.
const END: &[u8; 1024] = &[0; 1024];
/// Most bytes of zeros at the end: what `tar` pads to by default, and much more.
const END_BYTES_MAX: u64 = 1 << 20;
/// Most members: manifest, state, images.
const MEMBERS_MAX: usize = 2 + IMAGES_MAX;

/// A file that is a snapshot.
#[derive(Debug)]
pub(crate) struct Archive {
    path: PathBuf,
    /// What the snapshot is called: as the file.
    pub name: String,
    members: BTreeMap<String, Arc<Part>>,
}

impl Archive {
    /// Opens the file at `path` and finds its members.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let file = LocalFile::open(path.to_owned())?;
        let file = file.ok_or_else(|| Error::Absent(path.to_owned()))?;
        Self::read(Arc::new(file))
    }

    /// Finds the members of `whole`.
    pub fn read(whole: Arc<dyn Blob>) -> Result<Self, Error> {
        let path = whole.path().to_owned();
        let mut members = BTreeMap::new();
        let mut offset = 0;
        while let Some((name, bytes)) = read_header(&*whole, offset)? {
            let part = Part {
                path: path.join(&name),
                whole: whole.clone(),
                start: offset + BLOCK,
                bytes,
            };
            let end = part.start.checked_add(bytes).filter(|end| *end <= whole.bytes());
            let end = end.ok_or_else(|| Error::damaged(&path, offset, format!("'{name}' is cut short")))?;
            if members.len() == MEMBERS_MAX {
                return Err(Error::invalid(&path, format!("has more than {MEMBERS_MAX} members")));
            }
            if members.insert(name.clone(), Arc::new(part)).is_some() {
                return Err(Error::damaged(&path, offset, format!("'{name}' is there twice")));
            }
            offset = end.next_multiple_of(BLOCK);
            check_zero(&*whole, end, offset)?;
        }
        let rest = whole.bytes() - offset;
        if !(END.len() as u64..=END_BYTES_MAX).contains(&rest) {
            let what = format!("{rest} bytes are not the end of an archive");
            return Err(Error::damaged(&path, offset, what));
        }
        check_zero(&*whole, offset, whole.bytes())?;
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned());
        Ok(Self {
            name: name.unwrap_or_default(),
            path,
            members,
        })
    }
}

/// The name and length of the member whose header is at `offset`; nothing where the archive ends.
fn read_header(whole: &dyn Blob, offset: u64) -> Result<Option<(String, u64)>, Error> {
    let damaged = |what: String| Error::damaged(whole.path(), offset, what);
    let mut header = Header::new_old();
    whole.read_at(header.as_mut_bytes(), offset)?;
    if header.as_bytes().iter().all(|byte| *byte == 0) {
        return Ok(None);
    }
    let mut copy = header.clone();
    copy.set_cksum();
    let expected = copy.as_old().cksum;
    // Writers differ in how many digits they make.
    let [_, digits @ .., _] = expected;
    let shorter = [&digits[..], b"\0 "].concat();
    if header.as_old().cksum != expected && header.as_old().cksum[..] != shorter {
        return Err(damaged("the header of a member does not have its checksum".to_owned()));
    }
    if header.entry_type() != EntryType::Regular {
        return Err(damaged("a member is not a plain file".to_owned()));
    }
    let name = std::str::from_utf8(&header.path_bytes()).map(str::to_owned);
    let name = name.map_err(|_| damaged("a member has a name that is not text".to_owned()))?;
    let bytes = header.entry_size().map_err(|error| damaged(error.to_string()))?;
    Ok(Some((name, bytes)))
}

/// Checks that `whole` has nothing but zeros from `start` to before `end`, which are not far apart.
fn check_zero(whole: &dyn Blob, start: u64, end: u64) -> Result<(), Error> {
    let mut bytes = vec![0; usize::try_from(end - start).expect("bounded by the caller")];
    whole.read_at(&mut bytes, start)?;
    match bytes.iter().position(|byte| *byte != 0) {
        Some(position) => {
            let what = "there is data where only zeros can be";
            Err(Error::damaged(whole.path(), start + position as u64, what))
        }
        None => Ok(()),
    }
}

impl Source for Archive {
    fn path(&self) -> &Path {
        &self.path
    }

    fn path_of(&self, _: &str) -> PathBuf {
        self.path.clone()
    }

    fn names(&self) -> Result<Vec<String>, Error> {
        Ok(vec![self.name.clone()])
    }

    fn open(&self, name: &str, file: &str) -> Result<Option<Arc<dyn Blob>>, Error> {
        let member = self.members.get(file).filter(|_| name == self.name);
        Ok(member.map(|part| part.clone() as Arc<dyn Blob>))
    }
}
