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
//!
//! ```text
//!                           Fence                              GoOn
//!  Running, ShuttingDown, ─────────► Fenced ─────────┬────────────────► Running, Paused
//!  Paused                                │ RollBack  │
//!                 └──────────────────────┴──► RolledBack
//! ```
//! A VM that is protected as a member of a group stands still while the group is not sure of it, and after it went back
//! to a cut; it goes on when the group says so.
//!
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
    /// Stands still, as its group is not sure that it may run, or that it has run to its end.
    Fenced {
        /// Whether it ran before.
        ran: bool,
    },
    /// Stands still at a cut, to which its group has gone back.
    RolledBack {
        /// Whether it ran at the cut.
        ran: bool,
    },
    /// Over; nothing brings it back.
    Ended,
}

/// What a VM's group decides about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Recovery {
    /// It may not run for now.
    Fence,
    /// It is to be as it was at a cut.
    RollBack {
        /// Whether it ran there.
        ran: bool,
    },
    /// It may run.
    GoOn,
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
    /// Nobody protects it.
    #[error("the VM is not protected")]
    NotProtected,
    /// What would take it out of its protection.
    #[error("the VM is protected as a member of a group: have it leave the group first")]
    Protected,
    /// It waits for its group.
    #[error("the VM is {0}, and goes on when its group says so: wait for that, or destroy the VM")]
    StandsStill(State),
    /// The group takes one cut after the other.
    #[error("it is not decided yet whether cut {0} is valid")]
    CutUndecided(u64),
    /// The group is further.
    #[error("a cut with a number not below {0} was taken already")]
    CutIsOver(u64),
    /// Every cut of a while was valid, and none permanent.
    #[error("too many cuts wait to be permanent already")]
    TooManyCuts,
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
            (Self::Fenced { .. } | Self::RolledBack { .. }, _) => return Err(Refusal::StandsStill(self)),
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
            (Self::ShuttingDown { .. } | Self::Fenced { .. } | Self::RolledBack { .. }, Handover::Begin) => {
                return Err(Refusal::Busy(self));
            }
            (_, Handover::Begin) => return Err(Refusal::NotRunning),
            _ => return Err(Refusal::NoMigrationUnderWay),
        };
        Ok(Step { action, next })
    }

    /// What to do about what the group of the VM has decided, or why it is refused. Changes nothing itself. That the guest
    /// was asked to power down is forgotten: it is asked again after a fence, and may not have been before a way back.
    ///
    /// # Errors
    /// It has ended, was never run, or is another's.
    pub fn after_recovery(self, recovery: Recovery) -> Result<Step, Refusal> {
        let (action, next) = match (self, recovery) {
            (Self::Running | Self::ShuttingDown { .. }, Recovery::Fence) => (Action::Stop, Self::Fenced { ran: true }),
            (Self::Paused, Recovery::Fence) => (Action::Nothing, Self::Fenced { ran: false }),
            (Self::Fenced { .. } | Self::RolledBack { .. }, Recovery::Fence) => (Action::Nothing, self),
            (Self::Running | Self::ShuttingDown { .. }, Recovery::RollBack { ran }) => {
                (Action::Stop, Self::RolledBack { ran })
            }
            (Self::Paused | Self::Fenced { .. } | Self::RolledBack { .. }, Recovery::RollBack { ran }) => {
                (Action::Nothing, Self::RolledBack { ran })
            }
            (Self::Fenced { ran: true } | Self::RolledBack { ran: true }, Recovery::GoOn) => {
                (Action::Run, Self::Running)
            }
            (Self::Fenced { ran: false } | Self::RolledBack { ran: false }, Recovery::GoOn) => {
                (Action::Nothing, Self::Paused)
            }
            (Self::Running | Self::Paused | Self::ShuttingDown { .. }, Recovery::GoOn) => (Action::Nothing, self),
            (Self::Ended, _) => return Err(Refusal::Ended),
            (Self::Built | Self::HandingOver { .. } | Self::HandedOver { .. }, _) => return Err(Refusal::Busy(self)),
        };
        Ok(Step { action, next })
    }

    /// Whether a cut of the VM may be taken, and if so, whether it runs.
    ///
    /// # Errors
    /// It stands still because its group said so, or is not there.
    pub fn check_cut(self) -> Result<bool, Refusal> {
        match self {
            Self::Running | Self::ShuttingDown { .. } => Ok(true),
            Self::Paused => Ok(false),
            Self::Ended => Err(Refusal::Ended),
            Self::Fenced { .. } | Self::RolledBack { .. } => Err(Refusal::StandsStill(self)),
            Self::Built | Self::HandingOver { .. } | Self::HandedOver { .. } => Err(Refusal::Busy(self)),
        }
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
            | Self::Fenced { .. }
            | Self::RolledBack { .. }
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
            Self::Fenced { .. } => "fenced",
            Self::RolledBack { .. } => "rolled_back",
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

    /// Whether a VM that is protected must not do it: it would be another VM, another monitor's, or have other disks.
    pub fn ends_protection(self) -> bool {
        matches!(
            self,
            Self::Reboot { .. } | Self::Cycle | Self::UpdateDevice | Self::Migrate
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
mod tests;
