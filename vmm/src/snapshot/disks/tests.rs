//! Disks saved by the real writer and restored by the real reader, as they were at each snapshot.

mod driver;
mod failures;
mod running;

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex, MutexGuard};

use cutover_devices::OnThread;
use cutover_devices::virtio::block::Block;
use cutover_devices::virtio::block::chunks::CHUNK_SIZE;
use cutover_snapshot::chain::Chain;
use cutover_snapshot::manifest::{CpuNeeds, MemoryRegion, Parent};
use cutover_snapshot::section::{Payload, SectionWriter};
use cutover_snapshot::spec::VmSpec;
use cutover_snapshot::store::{Snapshot, Store};
use cutover_snapshot::writer::Draft;
use proptest::prelude::*;
use tempfile::TempDir;

use super::*;
use crate::Error;
use crate::dirty::Baseline;

fn unconfined() -> OnThread {
    Arc::new(|| {})
}

fn unwatched() -> Watch {
    Arc::new(|_| Ok(()))
}

/// Disks with their ids.
type Blocks = Vec<(String, Arc<Mutex<Block>>)>;

/// Disks called `disk0`, `disk1`, …, and a store.
struct Vm {
    directory: TempDir,
    spec: VmSpec,
    blocks: Blocks,
}

impl Vm {
    /// Empty disks of `sizes` bytes.
    fn new(sizes: &[u64]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir(directory.path().join("store")).unwrap();
        let paths: Vec<_> = (0..sizes.len())
            .map(|index| directory.path().join(format!("{index}.raw")))
            .collect();
        for (path, &size) in paths.iter().zip(sizes) {
            File::create(path).unwrap().set_len(size).unwrap();
        }
        let spec = spec_of(&paths);
        let blocks = open(&spec);
        Self {
            directory,
            spec,
            blocks,
        }
    }

    fn store(&self) -> Store {
        Store::open(&self.directory.path().join("store")).unwrap()
    }

    fn disks(&self) -> impl Iterator<Item = (&str, MutexGuard<'_, Block>)> {
        guards(&self.blocks)
    }

    fn track(&self, baseline: Baseline) -> DiskTracks {
        DiskTracks::of(self.disks(), baseline)
    }

    /// What a guest does that writes.
    fn write(&self, disk: usize, offset: u64, bytes: &[u8]) {
        let block = self.blocks[disk].1.lock().unwrap();
        block.disk().file().write_all_at(bytes, offset).unwrap();
        block.writes().record(offset..offset + bytes.len() as u64);
    }

    /// What the disks hold.
    fn contents(&self) -> Vec<Vec<u8>> {
        self.spec
            .disks
            .iter()
            .map(|disk| fs::read(&disk.path).unwrap())
            .collect()
    }

    /// The disks go into a snapshot called `name`, and may then be written again.
    fn save(
        &self,
        store: &Store,
        name: &str,
        parent: Option<&Snapshot>,
        tracks: &DiskTracks,
        compress: Option<i32>,
    ) -> Result<Snapshot, Error> {
        let mut writer = store.create(name, draft(&self.spec, parent))?;
        let whole = |id: &str| !writer.parent_has(&image_name(id), PAGE_BYTES);
        tracks.settle(whole);
        let held = tracks.hold_all(self.disks(), whole)?;
        let copies = held.start(&mut writer, compress, &unwatched(), &unconfined())?;
        let copied = copies.finish(&mut writer)?;
        let snapshot = writer.commit()?;
        copied.commit();
        Ok(snapshot)
    }
}

fn guards(blocks: &[(String, Arc<Mutex<Block>>)]) -> impl Iterator<Item = (&str, MutexGuard<'_, Block>)> {
    blocks.iter().map(|(id, block)| (id.as_str(), block.lock().unwrap()))
}

/// A VM with disks at `paths`.
fn spec_of(paths: &[PathBuf]) -> VmSpec {
    let disks: Vec<_> = paths.iter().map(|path| serde_json::json!({ "path": path })).collect();
    serde_json::from_value(serde_json::json!({
        "name": "sample",
        "cpus": 1,
        "memory": { "size": 1 << 20 },
        "boot": { "kernel": "vmlinux" },
        "disks": disks,
    }))
    .unwrap()
}

