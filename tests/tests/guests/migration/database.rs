//! A whole distribution that moves while it is used: databases, a web server, a long computation, and somebody who is
//! logged in.

use std::process::Stdio;

use cutover_tests::{Api, Disk, Exit, Guest, Lan, ManagedVm, Receiver, Signal, Ssh, Vm, poll_until, scratch};
use serde_json::json;
use sha2::{Digest, Sha256};

use super::visitors::{OPEN, Visitors};
use crate::snapshot::database::{CHECK, WRITES, acknowledged};

/// Keeps the processor busy with what leads from each result to the next: a wrong one anywhere would show in the last.
const COMPUTE: &str = r#"
cat >/srv/compute <<'END'
import hashlib, os
count, digest = 0, b''
while not os.path.exists('/run/stop'):
    for _ in range(1000):
        digest = hashlib.sha256(digest).digest()
    count += 1000
open('/run/computed', 'w').write(f'{count} {digest.hex()}')
END
systemd-run --quiet --unit compute --property Nice=10 python3 /srv/compute
"#;

/// Checks what the guest has computed, against the same computed here.
#[track_caller]
fn check_computed(ssh: &Ssh) {
    let computed = ssh.check("while systemctl --quiet is-active compute; do sleep 0.2; done; cat /run/computed");
    let (count, digest) = computed.split_once(' ').unwrap();
    let count: u32 = count.parse().unwrap();
    assert!(count > 0);
    let expected = (0..count).fold(Vec::new(), |digest, _| Sha256::digest(&digest).to_vec());
    let expected: String = expected.iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(digest, expected, "after {count} steps");
}

#[test]
fn a_debian_moves_there_and_back_under_its_databases_its_web_server_and_its_user() {
    let (directory, mut lan, root) = (scratch(), Lan::new(), Disk::debian_root());
    let taps = [lan.add_tap(), lan.add_tap()];
    let socket = directory.path().join("api");
    let vm = Guest::debian_on(&root, &lan, &taps[0])
        .arguments(["--api-sock".as_ref(), socket.as_os_str()])
        .boot();
    let ssh = Ssh::to(lan.guest());
    ssh.check(OPEN);
    ssh.check(WRITES);
    ssh.check(COMPUTE);
    let visitors = Visitors::begin(lan.guest());
    let session = ssh
        .command("while ! [ -e /run/stop ]; do date +%s.%N; sleep 0.2; done; echo end")
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let there = go_on(&ssh, &vm, &Api::new(&socket), &taps[1]);
    let back = go_on(&ssh, &there.vm, &there.api, &taps[0]);
    let before = acknowledged(&ssh);
    poll_until("the databases go on", || {
        (acknowledged(&ssh) > before + 5).then_some(())
    });
    visitors.check_served();
    ssh.check("touch /run/stop");
    check_computed(&ssh);
    let times = String::from_utf8(session.wait_with_output().unwrap().stdout).unwrap();
    let times: Vec<&str> = times.lines().collect();
    assert_eq!(times.last(), Some(&"end"));
    let seconds = times[..times.len() - 1].iter().map(|time| time.parse::<f64>().unwrap());
    assert!(seconds.is_sorted(), "{times:?}");
    assert_eq!(ssh.check(CHECK), "all there\n");
    assert_eq!(
        ssh.check("dmesg | grep -ci 'EXT4-fs error\\|soft lockup\\|stall' || :"),
        "0\n"
    );
    back.vm.monitor().signal(Signal::TERM);
    assert_eq!(back.vm.wait(), Exit::Shutdown);
}

/// Has the guest move to another monitor, on `tap`, while its databases take writes.
#[track_caller]
fn go_on(ssh: &Ssh, vm: &Vm, api: &Api, tap: &str) -> ManagedVm {
    let before = acknowledged(ssh);
    poll_until("the databases take writes", || {
        (acknowledged(ssh) > before + 5).then_some(())
    });
    let receiver = Receiver::start_with(["--tap", &format!("net0={tap}")]);
    let body = json!({ "to": format!("tcp://{}", receiver.address()), "insecure": true, "downtime_ms": 5_000 });
    api.post("/v1/migration", &body);
    assert_eq!(vm.wait(), Exit::Shutdown, "{}", vm.log());
    receiver.managed
}
