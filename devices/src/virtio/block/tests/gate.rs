//! Requests for chunks that are not ready wait, and what is copied meanwhile is right.

mod model;

use std::ops::Range;
use std::sync::{Arc, Mutex};
use std::thread;

use super::*;
use crate::virtio::block::chunks::{CHUNK_SIZE, ChunkSet};
use crate::virtio::block::gate::{COPY_CHUNKS, Copier, Holds};

/// The last chunk is not a whole one.
const CHUNKS: u64 = 12;
const DISK_SIZE: u64 = (CHUNKS - 1) * CHUNK_SIZE + 3 * 512;
const SECTORS_PER_CHUNK: u64 = CHUNK_SIZE / 512;

/// A disk of [`CHUNKS`] chunks, and its file.
struct Held {
    guest: Guest,
    block: Arc<Mutex<Block>>,
    file: File,
    image: Image,
}

impl Held {
    /// A disk with `contents`, which its guest has set up once `first` was done.
    fn new<T>(io: DiskIo, contents: &[u8], first: impl FnOnce(&mut Block) -> T) -> (Self, T) {
        let image = Image::new();
        fs::write(&image.path, contents).unwrap();
        let file = File::options().read(true).write(true).open(&image.path).unwrap();
        let block = Arc::new(Mutex::new(Block::open(&image.spec(io), &unconfined()).unwrap()));
        let outcome = first(&mut block.lock().unwrap());
        let mut guest = Guest::sharing(block.clone());
        guest.start(FLUSH);
        let held = Self {
            guest,
            block,
            file,
            image,
        };
        (held, outcome)
    }

    /// One of which `holds` of all chunks are held.
    fn holding(io: DiskIo, contents: &[u8], holds: Holds) -> (Self, Copier) {
        Self::new(io, contents, |block| {
            block.hold(holds, ChunkSet::all(DISK_SIZE)).unwrap()
        })
    }

    /// Offers a request that has its header, data and status at a place of its own.
    fn offer(&mut self, slot: u64, kind: u32, sector: u64, data: &[Piece]) -> u16 {
        let at = slot_at(slot);
        self.guest.write(at, &header(kind, sector));
        self.guest.write(at + 0x20, &[NO_STATUS]);
        let pieces = [&[Piece::Out(at, 16)], data, &[Piece::In(at + 0x20, 1)]].concat();
        let head = self.guest.offer(0, &pieces);
        self.guest.kick(0);
        head
    }

    fn offer_write(&mut self, slot: u64, sector: u64, byte: u8) -> u16 {
        self.guest.write(slot_at(slot) + 0x200, &[byte; 512]);
        self.offer(
            slot,
            VIRTIO_BLK_T_OUT,
            sector,
            &[Piece::Out(slot_at(slot) + 0x200, 512)],
        )
    }

    fn status(&self, slot: u64) -> u8 {
        self.guest.read(slot_at(slot) + 0x20, 1)[0]
    }

    /// Waits until a request waits for the copier.
    fn until_wanted(&self, copier: &Copier) {
        self.guest.until(|| copier.is_wanted());
    }

    fn sector(&self, sector: u64) -> Vec<u8> {
        self.read(sector * 512..(sector + 1) * 512)
    }

    /// What the file has.
    fn read(&self, bytes: Range<u64>) -> Vec<u8> {
        let mut content = vec![0; usize::try_from(bytes.end - bytes.start).unwrap()];
        self.file.read_exact_at(&mut content, bytes.start).unwrap();
        content
    }

    fn hold(&self, holds: Holds) -> Result<Copier, DeviceError> {
        self.block.lock().unwrap().hold(holds, ChunkSet::all(DISK_SIZE))
    }
}

fn slot_at(slot: u64) -> u64 {
    BUFFER + 0x1000 * slot
}

fn chunk(number: u64) -> Range<u64> {
    number * CHUNK_SIZE..((number + 1) * CHUNK_SIZE).min(DISK_SIZE)
}

/// What a disk has whose sectors all differ.
fn pattern() -> Vec<u8> {
    let word = |word: u64| (word.wrapping_mul(0x9e37_79b9_7f4a_7c15)).to_le_bytes();
    (0..DISK_SIZE / 8).flat_map(word).collect()
}

fn slice(content: &[u8], bytes: Range<u64>) -> &[u8] {
    &content[usize::try_from(bytes.start).unwrap()..usize::try_from(bytes.end).unwrap()]
}

