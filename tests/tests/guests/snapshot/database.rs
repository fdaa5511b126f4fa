//! Databases in a whole distribution: every write that was acknowledged before a snapshot is in it, and they go on.

use cutover_tests::{Api, Disk, Exit, Guest, Network, Shelf, Signal, Ssh, poll_until, scratch};

/// Two databases take writes one after the other, each of a number one higher, and what they acknowledge is noted.
pub const WRITES: &str = r#"
set -e
sed -i 's/^appendonly no/appendonly yes/; s/^appendfsync everysec/appendfsync always/' /etc/redis/redis.conf
systemctl restart redis-server
while ! redis-cli ping >/dev/null 2>&1; do sleep 0.5; done
sqlite3 /srv/numbers 'pragma journal_mode=wal; create table numbers (n integer primary key)' >/dev/null
cat >/srv/writes <<'END'
n=0
while :; do
    n=$((n+1))
    redis-cli rpush numbers $n >/dev/null && echo $n >/run/redis-acknowledged
    sqlite3 /srv/numbers "pragma synchronous=full; insert into numbers values ($n)" && echo $n >/run/sqlite-acknowledged
done
END
systemd-run --quiet --unit writes sh /srv/writes
"#;

/// No number is missing, none is there twice, and those acknowledged are there; also for who reads the files anew.
pub const CHECK: &str = r#"
set -eu
systemctl stop writes
check() {
    acknowledged=$(cat /run/$1-acknowledged)
    [ "$2" -ge "$acknowledged" ] || { echo "$1: acknowledged $acknowledged, there are $2"; exit 1; }
    [ "$2" = "$3" ] || { echo "$1: $2 numbers up to $3"; exit 1; }
}
check redis "$(redis-cli llen numbers)" "$(redis-cli lindex numbers -1)"
check sqlite "$(sqlite3 /srv/numbers 'select count(*) from numbers')" "$(sqlite3 /srv/numbers 'select max(n) from numbers')"
[ "$(sqlite3 /srv/numbers 'pragma integrity_check')" = ok ]
kill -9 "$(systemctl show --property MainPID --value redis-server)"
while ! redis-cli ping >/dev/null 2>&1 || redis-cli ping | grep -q LOADING; do sleep 0.5; done
check redis "$(redis-cli llen numbers)" "$(redis-cli lindex numbers -1)"
echo all there
"#;

pub fn acknowledged(ssh: &Ssh) -> u32 {
    let count = ssh.run("cat /run/sqlite-acknowledged").stdout;
    count.trim().parse().unwrap_or(0)
}

#[test]
fn databases_of_a_restored_debian_have_all_they_acknowledged_and_go_on() {
    const INCREMENTS: u32 = 2;
    let (shelf, network, root) = (Shelf::new(), Network::new(), Disk::debian_root());
    let socket = shelf.path("api");
    let vm = Guest::debian(&root, &network)
        .arguments(["--api-sock".as_ref(), socket.as_os_str()])
        .boot();
    let api = Api::new(&socket);
    let ssh = Ssh::to(network.guest());
    ssh.check(WRITES);
    for number in 0..=INCREMENTS {
        poll_until("the databases take more writes", || {
            (acknowledged(&ssh) > 20 * (number + 1)).then_some(())
        });
        let kind = if number == 0 { "full" } else { "incremental" };
        shelf.ask(&api, &format!("s{number}"), kind).success();
    }
    assert_eq!(ssh.check(CHECK), "all there\n");
    drop(vm);
    drop(root);

    for number in [0, INCREMENTS] {
        let disks = scratch();
        let restored = shelf
            .restore(&format!("s{number}"))
            .arguments(["--disks".as_ref(), disks.path().as_os_str()])
            .start();
        let ssh = Ssh::to(network.guest());
        let before = acknowledged(&ssh);
        assert!(before > 20 * (number + 1), "{before} writes in s{number}");
        poll_until("the databases go on", || {
            (acknowledged(&ssh) > before + 5).then_some(())
        });
        assert_eq!(ssh.check(CHECK), "all there\n");
        assert_eq!(ssh.check("dmesg | grep -ci 'EXT4-fs error' || :"), "0\n");
        restored.vm.monitor().signal(Signal::TERM);
        assert_eq!(restored.vm.wait(), Exit::Shutdown);
    }
}
