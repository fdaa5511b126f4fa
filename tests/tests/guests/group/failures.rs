//! Failures of what protects a group, and of the network between its hosts.

use cutover_tests::{Exit, Group, Guest, ParallelJob};

use super::{PASSES, check_members, check_passes};

/// Number of the last permanent cut.
fn last_cut(group: &Group) -> u64 {
    group.status()["permanent_cut"].as_u64().unwrap_or(0)
}

/// Checks that cuts become permanent.
fn check_cuts_go_on(group: &Group) {
    let before = last_cut(group);
    group.wait_until("more cuts become permanent", |status| {
        status["permanent_cut"].as_u64().is_some_and(|last| last > before + 2)
    });
}

#[test]
fn a_group_goes_on_without_its_coordinator_its_standbys_and_its_network() {
    let mut group = Group::boot(2, &[0, 1], Guest::micro);
    for vm in &group.vms {
        vm.start_page_writer(8, Some(200));
    }
    let mut job = ParallelJob::begin(&group.members(), "is", "S", 4 * PASSES);
    group.protect();
    check_passes(&mut job);

    group.kill_coordinator();
    group.start_coordinator();
    check_cuts_go_on(&group);
    let status = group.wait_until_protected();
    for member in status["members"].as_array().unwrap() {
        assert_eq!(member["incarnation"], 0, "nobody was lost: {status}");
    }
    check_passes(&mut job);

    group.sites[1].kill_standbys();
    group.wait_until("that is seen", |status| status["state"] != "protected");
    group.wait_until_protected();
    check_cuts_go_on(&group);
    check_passes(&mut job);

    group.lose(&[1], 0, |group| group.sites[1].cut_link());
    job.check_rest();
    check_members(&group);
    group.sites[1].mend_link();
    // It was fenced. Now it hears that another is in its place, or its agent hears that first, and kills it.
    let ended = group.vms[1].wait();
    assert!(matches!(ended, Exit::Forced | Exit::Signal(9)), "{ended:?}");
    group.wait_until_protected();
    check_members(&group);
}
