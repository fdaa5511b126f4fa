//! Disks keep what is written to them, and nothing else.

use cutover_tests::{Disk, Exit, Guest};

const MIB: usize = 1 << 20;

/// Writes 8 MiB and syncs, and expects to find them on the host at once and in the guest after a reboot.
fn writes_last(io: &str) {
    let disk = Disk::blank(16 << 20);
    let guest = Guest::micro().disk_with(&disk, &format!("io={io}"));

    let vm = guest.boot();
    vm.check("head -c 8m /dev/urandom > /tmp/data && dd if=/tmp/data of=/dev/vda bs=1M conv=fsync");
    let written = vm.check("sha256sum < /tmp/data");
    assert_eq!(written, format!("{}  -\n", disk.sha256(8 * MIB)));
    vm.run_to_the_end("reboot -f");
    assert_eq!(vm.wait(), Exit::Reboot);

    let vm = guest.boot();
    assert_eq!(vm.check("head -c 8m /dev/vda | sha256sum"), written);
}

#[test]
fn synced_writes_are_on_the_host_and_there_after_a_reboot_with_a_thread_pool() {
    writes_last("threads");
}

#[test]
fn synced_writes_are_on_the_host_and_there_after_a_reboot_with_io_uring() {
    writes_last("io-uring");
}

#[test]
fn a_file_system_made_in_the_guest_survives_a_power_off() {
    let disk = Disk::blank(32 << 20);
    let guest = Guest::micro().cpus(2).disk(&disk);

    let vm = guest.boot();
    vm.check("mke2fs /dev/vda && mkdir -p /mnt && mount -t ext4 /dev/vda /mnt");
    // Two writers at once, so that several requests are in flight.
    vm.check("for i in 1 2; do head -c 3m /dev/urandom > /mnt/$i & done; wait");
    let sums = vm.check("cd /mnt && sha256sum 1 2");
    vm.check("umount /mnt");
    vm.power_off();
    assert_eq!(vm.wait(), Exit::Shutdown);

    let vm = guest.boot();
    vm.check("mkdir -p /mnt && mount -t ext4 /dev/vda /mnt");
    assert_eq!(vm.check("cd /mnt && sha256sum 1 2"), sums);
}

#[test]
fn each_disk_has_its_own_size_serial_number_and_contents() {
    let disks = [Disk::blank(1 << 20), Disk::blank(2 << 20), Disk::blank((3 << 20) + 512)];
    let vm = Guest::micro()
        .disk_with(&disks[0], "serial=first")
        .disk_with(&disks[1], "serial=12345678901234567890")
        .disk(&disks[2])
        .boot();
    assert_eq!(vm.check("cat /sys/block/vd?/size"), "2048\n4096\n6145\n");
    assert_eq!(vm.check("cat /sys/block/vda/serial"), "first");
    assert_eq!(vm.check("cat /sys/block/vdb/serial"), "12345678901234567890");
    vm.check("for disk in vda vdb vdc; do echo $disk > /tmp/name; dd if=/tmp/name of=/dev/$disk conv=fsync; done");
    for (disk, name) in disks.iter().zip([b"vda\n", b"vdb\n", b"vdc\n"]) {
        assert_eq!(disk.beginning(4), name);
    }
    // The last sector, and nothing past it.
    vm.check("dd if=/tmp/name of=/dev/vdc seek=6144 conv=fsync");
    assert_ne!(vm.run("dd if=/tmp/name of=/dev/vdc seek=6145 conv=fsync").exit_code, 0);
}

#[test]
fn a_read_only_disk_is_read_and_refuses_writes() {
    let contents = vec![b'x'; MIB];
    let disk = Disk::holding(&contents);
    let vm = Guest::micro().disk_with(&disk, "readonly").boot();
    assert_eq!(vm.check("cat /sys/block/vda/ro"), "1\n");
    assert_eq!(vm.check("tr -d x < /dev/vda | wc -c"), "0\n");
    let refused = vm.run("dd if=/dev/zero of=/dev/vda bs=512 count=1 conv=fsync");
    assert_ne!(refused.exit_code, 0);
    assert!(
        refused.stderr.contains("not permitted") || refused.stderr.contains("Read-only"),
        "{}",
        refused.stderr
    );
    assert!(disk.beginning(MIB) == contents, "a read-only disk was changed");
}

#[test]
fn discarded_blocks_read_as_zeroes_and_leave_the_hosts_storage() {
    let disk = Disk::holding(&vec![b'x'; 8 * MIB]);
    let full = disk.allocated();
    let vm = Guest::micro().disk(&disk).boot();
    vm.check("blkdiscard -o 1048576 -l 4194304 /dev/vda");
    assert_eq!(full - disk.allocated(), 4 << 20);
    // tr leaves what is not an x; zeroes are counted.
    assert_eq!(vm.check("tr -d x < /dev/vda | wc -c"), "4194304\n");
    let contents = disk.beginning(8 * MIB);
    assert!(
        contents[..MIB]
            .iter()
            .chain(&contents[5 * MIB..])
            .all(|&byte| byte == b'x')
    );
    assert!(contents[MIB..5 * MIB].iter().all(|&byte| byte == 0));
}

#[test]
fn a_block_device_of_the_host_is_a_disk_like_any_other() {
    let backing = Disk::blank(8 << 20);
    let device = backing.block_device();
    let argument = format!("path={}", device.path().display());
    let vm = Guest::micro().arguments(["--disk", &argument]).boot();
    assert_eq!(vm.check("cat /sys/block/vda/size"), "16384\n");
    vm.check("head -c 4m /dev/urandom > /tmp/data && dd if=/tmp/data of=/dev/vda bs=1M conv=fsync");
    let written = vm.check("sha256sum < /tmp/data");
    vm.power_off();
    assert_eq!(vm.wait(), Exit::Shutdown);
    drop(device);
    assert_eq!(format!("{}  -\n", backing.sha256(4 << 20)), written);
}
