//! Who may do what when: the states of a VM, and the pure decisions about requests, the guest's end and time limits.
//!
//! ```text
//!             Resume               Pause
//!  Built ───────────► Running ◄───────────► Paused
//!    ▲                  │  ▲       Resume      │
//!    │    Shutdown,     │  │                   │
//!    │    Reboot        ▼  │                   │
//!    ├───────────── ShuttingDown               │
//!    │  Reboot is done     │                   │
//!    │                     ▼                   │
//!    └── Cycle (from     Ended ◄───────────────┘   Destroy (from any), the guest ends, the time is up
//!        Running, Paused)
//! ```
//! One operation at a time: while the guest shuts down, only force is accepted, and another press of the power button.
//!
//! ```text
//!                     Begin                    Commit                 Arrived
//!  Running, Paused ─────────► HandingOver ─────────────► HandedOver ─────────► Ended
//!        ▲                         │                         │
//!        ├──────── GiveUp ─────────┘    Paused ◄── Reclaim ──┤  if somebody says that it runs nowhere else
//!        └──────────────────────── Declined ─────────────────┘  if the other monitor says that
//! ```
//! A VM migrates while it runs or is paused; its state changes for the last moment only, when it stands still to be
//! handed over. Once that is done, another monitor may run it: whatever happens, this one does so no more by itself.
//! A VM that is rebooted or cycled is built anew, runs as soon as it is [`Built`](State::Built), and is the same
//! VM to everyone outside.

use std::fmt;
use std::time::{Duration, Instant};

use serde::{Serialize, Serializer};

/// Longest time limit of a shutdown or reboot; longer ones are cut to it.
pub const POWER_TIMEOUT_MAX: Duration = Duration::from_secs(24 * 60 * 60);

/// What a VM is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Complete, never run.
    Built,
    /// vCPUs and devices run.
    Running,
    /// vCPUs stand still and devices are quiesced.
    Paused,
    /// The guest runs, and has been asked to power down.
    ShuttingDown {
        /// When it is ended by force.
        deadline: Instant,
        /// What comes of it.
        then: Then,
    },
    /// Stands still, and is about to be another monitor's.
    HandingOver {
        /// Whether it ran before.
        ran: bool,
    },
    /// Another monitor's: it may run there.
    HandedOver {
        /// Whether it ran before.
        ran: bool,
    },
    /// Over; nothing brings it back.
    Ended,
}

/// How a VM becomes another monitor's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Handover {
    /// Its last changes are to be sent: it stands still from here on.
    Begin,
    /// Nothing comes of it: the VM goes on here as before.
    GiveUp,
    /// The other monitor is about to be told to run it.
    Commit,
    /// The other monitor has said that it runs there.
    Arrived,
    /// The other monitor has said that it does not, and never will.
    Declined,
}

/// What follows the end of a guest that was asked to power down.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Then {
    /// The VM ends.
    End,
    /// It is built anew.
    BuildAnew,
}

/// What anyone may ask of a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// Let the guest run.
    Resume,
    /// Stop vCPUs, then devices.
    Pause,
    /// Press the guest's power button; what comes of it is the guest's to decide.
    PressPowerButton,
    /// Press the guest's power button, and end the VM by force if the guest has not ended in time.
    Shutdown {
        /// The time it has, at most [`POWER_TIMEOUT_MAX`].
        timeout: Duration,
    },
    /// As [`Shutdown`](Self::Shutdown), and then build the VM anew.
    Reboot {
        /// The time it has, at most [`POWER_TIMEOUT_MAX`].
        timeout: Duration,
    },
    /// Destroy the VM and build it anew, without asking the guest.
    Cycle,
    /// End the VM now, without asking the guest.
    Destroy,
    /// Change what is behind a device.
    UpdateDevice,
    /// Make a snapshot.
    Snapshot,
    /// Have another monitor go on with it.
    Migrate,
    /// Have a VM back that was handed over, on the word of whoever asks that it runs nowhere else.
    Reclaim,
}

/// How the guest came to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuestEnd {
    /// It powered itself off.
    Shutdown,
    /// It asked for a reset.
    Reset,
    /// Its kernel panicked, or a vCPU met a triple fault.
    Panic,
    /// The person at its console asked for the end of the VM.
    ConsoleQuit,
}

/// How a VM came to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Exit {
    /// The guest powered itself off.
    Shutdown,
    /// The guest asked for a reset.
    Reboot,
    /// The guest's kernel panicked, or a vCPU met a triple fault.
    Panic,
    /// Somebody ended it by force.
    Ended,
    /// It goes on under another monitor.
    Migrated,
}

