//! What is known of a disk at its cuts, and going back there, against a disk that is copied whole at each cut.

use std::fs;
use std::sync::mpsc;

use cutover_snapshot::spec::{DiskIo, DiskSpec, RateLimiterSpec};
use proptest::prelude::*;
use rustix::event::{PollFd, PollFlags, poll};
use std::os::fd::{AsRawFd, BorrowedFd};
use tempfile::NamedTempFile;

use super::*;
use crate::virtio::block::gate::COPY_BYTES;

const SECTOR: u64 = 512;
/// The last chunk is not a whole one.
const SECTORS: u64 = 5 * CHUNK_SIZE / SECTOR + 3;
const SIZE: u64 = SECTORS * SECTOR;

/// A disk, and a guest that writes to it.
struct Fixture {
    epochs: Epochs,
    disk: Disk,
    writes: WriteTracker,
    /// Where checkpoints are asked for.
    asked: (mpsc::Sender<()>, mpsc::Receiver<()>),
    _file: NamedTempFile,
}

impl Fixture {
    fn with_limit(limit: usize) -> Self {
        let file = NamedTempFile::new().unwrap();
        fs::write(file.path(), expand(&first_content())).unwrap();
        let disk = Disk::open(&DiskSpec {
            id: None,
            path: file.path().to_owned(),
            readonly: false,
            serial: None,
            io: DiskIo::Auto,
            rate_limiter: RateLimiterSpec::default(),
        });
        Self {
            epochs: Epochs::with_limit(limit).unwrap(),
            disk: disk.unwrap(),
            writes: WriteTracker::new(SIZE),
            asked: mpsc::channel(),
            _file: file,
        }
    }

    fn begin(&mut self, cut: u64) -> DiskCut {
        let asked = self.asked.0.clone();
        let soon: CheckpointSoon = Arc::new(move || asked.send(()).unwrap());
        let unconfined: OnThread = Arc::new(|| {});
        self.epochs
            .begin(&self.disk, cut, ChunkSet::none(SIZE), soon, &unconfined)
            .unwrap()
    }

    /// Writes as a guest does: when it is let.
    fn write(&self, sectors: &Range<u64>, byte: u8) {
        let request = request(sectors);
        while !self.epochs.admit(&request) {
            self.until_ready();
        }
        let content = vec![byte; usize::try_from((sectors.end - sectors.start) * SECTOR).unwrap()];
        self.disk.file().write_all_at(&content, sectors.start * SECTOR).unwrap();
    }

    fn until_ready(&self) {
        // SAFETY: the event is open as long as its owner, which is borrowed.
        let ready = unsafe { BorrowedFd::borrow_raw(self.epochs.shared.ready.as_raw_fd()) };
        poll(&mut [PollFd::from_borrowed_fd(ready, PollFlags::IN)], None).unwrap();
        self.epochs.shared.ready.read().unwrap();
    }

    fn content(&self) -> Vec<u8> {
        let mut content = vec![0; usize::try_from(SIZE).unwrap()];
        self.disk.file().read_exact_at(&mut content, 0).unwrap();
        content
    }

    fn bytes_kept(&self) -> usize {
        let state = self.epochs.shared.state();
        state.protected.as_ref().map_or(0, |protected| protected.logs.bytes())
    }
}

fn request(sectors: &Range<u64>) -> Request {
    Request::Write {
        offset: sectors.start * SECTOR,
        len: (sectors.end - sectors.start) * SECTOR,
    }
}

/// What each sector is full of at first; the third chunk has zeroes alone.
fn first_content() -> Vec<u8> {
    let sectors_per_chunk = CHUNK_SIZE / SECTOR;
    let byte = |sector: u64| match sector / sectors_per_chunk {
        2 => 0,
        _ => sector.to_le_bytes()[0],
    };
    (0..SECTORS).map(byte).collect()
}

/// The bytes of a disk whose sectors are full of these.
fn expand(sectors: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0; sectors.len() * 512];
    for (sector, byte) in bytes.chunks_mut(512).zip(sectors) {
        sector.fill(*byte);
    }
    bytes
}

fn read(cut: &DiskCut) -> Result<Vec<u8>, DeviceError> {
    let mut content = vec![0xff; usize::try_from(SIZE).unwrap()];
    cut.read(0, &mut content)?;
    Ok(content)
}

fn chunk(number: u64) -> Range<u64> {
    let sectors_per_chunk = CHUNK_SIZE / SECTOR;
    number * sectors_per_chunk..((number + 1) * sectors_per_chunk).min(SECTORS)
}

#[test]
fn a_cut_is_read_as_it_was_in_any_pieces_while_the_disk_changes() {
    let mut fixture = Fixture::with_limit(LOG_BYTES_MAX);
    let cut = fixture.begin(4);
    let expected = expand(&first_content());
    fixture.write(&(0..SECTORS), 0x5a);
    for (offset, len) in [
        (0, 1),
        (CHUNK_SIZE - 3, 7),
        (SIZE - 5, 5),
        (CHUNK_SIZE, 2 * CHUNK_SIZE),
        (9, 0),
    ] {
        let mut piece = vec![0; usize::try_from(len).unwrap()];
        cut.read(offset, &mut piece).unwrap();
        let start = usize::try_from(offset).unwrap();
        assert!(piece == expected[start..start + piece.len()]);
    }
    assert!(cut.read(SIZE - 1, &mut [0; 2]).is_err());
    assert!(cut.read(u64::MAX - 1, &mut [0; 9]).is_err());
}

