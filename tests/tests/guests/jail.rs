//! Monitors with least privilege: what their processes are and reach, and that their guests lack nothing.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use cutover_tests::{Api, Disk, Exit, Guest, Jail, Monitor, Signal, Vm, guest_file, poll_until, scratch};
use serde_json::json;

const TAP: &str = "tap0";
const HOST: &str = "198.18.255.1/24";
/// Gives the guest its address, and shows that it reaches the host's end of the tap.
const NETWORK: &str = "ip address add 198.18.255.2/24 dev eth0; ip link set eth0 up; ping -c 1 198.18.255.1";
const MEMORY_MAX: u64 = 600 << 20;

/// A jail called `name` with kernel and initrd of `guest`, and folders for snapshots and disks.
fn jail(name: &str, snapshots: &Path, disks: &Path) -> Jail {
    let mut jail = Jail::new(name, TAP, HOST)
        .given(snapshots, "/snapshots", true)
        .given(disks, "/disks", true)
        .with(["--parent-cgroup", "cutover-tests", "--cgroup", "pids.max=64"])
        .with(["--cgroup", &format!("memory.max={MEMORY_MAX}")])
        .with(["--resource-limit", "no-file=512"]);
    for file in ["micro/vmlinuz", "micro/initrd"].map(guest_file) {
        jail = jail.given(&file, file.to_str().expect("ASCII"), false);
    }
    jail
}

/// Checks what the process of the monitor in `jail` is, and what it can see.
fn check_confined(jail: &Jail, keeper: &Monitor) {
    let monitor = Jail::monitor(keeper);
    let status = fs::read_to_string(monitor.join("status")).unwrap();
    for line in [
        "Uid: 61234 61234 61234 61234",
        "Gid: 61234 61234 61234 61234",
        "Groups:",
        "CapInh: 0000000000000000",
        "CapPrm: 0000000000000000",
        "CapEff: 0000000000000000",
        "CapBnd: 0000000000000000",
        "CapAmb: 0000000000000000",
        "NoNewPrivs: 1",
        "Seccomp: 2",
    ] {
        let is_line = |found: &str| found.split_whitespace().eq(line.split_whitespace());
        assert!(status.lines().any(is_line), "{line}: {status}");
    }
    let network = fs::metadata(monitor.join("ns/net")).unwrap().ino();
    assert_eq!(network, jail.network());
    for namespace in ["mnt", "pid", "ipc", "uts", "cgroup"] {
        let of = |process: &Path| fs::metadata(process.join("ns").join(namespace)).unwrap().ino();
        assert_ne!(of(&monitor), of(Path::new("/proc/self")), "{namespace}");
    }
    // The host's, as the monitor sees it: nothing of it.
    let root = monitor.join("root");
    assert!(root.join("proc/1").exists() && root.join("snapshots").exists());
    assert!(!root.join("etc").exists() && !root.join("usr").exists() && !root.join("sys").exists());
    assert_eq!(fs::read(monitor.join("environ")).unwrap(), b"", "a test has variables");
    let limits = fs::read_to_string(monitor.join("limits")).unwrap();
    let files = limits.lines().find(|line| line.starts_with("Max open files")).unwrap();
    assert!(
        files.split_whitespace().eq("Max open files 512 512 files".split(' ')),
        "{files}"
    );
    let group = fs::read_to_string(monitor.join("cgroup")).unwrap();
    let group = Path::new("/sys/fs/cgroup").join(group.trim().strip_prefix("0::/").unwrap());
    assert!(group.starts_with("/sys/fs/cgroup/cutover-tests"), "{}", group.display());
    let limit = fs::read_to_string(group.join("memory.max")).unwrap();
    assert_eq!(limit.trim(), MEMORY_MAX.to_string());
}

/// Has the monitor use another file for its guest's disk, which it must not reach; returns what it says.
fn refused_disk(api: &Api, path: &Path) -> String {
    let body = json!({ "drive_id": "disk0", "path_on_host": path });
    api.request("PATCH", "/drives/disk0", Some(&body)).fault()
}

#[test]
fn a_guest_runs_is_saved_and_restored_in_jails_that_reach_nothing_else() {
    let (snapshots, disks) = (scratch(), scratch());
    let (disk, other) = (Disk::holding(&b"on the disk ".repeat(128)), Disk::blank(1 << 20));
    let first = jail("first", snapshots.path(), disks.path()).given(disk.path(), "/disk", true);
    let vm = Guest::micro()
        .arguments(["--disk", "path=/disk", "--net", &format!("tap={TAP}")])
        .arguments(["--api-sock", Jail::SOCKET])
        .in_jail(&first)
        .boot();
    check_confined(&first, vm.monitor());
    assert_eq!(vm.check("head -c 11 /dev/vda"), "on the disk");
    vm.check(NETWORK);
    let unreachable = refused_disk(&first.api(), other.path());
    assert!(unreachable.contains("No such file or directory"), "{unreachable}");

    vm.check("echo before > /tmp/when");
    let snapshot = json!({ "store": "/snapshots", "name": "one", "kind": "full" });
    first.api().post("/v1/snapshots", &snapshot);
    vm.monitor().signal(Signal::TERM);
    assert_eq!(vm.wait(), Exit::Shutdown);
    assert!(!first.folder().exists(), "a jail goes with its monitor");
    assert!(!Path::new("/sys/fs/cgroup/cutover-tests/first").exists());

    let second = jail("second", snapshots.path(), disks.path());
    let mut command = Monitor::command();
    command.arg("jail").args(second.options()).arg("--");
    command.args([
        "snapshot",
        "restore",
        "/snapshots/one",
        "--disks",
        "/disks",
        "--api-sock",
        Jail::SOCKET,
    ]);
    let restored = Vm::start_restored(command);
    second.api().wait_ready();
    assert_eq!(
        restored.check("cat /tmp/when; head -c 11 /dev/vda"),
        "before\non the disk"
    );
    // Its threads have confined themselves further when the guest runs.
    check_confined(&second, restored.monitor());
    restored.check("ping -c 1 198.18.255.1");
    let monitor = Jail::monitor(restored.monitor());
    restored.monitor().signal(Signal::KILL);
    assert_eq!(restored.wait(), Exit::Signal(9));
    poll_until("the monitor goes with its keeper", || (!monitor.exists()).then_some(()));
}

#[test]
fn landlock_confines_a_monitor_to_the_files_given() {
    let (directory, given, other) = (scratch(), Disk::holding(&b"on disk ".repeat(64)), Disk::blank(1 << 20));
    let api = Api::new(&directory.path().join("api"));
    let mut options = vec!["--landlock".to_owned()];
    let readable =
        ["micro/vmlinuz", "micro/initrd"].map(|file| format!("path={},readonly", guest_file(file).display()));
    let writable = [directory.path(), given.path()].map(|path| format!("path={}", path.display()));
    for file in readable.into_iter().chain(writable) {
        options.extend(["--file".to_owned(), file]);
    }
    let vm = Guest::micro()
        .disk(&given)
        .arguments(["--api-sock".as_ref(), api.socket().as_os_str()])
        .confined(options)
        .boot();
    assert_eq!(vm.check("head -c 7 /dev/vda"), "on disk");
    let denied = refused_disk(&api, other.path());
    assert!(denied.contains("Permission denied"), "{denied}");
    let status = fs::read_to_string(vm.monitor().proc("status")).unwrap();
    assert!(
        status.contains("CapEff:\t0000000000000000") && status.contains("NoNewPrivs:\t1"),
        "{status}"
    );
    vm.power_off();
    assert_eq!(vm.wait(), Exit::Shutdown);
}