/// What has to be done to enter a state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Nothing, or what the request itself says.
    Nothing,
    /// Start devices and vCPUs.
    Run,
    /// Stop vCPUs and devices.
    Stop,
    /// Press the power button.
    PressPowerButton,
    /// Tear the VM down and build it anew.
    BuildAnew,
    /// Tear the VM down.
    End(Exit),
}

/// What was decided: what to do, and the state after it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    /// To be done first.
    pub action: Action,
    /// The state then.
    pub next: State,
}

/// Why a request is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The VM already is as asked.
    #[error("the VM is already {0}")]
    Already(State),
    /// A guest that does not run cannot notice.
    #[error("the VM is not running: resume it first")]
    NotRunning,
    /// Another operation is under way.
    #[error("the VM is {0}: wait for that, or destroy the VM")]
    Busy(State),
    /// It is over.
    #[error("the VM has ended")]
    Ended,
    /// More requests wait than are kept.
    #[error("too many requests wait for the VM already: try again later")]
    TooManyRequests,
    /// There is one snapshot at a time.
    #[error("a snapshot is being made: wait for it, or cancel it")]
    SnapshotUnderWay,
    /// There is no snapshot to cancel.
    #[error("no snapshot is being made")]
    NoSnapshotUnderWay,
    /// There is one migration at a time.
    #[error("the VM is being migrated: wait for that, or cancel it")]
    MigrationUnderWay,
    /// There is no migration to cancel.
    #[error("the VM is not being migrated")]
    NoMigrationUnderWay,
    /// The migration has passed the point from which there is no way back.
    #[error("the VM has been handed over to another monitor: that can no longer be cancelled")]
    MigrationCommitted,
    /// Another monitor may run it.
    #[error(
        "the VM has been handed over to another monitor, and may run there: destroy it here, or reclaim it if it is \
         certain that it does not run there"
    )]
    HandedOver,
    /// It never left.
    #[error("the VM has not been handed over to another monitor")]
    NotHandedOver,
    /// The VM runs without the means for it.
    #[error("this VM was started without an API, and is confined to what it needs for that")]
    Confined,
}

impl State {
    /// What to do about `request`, asked at `now`, or why it is refused. Changes nothing itself.
    ///
    /// # Errors
    /// The request makes no sense in this state; the VM stays as it is.
    pub fn after(self, request: Request, now: Instant) -> Result<Step, Refusal> {
        let (action, next) = match (self, request) {
            (Self::Ended, _) => return Err(Refusal::Ended),
            (_, Request::Destroy) => (Action::End(Exit::Ended), Self::Ended),
            (Self::Built | Self::Paused, Request::Resume) => (Action::Run, Self::Running),
            (Self::Running, Request::Pause) => (Action::Stop, Self::Paused),
            (Self::Running, Request::Resume) | (Self::Paused, Request::Pause) => return Err(Refusal::Already(self)),
            (Self::Running | Self::ShuttingDown { .. }, Request::PressPowerButton) => (Action::PressPowerButton, self),
            (Self::Running, Request::Shutdown { timeout }) => shut_down(now, timeout, Then::End),
            (Self::Running, Request::Reboot { timeout }) => shut_down(now, timeout, Then::BuildAnew),
            (Self::Running | Self::Paused, Request::Cycle) => (Action::BuildAnew, Self::Built),
            (Self::Running | Self::Paused | Self::ShuttingDown { .. }, Request::UpdateDevice)
            | (Self::Running | Self::Paused, Request::Snapshot | Request::Migrate) => (Action::Nothing, self),
            (Self::HandedOver { .. }, Request::Reclaim) => (Action::Nothing, Self::Paused),
            (Self::HandedOver { .. }, _) => return Err(Refusal::HandedOver),
            (_, Request::Reclaim) => return Err(Refusal::NotHandedOver),
            (Self::ShuttingDown { .. } | Self::HandingOver { .. }, _) => return Err(Refusal::Busy(self)),
            (Self::Built, _)
            | (Self::Paused, Request::PressPowerButton | Request::Shutdown { .. } | Request::Reboot { .. }) => {
                return Err(Refusal::NotRunning);
            }
        };
        Ok(Step { action, next })
    }

