//! What is asked for wrongly, or what the machine cannot give, is refused with a message that says what to do.

use std::fs;
use std::path::Path;
use std::process::Command;

use cutover_tests::cli::{Finished, cutover, finish};
use cutover_tests::{Disk, Exit, Guest, Monitor, Network, Vm, guest_file, scratch};

/// `cutover run` with a kernel that is there, and these arguments.
fn run_with(arguments: &[&str]) -> Finished {
    let kernel = guest_file("micro/vmlinuz");
    cutover([&["run", "--kernel", kernel.to_str().unwrap()], arguments].concat())
}

/// Expects the refusal of a VM, with `message` in it.
#[track_caller]
fn expect_refusal(finished: &Finished, exit: Exit, message: &str) {
    assert_eq!(
        (finished.exit, finished.stdout.as_str()),
        (exit, ""),
        "{}",
        finished.stderr
    );
    assert!(
        finished.stderr.contains(message),
        "'{message}' is not in: {}",
        finished.stderr
    );
}

#[test]
fn values_beyond_a_limit_are_refused_with_the_limit() {
    for (arguments, message) in [
        (["--cpus", "0"], "cpus: 0 is out of range: a VM has 1 to 32 vCPUs"),
        (["--cpus", "33"], "cpus: 33 is out of range: a VM has 1 to 32 vCPUs"),
        (["--memory", "31M"], "memory: 31M is out of range: a VM has 32M"),
        (
            ["--memory", "33554433"],
            "memory: 33554433 is not a multiple of the page size",
        ),
        (
            ["--memory", "12X"],
            "'12X' is not a size: write a number with an optional unit, such as 512M or 4GiB",
        ),
        (
            ["--net", "mac=01:00:00:00:00:00"],
            "'01:00:00:00:00:00' is not a unicast MAC address",
        ),
        (["--net", "mtu=60"], "mtu: 60 is out of range"),
        (
            ["--net", "tap=a-name-of-16-byt"],
            "is not an interface name: it has 1 to 15 bytes",
        ),
        (
            ["--net", "host-ip=10.0.0.1"],
            "'10.0.0.1' is not an IPv4 address with a prefix length",
        ),
        (["--disk", "path=/x,colour=red"], "there is no key 'colour'"),
        (
            ["--disk", "path=/x,serial=123456789012345678901"],
            "it has 1 to 20 printable ASCII characters",
        ),
        (["--serial", "carrier-pigeon"], "carrier-pigeon"),
        (["--colour", "red"], "unexpected argument '--colour'"),
    ] {
        expect_refusal(&run_with(&arguments), Exit::Usage, message);
    }
}

#[test]
fn a_configuration_file_is_refused_with_its_name_and_the_place_of_the_mistake() {
    let directory = scratch();
    let path = directory.path().join("vm.json");
    for (json, mistake) in [
        ("{", "EOF while parsing an object at line 1 column 1"),
        ("{\"cpus\": 1,\n \"colour\": 2}", "unknown field `colour`"),
        ("{\"cpus\": 1}", "missing field `memory`"),
    ] {
        fs::write(&path, json).unwrap();
        let refused = cutover(["run".as_ref(), "--config".as_ref(), path.as_os_str()]);
        expect_refusal(&refused, Exit::Usage, mistake);
        assert!(refused.stderr.contains(path.to_str().unwrap()), "{}", refused.stderr);
    }
}

#[test]
fn what_cannot_be_booted_is_refused_by_name() {
    let directory = scratch();
    let text = directory.path().join("text");
    fs::write(&text, "not a kernel\n".repeat(1000)).unwrap();
    let run = |kernel: &Path, arguments: &[&str]| {
        cutover([&["run", "--kernel", kernel.to_str().unwrap()], arguments].concat())
    };

    let missing = Path::new("/nonexistent/vmlinuz");
    expect_refusal(
        &run(missing, &[]),
        Exit::Error,
        "cannot read kernel /nonexistent/vmlinuz: No such file",
    );
    expect_refusal(&run(directory.path(), &[]), Exit::Error, "is a directory");
    let refused = run(&text, &[]);
    expect_refusal(
        &refused,
        Exit::Error,
        "is not a kernel: an x86-64 bzImage or ELF vmlinux is needed",
    );
    assert!(refused.stderr.contains(text.to_str().unwrap()), "{}", refused.stderr);

    let refused = run_with(&["--initrd", "/nonexistent/initrd"]);
    expect_refusal(
        &refused,
        Exit::Error,
        "cannot read initrd /nonexistent/initrd: No such file",
    );
    let refused = run(&guest_file("micro/vmlinux"), &["--memory", "32M"]);
    expect_refusal(&refused, Exit::Error, "give the VM more memory");
}

