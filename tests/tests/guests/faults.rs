//! When the host cannot do what the guest asks for, the guest gets an error, and nothing else breaks.

use cutover_tests::{Disk, Exit, Guest};

#[test]
fn a_full_host_disk_gives_the_guest_io_errors_and_everything_else_goes_on() {
    for io in ["threads", "io-uring"] {
        let sound = Disk::blank(1 << 20);
        let parent = cutover_tests::scratch();
        let mount = parent.path().display();
        // A disk of 64 MiB on a file system of 16 MiB, mounted for the monitor alone and gone with it.
        let script =
            format!("mount -t tmpfs -o size=16m tmpfs {mount} && truncate -s 64M {mount}/disk && exec \"$0\" \"$@\"");
        let vm = Guest::micro()
            .disk(&sound)
            .arguments(["--disk", &format!("path={mount}/disk,io={io}")])
            .through(["unshare", "--mount", "sh", "-c", &script])
            .boot();

        vm.check("head -c 4m /dev/urandom > /tmp/data && dd if=/tmp/data of=/dev/vdb bs=1M conv=fsync");
        let written = vm.check("sha256sum < /tmp/data");
        let failed = vm.run("dd if=/dev/urandom of=/dev/vdb bs=1M seek=8 count=20 conv=fsync");
        assert_ne!(failed.exit_code, 0);
        assert!(failed.stderr.contains("Input/output error"), "{}", failed.stderr);

        vm.check("echo 3 > /proc/sys/vm/drop_caches");
        assert_eq!(
            vm.check("head -c 4m /dev/vdb | sha256sum"),
            written,
            "what was written before is lost"
        );
        vm.check("dd if=/tmp/data of=/dev/vda bs=1M count=1 conv=fsync");
        assert_eq!(
            format!("{}  -\n", sound.sha256(1 << 20)),
            vm.check("head -c 1m /tmp/data | sha256sum")
        );
        vm.power_off();
        assert_eq!(vm.wait(), Exit::Shutdown);
    }
}
