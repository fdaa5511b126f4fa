//! What may be asked when, and that actions and states agree whatever is asked.

use proptest::prelude::*;

use super::*;

const TIMEOUT: Duration = Duration::from_secs(30);

fn shutting_down(now: Instant, then: Then) -> State {
    State::ShuttingDown {
        deadline: now + TIMEOUT,
        then,
    }
}

#[test]
fn a_paused_guest_cannot_be_asked_to_power_off() {
    for request in [
        Request::PressPowerButton,
        Request::Shutdown { timeout: TIMEOUT },
        Request::Reboot { timeout: TIMEOUT },
    ] {
        assert_eq!(State::Paused.after(request, Instant::now()), Err(Refusal::NotRunning));
    }
}

#[test]
fn a_vm_that_never_ran_cannot_be_paused() {
    assert_eq!(
        State::Built.after(Request::Pause, Instant::now()),
        Err(Refusal::NotRunning)
    );
}

#[test]
fn a_second_operation_is_refused_naming_the_first() {
    let now = Instant::now();
    let rebooting = shutting_down(now, Then::BuildAnew);
    for request in [
        Request::Pause,
        Request::Resume,
        Request::Cycle,
        Request::Shutdown { timeout: TIMEOUT },
        Request::Reboot { timeout: TIMEOUT },
    ] {
        let refusal = rebooting.after(request, now).unwrap_err();
        assert_eq!(refusal, Refusal::Busy(rebooting));
        assert_eq!(
            refusal.to_string(),
            "the VM is rebooting: wait for that, or destroy the VM"
        );
    }
}

#[test]
fn a_guest_that_powers_off_when_asked_ends_the_vm_or_is_built_anew() {
    let now = Instant::now();
    let end = |then| shutting_down(now, then).after_guest_end(GuestEnd::Shutdown).action;
    assert_eq!(end(Then::End), Action::End(Exit::Shutdown));
    assert_eq!(end(Then::BuildAnew), Action::BuildAnew);
}

#[test]
fn a_reboot_builds_anew_however_the_guest_goes_down_but_the_person_at_the_console_still_ends_the_vm() {
    let rebooting = shutting_down(Instant::now(), Then::BuildAnew);
    for end in [GuestEnd::Shutdown, GuestEnd::Reset, GuestEnd::Panic] {
        assert_eq!(rebooting.after_guest_end(end).action, Action::BuildAnew, "{end:?}");
    }
    assert_eq!(
        rebooting.after_guest_end(GuestEnd::ConsoleQuit).action,
        Action::End(Exit::Ended)
    );
}

#[test]
fn force_follows_at_the_deadline_and_not_before() {
    let now = Instant::now();
    let at = |then, time| shutting_down(now, then).after_deadline(time).map(|step| step.action);
    let (early, due) = (now + TIMEOUT - Duration::from_nanos(1), now + TIMEOUT);
    assert_eq!(at(Then::End, early), None);
    assert_eq!(at(Then::End, due), Some(Action::End(Exit::Ended)));
    assert_eq!(at(Then::BuildAnew, due), Some(Action::BuildAnew));
}

#[test]
fn a_time_limit_beyond_all_bounds_is_cut() {
    let now = Instant::now();
    let request = Request::Shutdown { timeout: Duration::MAX };
    let step = State::Running
        .after(request, now)
        .expect("a running VM can be shut down");
    assert_eq!(step.next.deadline(), Some(now + POWER_TIMEOUT_MAX));
}

#[test]
fn a_vm_that_was_handed_over_does_not_run_again_by_itself() {
    let handed_over = [Handover::Begin, Handover::Commit]
        .into_iter()
        .try_fold(State::Running, |state, handover| {
            state.after_handover(handover).map(|step| step.next)
        })
        .expect("a running VM can be handed over");
    for request in [Request::Resume, Request::Cycle, Request::Snapshot, Request::Migrate] {
        assert_eq!(handed_over.after(request, Instant::now()), Err(Refusal::HandedOver));
    }
    for handover in [Handover::Begin, Handover::GiveUp, Handover::Commit] {
        assert_eq!(handed_over.after_handover(handover), Err(Refusal::HandedOver));
    }
    let reclaimed = handed_over.after(Request::Reclaim, Instant::now()).expect("by force");
    assert_eq!((reclaimed.action, reclaimed.next), (Action::Nothing, State::Paused));
}

#[test]
fn a_migration_that_is_given_up_leaves_the_vm_as_it_was() {
    for state in [State::Running, State::Paused] {
        let handing_over = state.after_handover(Handover::Begin).expect("accepted").next;
        let back = handing_over.after_handover(Handover::GiveUp).expect("accepted");
        assert_eq!(back.next, state);
    }
}

#[test]
fn a_guest_that_shuts_down_is_not_handed_over() {
    let state = shutting_down(Instant::now(), Then::End);
    assert_eq!(state.after_handover(Handover::Begin), Err(Refusal::Busy(state)));
}

