//! What changes a VM's state: asked for, and waited for until it is so.
//!
//! A VM answers when it has accepted. Whether it is done is seen from its events, from before the request on, so that
//! nothing is missed however fast it goes.

use std::time::Duration;

use hyper::Method;
use serde_json::json;

use super::error::ClientError;
use super::events::{Follower, Seen};
use super::http::{INFO, Vm};
use crate::server::v1::types::{EventKindV1, InfoV1, PowerAction, PowerRequest, StateV1};

/// Time for what remains to be done once a guest is down, or has been ended: tearing down, building anew.
const AFTERWARDS: Duration = Duration::from_secs(30);

/// What to have a VM do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Stop vCPUs and devices.
    Pause,
    /// Let them go on.
    Resume,
    /// Have it back that was handed over to another monitor, and does not run there.
    Reclaim,
    /// Switch it off or on, one way or another; the guest may take as long as said.
    Power(PowerAction, Option<Duration>),
}

/// How to ask.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Manner {
    /// How long the VM may take to answer.
    pub limit: Duration,
    /// Wait until it is done.
    pub wait: bool,
}

impl Operation {
    /// Has `vm` do it; returns in words what it did.
    ///
    /// # Errors
    /// The VM cannot be asked, refuses, or does something else.
    pub async fn carry_out(self, vm: Vm, manner: Manner) -> Result<&'static str, ClientError> {
        match self {
            Self::Pause => set_running(&vm, "Paused", manner.limit).await.map(|()| "paused"),
            Self::Resume => set_running(&vm, "Resumed", manner.limit).await.map(|()| "running"),
            Self::Reclaim => vm
                .tell(Method::PUT, "/v1/migration/reclaim", &json!({}), manner.limit)
                .await
                .map(|()| "paused"),
            Self::Power(action, time) => power(vm, action, time, manner).await,
        }
    }
}

async fn set_running(vm: &Vm, state: &str, limit: Duration) -> Result<(), ClientError> {
    vm.tell(Method::PATCH, "/vm", &json!({ "state": state }), limit).await
}

async fn power(
    vm: Vm,
    action: PowerAction,
    time: Option<Duration>,
    manner: Manner,
) -> Result<&'static str, ClientError> {
    let newest = vm.get::<InfoV1>(INFO, manner.limit).await?.last_event;
    let request = PowerRequest {
        action,
        timeout_ms: time.map(|time| u64::try_from(time.as_millis()).unwrap_or(u64::MAX)),
    };
    vm.tell(Method::PUT, "/v1/power", &request, manner.limit).await?;
    if !manner.wait {
        return Ok("accepted");
    }
    let limit = time.unwrap_or_default() + AFTERWARDS;
    let done = tokio::time::timeout(limit, follow(vm, newest, manner.limit, Progress::new(action))).await;
    done.unwrap_or(Err(ClientError::Timeout(limit)))
}

async fn follow(vm: Vm, newest: u64, limit: Duration, mut progress: Progress) -> Result<&'static str, ClientError> {
    let mut events = match Follower::open(vm, newest, limit).await {
        // It was fast.
        Err(ClientError::NotThere(_)) => return progress.vm_is_gone(),
        events => events?,
    };
    while let Some(event) = events.next().await? {
        if let Some(outcome) = progress.see(&event) {
            return outcome;
        }
    }
    progress.vm_is_gone()
}

/// What has been seen of a power operation.
#[derive(Debug)]
struct Progress {
    action: PowerAction,
    /// The VM has left the state it ran in.
    is_down: bool,
    /// The guest has ended itself.
    is_by_guest: bool,
}

impl Progress {
    fn new(action: PowerAction) -> Self {
        Self {
            action,
            is_down: false,
            is_by_guest: false,
        }
    }

    fn begins_anew(&self) -> bool {
        matches!(self.action, PowerAction::Reboot | PowerAction::Cycle)
    }

