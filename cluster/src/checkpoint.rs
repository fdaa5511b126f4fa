//! Checkpoints of a group that are kept in a directory, from which it can be restored when nothing of it runs any more.
//!
//! ```text
//!  STORE/GROUP/ ─┬─ NAME.json         a manifest: which snapshots are of one cut. Written last, so there is all of it or nothing
//!                └─ vms/VM/SNAPSHOT/  a store of snapshots for each member, each a chain
//! ```
//! Each member writes its own snapshots, the coordinator the manifest: where hosts share no storage, each has its part.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::error::Error;
use crate::id::{Epoch, Generation, MemberId};

/// The version of manifests.
const VERSION: u32 = 1;
/// What names of manifests end with.
const SUFFIX: &str = ".json";
/// Directory of members' snapshots in that of the group.
const VMS: &str = "vms";
/// Most bytes of a manifest: as many members as there can be, with long names.
const MANIFEST_BYTES_MAX: u64 = 1 << 20;
/// Most entries of a directory that are looked at.
const ENTRIES_MAX: usize = 1 << 16;
/// Most bytes of a name: that of a snapshot has [a few more](StoreRequest::snapshot_name).
pub const NAME_MAX: usize = 55;

/// A checkpoint of a group, made up when it is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct CheckpointId(pub Uuid);

impl CheckpointId {
    /// One that there never was.
    pub fn made_up() -> Self {
        Self(Uuid::new_v4())
    }
}

/// What is asked of a member for a checkpoint that is stored.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Order {
    /// Which checkpoint.
    pub id: CheckpointId,
    /// The directory of checkpoints, which exists on the member's host.
    pub store: PathBuf,
    /// The directory of the member's snapshots in it.
    pub chain: PathBuf,
    /// What the member's snapshot is to be called there.
    pub snapshot: String,
    /// Save all, also if there is a snapshot that could be built on.
    pub full: bool,
    /// Compress with zstd at this level.
    pub compress: Option<i32>,
}

/// What is asked of a group.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct StoreRequest {
    /// Which checkpoint it will be.
    pub id: CheckpointId,
    /// The directory of checkpoints, which exists on all hosts.
    pub store: PathBuf,
    /// What the checkpoint is to be called.
    pub name: String,
    /// Save all.
    pub full: bool,
    /// Compress with zstd at this level.
    pub compress: Option<i32>,
}

/// A member's snapshot that is permanent.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StoredSnapshot {
    /// Its id.
    pub id: Uuid,
    /// Its name.
    pub name: String,
    /// The name of the one it is built on.
    pub parent: Option<String>,
    /// Bytes of its files.
    pub file_bytes: u64,
    /// How long the guest stood still for the cut, in nanoseconds.
    pub pause_ns: u64,
}

/// A cut of which all members have a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct StoredCut {
    /// Which.
    pub cut: Epoch,
    /// The generation it was taken in.
    pub generation: Generation,
    /// Of each member.
    pub snapshots: Vec<(MemberId, StoredSnapshot)>,
}

/// What makes snapshots a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// How to read it.
    pub version: u32,
    /// Name of the group.
    pub group: String,
    /// Name of the checkpoint.
    pub name: String,
    /// When it was complete: seconds since the beginning of 1970 (UTC).
    pub created: u64,
    /// The cut that all of it is of.
    pub cut: Epoch,
    /// The generation the group was in.
    pub generation: Generation,
    /// Its members.
    pub members: Vec<StoredMember>,
}

/// A member in a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StoredMember {
    /// Name of its VM.
    pub vm: String,
    /// Its snapshot, in [`Manifest::snapshot_path`].
    pub snapshot: StoredSnapshot,
}

impl StoreRequest {
    /// What is asked of the member that is VM `vm` of `group`.
    pub fn order(&self, group: &str, vm: &str) -> Order {
        Order {
            id: self.id,
            store: self.store.clone(),
            chain: Path::new(group).join(VMS).join(vm),
            snapshot: self.snapshot_name(),
            full: self.full,
            compress: self.compress,
        }
    }

    /// Its own for each try: what one that came to nothing left is not in the way of the next.
    fn snapshot_name(&self) -> String {
        let id = self.id.0.simple().to_string();
        format!("{}.{}", self.name, &id[..8])
    }

    /// Whether there can be such a checkpoint.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn validate(&self) -> Result<(), String> {
        check_name(&self.name)?;
        if !self.store.is_absolute() {
            return Err(format!("{} is not named from the root", self.store.display()));
        }
        Ok(())
    }
}