#[test]
fn a_disk_image_that_cannot_be_used_is_refused_by_name_with_what_to_do() {
    let refuse = |disk: &str, message: &str| {
        expect_refusal(&run_with(&["--disk", disk]), Exit::Error, message);
    };
    refuse("path=/nonexistent/disk", "cannot open disk image '/nonexistent/disk'");
    refuse(
        "path=/dev/null",
        "disk image '/dev/null' is neither a regular file nor a block device",
    );
    let odd = Disk::holding(&[0; 1000]);
    let odd = format!("path={}", odd.path().display());
    refuse(&odd, "has 1000 bytes, which is not a positive multiple of 512");

    let shared = Disk::blank(1 << 20);
    let vm = Guest::micro().disk(&shared).boot();
    refuse(&format!("path={}", shared.path().display()), "is in use by");
    vm.check("dd if=/dev/vda of=/dev/null");
}

#[test]
fn a_tap_device_that_another_monitor_has_is_refused_as_busy() {
    let network = Network::new();
    let _vm = Guest::micro().net(&network).boot();
    let refused = run_with(&["--net", &format!("tap={}", network.tap())]);
    expect_refusal(
        &refused,
        Exit::Error,
        &format!("tap device '{}' is busy: another process has it open", network.tap()),
    );
    expect_refusal(&run_with(&["--net", "tap=lo"]), Exit::Error, "'lo' is not a tap device");
    expect_refusal(
        &run_with(&["--net", "fd=0"]),
        Exit::Error,
        "file descriptor 0 is not a tap device",
    );
}

/// Replaces `/dev` by one that has nothing but shared memory, where the files of the tests are.
const EMPTY_DEV: &str = "mount -t tmpfs tmpfs /mnt && mkdir /mnt/shm && mount --bind /dev/shm /mnt/shm && \
                         mount --move /mnt /dev";
/// Makes a `/dev/kvm` of someone else, and takes root's right to open it all the same.
const FORBIDDEN_KVM: &str = "mknod -m 600 /dev/kvm c 10 232 && chown 65534 /dev/kvm && \
                             rights=-dac_override,-dac_read_search && \
                             set -- --bounding-set $rights --inh-caps $rights \"$0\" \"$@\" && exec setpriv \"$@\"";

/// `cutover` with these arguments where `/dev` is empty but for what a shell script puts there.
fn cutover_without_devices(script: &str, arguments: &[&str]) -> Finished {
    let script = format!("{EMPTY_DEV} && {script} && exec \"$0\" \"$@\"");
    let monitor = Monitor::command();
    let mut command = Command::new("unshare");
    command
        .args(["--mount", "sh", "-c", &script])
        .arg(monitor.get_program())
        .args(arguments);
    finish(command)
}

#[test]
fn a_machine_without_kvm_or_the_right_to_it_is_told_with_advice() {
    let run = ["run", "--kernel", "/proc/version"];
    for (script, problem, advice) in [
        (
            "true",
            "cannot open /dev/kvm: No such file or directory",
            "load the kvm_intel or kvm_amd module",
        ),
        (
            FORBIDDEN_KVM,
            "cannot open /dev/kvm: Permission denied",
            "add your user to the group that owns it",
        ),
    ] {
        let refused = cutover_without_devices(script, &run);
        expect_refusal(&refused, Exit::Error, problem);
        expect_refusal(&refused, Exit::Error, advice);

        let check = cutover_without_devices(script, &["check"]);
        assert_eq!(check.exit, Exit::Error, "{}", check.stdout);
        assert!(
            check.stdout.ends_with("This machine cannot run guests.\n"),
            "{}",
            check.stdout
        );
    }
}

#[test]
fn a_machine_that_can_run_guests_says_so_to_people_and_programs() {
    let text = cutover(["check"]);
    assert_eq!(text.exit, Exit::Shutdown, "{}", text.stdout);
    assert!(
        text.stdout.ends_with("This machine can run guests.\n"),
        "{}",
        text.stdout
    );
    let json: serde_json::Value = serde_json::from_str(&cutover(["check", "--json"]).stdout).unwrap();
    assert_eq!(json["can_run_guests"], true);
}

#[test]
fn a_configuration_file_starts_the_vm_it_describes_and_options_change_it() {
    let directory = scratch();
    let path = directory.path().join("vm.json");
    let spec = serde_json::json!({
        "cpus": 1,
        "memory": { "size": "96M" },
        "boot": {
            "kernel": guest_file("micro/vmlinuz"),
            "initrd": guest_file("micro/initrd"),
            "cmdline": "console=ttyS0 quiet panic=-1 from.the=file",
        },
        "rng": true,
    });
    fs::write(&path, spec.to_string()).unwrap();
    let mut command = Monitor::command();
    command.arg("run").arg("--config").arg(&path).args(["--cpus", "2"]);
    let vm = Vm::start(command);
    vm.wait_agent();
    assert_eq!(
        vm.check("cat /proc/cmdline"),
        "console=ttyS0 quiet panic=-1 from.the=file\n"
    );
    assert_eq!(vm.check("nproc"), "2\n");
    assert_eq!(
        vm.check("cat /sys/class/misc/hw_random/rng_available"),
        "virtio_rng.0 \n"
    );
}
