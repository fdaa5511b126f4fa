//! Groups that are kept in files, and lost whole.

use cutover_tests::{Group, Guest, poll_until, scratch};

/// Where the job reports, within its first guest.
const REPORT_PORT: u16 = 6001;
/// Passes of the job.
const PASSES: usize = 6;

/// Results that have come so far, in the guest that has them.
fn results(group: &Group) -> Vec<String> {
    let text = group.vms[0].check("cat /run/results");
    text.lines().map(str::to_owned).collect()
}

#[test]
fn a_group_that_is_lost_whole_comes_to_the_right_result_from_a_checkpoint_that_was_kept() {
    let mut group = Group::boot(2, &[0, 1], Guest::micro);
    let addresses: Vec<String> = group
        .members()
        .iter()
        .map(|(_, address)| format!("{address}:6000"))
        .collect();
    for (rank, vm) in group.vms.iter().enumerate() {
        vm.start_page_writer(8, Some(200));
        vm.check(&format!(
            "ip link set lo up; parallel-job is S {PASSES} {rank} {REPORT_PORT} {} </dev/null >/run/job.log 2>&1 &",
            addresses.join(" ")
        ));
    }
    // What comes of it stays in the group: to somebody outside, a group that goes back that far has lost what it said since.
    group.vms[0].check(&format!(
        "{{ until busybox nc 127.0.0.1 {REPORT_PORT} >/run/results && test -s /run/results; do :; done; }} \
         </dev/null >/dev/null 2>&1 &"
    ));
    group.protect();
    poll_until("the first pass is done", || (!results(&group).is_empty()).then_some(()));
    let store = scratch();
    group.store(store.path());
    let before = results(&group).len();
    assert!(before < PASSES, "the job is under way");
    group.lose_everything();
    group.restore(store.path());
    let after = poll_until("all passes are done", || {
        Some(results(&group)).filter(|done| done.len() == PASSES)
    });
    let outcomes: Vec<_> = (1..)
        .zip(&after)
        .map(|(pass, line)| line.strip_prefix(&format!("pass {pass} ")))
        .collect();
    assert!(
        outcomes.iter().flatten().all(|outcome| outcome.contains(" verified ")),
        "{after:?}"
    );
    assert!(
        outcomes
            .iter()
            .all(|outcome| outcome.is_some() && *outcome == outcomes[0]),
        "{after:?}"
    );
    for vm in &group.vms {
        let (first, second) = (vm.check_pages(), vm.check_pages());
        assert!(second.pages > first.pages, "{first} and then {second}");
    }
}