/// The disks of `spec`, as a machine that stands still has them.
fn open(spec: &VmSpec) -> Blocks {
    let disks = spec.disks.iter().enumerate().map(|(index, disk)| {
        let block = Block::open(disk, &unconfined()).unwrap();
        (disk.id_at(index), Arc::new(Mutex::new(block)))
    });
    disks.collect()
}

fn draft(spec: &VmSpec, parent: Option<&Snapshot>) -> Draft {
    Draft {
        created: "2026-11-21T12:00:00Z".parse().unwrap(),
        parent: parent.map(Parent::from),
        spec: spec.clone(),
        memory: vec![MemoryRegion {
            start: 0,
            bytes: spec.memory.size.bytes(),
        }],
        cpu: CpuNeeds {
            vendor: String::new(),
            features: Vec::new(),
        },
    }
}

/// Paths for `count` disks in `directory`.
fn targets(directory: &Path, count: usize) -> Vec<PathBuf> {
    (0..count)
        .map(|index| directory.join(format!("restored-{index}.raw")))
        .collect()
}

/// Opens what is to be restored to `paths`.
fn images(snapshot: &Path, paths: &[PathBuf], existing: Existing) -> Result<DiskImages, Error> {
    let chain = Chain::open(snapshot)?;
    let state = chain.state()?;
    DiskImages::open(&chain, &state, &spec_of(paths), existing)
}

/// Ends of filling, in the order they come.
fn outcomes() -> (WhenFilled, Receiver<Result<(), Error>>) {
    let (sender, receiver) = channel();
    let failures = sender.clone();
    let then = WhenFilled {
        done: Arc::new(move || sender.send(Ok(())).unwrap()),
        failed: Arc::new(move |error| failures.send(Err(error)).unwrap()),
    };
    (then, receiver)
}

/// Restores the disks of a snapshot to `paths`, by as many threads for each as `workers`; returns what they hold.
fn restore(snapshot: &Path, paths: &[PathBuf], workers: usize) -> Vec<Vec<u8>> {
    let mut new = images(snapshot, paths, Existing::Kept).unwrap().create().unwrap();
    new.disks.iter_mut().for_each(|disk| disk.workers = workers);
    let blocks = open(&new.spec(&spec_of(paths)));
    let (then, outcomes) = outcomes();
    let filling = new.fill_all(guards(&blocks), &unconfined(), then).unwrap();
    filling.wait(&|| true);
    // Nobody copies them any more: they may be saved, whole or not.
    drop(
        DiskTracks::of(guards(&blocks), Baseline::Now)
            .hold_all(guards(&blocks), |_| false)
            .unwrap(),
    );
    assert!(matches!(outcomes.recv().unwrap(), Ok(())));
    let progress = filling.progress();
    assert_eq!(progress.done, progress.total);
    paths.iter().map(|path| fs::read(path).unwrap()).collect()
}

#[derive(Clone, Debug)]
struct Write {
    disk: usize,
    /// Where, in thousandths of the disk.
    place: u64,
    len: u64,
    /// 0 for zeroes, as after a discard.
    byte: u8,
}

fn write() -> impl Strategy<Value = Write> {
    (0..2_usize, 0..1000_u64, 1..3 * CHUNK_SIZE, 0..4_u8).prop_map(|(disk, place, len, byte)| Write {
        disk,
        place,
        len,
        byte,
    })
}