#[test]
fn a_vm_that_waits_for_its_group_does_nothing_else_but_end() {
    for recovery in [Recovery::Fence, Recovery::RollBack { ran: true }] {
        let state = State::Running.after_recovery(recovery).expect("it runs").next;
        for request in [
            Request::Resume,
            Request::Pause,
            Request::Cycle,
            Request::Snapshot,
            Request::Migrate,
        ] {
            assert_eq!(state.after(request, Instant::now()), Err(Refusal::StandsStill(state)));
        }
        let destroyed = state.after(Request::Destroy, Instant::now()).expect("always");
        assert_eq!(destroyed.next, State::Ended);
    }
}

#[test]
fn a_vm_goes_on_as_it_was_when_it_was_fenced_or_at_the_cut() {
    for (before, recovery, after) in [
        (State::Running, Recovery::Fence, State::Running),
        (State::Paused, Recovery::Fence, State::Paused),
        (State::Paused, Recovery::RollBack { ran: true }, State::Running),
        (State::Running, Recovery::RollBack { ran: false }, State::Paused),
    ] {
        let stands = before.after_recovery(recovery).expect("accepted").next;
        assert_eq!(stands.after_recovery(Recovery::GoOn).expect("accepted").next, after);
    }
}

#[derive(Clone, Copy, Debug)]
enum Input {
    Request(Request),
    Handover(Handover),
    Recovery(Recovery),
    GuestEnd(GuestEnd),
    Wait(Duration),
}

fn any_input() -> impl Strategy<Value = Input> {
    let timeout = || (0..100_u64).prop_map(Duration::from_secs);
    prop_oneof![
        Just(Input::Request(Request::Resume)),
        Just(Input::Request(Request::Pause)),
        Just(Input::Request(Request::PressPowerButton)),
        timeout().prop_map(|timeout| Input::Request(Request::Shutdown { timeout })),
        timeout().prop_map(|timeout| Input::Request(Request::Reboot { timeout })),
        Just(Input::Request(Request::Cycle)),
        Just(Input::Request(Request::Destroy)),
        Just(Input::Request(Request::UpdateDevice)),
        Just(Input::Request(Request::Snapshot)),
        Just(Input::Request(Request::Migrate)),
        Just(Input::Request(Request::Reclaim)),
        Just(Input::Handover(Handover::Begin)),
        Just(Input::Handover(Handover::GiveUp)),
        Just(Input::Handover(Handover::Commit)),
        Just(Input::Handover(Handover::Arrived)),
        Just(Input::Handover(Handover::Declined)),
        Just(Input::Recovery(Recovery::Fence)),
        any::<bool>().prop_map(|ran| Input::Recovery(Recovery::RollBack { ran })),
        Just(Input::Recovery(Recovery::GoOn)),
        Just(Input::GuestEnd(GuestEnd::Shutdown)),
        Just(Input::GuestEnd(GuestEnd::Reset)),
        Just(Input::GuestEnd(GuestEnd::Panic)),
        timeout().prop_map(Input::Wait),
    ]
}

/// What the driver does with a decision: vCPUs that run, and VMs that exist, are counted instead.
#[derive(Default)]
struct Model {
    vcpus_run: bool,
    ended: bool,
}

impl Model {
    fn carry_out(&mut self, action: Action) {
        assert!(!self.ended, "{action:?} after the end");
        match action {
            Action::Nothing => {}
            Action::Run => assert!(!std::mem::replace(&mut self.vcpus_run, true), "already ran"),
            Action::Stop => assert!(std::mem::replace(&mut self.vcpus_run, false), "already stopped"),
            Action::PressPowerButton => assert!(self.vcpus_run, "nobody there to notice"),
            Action::BuildAnew => self.vcpus_run = false,
            Action::End(_) => self.ended = true,
        }
    }
}

proptest! {
    #[test]
    fn actions_and_states_agree_whatever_happens(inputs in prop::collection::vec(any_input(), 0..64)) {
        let mut now = Instant::now();
        let mut model = Model::default();
        let mut state = State::Built;
        for input in inputs {
            let step = match input {
                Input::Request(request) => match state.after(request, now) {
                    Ok(step) => Some(step),
                    Err(refusal) => {
                        prop_assert_eq!(refusal == Refusal::Ended, state == State::Ended);
                        prop_assert!(state == State::Ended || request != Request::Destroy);
                        None
                    }
                },
                Input::Handover(handover) => state.after_handover(handover).ok(),
                Input::Recovery(recovery) => state.after_recovery(recovery).ok(),
                // A guest that stands still does not end itself.
                Input::GuestEnd(end) => (model.vcpus_run && !model.ended).then(|| state.after_guest_end(end)),
                Input::Wait(time) => {
                    now += time;
                    state.after_deadline(now)
                }
            };
            if let Some(step) = step {
                model.carry_out(step.action);
                state = step.next;
            }
            prop_assert_eq!(model.ended, state == State::Ended);
            prop_assert_eq!(
                model.vcpus_run && !model.ended,
                matches!(state, State::Running | State::ShuttingDown { .. })
            );
        }
    }
}