#[test]
fn writes_of_held_chunks_wait_until_these_are_copied_and_others_go_on() {
    for io in ENGINES {
        let mut chunks = ChunkSet::none(DISK_SIZE);
        [1, 2, 7].into_iter().for_each(|number| chunks.insert(chunk(number)));
        let before = pattern();
        let (mut disk, copier) = Held::new(io, &before, |block| block.hold(Holds::Writes, chunks).unwrap());
        // Reads of a held chunk, and writes of another one.
        let answer = request(
            &mut disk.guest,
            VIRTIO_BLK_T_IN,
            7 * SECTORS_PER_CHUNK,
            &[Piece::In(BUFFER, 512)],
        );
        assert_eq!(answer, (OK, 513));
        let head = disk.offer_write(0, 0, 0x11);
        assert_eq!((disk.guest.take_used(0).0, disk.sector(0)), (head, vec![0x11; 512]));
        let sector = 7 * SECTORS_PER_CHUNK + 5;
        let head = disk.offer_write(1, sector, 0x22);
        disk.until_wanted(&copier);
        assert_eq!((disk.guest.try_take_used(0), disk.status(1)), (None, NO_STATUS));
        // What is wanted comes first.
        assert_eq!(copier.next_chunks(), Some(chunk(7)));
        assert_eq!(disk.read(chunk(7)), slice(&before, chunk(7)));
        assert_eq!(copier.release(&chunk(7)), CHUNK_SIZE);
        assert_eq!(disk.guest.take_used(0), (head, 1));
        assert_eq!((disk.status(1), disk.sector(sector)), (OK, vec![0x22; 512]));
        // Then what is left, in order.
        assert_eq!(copier.next_chunks(), Some(chunk(1).start..chunk(2).end));
        assert_eq!(copier.release(&(chunk(1).start..chunk(2).end)), 2 * CHUNK_SIZE);
        assert_eq!((copier.next_chunks(), copier.bytes_left()), (None, 0));
    }
}

#[test]
fn requests_behind_one_that_waits_are_served_after_it() {
    for io in ENGINES {
        let (mut disk, copier) = Held::holding(io, &pattern(), Holds::Writes);
        let mut heads = vec![disk.offer_write(0, 0, 1)];
        disk.until_wanted(&copier);
        heads.push(disk.offer(1, VIRTIO_BLK_T_FLUSH, 0, &[]));
        heads.push(disk.offer_write(2, 8, 2));
        copier.release(&chunk(0));
        let mut done: Vec<_> = heads.iter().map(|_| disk.guest.take_used(0).0).collect();
        done.sort_unstable();
        assert_eq!(done, heads);
        assert_eq!((disk.sector(0), disk.sector(8)), (vec![1; 512], vec![2; 512]));
    }
}

#[test]
fn flushes_and_serial_numbers_are_never_held() {
    for io in ENGINES {
        let (mut disk, _copier) = Held::holding(io, &pattern(), Holds::Everything);
        assert_eq!(request(&mut disk.guest, VIRTIO_BLK_T_FLUSH, 0, &[]), (OK, 1));
        let data = [Piece::In(BUFFER, 20)];
        assert_eq!(request(&mut disk.guest, VIRTIO_BLK_T_GET_ID, 0, &data), (OK, 21));
    }
}

#[test]
fn discards_and_zeroes_wait_for_every_chunk_they_touch() {
    for io in ENGINES {
        for kind in [VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES] {
            let before = pattern();
            let (mut disk, copier) = Held::holding(io, &before, Holds::Writes);
            // From the last sector of chunk 2 to the first one of chunk 9.
            let (first, end) = (3 * SECTORS_PER_CHUNK - 1, 9 * SECTORS_PER_CHUNK + 1);
            let sectors = u32::try_from(end - first).unwrap();
            disk.guest.write(BUFFER, &segment(first, sectors, 0));
            let head = disk.offer(1, kind, 0, &[Piece::Out(BUFFER, 16)]);
            disk.until_wanted(&copier);
            let expected = [2..6, 6..10].map(|chunks: Range<u64>| chunk(chunks.start).start..chunk(chunks.end - 1).end);
            for (step, expected) in expected.into_iter().enumerate() {
                assert_eq!(copier.next_chunks(), Some(expected.clone()));
                assert_eq!(
                    disk.read(expected.clone()),
                    slice(&before, expected.clone()),
                    "step {step}"
                );
                assert_eq!(disk.guest.try_take_used(0), None);
                copier.release(&expected);
            }
            assert_eq!(disk.guest.take_used(0), (head, 1));
            assert_eq!(disk.status(1), OK);
            let zeroes = disk.read(first * 512..end * 512);
            assert!(zeroes.iter().all(|&byte| byte == 0));
        }
    }
}

