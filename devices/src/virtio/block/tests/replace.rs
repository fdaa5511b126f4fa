//! Another image takes a disk's place while its guest uses it.

use std::sync::{Arc, Mutex};

use virtio_bindings::virtio_mmio::*;

use super::*;

struct Swappable {
    guest: Guest,
    block: Arc<Mutex<Block>>,
}

impl Swappable {
    /// A guest that has set the disk up.
    fn started(spec: &DiskSpec) -> Self {
        let block = Arc::new(Mutex::new(Block::open(spec, &unconfined()).unwrap()));
        let mut guest = Guest::sharing(block.clone());
        guest.start(FLUSH);
        Self { guest, block }
    }

    /// What the device manager does.
    fn swap(&self, path: &Path) -> Result<(), DeviceError> {
        let disk = self.block.lock().unwrap().disk().successor(path)?;
        let block = self.block.clone();
        self.guest
            .on_loop(move || block.lock().unwrap().replace(disk).map(drop))?;
        self.guest.transport.config_changed();
        Ok(())
    }

    fn refusal(&self, path: &Path) -> String {
        self.swap(path).unwrap_err().to_string()
    }

    /// First bytes of a sector, as the guest reads them.
    fn sector(&mut self, sector: u64) -> Vec<u8> {
        let read = request(&mut self.guest, VIRTIO_BLK_T_IN, sector, &[Piece::In(BUFFER, 512)]);
        assert_eq!(read, (OK, 513));
        self.guest.read(BUFFER, 8)
    }

    fn capacity(&mut self) -> u64 {
        let [low, high] = [0, 4].map(|offset| self.guest.read_register(VIRTIO_MMIO_CONFIG + offset));
        u64::from(high) << 32 | u64::from(low)
    }
}

/// An image all of whose bytes are `byte`.
fn filled(byte: u8, sectors: usize) -> Image {
    let image = Image::new();
    fs::write(&image.path, vec![byte; sectors * 512]).unwrap();
    image
}

#[test]
fn the_guest_reads_and_writes_the_new_image_and_leaves_the_old_one_alone() {
    for io in ENGINES {
        let (old, new) = (filled(1, 8), filled(2, 8));
        let mut disk = Swappable::started(&old.spec(io));
        assert_eq!(disk.sector(0), [1; 8]);
        disk.swap(&new.path).unwrap();
        assert_eq!(disk.sector(0), [2; 8]);
        disk.guest.write(BUFFER, &[3; 512]);
        request(&mut disk.guest, VIRTIO_BLK_T_OUT, 1, &[Piece::Out(BUFFER, 512)]);
        assert_eq!((new.read(512, 512), old.read(512, 512)), (vec![3; 512], vec![1; 512]));
    }
}

#[test]
fn a_driver_is_told_of_another_size_and_finds_it_under_a_new_generation() {
    for (sectors, io) in [(4, DiskIo::IoUring), (24, DiskIo::Threads)] {
        let (old, new) = (filled(1, 8), filled(2, sectors));
        let mut disk = Swappable::started(&old.spec(io));
        assert_eq!(disk.capacity(), 8);
        let generation = disk.guest.read_register(VIRTIO_MMIO_CONFIG_GENERATION);
        disk.swap(&new.path).unwrap();
        assert_eq!(
            disk.guest.read_register(VIRTIO_MMIO_INTERRUPT_STATUS),
            VIRTIO_MMIO_INT_CONFIG
        );
        assert_ne!(disk.guest.read_register(VIRTIO_MMIO_CONFIG_GENERATION), generation);
        assert_eq!(disk.capacity(), u64::try_from(sectors).unwrap());
        let beyond = [Piece::In(BUFFER, 512)];
        let sectors = disk.capacity();
        assert_eq!(disk.sector(sectors - 1), [2; 8]);
        assert_eq!(
            request(&mut disk.guest, VIRTIO_BLK_T_IN, sectors, &beyond),
            (IO_ERROR, 1)
        );
    }
}

#[test]
fn a_driver_that_has_not_set_the_disk_up_is_not_interrupted() {
    let (old, new) = (filled(1, 8), filled(2, 16));
    let block = Arc::new(Mutex::new(Block::open(&old.spec(DiskIo::Auto), &unconfined()).unwrap()));
    let mut disk = Swappable {
        guest: Guest::sharing(block.clone()),
        block,
    };
    disk.swap(&new.path).unwrap();
    assert_eq!(disk.guest.read_register(VIRTIO_MMIO_INTERRUPT_STATUS), 0);
    disk.guest.start(FLUSH);
    assert_eq!((disk.capacity(), disk.sector(15)), (16, vec![2; 8]));
}