/// Names are those of files, and of snapshots.
fn check_name(name: &str) -> Result<(), String> {
    if name.len() > NAME_MAX || cutover_snapshot::store::check_name(name).is_err() {
        return Err(format!(
            "'{name}' is not 1 to {NAME_MAX} letters, digits, '-', '_' or '.', the first not a '.'"
        ));
    }
    Ok(())
}

impl Manifest {
    /// Of a `cut` of `group` that `request` asked for; `names` are those of its members in order.
    pub fn new(request: &StoreRequest, group: &str, names: &[&str], cut: StoredCut, created: u64) -> Self {
        let name = |member: MemberId| names.get(usize::from(member.0)).copied().unwrap_or_default().to_owned();
        let members = cut.snapshots.into_iter().map(|(member, snapshot)| StoredMember {
            vm: name(member),
            snapshot,
        });
        Self {
            version: VERSION,
            group: group.to_owned(),
            name: request.name.clone(),
            created,
            cut: cut.cut,
            generation: cut.generation,
            members: members.collect(),
        }
    }

    /// Where the snapshot of `member` is, if the directory of the group is `dir`.
    pub fn snapshot_path(dir: &Path, member: &StoredMember) -> PathBuf {
        dir.join(VMS).join(&member.vm).join(&member.snapshot.name)
    }

    /// The manifest of checkpoint `name` in the group's directory `dir`.
    ///
    /// # Errors
    /// There is none, or it is damaged.
    pub fn read(dir: &Path, name: &str) -> Result<Self, Error> {
        let path = dir.join(format!("{name}{SUFFIX}"));
        let failed = |reason: String| Error::Checkpoint {
            path: path.clone(),
            action: "read it",
            reason,
        };
        check_name(name).map_err(failed)?;
        let size = path.metadata().map_err(|error| failed(error.to_string()))?.len();
        if size > MANIFEST_BYTES_MAX {
            return Err(failed(format!("it has more than {MANIFEST_BYTES_MAX} bytes")));
        }
        let text = fs::read(&path).map_err(|error| failed(error.to_string()))?;
        let manifest: Self = serde_json::from_slice(&text).map_err(|error| failed(error.to_string()))?;
        manifest.check(name).map_err(failed)?;
        Ok(manifest)
    }

    /// What it says is not trusted: names become paths.
    fn check(&self, name: &str) -> Result<(), String> {
        if self.version != VERSION {
            return Err(format!("it has version {}, and this reads {VERSION}", self.version));
        }
        if self.name != name {
            return Err(format!("it is that of '{}'", self.name));
        }
        for member in &self.members {
            for part in [&member.vm, &member.snapshot.name] {
                if cutover_snapshot::store::check_name(part).is_err() {
                    return Err(format!("'{part}' is no name"));
                }
            }
        }
        Ok(())
    }

    /// The checkpoints in the group's directory `dir` that can be read, the oldest first.
    ///
    /// # Errors
    /// The directory cannot be read.
    pub fn list(dir: &Path) -> Result<Vec<Self>, Error> {
        let failed = |error: io::Error| Error::Checkpoint {
            path: dir.to_owned(),
            action: "read it as the directory of a group's checkpoints",
            reason: error.to_string(),
        };
        let mut found = Vec::new();
        for entry in fs::read_dir(dir).map_err(failed)?.take(ENTRIES_MAX) {
            let name = entry.map_err(failed)?.file_name();
            let Some(name) = name.to_str().and_then(|name| name.strip_suffix(SUFFIX)) else {
                continue;
            };
            match Self::read(dir, name) {
                Ok(manifest) => found.push(manifest),
                Err(error) => tracing::warn!(%error, "left out"),
            }
        }
        found.sort_by(|a, b| (a.created, a.cut, &a.name).cmp(&(b.created, b.cut, &b.name)));
        Ok(found)
    }

    /// Whether one of this name is there already, in directory `store` of checkpoints.
    pub fn exists(store: &Path, group: &str, name: &str) -> bool {
        store.join(group).join(format!("{name}{SUFFIX}")).exists()
    }

