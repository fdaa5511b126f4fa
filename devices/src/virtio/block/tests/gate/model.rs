//! Any requests, with any progress of the copier between them, against a disk that is simply there.

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;

#[derive(Clone, Debug)]
enum Step {
    Read(Range<u64>),
    Write(Range<u64>, u8),
    Zero(Range<u64>),
    Copy,
    Pause,
    Reset,
}

/// Some sectors of the disk, up to two chunks of them.
fn sectors() -> impl Strategy<Value = Range<u64>> {
    let all = DISK_SIZE / 512;
    (0..all, 1..=2 * SECTORS_PER_CHUNK).prop_map(move |(first, count)| first..(first + count).min(all))
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        3 => sectors().prop_map(Step::Read),
        3 => (sectors(), any::<u8>()).prop_map(|(sectors, byte)| Step::Write(sectors, byte)),
        1 => sectors().prop_map(Step::Zero),
        2 => Just(Step::Copy),
        1 => Just(Step::Pause),
        1 => Just(Step::Reset),
    ]
}

/// A disk, the one who copies it, and what both must be.
struct Model {
    disk: Held,
    holds: Holds,
    copier: Copier,
    held: BTreeSet<u64>,
    /// What the guest must see.
    expected: Vec<u8>,
    /// What was there when it was held: for a copy in, what is filled in.
    original: Vec<u8>,
    copied: Vec<u8>,
}

impl Model {
    fn new(io: DiskIo, holds: Holds) -> Self {
        let original = pattern();
        let blank = vec![0; original.len()];
        let on_disk = if holds == Holds::Writes { &original } else { &blank };
        let (disk, copier) = Held::holding(io, on_disk, holds);
        Self {
            disk,
            holds,
            copier,
            held: (0..CHUNKS).collect(),
            expected: original.clone(),
            copied: blank,
            original,
        }
    }

    /// Copies the next piece, which has some of `wanted` if there is anything wanted.
    fn copy(&mut self, wanted: Option<&BTreeSet<u64>>) {
        let Some(bytes) = self.copier.next_chunks() else {
            assert!(self.held.is_empty());
            return;
        };
        let chunks: BTreeSet<u64> = (bytes.start / CHUNK_SIZE..bytes.end.div_ceil(CHUNK_SIZE)).collect();
        assert!(chunks.is_subset(&self.held) && chunks.len() as u64 <= COPY_CHUNKS);
        assert!(wanted.is_none_or(|wanted| !chunks.is_disjoint(wanted)));
        let place = usize::try_from(bytes.start).unwrap()..usize::try_from(bytes.end).unwrap();
        if self.holds == Holds::Writes {
            self.copied[place].copy_from_slice(&self.disk.read(bytes.clone()));
        } else {
            let content = &self.original[place];
            self.disk.file.write_all_at(content, bytes.start).unwrap();
        }
        self.copier.release(&bytes);
        self.held.retain(|chunk| !chunks.contains(chunk));
    }

    /// Makes a request, and copies as long as it waits.
    fn request(&mut self, kind: u32, sectors: &Range<u64>, sector: u64, data: Piece) {
        let head = self.disk.offer(0, kind, sector, &[data]);
        let chunks = sectors.start / SECTORS_PER_CHUNK..sectors.end.div_ceil(SECTORS_PER_CHUNK);
        let touched: BTreeSet<u64> = chunks.collect();
        let waits = kind != VIRTIO_BLK_T_IN || self.holds == Holds::Everything;
        while waits && !touched.is_disjoint(&self.held) {
            self.disk.until_wanted(&self.copier);
            assert_eq!(self.disk.guest.try_take_used(0), None);
            let wanted = touched.intersection(&self.held).copied().collect();
            self.copy(Some(&wanted));
        }
        assert_eq!((self.disk.guest.take_used(0).0, self.disk.status(0)), (head, OK));
    }

    fn take(&mut self, step: Step) {
        const PLACE: u64 = BUFFER + 0x1000;
        let place = |sectors: &Range<u64>| {
            let bytes = sectors.start * 512..sectors.end * 512;
            usize::try_from(bytes.start).unwrap()..usize::try_from(bytes.end).unwrap()
        };
        let len = |sectors: &Range<u64>| u32::try_from((sectors.end - sectors.start) * 512).unwrap();
        match step {
            Step::Read(sectors) => {
                self.request(
                    VIRTIO_BLK_T_IN,
                    &sectors,
                    sectors.start,
                    Piece::In(PLACE, len(&sectors)),
                );
                let expected = &self.expected[place(&sectors)];
                assert!(self.disk.guest.read(PLACE, expected.len()) == expected);
            }
            Step::Write(sectors, byte) => {
                self.disk.guest.write(PLACE, &vec![byte; len(&sectors) as usize]);
                self.request(
                    VIRTIO_BLK_T_OUT,
                    &sectors,
                    sectors.start,
                    Piece::Out(PLACE, len(&sectors)),
                );
                self.expected[place(&sectors)].fill(byte);
            }
            Step::Zero(sectors) => {
                let count = u32::try_from(sectors.end - sectors.start).unwrap();
                self.disk.guest.write(PLACE, &segment(sectors.start, count, 0));
                self.request(VIRTIO_BLK_T_WRITE_ZEROES, &sectors, 0, Piece::Out(PLACE, 16));
                self.expected[place(&sectors)].fill(0);
            }
            Step::Copy => self.copy(None),
            Step::Pause => {
                self.disk.guest.transport.pause();
                self.disk.guest.transport.resume();
            }
            Step::Reset => self.disk.guest.start(FLUSH),
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn whatever_is_asked_and_copied_when_guest_and_copier_find_what_they_should(
        steps in prop::collection::vec(step(), 1..24),
        uring in any::<bool>(),
        into in any::<bool>(),
    ) {
        let io = if uring { DiskIo::IoUring } else { DiskIo::Threads };
        let holds = if into { Holds::Everything } else { Holds::Writes };
        let mut model = Model::new(io, holds);
        for step in steps {
            model.take(step);
        }
        while !model.held.is_empty() {
            model.copy(None);
        }
        prop_assert!(model.disk.read(0..DISK_SIZE) == model.expected);
        prop_assert!(holds == Holds::Everything || model.copied == model.original);
    }
}
