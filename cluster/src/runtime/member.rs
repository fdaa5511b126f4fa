//! A member as it runs: in the process of its VM, from when it joins or is promoted until it is one no more.

use super::seat::{Caller, Desk, Mail};
use crate::Error;
use crate::error::in_full;
use crate::member::{Call, Do, Input, Member};
use crate::message::{Ending, Envelope, FromSeat};
use crate::vm::{CutReport, MemberVm};

/// The runtime of a member.
pub(super) struct MemberRuntime {
    machine: Member,
    desk: Desk,
    caller: Caller<Call>,
}

impl MemberRuntime {
    /// `machine` is to drive `vm`.
    pub fn start(mut vm: impl MemberVm + 'static, machine: Member, desk: Desk) -> Result<Self, Error> {
        let (view, mail) = (desk.view.clone(), desk.mail());
        let caller = Caller::start(move |call: Call| {
            let result = make(&mut vm, &call);
            view.note_status(vm.status());
            if let Err(reason) = &result {
                tracing::warn!(?call, reason, "a member's VM did not do its part");
            }
            // A runtime that is gone does not care.
            let _ = mail.send(Mail::Did(call, result));
        })?;
        Ok(Self { machine, desk, caller })
    }

    /// Takes part until it is no member any more.
    pub fn run(mut self) -> Ending {
        loop {
            let mail = self.desk.next(self.machine.stops_at());
            let input = mail.and_then(|mail| self.input(mail));
            // A lease that ended is found by any input; a heartbeat is one.
            let inputs = input.into_iter().chain(self.beat());
            for input in inputs.collect::<Vec<_>>() {
                let todo = self.machine.on(input, self.desk.now());
                self.desk.view.note(self.machine.generation(), self.machine.standing());
                for step in todo {
                    if let Some((ending, last)) = self.carry_out(step) {
                        return self.end(ending, last);
                    }
                }
            }
        }
    }

    fn input(&mut self, mail: Mail) -> Option<Input> {
        match mail {
            Mail::Contact(contact) => self.desk.hear(contact).map(Input::Said),
            Mail::Did(call, result) => Some(Input::Did(call, result)),
            Mail::Notice(notice) => Some(Input::Notice(notice)),
            // It is no standby any more.
            Mail::StandbyDid(..) | Mail::StandbyNotice(_) => None,
        }
    }

    fn beat(&mut self) -> Option<Input> {
        let is_late = self.machine.stops_at().is_some_and(|at| at <= self.desk.now());
        let is_due = self.desk.is_beat_due(&self.machine.timing());
        (is_due || is_late).then(|| Input::Tick(self.desk.view.status()))
    }

    /// Does `step`; how it ends, if that is it.
    fn carry_out(&mut self, step: Do) -> Option<(Ending, Option<Envelope<FromSeat>>)> {
        match step {
            Do::Say(message) => self.desk.say(message),
            Do::Call(call) => {
                if let Err(call) = self.caller.call(call) {
                    tracing::error!(?call, "a member's VM is asked for more than it does");
                    return Some((Ending::Replaced, None));
                }
            }
            Do::End { ending, last } => return Some((ending, last)),
        }
        None
    }

    fn end(self, ending: Ending, last: Option<Envelope<FromSeat>>) -> Ending {
        self.caller.finish();
        if let Some(last) = last {
            self.desk.say(last);
        }
        tracing::info!(?ending, "not a member of a group any more");
        ending
    }
}

fn make(vm: &mut impl MemberVm, call: &Call) -> Result<CutReport, String> {
    let nothing = CutReport::default();
    let result = match call {
        Call::Seed(seeding) => vm
            .seed(&seeding.address, &seeding.macs, seeding.epoch)
            .map(|()| nothing),
        Call::Block(epoch) => vm.block(*epoch).map(|()| nothing),
        Call::Take(epoch) => vm.take(*epoch),
        Call::Validate(epoch) => vm.validate(*epoch).map(|()| nothing),
        Call::Invalidate(epoch) => vm.invalidate(*epoch).map(|()| nothing),
        Call::Permanent(epoch) => vm.permanent(*epoch).map(|()| nothing),
        Call::RollBack(cut) => vm.roll_back(*cut).map(|()| nothing),
        Call::Resume => vm.resume().map(|()| nothing),
        Call::Fence => vm.fence().map(|()| nothing),
        Call::Unprotect => vm.unprotect().map(|()| nothing),
        Call::PrepareSnapshot(order) => vm.prepare_snapshot(order).map(|()| nothing),
        Call::SnapshotAt(epoch) => vm.snapshot_at(*epoch).map(|()| nothing),
        Call::NoSnapshot(id) => vm.no_snapshot(*id).map(|()| nothing),
    };
    result.map_err(|error| in_full(&*error))
}
