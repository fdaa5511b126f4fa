//! Groups on two hosts, which have nothing in common but a network.

use cutover_tests::{Group, Guest, ParallelJob};

use super::{PASSES, check_members, check_passes};

#[test]
fn a_job_goes_on_when_a_host_loses_its_power_and_is_protected_again_when_it_is_back() {
    let mut group = Group::boot_between_hosts(&[0, 0, 1, 1], Guest::micro);
    for vm in &group.vms {
        vm.start_page_writer(8, Some(200));
    }
    let mut job = ParallelJob::begin(&group.members(), "is", "S", 3 * PASSES);
    group.protect();
    check_passes(&mut job);

    group.lose(&[2, 3], 0, |group| group.sites[1].cut_power());
    check_passes(&mut job);
    check_members(&group);

    group.sites[1].power_up();
    group.wait_until_protected();
    job.check_rest();
    check_members(&group);
}
