//! A whole distribution that moves while it is used: databases, a web server, and somebody who is logged in.

use std::process::Stdio;

use cutover_tests::{Api, Disk, Exit, Guest, Lan, ManagedVm, Receiver, Signal, Ssh, Vm, poll_until, scratch};
use serde_json::json;

use crate::snapshot::database::{CHECK, WRITES, acknowledged};

/// Fetches a page again and again, and counts the times that it was not what it should be.
const READS: &str = r#"
head -c 1m /dev/urandom >/var/www/html/page
cat >/srv/reads <<'END'
sum=$(md5sum </var/www/html/page)
n=0
wrong=0
while ! [ -e /run/stop ]; do
    n=$((n+1))
    [ "$(python3 -c 'import sys,urllib.request as u; sys.stdout.buffer.write(u.urlopen("http://localhost/page").read())' | md5sum)" = "$sum" ] || wrong=$((wrong+1))
    echo $n $wrong >/run/reads
done
END
systemd-run --quiet --unit reads sh /srv/reads
"#;

#[test]
fn a_debian_moves_there_and_back_under_its_databases_its_web_server_and_its_user() {
    let (directory, mut lan, root) = (scratch(), Lan::new(), Disk::debian_root());
    let taps = [lan.add_tap(), lan.add_tap()];
    let socket = directory.path().join("api");
    let vm = Guest::debian_on(&root, &lan, &taps[0])
        .arguments(["--api-sock".as_ref(), socket.as_os_str()])
        .boot();
    let ssh = Ssh::to(lan.guest());
    ssh.check(WRITES);
    ssh.check(READS);
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
    ssh.check("touch /run/stop");
    let times = String::from_utf8(session.wait_with_output().unwrap().stdout).unwrap();
    let times: Vec<&str> = times.lines().collect();
    assert_eq!(times.last(), Some(&"end"));
    let seconds = times[..times.len() - 1].iter().map(|time| time.parse::<f64>().unwrap());
    assert!(seconds.is_sorted(), "{times:?}");
    assert_eq!(ssh.check(CHECK), "all there\n");
    let reads = ssh.check("cat /run/reads");
    assert!(reads.ends_with(" 0\n") && reads != "0 0\n", "{reads}");
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
