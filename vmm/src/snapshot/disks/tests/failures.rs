//! What goes wrong costs no snapshot, no disk and no write of the guest.

use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};

use cutover_devices::virtio::DeviceError;
use cutover_devices::virtio::block::chunks::ChunkSet;
use cutover_devices::virtio::block::gate::Holds;
use cutover_snapshot::error::Error as SnapshotError;
use cutover_snapshot::files::{Files, HostFiles, NewFile, NewFiles};
use cutover_snapshot::image::{Layout, Shape};
use cutover_snapshot::manifest::Base;
use tempfile::NamedTempFile;

use super::*;

/// A file system that is full after so many writes.
#[derive(Clone)]
struct FullAfter(Arc<AtomicUsize>);

impl FullAfter {
    fn write(&self) -> io::Result<()> {
        let room = self
            .0
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1));
        room.map(|_| ()).map_err(|_| io::ErrorKind::StorageFull.into())
    }
}

impl NewFiles for FullAfter {
    fn create(&self, path: &Path) -> io::Result<Box<dyn NewFile>> {
        Ok(Box::new(LimitedFile {
            file: HostFiles.create(path)?,
            limit: self.clone(),
        }))
    }
}

impl Files for FullAfter {
    fn create_dir(&self, path: &Path) -> io::Result<()> {
        HostFiles.create_dir(path)
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        HostFiles.sync_dir(path)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        HostFiles.rename(from, to)
    }

    fn exchange(&self, one: &Path, other: &Path) -> io::Result<()> {
        HostFiles.exchange(one, other)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        HostFiles.remove(path)
    }
}

struct LimitedFile {
    file: Box<dyn NewFile>,
    limit: FullAfter,
}

impl NewFile for LimitedFile {
    fn write_all_at(&mut self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.limit.write()?;
        self.file.write_all_at(bytes, offset)
    }

    fn sync(&mut self) -> io::Result<()> {
        self.file.sync()
    }
}

/// The disks may be held again: nobody copies them.
fn assert_nothing_is_held(vm: &Vm, tracks: &DiskTracks) {
    drop(tracks.hold_all(vm.disks(), |_| true).unwrap());
}

#[test]
fn a_store_that_is_full_at_any_point_of_a_snapshot_loses_nothing() {
    let vm = Vm::new(&[3 * CHUNK_SIZE, CHUNK_SIZE + 512]);
    let tracks = vm.track(Baseline::Nothing);
    let full = vm.save(&vm.store(), "full", None, &tracks, None).unwrap();
    vm.write(0, CHUNK_SIZE, &[1; 512]);
    vm.write(1, CHUNK_SIZE, &[2; 512]);
    let mut room = 0;
    let next = loop {
        let files = FullAfter(Arc::new(AtomicUsize::new(room)));
        let store = Store::with_files(vm.store().dir(), Arc::new(files)).unwrap();
        match vm.save(&store, "next", Some(&full), &tracks, None) {
            Ok(next) => break next,
            Err(Error::Snapshot(SnapshotError::Full(_))) => assert_nothing_is_held(&vm, &tracks),
            Err(other) => panic!("{other}"),
        }
        // Before it is tried again, the guest goes on.
        room += 1;
        vm.write(0, 0, &[u8::try_from(room).unwrap(); 512]);
    };
    // Two chunks, two indexes, the state and the manifest.
    assert!(room >= 6, "failed {room} times");
    assert_eq!(restore(&next.path, &targets(vm.directory.path(), 2), 1), vm.contents());
}

#[test]
fn a_snapshot_that_is_given_up_lets_go_of_the_disks_and_forgets_nothing() {
    let vm = Vm::new(&[3 * CHUNK_SIZE]);
    let tracks = vm.track(Baseline::Nothing);
    let full = vm.save(&vm.store(), "full", None, &tracks, None).unwrap();
    vm.write(0, 0, &[1; 512]);
    drop(tracks.hold_all(vm.disks(), |_| false).unwrap());
    let mut writer = vm.store().create("given-up", draft(&vm.spec, Some(&full))).unwrap();
    let held = tracks.hold_all(vm.disks(), |_| false).unwrap();
    assert_eq!(held.bytes(), CHUNK_SIZE);
    let nobody_wants_it: Watch = Arc::new(|_| Err(Error::SnapshotCancelled));
    let copies = held.start(&mut writer, None, &nobody_wants_it, &unconfined()).unwrap();
    assert!(matches!(copies.finish(&mut writer), Err(Error::SnapshotCancelled)));
    let held = tracks.hold_all(vm.disks(), |_| false).unwrap();
    assert_eq!(held.bytes(), CHUNK_SIZE);
    let mut writer = vm.store().create("given-up", draft(&vm.spec, Some(&full))).unwrap();
    drop(held.start(&mut writer, None, &unwatched(), &unconfined()).unwrap());
    assert_eq!(tracks.hold_all(vm.disks(), |_| false).unwrap().bytes(), CHUNK_SIZE);
}

