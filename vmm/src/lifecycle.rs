//! Who may do what when: the states of a VM and the pure decision whether a request is carried out.
//!
//! ```text
//!            Resume               Pause
//!  Built ──────────► Running ◄───────────► Paused
//!    │                  │        Resume       │
//!    └───── End ────────┴────────► Ended ◄────┘   (also when the guest ends itself)
//! ```

/// What a VM is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Complete, never run.
    Built,
    /// vCPUs and devices run.
    Running,
    /// vCPUs stand still and devices are quiesced.
    Paused,
    /// Over; nothing brings it back.
    Ended,
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
    /// End the VM now, without asking the guest.
    End,
}

/// Why a request is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The VM already is as asked.
    #[error("the VM is already {0}")]
    Already(&'static str),
    /// A guest that does not run cannot notice.
    #[error("the VM is not running: resume it first")]
    NotRunning,
    /// It is over.
    #[error("the VM has ended")]
    Ended,
}

impl State {
    /// The state after `request`, or why it is refused. Changes nothing itself.
    ///
    /// # Errors
    /// The request makes no sense in this state; the VM stays as it is.
    pub fn after(self, request: Request) -> Result<Self, Refusal> {
        match (self, request) {
            (Self::Ended, _) => Err(Refusal::Ended),
            (_, Request::End) => Ok(Self::Ended),
            (Self::Built | Self::Paused, Request::Resume) => Ok(Self::Running),
            (Self::Running, Request::Resume) => Err(Refusal::Already("running")),
            (Self::Running, Request::Pause) => Ok(Self::Paused),
            (Self::Paused, Request::Pause) => Err(Refusal::Already("paused")),
            (Self::Running, Request::PressPowerButton) => Ok(Self::Running),
            (Self::Built, Request::Pause) | (Self::Built | Self::Paused, Request::PressPowerButton) => {
                Err(Refusal::NotRunning)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn any_request() -> impl Strategy<Value = Request> {
        prop_oneof![
            Just(Request::Resume),
            Just(Request::Pause),
            Just(Request::PressPowerButton),
            Just(Request::End),
        ]
    }

    #[test]
    fn a_paused_guest_cannot_be_asked_to_power_off() {
        assert_eq!(State::Paused.after(Request::PressPowerButton), Err(Refusal::NotRunning));
    }

    #[test]
    fn a_vm_that_never_ran_cannot_be_paused() {
        assert_eq!(State::Built.after(Request::Pause), Err(Refusal::NotRunning));
    }

    proptest! {
        #[test]
        fn an_ended_vm_refuses_everything_and_nothing_ends_it_but_end(requests in prop::collection::vec(any_request(), 0..32)) {
            let mut state = State::Built;
            for request in requests {
                let before = state;
                match state.after(request) {
                    Ok(after) => {
                        prop_assert_ne!(before, State::Ended);
                        prop_assert_eq!(after == State::Ended, request == Request::End);
                        state = after;
                    }
                    Err(Refusal::Ended) => prop_assert_eq!(before, State::Ended),
                    Err(_) => prop_assert_ne!(request, Request::End),
                }
            }
        }
    }
}