#[test]
fn requests_under_way_are_each_finished_on_one_of_the_two_images() {
    for io in ENGINES {
        let images = [filled(1, 64), filled(2, 64)];
        let mut disk = Swappable::started(&images[0].spec(io));
        for round in 0..50 {
            for index in 0..4_u64 {
                let at = DATA + 0x1_0000 + 0x8000 * index;
                disk.guest.write(at, &header(VIRTIO_BLK_T_IN, index));
                let data = Piece::In(at + 0x1000, 0x4000);
                disk.guest
                    .offer(0, &[Piece::Out(at, 16), data, Piece::In(at + 0x20, 1)]);
            }
            disk.guest.kick(0);
            disk.swap(&images[(round + 1) % 2].path).unwrap();
            for _ in 0..4 {
                assert_eq!(disk.guest.take_used(0).1, 0x4001);
            }
            for index in 0..4 {
                let data = disk.guest.read(DATA + 0x1_1000 + 0x8000 * index, 0x4000);
                assert!(data == [1; 0x4000] || data == [2; 0x4000]);
            }
        }
    }
}

#[test]
fn a_disk_replaced_while_it_stands_still_is_the_new_one_when_it_goes_on() {
    for io in ENGINES {
        let (old, new) = (filled(1, 8), filled(2, 16));
        let mut disk = Swappable::started(&old.spec(io));
        disk.guest.transport.pause();
        disk.swap(&new.path).unwrap();
        disk.guest.transport.resume();
        assert_eq!((disk.capacity(), disk.sector(15)), (16, vec![2; 8]));
    }
}

#[test]
fn an_image_that_has_grown_is_measured_anew_when_it_replaces_itself() {
    let image = filled(1, 8);
    let mut disk = Swappable::started(&image.spec(DiskIo::Auto));
    File::options()
        .write(true)
        .open(&image.path)
        .unwrap()
        .set_len(16 * 512)
        .unwrap();
    // By another name, too: it is the image that counts.
    let link = image.path.with_extension("link");
    fs::hard_link(&image.path, &link).unwrap();
    disk.swap(&link).unwrap();
    assert_eq!((disk.capacity(), disk.sector(15)), (16, vec![0; 8]));
}

#[test]
fn the_new_image_is_locked_and_the_old_one_is_free() {
    let (old, new) = (filled(1, 8), filled(2, 8));
    let mut disk = Swappable::started(&old.spec(DiskIo::Auto));
    disk.swap(&new.path).unwrap();
    Block::open(&old.spec(DiskIo::Auto), &unconfined()).unwrap();
    let refused = Block::open(&new.spec(DiskIo::Auto), &unconfined())
        .map(drop)
        .unwrap_err();
    assert!(matches!(refused, DeviceError::DiskInUse { .. }), "{refused}");
    assert_eq!(disk.sector(7), [2; 8]);
}

#[test]
fn an_image_that_cannot_be_used_is_refused_and_the_old_one_serves_on() {
    let (old, taken, odd) = (filled(1, 8), filled(2, 8), filled(3, 8));
    let _user = Block::open(&taken.spec(DiskIo::Auto), &unconfined()).unwrap();
    fs::write(&odd.path, [0; 700]).unwrap();
    let mut disk = Swappable::started(&old.spec(DiskIo::Auto));
    for (path, reason) in [
        (Path::new("/nonexistent/disk.raw"), "No such file"),
        (Path::new("/dev/null"), "neither a regular file nor a block device"),
        (&*odd.path, "not a positive multiple of 512"),
        (&*taken.path, "is in use"),
    ] {
        let message = disk.refusal(path);
        assert!(message.contains(reason), "{message}");
    }
    assert_eq!((disk.capacity(), disk.sector(7)), (8, vec![1; 8]));
}

#[test]
fn a_writable_disk_takes_no_image_that_can_only_be_read() {
    let old = filled(1, 8);
    let mut disk = Swappable::started(&old.spec(DiskIo::Auto));
    // Executing files cannot be opened for writing by anyone, the system's superuser included.
    let message = disk.refusal(&std::env::current_exe().unwrap());
    assert!(message.contains("for reading and writing"), "{message}");
    assert_eq!(disk.sector(0), [1; 8]);
}
