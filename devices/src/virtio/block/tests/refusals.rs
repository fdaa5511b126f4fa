//! Disks that cannot be opened, and what the user is told.

use super::*;

/// The message with which a disk is refused.
fn refusal(spec: &DiskSpec) -> String {
    Block::open(spec, &unconfined()).map(drop).unwrap_err().to_string()
}

#[test]
fn a_size_that_is_not_whole_sectors_is_refused_with_a_way_out() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("odd.raw");
    for size in [0, 1, 513] {
        fs::write(&path, vec![0; size]).unwrap();
        let message = refusal(&spec(&path, DiskIo::Auto));
        assert!(
            message.contains("odd.raw") && message.contains(&format!("{size} bytes")),
            "{message}"
        );
        assert!(
            message.contains("multiple of 512") && message.contains("truncate"),
            "{message}"
        );
    }
}

#[test]
fn what_is_no_disk_is_refused_by_name() {
    let directory = tempfile::tempdir().unwrap();
    let missing = refusal(&spec(&directory.path().join("none.raw"), DiskIo::Auto));
    assert!(
        missing.contains("none.raw' for reading and writing: No such file"),
        "{missing}"
    );
    let readonly = DiskSpec {
        readonly: true,
        ..spec(directory.path(), DiskIo::Auto)
    };
    assert!(refusal(&readonly).contains("neither a regular file nor a block device"));
    let device = refusal(&spec(Path::new("/dev/null"), DiskIo::Auto));
    assert_eq!(
        device,
        "disk image '/dev/null' is neither a regular file nor a block device"
    );
}

#[test]
fn an_image_that_cannot_be_written_suggests_readonly() {
    // Executing files cannot be opened for writing by anyone, the system's superuser included.
    let message = refusal(&spec(&std::env::current_exe().unwrap(), DiskIo::Auto));
    assert!(message.contains("for reading and writing: Text file busy"), "{message}");
    let denied = disk_open_error(std::io::ErrorKind::PermissionDenied, false);
    assert!(denied.ends_with("; add 'readonly'"), "{denied}");
    let denied = disk_open_error(std::io::ErrorKind::PermissionDenied, true);
    assert!(
        denied.contains("for reading: permission denied") && !denied.contains("add"),
        "{denied}"
    );
}

fn disk_open_error(kind: std::io::ErrorKind, readonly: bool) -> String {
    let image = disk::Image {
        path: Path::new("disk.raw"),
        readonly,
        advice: "; add 'readonly'",
    };
    image.open_error(kind.into()).to_string()
}

#[test]
fn an_image_in_use_is_refused_unless_all_users_only_read() {
    let image = Image::new();
    let writer = image.spec(DiskIo::Auto);
    let reader = DiskSpec {
        readonly: true,
        ..writer.clone()
    };
    let open = Block::open(&writer, &unconfined()).unwrap();
    assert!(refusal(&writer).contains("disk.raw' is in use by another "));
    assert!(refusal(&reader).contains("is in use"));
    drop(open);
    let _first = Block::open(&reader, &unconfined()).unwrap();
    let _second = Block::open(&reader, &unconfined()).unwrap();
    assert!(refusal(&writer).contains("is in use"));
}

#[test]
fn a_disk_that_is_released_can_be_had_by_another_until_it_is_taken_again() {
    let image = Image::new();
    let spec = image.spec(DiskIo::Auto);
    let source = Block::open(&spec, &unconfined()).unwrap();
    let destination = Block::open_unlocked(&spec, &unconfined()).unwrap();
    let in_the_way = |block: &Block| block.disk().lock().unwrap_err().to_string();
    assert!(in_the_way(&destination).contains("is in use by"));
    source.disk().release().unwrap();
    destination.disk().lock().unwrap();
    assert!(in_the_way(&source).contains("is in use by"));
    drop(destination);
    source.disk().lock().unwrap();
}

#[test]
fn a_disk_that_was_resized_before_it_is_locked_is_refused_and_left_to_others() {
    let image = Image::new();
    let spec = image.spec(DiskIo::Auto);
    let early = Block::open_unlocked(&spec, &unconfined()).unwrap();
    let file = File::options().write(true).open(&image.path).unwrap();
    let size = file.metadata().unwrap().len();
    file.set_len(size + 512).unwrap();
    let refused = early.disk().lock().unwrap_err().to_string();
    assert!(
        refused.contains(&format!("had {size} bytes")) && refused.contains(&format!("has {} now", size + 512)),
        "{refused}"
    );
    Block::open(&spec, &unconfined()).unwrap();
}

#[test]
fn a_serial_number_has_at_most_20_bytes() {
    let image = Image::new();
    let long = DiskSpec {
        serial: Some("x".repeat(21)),
        ..image.spec(DiskIo::Auto)
    };
    assert!(refusal(&long).contains("has 21 bytes; the limit is 20"));
    let fits = DiskSpec {
        serial: Some("x".repeat(20)),
        ..long
    };
    Block::open(&fits, &unconfined()).unwrap();
}