/// Sizes in which something ends at, before or behind the end of a chunk or of a word of a set.
fn size() -> impl Strategy<Value = u64> {
    let whole = prop::sample::select(vec![1, 2, 5, 64, 65]);
    let sectors = prop::sample::select(vec![-1_i64, 0, 1]);
    (whole, sectors).prop_map(|(chunks, sectors)| (chunks * CHUNK_SIZE).saturating_add_signed(sectors * 512))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]

    #[test]
    fn every_snapshot_of_a_chain_restores_the_disks_as_they_were(
        sizes in [size(), size()],
        writes in prop::collection::vec(prop::collection::vec(write(), 0..6), 4),
        compress in any::<bool>(),
    ) {
        let vm = Vm::new(&sizes);
        let (store, tracks) = (vm.store(), vm.track(Baseline::Nothing));
        let mut saved: Vec<(Snapshot, Vec<Vec<u8>>)> = Vec::new();
        for (number, writes) in writes.iter().enumerate() {
            for write in writes {
                let offset = sizes[write.disk] * write.place / 1000;
                let len = usize::try_from(write.len.min(sizes[write.disk] - offset)).unwrap();
                vm.write(write.disk, offset, &vec![write.byte; len]);
            }
            let parent = saved.last().map(|(snapshot, _)| snapshot);
            let name = format!("snapshot-{number}");
            let snapshot = vm.save(&store, &name, parent, &tracks, compress.then_some(1)).unwrap();
            saved.push((snapshot, vm.contents()));
        }
        for (number, (snapshot, contents)) in saved.iter().enumerate() {
            let directory = tempfile::tempdir_in(vm.directory.path()).unwrap();
            let restored = restore(&snapshot.path, &targets(directory.path(), 2), number + 1);
            prop_assert!(&restored == contents, "snapshot {}", number);
        }
    }
}

#[test]
fn a_full_snapshot_stores_nothing_of_holes_and_an_incremental_one_nothing_but_what_changed() {
    const CHUNKS: u64 = 4096;
    let vm = Vm::new(&[CHUNKS * CHUNK_SIZE]);
    let (store, tracks) = (vm.store(), vm.track(Baseline::Now));
    vm.write(0, 1000 * CHUNK_SIZE - 1, &[1, 2]);
    let full = vm.save(&store, "full", None, &tracks, None).unwrap();
    vm.write(0, 4000 * CHUNK_SIZE, &[3]);
    vm.write(0, 999 * CHUNK_SIZE, &vec![0; usize::try_from(CHUNK_SIZE).unwrap()]);
    let next = vm.save(&store, "next", Some(&full), &tracks, None).unwrap();
    let stored = |snapshot: &Snapshot| {
        let image = snapshot.sealed.manifest.image("disk-disk0").unwrap();
        (image.stored_pages, image.zero_pages)
    };
    assert_eq!((stored(&full), stored(&next)), ((2, 0), (1, 1)));
    // The flat image can be mapped as it is, and is as sparse as the disk.
    let chain = Chain::open(&full.path).unwrap();
    assert!(chain.image("disk-disk0").unwrap().flat_file().is_some());
    assert_eq!(restore(&next.path, &targets(vm.directory.path(), 1), 1), vm.contents());
}

#[test]
fn an_incremental_snapshot_has_all_of_a_disk_that_its_parent_only_refers_to() {
    let vm = Vm::new(&[5 * CHUNK_SIZE, CHUNK_SIZE]);
    let (store, tracks) = (vm.store(), vm.track(Baseline::Now));
    vm.write(0, 0, &[1; 512]);
    vm.write(1, 0, &[2; 512]);
    let saved = vm.save(&store, "saved", None, &tracks, None).unwrap();
    vm.write(0, 3 * CHUNK_SIZE, &[3; 512]);
    let refers = store
        .create("refers", draft(&vm.spec, Some(&saved)))
        .unwrap()
        .commit()
        .unwrap();
    let whole = vm.save(&store, "whole", Some(&refers), &tracks, None).unwrap();
    let image = whole.sealed.manifest.image("disk-disk0").unwrap();
    assert_eq!(
        (image.base, image.stored_pages),
        (cutover_snapshot::manifest::Base::Zero, 2)
    );
    assert_eq!(restore(&whole.path, &targets(vm.directory.path(), 2), 1), vm.contents());
    vm.write(1, 0, &[4; 512]);
    let next = vm.save(&store, "next", Some(&whole), &tracks, None).unwrap();
    let image = next.sealed.manifest.image("disk-disk0").unwrap();
    assert_eq!(
        (image.base, image.stored_pages),
        (cutover_snapshot::manifest::Base::Parent, 0)
    );
    let directory = tempfile::tempdir().unwrap();
    assert_eq!(restore(&next.path, &targets(directory.path(), 2), 1), vm.contents());
}

