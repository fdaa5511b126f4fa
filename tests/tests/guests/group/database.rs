//! A whole distribution that is protected while it is used from outside.

use cutover_tests::{Disk, Group, Ssh, poll_until};

use crate::migration::visitors::{OPEN, Visitors};
use crate::snapshot::database::{CHECK, WRITES, acknowledged};

#[test]
fn a_debian_survives_its_monitor_with_all_it_acknowledged_and_its_connections_open() {
    let root = Disk::debian_root();
    let mut group = Group::boot_debian(&root);
    let address = group.members()[0].1;
    let ssh = Ssh::to(address);
    ssh.check(OPEN);
    ssh.check(WRITES);
    let visitors = Visitors::begin(address);
    group.protect();
    let more_writes = || {
        let before = acknowledged(&ssh);
        poll_until("the databases take writes", || {
            (acknowledged(&ssh) > before + 5).then_some(())
        });
    };
    more_writes();

    group.lose(&[0], 1, |group| group.vms[0].kill());
    more_writes();
    visitors.check_served();
    assert_eq!(ssh.check(CHECK), "all there\n");
    assert_eq!(ssh.check("dmesg | grep -ci 'EXT4-fs error\\|soft lockup' || :"), "0\n");
}