    /// What to do about the next step of a migration, or why it is refused. Changes nothing itself.
    ///
    /// # Errors
    /// The VM has come into a state meanwhile in which it cannot be handed over; it stays in that.
    pub fn after_handover(self, handover: Handover) -> Result<Step, Refusal> {
        let (action, next) = match (self, handover) {
            (Self::Running, Handover::Begin) => (Action::Stop, Self::HandingOver { ran: true }),
            (Self::Paused, Handover::Begin) => (Action::Nothing, Self::HandingOver { ran: false }),
            (Self::HandingOver { ran: true }, Handover::GiveUp)
            | (Self::HandedOver { ran: true }, Handover::Declined) => (Action::Run, Self::Running),
            (Self::HandingOver { ran: false }, Handover::GiveUp)
            | (Self::HandedOver { ran: false }, Handover::Declined) => (Action::Nothing, Self::Paused),
            (Self::HandingOver { ran }, Handover::Commit) => (Action::Nothing, Self::HandedOver { ran }),
            (Self::HandedOver { .. }, Handover::Arrived) => (Action::End(Exit::Migrated), Self::Ended),
            (Self::Ended, _) => return Err(Refusal::Ended),
            (Self::HandedOver { .. }, _) => return Err(Refusal::HandedOver),
            (Self::ShuttingDown { .. }, Handover::Begin) => return Err(Refusal::Busy(self)),
            (_, Handover::Begin) => return Err(Refusal::NotRunning),
            _ => return Err(Refusal::NoMigrationUnderWay),
        };
        Ok(Step { action, next })
    }

    /// What to do now that the guest has ended itself.
    pub fn after_guest_end(self, end: GuestEnd) -> Step {
        let exit = match (self, end) {
            (_, GuestEnd::ConsoleQuit) => Exit::Ended,
            // Whichever way it goes down for a reboot, it is rebooted.
            (
                Self::ShuttingDown {
                    then: Then::BuildAnew, ..
                },
                _,
            ) => return Step::build_anew(),
            (_, GuestEnd::Panic) => Exit::Panic,
            (_, GuestEnd::Shutdown) => Exit::Shutdown,
            (_, GuestEnd::Reset) => Exit::Reboot,
        };
        Step::end(exit)
    }

    /// When [`after_deadline`](Self::after_deadline) is to be asked, if ever.
    pub fn deadline(self) -> Option<Instant> {
        match self {
            Self::ShuttingDown { deadline, .. } => Some(deadline),
            Self::Built
            | Self::Running
            | Self::Paused
            | Self::HandingOver { .. }
            | Self::HandedOver { .. }
            | Self::Ended => None,
        }
    }

    /// What to do at `now`: something only if a deadline has passed.
    pub fn after_deadline(self, now: Instant) -> Option<Step> {
        match self {
            Self::ShuttingDown { deadline, then } if deadline <= now => Some(match then {
                Then::End => Step::end(Exit::Ended),
                Then::BuildAnew => Step::build_anew(),
            }),
            _ => None,
        }
    }

    /// Its name, as the API has it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Built => "built",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::ShuttingDown { then: Then::End, .. } => "shutting_down",
            Self::ShuttingDown {
                then: Then::BuildAnew, ..
            } => "rebooting",
            Self::HandingOver { .. } => "handing_over",
            Self::HandedOver { .. } => "handed_over",
            Self::Ended => "ended",
        }
    }
}

fn shut_down(now: Instant, timeout: Duration, then: Then) -> (Action, State) {
    let deadline = now + timeout.min(POWER_TIMEOUT_MAX);
    (Action::PressPowerButton, State::ShuttingDown { deadline, then })
}

impl Step {
    fn build_anew() -> Self {
        Self {
            action: Action::BuildAnew,
            next: State::Built,
        }
    }

    fn end(exit: Exit) -> Self {
        Self {
            action: Action::End(exit),
            next: State::Ended,
        }
    }
}

impl Request {
    /// Its name, as the API has it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Resume => "resume",
            Self::Pause => "pause",
            Self::PressPowerButton => "press_power_button",
            Self::Shutdown { .. } => "shutdown",
            Self::Reboot { .. } => "reboot",
            Self::Cycle => "cycle",
            Self::Destroy => "destroy",
            Self::UpdateDevice => "update_device",
            Self::Snapshot => "snapshot",
            Self::Migrate => "migrate",
            Self::Reclaim => "reclaim",
        }
    }

    /// Whether it ends the guest, sooner or later.
    pub fn is_power_operation(self) -> bool {
        matches!(
            self,
            Self::Shutdown { .. } | Self::Reboot { .. } | Self::Cycle | Self::Destroy
        )
    }

    /// Whether it takes more of the operating system than a VM that just runs: opening files, building a VM.
    pub fn opens_files(self) -> bool {
        matches!(
            self,
            Self::Reboot { .. } | Self::Cycle | Self::UpdateDevice | Self::Snapshot | Self::Migrate
        )
    }
}

/// In words, for messages.
impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name().replace('_', " "))
    }
}

impl Serialize for State {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}

#[cfg(test)]
mod tests {
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

    #[derive(Clone, Copy, Debug)]
    enum Input {
        Request(Request),
        Handover(Handover),
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
}