    /// What has come of it, if `event` tells.
    fn see(&mut self, event: &Seen) -> Option<Result<&'static str, ClientError>> {
        match (&event.kind, self.begins_anew()) {
            (EventKindV1::GuestShutdown | EventKindV1::GuestReset | EventKindV1::GuestPanic, _) => {
                self.is_by_guest = true;
            }
            (EventKindV1::VmState { state: StateV1::Ended }, true) => {
                return Some(Err(ClientError::Otherwise(StateV1::Ended)));
            }
            (
                EventKindV1::VmState {
                    state: StateV1::Running,
                },
                true,
            ) if self.is_down => return Some(Ok(self.words())),
            (EventKindV1::VmState { state }, _) => self.is_down |= *state != StateV1::Running,
            _ => {}
        }
        None
    }

    /// What has come of it when the VM is gone. Only then are its files free for others.
    fn vm_is_gone(&self) -> Result<&'static str, ClientError> {
        if self.begins_anew() {
            Err(ClientError::Ended)
        } else {
            Ok(self.words())
        }
    }

    fn words(&self) -> &'static str {
        match (self.action, self.is_by_guest) {
            (PowerAction::Shutdown, true) => "shut down",
            (PowerAction::Shutdown, false) => "ended by force: the guest did not shut down in time",
            (PowerAction::Reboot, true) => "rebooted",
            (PowerAction::Reboot, false) => "cycled: the guest did not shut down in time",
            (PowerAction::Cycle, _) => "cycled",
            (PowerAction::Destroy, _) => "destroyed",
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    fn seen(kind: EventKindV1) -> Seen {
        Seen {
            sequence: 1,
            unix_time_ns: 0,
            kind,
            json: Value::Null,
        }
    }

    fn state(state: StateV1) -> Seen {
        seen(EventKindV1::VmState { state })
    }

    /// What comes of `action` when `events` happen, and then the VM is gone.
    fn outcome(action: PowerAction, events: &[Seen]) -> Result<&'static str, String> {
        let mut progress = Progress::new(action);
        let told = events.iter().find_map(|event| progress.see(event));
        told.unwrap_or_else(|| progress.vm_is_gone())
            .map_err(|error| error.to_string())
    }

    #[test]
    fn a_vm_is_shut_down_when_it_is_gone() {
        let events = [
            state(StateV1::ShuttingDown),
            seen(EventKindV1::GuestShutdown),
            state(StateV1::Ended),
        ];
        assert_eq!(outcome(PowerAction::Shutdown, &events), Ok("shut down"));
        assert_eq!(outcome(PowerAction::Destroy, &[state(StateV1::Ended)]), Ok("destroyed"));
        let mut progress = Progress::new(PowerAction::Shutdown);
        assert!(events.iter().all(|event| progress.see(event).is_none()));
    }

    #[test]
    fn a_vm_is_rebooted_when_it_runs_again() {
        let events = [
            state(StateV1::ShuttingDown),
            seen(EventKindV1::GuestShutdown),
            state(StateV1::Built),
            state(StateV1::Running),
        ];
        assert_eq!(outcome(PowerAction::Reboot, &events), Ok("rebooted"));
        assert_eq!(outcome(PowerAction::Cycle, &events[2..]), Ok("cycled"));
    }

    #[test]
    fn force_is_told_by_the_guest_not_having_ended_itself() {
        assert_eq!(
            outcome(
                PowerAction::Shutdown,
                &[state(StateV1::ShuttingDown), state(StateV1::Ended)]
            ),
            Ok("ended by force: the guest did not shut down in time")
        );
        let events = [
            state(StateV1::ShuttingDown),
            state(StateV1::Built),
            state(StateV1::Running),
        ];
        assert_eq!(
            outcome(PowerAction::Reboot, &events),
            Ok("cycled: the guest did not shut down in time")
        );
    }

    #[test]
    fn a_vm_that_ends_instead_of_beginning_anew_is_a_failure() {
        for action in [PowerAction::Reboot, PowerAction::Cycle] {
            let events = [state(StateV1::Built), state(StateV1::Ended)];
            assert_eq!(outcome(action, &events), Err("the VM is ended instead".to_owned()));
            assert_eq!(outcome(action, &[]), Err("the VM has ended".to_owned()));
        }
    }
}