#[test]
fn zeroes_are_kept_without_memory() {
    let mut fixture = Fixture::with_limit(LOG_BYTES_MAX);
    let cut = fixture.begin(1);
    fixture.write(&chunk(2), 7);
    assert_eq!(fixture.bytes_kept(), 0);
    assert!(read(&cut).unwrap() == expand(&first_content()));
    fixture.epochs.roll_back(1, &fixture.writes).unwrap();
    assert!(fixture.content() == expand(&first_content()));
}

#[test]
fn what_is_kept_is_forgotten_when_a_cut_is_permanent_and_after_a_step_back() {
    let mut fixture = Fixture::with_limit(LOG_BYTES_MAX);
    fixture.begin(1);
    fixture.write(&(0..1), 1);
    fixture.epochs.cut(2).unwrap();
    fixture.write(&(0..1), 2);
    assert_eq!(fixture.bytes_kept() as u64, 2 * CHUNK_SIZE);
    fixture.epochs.make_permanent(2);
    assert_eq!(fixture.bytes_kept() as u64, CHUNK_SIZE);
    fixture.epochs.roll_back(2, &fixture.writes).unwrap();
    assert_eq!((fixture.bytes_kept(), fixture.content()[0]), (0, 1));
    assert!(matches!(
        fixture.epochs.roll_back(1, &fixture.writes),
        Err(DeviceError::DiskCutGone { cut: 1 })
    ));
}

#[test]
fn writes_wait_when_no_more_can_be_kept_until_a_cut_is_permanent() {
    let limit = usize::try_from(2 * COPY_BYTES - 1).unwrap();
    let mut fixture = Fixture::with_limit(limit);
    fixture.begin(1);
    let mut number = 0;
    while fixture.bytes_kept() + usize::try_from(COPY_BYTES).unwrap() <= limit {
        // The third chunk is zeroes.
        fixture.write(&chunk(number), 9);
        number += 1;
    }
    fixture.asked.1.recv().unwrap();
    let kept = fixture.bytes_kept();
    let waits = request(&chunk(number));
    assert!(!fixture.epochs.admit(&waits));
    fixture.epochs.cut(2).unwrap();
    assert!(!fixture.epochs.admit(&waits), "the cut alone makes no space");
    assert_eq!(fixture.bytes_kept(), kept);
    fixture.epochs.make_permanent(2);
    fixture.write(&chunk(number), 9);
    assert!(fixture.asked.1.try_recv().is_err(), "asked once");
}

#[test]
fn a_request_that_could_never_be_kept_is_not_supported_while_the_disk_is_protected() {
    let mut fixture = Fixture::with_limit(LOG_BYTES_MAX);
    let huge = Request::WriteZeroes {
        offset: 0,
        len: REQUEST_BYTES_MAX + SECTOR,
        unmap: false,
    };
    assert_eq!(fixture.epochs.check(huge), Ok(huge));
    fixture.begin(1);
    assert_eq!(fixture.epochs.check(huge), Err(Status::Unsupported));
    let largest = Request::Write {
        offset: SECTOR,
        len: REQUEST_BYTES_MAX,
    };
    assert_eq!(fixture.epochs.check(largest), Ok(largest));
    let read = Request::Read {
        offset: 0,
        len: 2 * REQUEST_BYTES_MAX,
    };
    assert_eq!(fixture.epochs.check(read), Ok(read));
}

#[test]
fn a_request_that_waits_at_a_cut_keeps_what_was_kept_for_it() {
    let mut fixture = Fixture::with_limit(LOG_BYTES_MAX);
    fixture.begin(1);
    let waits = request(&(0..SECTORS));
    assert!(!fixture.epochs.admit(&waits));
    fixture.until_ready();
    let kept = fixture.bytes_kept();
    let cut = fixture.epochs.cut(2).unwrap();
    assert!(cut.written().is_empty(), "nothing was written yet");
    assert_eq!(fixture.bytes_kept(), kept);
    assert!(fixture.epochs.admit(&waits));
}

#[test]
fn a_disk_that_is_no_longer_protected_lets_everything_pass_and_knows_no_cuts() {
    let mut fixture = Fixture::with_limit(0);
    let cut = fixture.begin(1);
    let waits = request(&(0..1));
    assert!(!fixture.epochs.admit(&waits));
    fixture.epochs.end();
    fixture.until_ready();
    assert!(fixture.epochs.admit(&waits) && !fixture.epochs.are_active());
    assert!(matches!(read(&cut), Err(DeviceError::DiskCutGone { cut: 1 })));
    assert!(fixture.epochs.cut(2).is_none());
    fixture.begin(1);
    assert!(read(&cut).is_err(), "a cut of another protection");
}