#[test]
fn a_disk_that_cannot_be_read_is_named_and_fails_the_snapshot() {
    let vm = Vm::new(&[CHUNK_SIZE, 3 * CHUNK_SIZE]);
    vm.write(1, 0, &[1]);
    let tracks = vm.track(Baseline::Nothing);
    let held = tracks.hold_all(vm.disks(), |_| true).unwrap();
    let shrunk = File::options().write(true).open(&vm.spec.disks[1].path).unwrap();
    shrunk.set_len(512).unwrap();
    let mut writer = vm.store().create("one", draft(&vm.spec, None)).unwrap();
    let copies = held.start(&mut writer, None, &unwatched(), &unconfined()).unwrap();
    let Err(error) = copies.finish(&mut writer) else {
        panic!("it cannot have been read");
    };
    let message = error.to_string();
    assert!(message.starts_with("cannot read disk 'disk1' at byte 0 "), "{message}");
    assert_nothing_is_held(&vm, &tracks);
}

/// A snapshot of one disk with content, and a directory to restore to.
fn saved() -> (Vm, Snapshot, PathBuf) {
    let vm = Vm::new(&[9 * CHUNK_SIZE]);
    for chunk in 0..9 {
        vm.write(0, chunk * CHUNK_SIZE, &[u8::try_from(chunk).unwrap() + 1; 512]);
    }
    let snapshot = vm
        .save(&vm.store(), "one", None, &vm.track(Baseline::Nothing), None)
        .unwrap();
    let directory = vm.directory.path().join("restored");
    fs::create_dir(&directory).unwrap();
    (vm, snapshot, directory)
}

fn names(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).unwrap();
    entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect()
}

#[test]
fn a_file_in_the_way_stays_unless_it_may_be_replaced_and_then_until_that_is_complete() {
    let (vm, snapshot, directory) = saved();
    let paths = targets(&directory, 1);
    fs::write(&paths[0], "precious").unwrap();
    let refused = images(&snapshot.path, &paths, Existing::Kept).map(drop).unwrap_err();
    let message = refused.to_string();
    assert!(message.contains("allow files to be replaced"), "{message}");
    let new = images(&snapshot.path, &paths, Existing::Replaced)
        .unwrap()
        .create()
        .unwrap();
    assert_eq!(fs::read(&paths[0]).unwrap(), b"precious");
    let blocks = open(&new.spec(&spec_of(&paths)));
    assert_eq!(fs::read(&paths[0]).unwrap(), b"precious");
    let (then, _outcomes) = outcomes();
    let filling = new.fill_all(guards(&blocks), &unconfined(), then).unwrap();
    filling.wait(&|| true);
    assert_eq!(fs::read(&paths[0]).unwrap(), vm.contents()[0]);
    assert_eq!(names(&directory), ["restored-0.raw"]);
}

#[test]
fn only_files_that_nobody_uses_are_replaced() {
    let (vm, snapshot, directory) = saved();
    let link = directory.join("link");
    std::os::unix::fs::symlink("nowhere", &link).unwrap();
    for (path, existing, reason) in [
        (&vm.spec.disks[0].path, Existing::Replaced, "is in use"),
        (&directory, Existing::Replaced, "not a regular file"),
        (&link, Existing::Replaced, "not a regular file"),
        (&link, Existing::Kept, "not a regular file"),
    ] {
        let refused = images(&snapshot.path, std::slice::from_ref(path), existing);
        let message = refused.map(drop).unwrap_err().to_string();
        assert!(message.contains(reason), "{message}");
    }
}

#[test]
fn a_file_that_appears_meanwhile_stays_and_the_disk_is_kept_under_another_name() {
    let (vm, snapshot, directory) = saved();
    let paths = targets(&directory, 1);
    let new = images(&snapshot.path, &paths, Existing::Kept)
        .unwrap()
        .create()
        .unwrap();
    fs::write(&paths[0], "somebody else's").unwrap();
    let blocks = open(&new.spec(&spec_of(&paths)));
    let (then, outcomes) = outcomes();
    let _filling = new.fill_all(guards(&blocks), &unconfined(), then).unwrap();
    let Err(Error::DiskFile { path, .. }) = outcomes.recv().unwrap() else {
        panic!("the file is in the way");
    };
    assert_eq!(fs::read(&paths[0]).unwrap(), b"somebody else's");
    assert_eq!(fs::read(&path).unwrap(), vm.contents()[0]);
    // The next restore, which removes what was left of others, leaves it.
    drop(
        images(&snapshot.path, &paths, Existing::Replaced)
            .unwrap()
            .create()
            .unwrap(),
    );
    assert!(path.exists());
}