    /// Makes it permanent in directory `store`, as a whole.
    ///
    /// # Errors
    /// One of this name is there, or it cannot be written: then there is nothing of it.
    pub fn write(&self, store: &Path) -> Result<(), Error> {
        let dir = store.join(&self.group);
        let path = dir.join(format!("{}{SUFFIX}", self.name));
        self.write_to(store, &dir, &path).map_err(|error| Error::Checkpoint {
            path,
            action: "write it",
            reason: error.to_string(),
        })
    }

    fn write_to(&self, store: &Path, dir: &Path, path: &Path) -> io::Result<()> {
        // Where members have no storage in common with the coordinator, nobody has made it yet; what it is in has to be there.
        match fs::create_dir(dir) {
            Ok(()) => File::open(store)?.sync_all()?,
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error),
        }
        let beside = dir.join(format!(".{}.{}", self.name, Uuid::new_v4().simple()));
        let written = self.write_beside(&beside).and_then(|()| {
            // Unlike rename(2), this does not replace what is there.
            fs::hard_link(&beside, path)
        });
        let removed = fs::remove_file(&beside);
        written.and(removed)?;
        File::open(dir)?.sync_all()
    }

    fn write_beside(&self, path: &Path) -> io::Result<()> {
        let mut file = File::create_new(path)?;
        let mut text = serde_json::to_vec_pretty(self)?;
        text.push(b'\n');
        file.write_all(&text)?;
        file.sync_all()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(name: &str) -> StoreRequest {
        StoreRequest {
            id: CheckpointId(Uuid::nil()),
            store: "/store".into(),
            name: name.to_owned(),
            full: false,
            compress: None,
        }
    }

    fn manifest(name: &str, created: u64) -> Manifest {
        let snapshot = StoredSnapshot {
            id: Uuid::nil(),
            name: request(name).snapshot_name(),
            parent: None,
            file_bytes: 7,
            pause_ns: 8,
        };
        let cut = StoredCut {
            cut: 9,
            generation: Generation(2),
            snapshots: vec![(MemberId(1), snapshot)],
        };
        Manifest::new(&request(name), "shop", &["web", "db"], cut, created)
    }

    #[test]
    fn a_checkpoint_is_listed_and_read_when_its_manifest_is_written() {
        let store = tempfile::tempdir().expect("a folder");
        let dir = store.path().join("shop");
        manifest("b", 2).write(store.path()).expect("a folder");
        manifest("a", 1).write(store.path()).expect("a folder");
        let listed = Manifest::list(&dir).expect("a folder");
        assert_eq!(listed, [manifest("a", 1), manifest("b", 2)]);
        assert_eq!(Manifest::read(&dir, "a").expect("it is there"), manifest("a", 1));
        assert!(Manifest::exists(store.path(), "shop", "a"));
        assert_eq!(
            Manifest::snapshot_path(&dir, &listed[0].members[0]),
            dir.join("vms/db/a.00000000")
        );
        assert_eq!(fs::read_dir(&dir).expect("a folder").count(), 2, "nothing else is left");
    }

    #[test]
    fn one_checkpoint_does_not_take_the_place_of_another() {
        let store = tempfile::tempdir().expect("a folder");
        manifest("a", 1).write(store.path()).expect("a folder");
        manifest("a", 2).write(store.path()).expect_err("it is there already");
        let kept = Manifest::read(&store.path().join("shop"), "a").expect("it is there");
        assert_eq!(kept.created, 1);
    }

    #[test]
    fn a_manifest_that_names_a_way_out_of_its_directory_is_refused() {
        let store = tempfile::tempdir().expect("a folder");
        let mut hostile = manifest("a", 1);
        hostile.members[0].vm = "..".to_owned();
        hostile.write(store.path()).expect("a folder");
        let dir = store.path().join("shop");
        let error = Manifest::read(&dir, "a").expect_err("it is hostile").to_string();
        assert!(error.contains("'..' is no name"), "{error}");
        assert_eq!(Manifest::list(&dir).expect("a folder"), []);
        Manifest::read(&dir, "../a").expect_err("no name");
    }

    #[test]
    fn names_have_room_for_what_makes_them_a_snapshots() {
        let longest = "n".repeat(NAME_MAX);
        request(&longest).validate().expect("a name");
        let order = request(&longest).order("shop", "web");
        cutover_snapshot::store::check_name(&order.snapshot).expect("a name");
        assert_eq!(order.chain, Path::new("shop/vms/web"));
        request(&"n".repeat(NAME_MAX + 1)).validate().expect_err("too long");
        request("a/b").validate().expect_err("no name");
    }
}
