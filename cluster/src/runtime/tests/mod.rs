//! Groups of made-up VMs, over real sockets: everything but the guests.

mod made_up;
mod proxy;
mod world;

use world::World;

use crate::engine::State;
use crate::runtime::coordinator::GroupView;

fn is_protected(view: &GroupView) -> bool {
    view.status.state == State::Protected
}

#[test]
fn a_group_of_three_is_protected_and_goes_from_cut_to_cut() {
    let world = World::patient(3);
    world.create_group(&["a", "b", "c"]);
    let view = world.wait_for("five cuts", |view| is_protected(view) && view.status.cuts >= 5);
    assert_eq!(view.status.members.len(), 3);
    assert_eq!(view.connected.len(), 6, "each member and its standby: {view:?}");
    for name in ["a", "b", "c"] {
        let vm = world.vm(name);
        assert!(vm.runs && vm.permanent > 0, "{vm:?}");
    }
}

#[test]
fn a_member_that_is_killed_goes_on_as_its_standby_and_the_others_go_back_to_the_same_cut() {
    let world = World::patient(3);
    world.create_group(&["a", "b", "c"]);
    world.wait_for("a few cuts", |view| is_protected(view) && view.status.cuts >= 3);
    let killed = world.vm_id("a");
    world.kill_vm("a");
    let view = world.wait_for("recovery, and protection once more", |view| {
        is_protected(view) && view.status.recoveries == 1
    });
    let recovery = view.last_recovery.expect("there was one");
    assert_eq!(recovery.lost.len(), 1, "{recovery:?}");
    assert_ne!(world.vm_id("a"), killed, "its standby is the VM now");
    for name in ["a", "b", "c"] {
        let vm = world.vm(name);
        assert_eq!(vm.went_back_to, [recovery.cut], "{name}: {vm:?}");
        assert!(vm.runs, "{name}: {vm:?}");
    }
}

#[test]
fn a_member_that_is_cut_off_has_stopped_before_another_runs_in_its_place() {
    let world = World::new(3);
    world.create_group(&["a", "b"]);
    world.wait_for("a cut", is_protected);
    world.cut_off_vm("b");
    // Two of one that run at a time are found by the made-up VMs themselves.
    world.wait_for("recovery", |view| is_protected(view) && view.status.recoveries == 1);
}

#[test]
fn a_standby_that_is_lost_leaves_the_group_unprotected_until_it_has_another() {
    let world = World::patient(3);
    world.create_group(&["a", "b"]);
    let view = world.wait_for("a cut", is_protected);
    world.kill_standby("a");
    let again = world.wait_for("protection once more", |now| {
        is_protected(now)
            && now.status.reason.is_none()
            && now.status.permanent > view.status.permanent
            && world.has_standby("a")
    });
    assert_eq!(again.status.recoveries, 0, "no member had to go back");
    assert!(world.vm("a").went_back_to.is_empty(), "{:?}", world.vm("a"));
}

#[test]
fn a_coordinator_that_is_restarted_at_any_time_goes_on_with_the_group() {
    let mut world = World::patient(3);
    world.create_group(&["a", "b", "c"]);
    let mut generation = world.wait_for("a cut", is_protected).status.generation;
    for cuts in 0..8 {
        // Somewhere in a cut, each time somewhere else.
        world.wait_for("some cuts", |view| is_protected(view) && view.status.cuts >= cuts);
        world.restart_coordinator();
        let view = world.wait_for("a cut", |view| is_protected(view) && view.status.cuts > 0);
        assert!(view.status.generation > generation, "{view:?}");
        assert_eq!(view.status.recoveries, 0, "nobody was lost");
        generation = view.status.generation;
    }
}

#[test]
fn a_member_that_is_lost_while_there_is_no_coordinator_is_found_to_be_by_the_next() {
    let mut world = World::new(3);
    world.create_group(&["a", "b", "c"]);
    world.wait_for("a cut", is_protected);
    world.stop_coordinator();
    world.kill_vm("c");
    world.start_coordinator();
    world.wait_for("recovery", |view| is_protected(view) && view.status.recoveries == 1);
    assert!(world.vm("c").runs);
}

#[test]
fn a_coordinator_that_waits_takes_over_from_one_that_is_lost_and_so_on() {
    let mut world = World::patient(3);
    world.create_group(&["a", "b", "c"]);
    let mut generation = world.wait_for("a cut", is_protected).status.generation;
    for name in ["second", "third", "fourth"] {
        world.start_waiting_coordinator(name);
        world.lose_coordinator();
        let view = world.wait_for("cuts", |view| is_protected(view) && view.status.cuts > 2);
        assert!(view.status.generation > generation, "{view:?}");
        assert_eq!(view.status.recoveries, 0, "nobody was lost");
        generation = view.status.generation;
    }
}

#[test]
fn a_coordinator_whose_journal_fails_decides_nothing_until_it_works_again() {
    let world = World::patient(3);
    world.create_group(&["a", "b"]);
    world.wait_for("a cut", is_protected);
    world.break_journal(true);
    let said = world.wait_for_refusal();
    assert!(said.contains("journal in memory: cannot write: it is broken"), "{said}");
    let record = world.record();
    for name in ["a", "b"] {
        let permanent = world.vm(name).permanent;
        assert!(
            Some(permanent) <= record.permanent(),
            "{permanent} is in no journal: {record:?}"
        );
    }
    world.break_journal(false);
    let view = world.wait_for("a cut", |view| {
        is_protected(view) && view.status.permanent > record.permanent()
    });
    assert!(view.status.generation > record.generation, "{view:?}");
    assert_eq!(view.status.recoveries, 0, "nobody was lost");
}

#[test]
fn members_of_a_group_that_is_dissolved_run_on_on_their_own() {
    let world = World::patient(2);
    world.create_group(&["a", "b"]);
    world.wait_for("a cut", is_protected);
    world.dissolve();
    for name in ["a", "b"] {
        world.wait_for_vm(name, |vm| vm.runs && !vm.is_protected);
    }
}

#[test]
fn a_vm_that_is_not_there_is_named_and_the_group_waits_for_it() {
    let world = World::new(2);
    world.create_group_of(&[("nobody", 0)]);
    let view = world.wait_for("a refusal", |view| view.refusal.is_some());
    assert_eq!(view.refusal.as_deref(), Some("there is no VM 'nobody'"));
    assert_eq!(view.status.state, State::Unprotected);
}