#[test]
fn nothing_is_left_of_disks_that_are_not_filled() {
    let (_vm, snapshot, directory) = saved();
    let paths = targets(&directory, 1);
    let new = images(&snapshot.path, &paths, Existing::Kept).unwrap();
    assert_eq!(names(&directory).len(), 0);
    let new = new.create().unwrap();
    assert_eq!(names(&directory).len(), 1);
    drop(new);
    assert_eq!(names(&directory).len(), 0);
}

#[test]
fn a_damaged_chunk_ends_the_restore_naming_file_and_offset_and_is_never_shown() {
    let (_vm, snapshot, directory) = saved();
    let pages = snapshot.path.join("disk-disk0.pages");
    let file = File::options().write(true).open(&pages).unwrap();
    file.write_all_at(&[0xff], 5 * CHUNK_SIZE + 100).unwrap();
    let paths = targets(&directory, 1);
    let new = images(&snapshot.path, &paths, Existing::Kept)
        .unwrap()
        .create()
        .unwrap();
    let blocks = open(&new.spec(&spec_of(&paths)));
    let (then, outcomes) = outcomes();
    let filling = new.fill_all(guards(&blocks), &unconfined(), then).unwrap();
    let message = outcomes.recv().unwrap().unwrap_err().to_string();
    let expected = format!("{}: damaged at byte {}", pages.display(), 4 * CHUNK_SIZE);
    assert!(message.starts_with(&expected), "{message}");
    // No file, and the guest waits for what is not there.
    drop(filling);
    assert_eq!(names(&directory).len(), 0);
    let chunks = ChunkSet::none(9 * CHUNK_SIZE);
    let held = blocks[0].1.lock().unwrap().hold(Holds::Writes, chunks).map(drop);
    assert!(matches!(held, Err(DeviceError::DiskBeingCopied)));
}

#[test]
fn a_disk_that_runs_full_ends_the_restore_naming_it() {
    let (_vm, snapshot, directory) = saved();
    let paths = targets(&directory, 1);
    let mut new = images(&snapshot.path, &paths, Existing::Kept)
        .unwrap()
        .create()
        .unwrap();
    let blocks = open(&new.spec(&spec_of(&paths)));
    let full = File::options().write(true).open("/dev/full").unwrap();
    for disk in &mut new.disks {
        let path = std::mem::replace(&mut disk.file, NamedTempFile::new().unwrap()).into_temp_path();
        disk.file = NamedTempFile::from_parts(full.try_clone().unwrap(), path);
    }
    let (then, outcomes) = outcomes();
    let _filling = new.fill_all(guards(&blocks), &unconfined(), then).unwrap();
    let message = outcomes.recv().unwrap().unwrap_err().to_string();
    let expected = format!("disk 'disk0': cannot fill {}: No space left", paths[0].display());
    assert!(message.starts_with(&expected), "{message}");
}

#[test]
fn a_snapshot_whose_disks_do_not_fit_the_vm_is_refused_before_anything_is_created() {
    let saved = |id: &str, bytes| SavedDisk {
        id: id.to_owned(),
        bytes,
    };
    let cases = [
        (vec![saved("disk0", 0)], "are not whole sectors"),
        (vec![saved("disk0", CHUNK_SIZE + 1)], "are not whole sectors"),
        (vec![saved("disk0", 2 * CHUNK_SIZE)], "do not make 1 pages"),
        (vec![saved("disk0", CHUNK_SIZE); 2], "lists it twice"),
        (vec![saved("disk1", CHUNK_SIZE)], "has no such disk"),
    ];
    for (disks, reason) in cases {
        let vm = Vm::new(&[CHUNK_SIZE]);
        let mut writer = vm.store().create("odd", draft(&vm.spec, None)).unwrap();
        for id in ["disk0", "disk1"] {
            let shape = Shape {
                page_bytes: PAGE_BYTES,
                pages: 1,
                base: Base::Zero,
                layout: Layout::Flat,
            };
            let image = writer.image(&image_name(id), shape).unwrap();
            writer.complete(image).unwrap();
        }
        writer.section(SECTION, &SavedDisks { disks }).unwrap();
        let snapshot = writer.commit().unwrap();
        let paths = targets(vm.directory.path(), 1);
        let message = images(&snapshot.path, &paths, Existing::Kept)
            .map(drop)
            .unwrap_err()
            .to_string();
        assert!(message.contains(reason), "{message}");
    }
}
