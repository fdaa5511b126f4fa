//! Disks that a driver goes on using while they are saved and filled.

use cutover_snapshot::spec::DiskIo;

use super::driver::Driver;
use super::*;

const ENGINES: [DiskIo; 2] = [DiskIo::IoUring, DiskIo::Threads];
const SIZE: u64 = 37 * CHUNK_SIZE + 512;
const SECTORS: u64 = SIZE / 512;

/// The same disks with another engine.
fn with_engine(vm: Vm, io: DiskIo) -> Vm {
    let Vm {
        directory,
        mut spec,
        blocks,
    } = vm;
    drop(blocks);
    spec.disks[0].io = io;
    Vm {
        directory,
        blocks: open(&spec),
        spec,
    }
}

/// Has `driver` write a sector of its own content, one after the other all over the disk, and notes that in `expected`.
fn write_some(driver: &mut Driver, expected: &mut [u8], round: u64) {
    for index in 0..150 {
        let sector = (round * 331 + index * 1009) % SECTORS;
        let content = (round * 1000 + index).to_le_bytes().repeat(64);
        driver.write(sector, &content);
        let at = usize::try_from(sector * 512).unwrap();
        expected[at..at + 512].copy_from_slice(&content);
    }
}

#[test]
fn a_disk_is_saved_as_it_was_when_it_was_held_however_its_driver_goes_on() {
    for (io, compress) in [(ENGINES[0], None), (ENGINES[1], Some(1))] {
        let vm = with_engine(Vm::new(&[SIZE]), io);
        let (store, tracks) = (vm.store(), vm.track(Baseline::Nothing));
        let mut driver = Driver::start(&vm.blocks[0].1);
        let mut content = vec![0; usize::try_from(SIZE).unwrap()];
        let mut saved: Vec<(Snapshot, Vec<u8>)> = Vec::new();
        for round in 0..4 {
            write_some(&mut driver, &mut content, 2 * round);
            let parent = saved.last().map(|(snapshot, _)| snapshot);
            let mut writer = store.create(&format!("s{round}"), draft(&vm.spec, parent)).unwrap();
            driver.transport.pause();
            let held = tracks.hold_all(vm.disks(), |_| parent.is_none()).unwrap();
            let at_the_pause = content.clone();
            driver.transport.resume();
            let copies = held.start(&mut writer, compress, &unwatched(), &unconfined()).unwrap();
            write_some(&mut driver, &mut content, 2 * round + 1);
            let copied = copies.finish(&mut writer).unwrap();
            saved.push((writer.commit().unwrap(), at_the_pause));
            copied.commit();
        }
        drop(driver);
        assert!(vm.contents() == [content]);
        for (snapshot, content) in saved {
            let directory = tempfile::tempdir_in(vm.directory.path()).unwrap();
            assert!(restore(&snapshot.path, &targets(directory.path(), 1), 1) == [content]);
        }
    }
}

#[test]
fn a_disk_that_is_being_filled_is_to_its_driver_as_it_was_saved() {
    let vm = Vm::new(&[SIZE]);
    let mut content: Vec<u8> = (0..SIZE / 8).flat_map(|word| (word * word).to_le_bytes()).collect();
    content[..usize::try_from(CHUNK_SIZE).unwrap()].fill(0);
    vm.write(0, 0, &content);
    let tracks = vm.track(Baseline::Nothing);
    let snapshot = vm.save(&vm.store(), "one", None, &tracks, Some(1)).unwrap();
    for (number, io) in ENGINES.into_iter().enumerate() {
        let directory = tempfile::tempdir_in(vm.directory.path()).unwrap();
        let paths = targets(directory.path(), 1);
        let mut new = images(&snapshot.path, &paths, Existing::Kept)
            .unwrap()
            .create()
            .unwrap();
        new.disks.iter_mut().for_each(|disk| disk.workers = 2 * number + 1);
        let mut spec = new.spec(&spec_of(&paths));
        spec.disks[0].io = io;
        let blocks = open(&spec);
        let (then, outcomes) = outcomes();
        let filling = new.fill_all(guards(&blocks), &unconfined(), then).unwrap();
        let mut driver = Driver::start(&blocks[0].1);
        let mut expected = content.clone();
        for round in 0..3 {
            // From the end on, where threads that go in order come last.
            for index in (0..SECTORS).rev().step_by(101) {
                let mut sector = [0xee; 512];
                driver.read(index, &mut sector);
                let at = usize::try_from(index * 512).unwrap();
                assert_eq!(sector, expected[at..at + 512]);
            }
            write_some(&mut driver, &mut expected, round);
        }
        filling.wait(&|| true);
        assert!(matches!(outcomes.recv().unwrap(), Ok(())));
        driver.transport.pause();
        assert!(fs::read(&paths[0]).unwrap() == expected);
    }
}
