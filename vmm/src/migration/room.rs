//! Whether there is room for disks that move in, before anything of them has.
//!
//! A disk that has an older copy here begins as a copy of that, so until it takes its place there has to be room for what
//! both have. A file system that several disks go to has to have room for all of them.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use cutover_migration::vm::ImageShape;
use cutover_snapshot::size::ByteSize;
use cutover_snapshot::spec::VmSpec;
use rustix::fs::statvfs;

use crate::snapshot::directory_of;
use crate::snapshot::disks::image_name;

/// Bytes of the blocks that `st_blocks` counts (stat(3type)).
const BLOCK_BYTES: u64 = 512;

/// What goes to one file system.
struct Load<'a> {
    /// Where one of the disks is to be.
    directory: &'a Path,
    bytes: u64,
}

/// Why the disks of `spec` that `shapes` tell of do not all fit where they are to be. Of a directory that there is not,
/// whoever makes the files will tell.
pub fn lacking(spec: &VmSpec, shapes: &[ImageShape]) -> Vec<String> {
    let mut loads = BTreeMap::new();
    for (index, disk) in spec.disks.iter().enumerate() {
        let name = image_name(&disk.id_at(index));
        let directory = directory_of(&disk.path);
        let shape = shapes.iter().find(|shape| shape.name == name);
        if let (Some(shape), Ok(metadata)) = (shape, fs::metadata(directory)) {
            let load = loads.entry(metadata.dev()).or_insert(Load { directory, bytes: 0 });
            load.bytes = load.bytes.saturating_add(needed(shape, &disk.path));
        }
    }
    loads.values().filter_map(Load::lacks).collect()
}

/// Room for the disk that is to be at `path`, next to an older copy.
fn needed(shape: &ImageShape, path: &Path) -> u64 {
    let older = fs::metadata(path).map_or(0, |older| older.blocks().saturating_mul(BLOCK_BYTES));
    shape.data.saturating_add(older).min(shape.bytes)
}

impl Load<'_> {
    /// Why the file system does not take it, if so.
    fn lacks(&self) -> Option<String> {
        let system = statvfs(self.directory).ok()?;
        let free = system.f_bavail.saturating_mul(system.f_frsize);
        let [needed, free] = (self.bytes > free).then_some([self.bytes, free].map(ByteSize::from_bytes))?;
        let directory = self.directory.display();
        Some(format!(
            "its disks that move need {needed} in {directory}, which has room for {free}"
        ))
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use cutover_snapshot::spec::DiskSpec;

    use super::*;

    fn shape(disk: usize, data: u64) -> ImageShape {
        ImageShape {
            name: image_name(&format!("disk{disk}")),
            pages: u64::MAX / 8192,
            bytes: u64::MAX / 2,
            data,
        }
    }

    /// A VM with disks at `paths`.
    fn spec(paths: &[PathBuf]) -> VmSpec {
        let disk = |path| serde_json::from_value::<DiskSpec>(serde_json::json!({ "path": path })).unwrap();
        VmSpec {
            disks: paths.iter().map(disk).collect(),
            ..crate::testing::tiny_spec(Path::new("kernel"))
        }
    }

    #[test]
    fn disks_have_to_fit_together_where_they_go_and_their_holes_take_no_room() {
        let directory = tempfile::tempdir().unwrap();
        let spec = spec(&["a", "b"].map(|name| directory.path().join(name)));
        assert!(lacking(&spec, &[]).is_empty(), "none moves");
        let system = statvfs(directory.path()).unwrap();
        let most = system.f_blocks * system.f_frsize;
        assert!(lacking(&spec, &[shape(0, 1 << 12), shape(1, 1 << 12)]).is_empty());
        let reasons = lacking(&spec, &[shape(0, most / 2 + 1), shape(1, most / 2 + 1)]);
        assert_eq!(reasons.len(), 1, "{reasons:?}");
        assert!(reasons[0].contains(&*directory.path().to_string_lossy()), "{reasons:?}");
    }

    #[test]
    fn what_an_older_copy_has_needs_room_too_but_no_more_than_the_disk_is_long() {
        let older = tempfile::NamedTempFile::new().unwrap();
        fs::write(older.path(), vec![1; 1 << 20]).unwrap();
        older.as_file().sync_all().unwrap();
        assert!(needed(&shape(0, 4096), older.path()) >= 4096 + (1 << 20));
        let short = ImageShape {
            bytes: 1 << 19,
            ..shape(0, 4096)
        };
        assert_eq!(needed(&short, older.path()), 1 << 19);
    }

    #[test]
    fn a_directory_that_is_not_there_is_for_others_to_tell() {
        assert!(lacking(&spec(&[PathBuf::from("/nowhere/at/all")]), &[shape(0, u64::MAX)]).is_empty());
    }
}
