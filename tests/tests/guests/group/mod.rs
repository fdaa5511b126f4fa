//! Groups of VMs that compute together, and survive what happens to one of them or to a host.

mod between_hosts;
mod failures;
mod stored;

use cutover_tests::{Group, Guest, ParallelJob};

/// Passes of the job before anything happens, and after each thing that does.
const PASSES: u32 = 2;

/// Lets the job come to the results that are due before the next thing happens.
fn check_passes(job: &mut ParallelJob) {
    (0..PASSES).for_each(|_| job.check_next());
}

/// Checks that no member has lost a page, and that all go on.
fn check_members(group: &Group) {
    for vm in &group.vms {
        let (first, second) = (vm.check_pages(), vm.check_pages());
        assert!(second.pages > first.pages, "{first} and then {second}");
    }
}

#[test]
fn a_job_has_the_same_result_undisturbed_protected_and_after_a_killed_monitor_and_a_lost_host() {
    let mut group = Group::boot(2, &[0, 0, 1, 1], Guest::micro);
    for vm in &group.vms {
        vm.start_page_writer(8, Some(200));
    }
    let mut job = ParallelJob::begin(&group.members(), "is", "S", 4 * PASSES);
    check_passes(&mut job);

    group.protect();
    check_passes(&mut job);

    group.lose(&[1], 1, |group| group.vms[1].kill());
    check_passes(&mut job);
    check_members(&group);

    group.wait_until_protected();
    group.lose(&[1, 2, 3], 0, |group| group.sites[1].cut_power());
    job.check_rest();
    check_members(&group);
}
