//! A standby as it runs: in a process of its own, until it is not wanted any more, or is the VM.

use std::sync::mpsc::{Receiver, channel};

use super::member::MemberRuntime;
use super::seat::{Caller, Desk, Mail};
use crate::Error;
use crate::error::in_full;
use crate::member::Member;
use crate::message::Ending;
use crate::standby::{Call, Do, Input, Standby};
use crate::vm::{StandbyVm, VmError};

/// The runtime of a standby.
pub(super) struct StandbyRuntime<M> {
    machine: Standby,
    desk: Desk,
    caller: Caller<Call>,
    /// Where its VM comes from when it is promoted.
    promoted: Receiver<M>,
}

/// What comes after a step.
enum Next {
    Step,
    Become(Box<Member>),
    End(Ending),
}

impl<M: crate::vm::MemberVm + 'static> StandbyRuntime<M> {
    /// `machine` is to drive `standby`.
    pub fn start<S>(standby: S, machine: Standby, desk: Desk) -> Result<Self, Error>
    where
        S: StandbyVm<Member = M> + 'static,
    {
        let (promotes, promoted) = channel();
        let mail = desk.mail();
        let mut standby = Some(standby);
        let caller = Caller::start(move |call: Call| {
            let result = make(&mut standby, call).map(|member| {
                if let Some(member) = member {
                    // A runtime that is gone does not care, here and below.
                    let _ = promotes.send(member);
                }
            });
            let result = result.map_err(|error| in_full(&*error));
            if let Err(reason) = &result {
                tracing::warn!(?call, reason, "a standby did not do its part");
            }
            let _ = mail.send(Mail::StandbyDid(call, result));
        })?;
        Ok(Self {
            machine,
            desk,
            caller,
            promoted,
        })
    }

    /// Keeps the image until it is not wanted any more; and if it becomes the VM, until that is no member any more.
    pub fn run(mut self) -> Ending {
        loop {
            let mail = self.desk.next(None);
            let input = mail.and_then(|mail| self.input(mail));
            let is_due = self.desk.is_beat_due(&self.machine.timing());
            let inputs = input.into_iter().chain(is_due.then_some(Input::Tick));
            for input in inputs.collect::<Vec<_>>() {
                let todo = self.machine.on(input, self.desk.now());
                self.desk.view.note(self.machine.generation(), self.machine.standing());
                let mut becomes = None;
                for step in todo {
                    match self.carry_out(step) {
                        Next::Step => {}
                        Next::Become(member) => becomes = Some(member),
                        Next::End(ending) => {
                            self.caller.finish();
                            return ending;
                        }
                    }
                }
                if let Some(member) = becomes {
                    return self.become_member(*member);
                }
            }
        }
    }

    fn input(&mut self, mail: Mail) -> Option<Input> {
        match mail {
            Mail::Contact(contact) => self.desk.hear(contact).map(Input::Said),
            Mail::StandbyDid(call, result) => Some(Input::Did(call, result)),
            Mail::StandbyNotice(notice) => Some(Input::Notice(notice)),
            // Of a VM that it is not yet.
            Mail::Did(..) | Mail::Notice(_) => None,
        }
    }

    fn carry_out(&mut self, step: Do) -> Next {
        match step {
            Do::Say(message) => self.desk.say(message),
            Do::Call(call) => {
                if let Err(call) = self.caller.call(call) {
                    tracing::error!(?call, "a standby is asked for more than it does");
                    return Next::End(Ending::Replaced);
                }
            }
            Do::Become(member) => return Next::Become(member),
            Do::End(ending) => return Next::End(ending),
        }
        Next::Step
    }

    fn become_member(self, machine: Member) -> Ending {
        self.caller.finish();
        let Ok(vm) = self.promoted.try_recv() else {
            tracing::error!("a standby was promoted without becoming a VM");
            return Ending::Replaced;
        };
        tracing::warn!(who = %machine.who().seat, "the standby is the VM now");
        self.desk.view.note_macs(vm.macs());
        match MemberRuntime::start(vm, machine, self.desk) {
            Ok(runtime) => runtime.run(),
            Err(error) => {
                tracing::error!(%error, "a standby that was promoted cannot be a member");
                Ending::Replaced
            }
        }
    }
}

/// Makes `call`; the VM, if that is what it came to.
fn make<S: StandbyVm>(standby: &mut Option<S>, call: Call) -> Result<Option<S::Member>, VmError> {
    match call {
        Call::Permanent(epoch) => match standby {
            Some(standby) => standby.permanent(epoch).map(|()| None),
            None => Ok(None),
        },
        Call::Promote(cut) => match standby.take() {
            Some(standby) => standby.promote(cut).map(Some),
            None => Err("it was promoted before".into()),
        },
    }
}