#[test]
fn what_is_copied_out_is_as_it_was_when_it_was_held_however_much_is_written() {
    for io in ENGINES {
        let (mut disk, ()) = Held::new(io, &pattern(), |_| ());
        let mut expected = pattern();
        for round in 0..8_u8 {
            disk.guest.transport.pause();
            let before = disk.read(0..DISK_SIZE);
            assert!(before == expected, "what was answered is in the file");
            let copier = disk.hold(Holds::Writes).unwrap();
            disk.guest.transport.resume();
            let file = disk.file.try_clone().unwrap();
            let copied = thread::spawn(move || copy_out(&file, copier));
            for index in 0..60_u64 {
                let sector = (u64::from(round) * 31 + index * 977) % (DISK_SIZE / 512);
                let byte = round.wrapping_mul(61).wrapping_add(u8::try_from(index).unwrap());
                disk.offer_write(0, sector, byte);
                disk.guest.take_used(0);
                let at = usize::try_from(sector * 512).unwrap();
                expected[at..at + 512].fill(byte);
            }
            assert!(copied.join().unwrap() == before);
        }
        assert!(disk.read(0..DISK_SIZE) == expected);
    }
}

/// Copies everything out.
fn copy_out(file: &File, copier: Copier) -> Vec<u8> {
    let mut copied = vec![0xff; usize::try_from(DISK_SIZE).unwrap()];
    while let Some(bytes) = copier.next_chunks() {
        let range = usize::try_from(bytes.start).unwrap()..usize::try_from(bytes.end).unwrap();
        file.read_exact_at(&mut copied[range], bytes.start).unwrap();
        copier.release(&bytes);
    }
    copied
}

/// Fills everything in.
fn copy_in(file: &File, content: &[u8], copier: Copier) {
    while let Some(bytes) = copier.next_chunks() {
        file.write_all_at(slice(content, bytes.clone()), bytes.start).unwrap();
        copier.release(&bytes);
    }
}

#[test]
fn a_guest_finds_what_is_copied_in_and_what_it_wrote_itself() {
    for io in ENGINES {
        let mut expected = pattern();
        let empty = vec![0; expected.len()];
        let (mut disk, copier) = Held::holding(io, &empty, Holds::Everything);
        let (file, content) = (disk.file.try_clone().unwrap(), expected.clone());
        let filler = thread::spawn(move || copy_in(&file, &content, copier));
        for index in 0..200_u64 {
            let sector = index * 1009 % (DISK_SIZE / 512);
            let at = usize::try_from(sector * 512).unwrap();
            if index % 2 == 0 {
                let byte = u8::try_from(index).unwrap();
                disk.offer_write(0, sector, byte);
                disk.guest.take_used(0);
                expected[at..at + 512].fill(byte);
            } else {
                disk.offer(0, VIRTIO_BLK_T_IN, sector, &[Piece::In(BUFFER + 0x200, 512)]);
                disk.guest.take_used(0);
                assert_eq!(disk.guest.read(BUFFER + 0x200, 512), expected[at..at + 512]);
            }
            assert_eq!(disk.status(0), OK);
        }
        filler.join().unwrap();
        assert!(disk.read(0..DISK_SIZE) == expected);
    }
}

#[test]
fn a_pause_while_a_request_waits_loses_nothing() {
    for io in ENGINES {
        let (mut disk, copier) = Held::holding(io, &pattern(), Holds::Writes);
        let head = disk.offer_write(0, 0, 1);
        disk.until_wanted(&copier);
        for _ in 0..3 {
            disk.guest.transport.pause();
            disk.guest.transport.resume();
        }
        disk.guest.transport.pause();
        copier.release(&chunk(0));
        assert_eq!(disk.guest.try_take_used(0), None);
        disk.guest.transport.resume();
        assert_eq!(disk.guest.take_used(0), (head, 1));
        assert_eq!(disk.sector(0), [1; 512]);
    }
}

#[test]
fn a_disk_reset_while_a_request_waits_forgets_it_and_holds_on() {
    for io in ENGINES {
        let before = pattern();
        let (mut disk, copier) = Held::holding(io, &before, Holds::Writes);
        disk.offer_write(0, 0, 1);
        disk.until_wanted(&copier);
        disk.guest.start(FLUSH);
        let head = disk.offer_write(1, 5 * SECTORS_PER_CHUNK, 2);
        copier.release(&chunk(0));
        disk.until_wanted(&copier);
        assert_eq!(copier.next_chunks(), Some(chunk(5).start..chunk(4 + COPY_CHUNKS).end));
        copier.release(&chunk(5));
        assert_eq!(disk.guest.take_used(0), (head, 1));
        assert_eq!(
            (disk.sector(0), disk.status(0)),
            (slice(&before, 0..512).to_vec(), NO_STATUS)
        );
    }
}