#[test]
fn what_goes_back_is_recorded_as_written() {
    let mut fixture = Fixture::with_limit(LOG_BYTES_MAX);
    fixture.begin(1);
    fixture.write(&(0..1), 1);
    fixture.write(&chunk(4), 1);
    let consumer = fixture.writes.register();
    fixture.epochs.roll_back(1, &fixture.writes).unwrap();
    let taken = consumer.take();
    let written: Vec<_> = taken.chunks().ranges().collect();
    assert_eq!(written, [0..CHUNK_SIZE, 4 * CHUNK_SIZE..5 * CHUNK_SIZE]);
}

#[derive(Clone, Debug)]
enum Op {
    Write(Range<u64>, u8),
    Cut,
    /// The newest cut is given up.
    Invalidate,
    /// One of the cuts that are known, by its place.
    MakePermanent(prop::sample::Index),
    RollBack(prop::sample::Index),
}

fn op() -> impl Strategy<Value = Op> {
    let write = (0..SECTORS, 1..300_u64, any::<u8>());
    prop_oneof![
        8 => write.prop_map(|(start, len, byte)| Op::Write(start..(start + len).min(SECTORS), byte)),
        4 => Just(Op::Cut),
        1 => Just(Op::Invalidate),
        2 => any::<prop::sample::Index>().prop_map(Op::MakePermanent),
        1 => any::<prop::sample::Index>().prop_map(Op::RollBack),
    ]
}

/// A disk that is copied whole.
struct Reference {
    now: Vec<u8>,
    /// Chunks written since the last cut.
    written: ChunkSet,
    /// Cuts that are known, the last permanent one first: their numbers and contents.
    cuts: Vec<(u64, Vec<u8>, DiskCut)>,
    gone: Vec<DiskCut>,
    next: u64,
}

impl Reference {
    fn apply(&mut self, fixture: &Fixture, op: &Op) -> Result<(), TestCaseError> {
        match op {
            Op::Write(sectors, byte) => {
                fixture.write(sectors, *byte);
                let range = usize::try_from(sectors.start).unwrap()..usize::try_from(sectors.end).unwrap();
                self.now[range].fill(*byte);
                self.written.insert(sectors.start * SECTOR..sectors.end * SECTOR);
            }
            Op::Cut => {
                let cut = fixture.epochs.cut(self.next).unwrap();
                prop_assert_eq!(cut.written(), &self.written);
                self.written = ChunkSet::none(SIZE);
                self.cuts.push((self.next, self.now.clone(), cut));
                self.next += 1;
            }
            Op::Invalidate if self.cuts.len() > 1 => {
                if let Some((number, _, cut)) = self.cuts.pop() {
                    fixture.epochs.invalidate(number);
                    cut.written().ranges().for_each(|bytes| self.written.insert(bytes));
                    self.gone.push(cut);
                }
            }
            Op::Invalidate => fixture.epochs.invalidate(self.next),
            Op::MakePermanent(which) => {
                let position = which.index(self.cuts.len());
                fixture.epochs.make_permanent(self.cuts[position].0);
                self.gone.extend(self.cuts.drain(..position).map(|(_, _, cut)| cut));
            }
            Op::RollBack(which) => {
                let position = which.index(self.cuts.len());
                let (number, content, _) = &self.cuts[position];
                fixture.epochs.roll_back(*number, &fixture.writes).unwrap();
                (self.now, self.next) = (content.clone(), number + 1);
                self.written = ChunkSet::none(SIZE);
                // What was being read is gone, but the disk can go back to the older ones still.
                self.cuts.truncate(position + 1);
            }
        }
        Ok(())
    }

    fn check(&self, fixture: &Fixture, since_step_back: usize) -> Result<(), TestCaseError> {
        prop_assert!(fixture.content() == expand(&self.now));
        for (number, content, cut) in self.cuts.iter().skip(since_step_back) {
            prop_assert!(read(cut).unwrap() == expand(content), "cut {number}");
        }
        for cut in &self.gone {
            let is_gone = matches!(read(cut), Err(DeviceError::DiskCutGone { .. }));
            prop_assert!(is_gone);
        }
        Ok(())
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn whatever_happens_cuts_are_what_the_disk_was_and_it_goes_back_to_them(ops in prop::collection::vec(op(), 0..50)) {
        let mut fixture = Fixture::with_limit(LOG_BYTES_MAX);
        let first = fixture.begin(10);
        let mut reference = Reference {
            now: first_content(),
            written: ChunkSet::none(SIZE),
            cuts: vec![(10, first_content(), first)],
            gone: Vec::new(),
            next: 11,
        };
        // How many of the cuts were made before the last step back, and cannot be read any more.
        let mut before_step_back = 0;
        for op in &ops {
            let known = reference.cuts.len();
            reference.apply(&fixture, op)?;
            before_step_back = match op {
                Op::RollBack(_) => reference.cuts.len(),
                Op::MakePermanent(_) => before_step_back.saturating_sub(known - reference.cuts.len()),
                _ => before_step_back.min(reference.cuts.len()),
            };
            reference.check(&fixture, before_step_back)?;
        }
    }
}