#[test]
fn all_is_counted_that_is_dealt_with() {
    let vm = Vm::new(&[5 * CHUNK_SIZE, CHUNK_SIZE + 512]);
    vm.write(0, 2 * CHUNK_SIZE, &[1; 512]);
    let tracks = vm.track(Baseline::Nothing);
    let held = tracks.hold_all(vm.disks(), |_| true).unwrap();
    assert_eq!(held.bytes(), 7 * CHUNK_SIZE);
    let counted = Arc::new(AtomicU64::new(0));
    let counter = counted.clone();
    let watch: Watch = Arc::new(move |bytes| {
        counter.fetch_add(bytes, Ordering::Relaxed);
        Ok(())
    });
    let mut writer = vm.store().create("one", draft(&vm.spec, None)).unwrap();
    let copies = held.start(&mut writer, None, &watch, &unconfined()).unwrap();
    copies.finish(&mut writer).unwrap().commit();
    assert_eq!(counted.load(Ordering::Relaxed), 7 * CHUNK_SIZE);
}

#[test]
fn disks_that_can_only_be_read_are_left_out() {
    let vm = Vm::new(&[CHUNK_SIZE, CHUNK_SIZE]);
    let mut spec = vm.spec.clone();
    spec.disks[1].readonly = true;
    let Vm { directory, blocks, .. } = vm;
    drop(blocks);
    let vm = Vm {
        blocks: open(&spec),
        directory,
        spec,
    };
    let tracks = vm.track(Baseline::Nothing);
    let snapshot = vm.save(&vm.store(), "one", None, &tracks, None).unwrap();
    let names: Vec<_> = snapshot
        .sealed
        .manifest
        .images
        .iter()
        .map(|image| &image.name)
        .collect();
    assert_eq!(names, ["disk-disk0"]);
    // Only the first one is created; the second one is where the spec says.
    let directory = tempfile::tempdir().unwrap();
    let paths = targets(directory.path(), 2);
    let new = images(&snapshot.path, &paths, Existing::Kept)
        .unwrap()
        .create()
        .unwrap();
    let built = new.spec(&spec_of(&paths));
    assert_ne!(built.disks[0].path, paths[0]);
    assert_eq!(built.disks[1].path, paths[1]);
}

#[test]
fn a_snapshot_without_disks_restores_none() {
    let vm = Vm::new(&[]);
    let snapshot = vm
        .store()
        .create("none", draft(&vm.spec, None))
        .unwrap()
        .commit()
        .unwrap();
    assert_eq!(restore(&snapshot.path, &[], 1), Vec::<Vec<u8>>::new());
}

/// Keeps the one section it is given.
struct Kept(Option<(String, u16, Vec<u8>)>);

impl SectionWriter for Kept {
    fn payload(&mut self, name: &str, payload: &Payload<'_>) {
        self.0 = Some((name.to_owned(), payload.version, payload.bytes.to_vec()));
    }
}

#[test]
fn the_section_has_the_bytes_of_its_first_version() {
    let saved = SavedDisks {
        disks: vec![SavedDisk {
            id: "root".to_owned(),
            bytes: 66_048,
        }],
    };
    let mut kept = Kept(None);
    kept.section(SECTION, &saved).unwrap();
    let (name, version, bytes) = kept.0.unwrap();
    assert_eq!((name.as_str(), version), ("disks", 1));
    assert_eq!(bytes, [1, 4, b'r', b'o', b'o', b't', 0x80, 0x84, 0x04]);
    let payload = Payload { version, bytes: &bytes };
    assert_eq!(SavedDisks::read(&payload).unwrap(), saved);
    assert!(SavedDisks::read(&Payload { version: 2, ..payload }).is_err());
}