#[test]
fn a_copy_out_that_is_given_up_lets_every_write_pass_and_can_be_followed_by_another() {
    for io in ENGINES {
        let (mut disk, copier) = Held::holding(io, &pattern(), Holds::Writes);
        copier.release(&chunk(0));
        let head = disk.offer_write(0, 5 * SECTORS_PER_CHUNK, 1);
        disk.until_wanted(&copier);
        drop(copier);
        assert_eq!(disk.guest.take_used(0), (head, 1));
        disk.guest.transport.pause();
        let again = disk.hold(Holds::Writes).unwrap();
        assert_eq!(again.bytes_left(), CHUNKS * CHUNK_SIZE);
    }
}

#[test]
fn a_copy_in_that_is_given_up_shows_the_guest_nothing_of_what_is_missing() {
    for io in ENGINES {
        let (mut disk, copier) = Held::holding(io, &pattern(), Holds::Everything);
        copier.release(&chunk(0));
        drop(copier);
        let data = [Piece::In(BUFFER, 512)];
        assert_eq!(request(&mut disk.guest, VIRTIO_BLK_T_IN, 0, &data), (OK, 513));
        disk.offer(1, VIRTIO_BLK_T_IN, SECTORS_PER_CHUNK, &data);
        // Stopping finishes whatever is under way: this is not.
        disk.guest.transport.pause();
        assert_eq!((disk.guest.try_take_used(0), disk.status(1)), (None, NO_STATUS));
        assert!(matches!(disk.hold(Holds::Writes), Err(DeviceError::DiskBeingCopied)));
    }
}

#[test]
fn an_image_that_is_copied_is_not_replaced_until_the_copier_is_gone() {
    let (disk, copier) = Held::holding(DiskIo::Auto, &pattern(), Holds::Writes);
    let other = Image::new();
    let replace = || {
        let mut block = disk.block.lock().unwrap();
        let successor = block.disk().successor(&other.path).unwrap();
        block.replace(successor).map(drop)
    };
    assert!(matches!(replace(), Err(DeviceError::DiskBeingCopied)));
    copier.release(&(0..DISK_SIZE));
    assert!(matches!(replace(), Err(DeviceError::DiskBeingCopied)));
    drop(copier);
    replace().unwrap();
    assert_eq!(disk.block.lock().unwrap().disk().size(), SIZE as u64);
}

#[test]
fn each_chunk_is_named_once_to_all_who_copy() {
    let content = pattern();
    let (disk, copier) = Held::holding(DiskIo::Auto, &vec![0; content.len()], Holds::Everything);
    let named = Mutex::new(ChunkSet::none(DISK_SIZE));
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                while let Some(bytes) = copier.next_chunks() {
                    let mut named = named.lock().unwrap();
                    assert_eq!(named.first_of(&bytes), None);
                    named.insert(bytes.clone());
                    drop(named);
                    disk.file
                        .write_all_at(slice(&content, bytes.clone()), bytes.start)
                        .unwrap();
                    copier.release(&bytes);
                }
            });
        }
    });
    assert_eq!(
        (named.into_inner().unwrap(), copier.bytes_left()),
        (ChunkSet::all(DISK_SIZE), 0)
    );
    assert!(disk.read(0..DISK_SIZE) == content);
}

#[test]
fn nobody_else_copies_at_the_same_time() {
    let (disk, copier) = Held::new(DiskIo::Auto, &pattern(), |block| {
        let copier = block.hold(Holds::Writes, ChunkSet::none(DISK_SIZE)).unwrap();
        assert!(matches!(
            block.hold(Holds::Writes, ChunkSet::all(DISK_SIZE)),
            Err(DeviceError::DiskBeingCopied)
        ));
        copier
    });
    drop(copier);
    assert!(disk.image.path.exists());
}

#[test]
#[should_panic(expected = "requests are under way")]
fn chunks_of_a_running_disk_cannot_be_held() {
    let (disk, ()) = Held::new(DiskIo::Auto, &pattern(), |_| ());
    // The panic must not reach the device's lock, which the guest's end needs.
    let mut block = disk.block.lock().unwrap();
    let held = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        block.hold(Holds::Writes, ChunkSet::all(DISK_SIZE)).map(drop)
    }));
    drop(block);
    drop(disk);
    std::panic::resume_unwind(held.unwrap_err());
}
