//! What the state driver does for a migration: it begins one, and takes the steps that only it may take.

use std::time::Instant;

use super::{Driver, Outcome};
use crate::Error;
use crate::control::Reply;
use crate::job::Context;
use crate::lifecycle::{Handover, Refusal, Request, State};
use crate::machine::Machine;
use crate::migration::{MigrateRequest, Migration, MigrationReport, Step, Still};

impl Driver {
    /// Begins to move `machine` to another monitor; what comes of it goes to `reply`.
    pub(super) fn begin_migration(
        &mut self,
        machine: &Machine,
        request: MigrateRequest,
        reply: Reply<MigrationReport>,
    ) {
        let context = Context {
            machine,
            spec: &self.spec,
            incarnation: self.incarnation,
            options: &self.options,
            mailbox: &self.mailbox,
        };
        let accepted = match self.migration {
            Some(_) => Err(Refusal::MigrationUnderWay),
            None if self.snapshots.needs_disks() => Err(Refusal::SnapshotUnderWay),
            None => self.decide(Request::Migrate),
        };
        let begun = accepted
            .map_err(Error::from)
            .and_then(|_| Migration::begin(&context, self.snapshots.filling().clone(), request));
        match begun {
            Ok(mut migration) => {
                migration.reply_to(reply);
                self.log(migration.started());
                self.migration = Some(migration);
            }
            Err(error) => reply.send(Err(error)),
        }
    }

    /// Has the migration that is under way be given up.
    pub(super) fn cancel_migration(&self) -> Result<(), Refusal> {
        let migration = self.migration.as_ref().ok_or(Refusal::NoMigrationUnderWay)?;
        if let State::HandedOver { .. } = self.state {
            return Err(Refusal::MigrationCommitted);
        }
        migration.cancel();
        Ok(())
    }

    /// Does what the migration of `machine` that is under way needs next.
    pub(super) fn advance_migration(&mut self, machine: &Machine, step: Step) -> Option<Outcome> {
        let answer = match step {
            Step::Stop => self.stand_still(machine).map(Some),
            Step::Resume => self.go_on(machine).map(|()| None),
            Step::HandOver => self.let_go(machine).map(|()| None),
            Step::Done(outcome) => return self.finish_migration(machine, outcome),
        };
        if let Some(migration) = &self.migration {
            migration.answer(answer);
        }
        None
    }

    /// Stops the guest of `machine` to be handed over, and tells what it is.
    fn stand_still(&mut self, machine: &Machine) -> Result<Box<Still>, Error> {
        let at = Instant::now();
        self.hand_over(machine, Handover::Begin)?;
        if self.mailbox.has_ending() {
            // It has come to its end just before: that is dealt with next.
            return Err(Refusal::Ended.into());
        }
        let ran = matches!(self.state, State::HandingOver { ran: true });
        match machine.save() {
            Ok(state) => Ok(Box::new(Still { state, ran, at })),
            Err(error) => {
                self.hand_over(machine, Handover::GiveUp)?;
                Err(error)
            }
        }
    }

    /// From here on, another monitor may run what `machine` was, with its disks.
    fn let_go(&mut self, machine: &Machine) -> Result<(), Error> {
        if self.migration.as_ref().is_none_or(Migration::leaves_this_host) {
            machine.devices.disk_flusher().flush()?;
        }
        machine.devices.let_go()?;
        self.hand_over(machine, Handover::Commit)?;
        self.snapshots.expect_no_moment();
        Ok(())
    }

    /// Has the guest of `machine` go on after all, if it is still there.
    fn go_on(&mut self, machine: &Machine) -> Result<(), Error> {
        match self.state {
            State::HandingOver { .. } => self.hand_over(machine, Handover::GiveUp)?,
            State::HandedOver { .. } => {
                machine.devices.take_over()?;
                self.hand_over(machine, Handover::Declined)?
            }
            _ => None,
        };
        Ok(())
    }

    /// Has `machine` back, of which nobody knows what became of it elsewhere, with its disks.
    pub(super) fn reclaim(&mut self, machine: &Machine) -> Result<(), Error> {
        let step = self.decide(Request::Reclaim)?;
        machine.devices.take_over()?;
        self.carry_out(machine, step);
        Ok(())
    }

    fn hand_over(&mut self, machine: &Machine, handover: Handover) -> Result<Option<Outcome>, Error> {
        let step = self.state.after_handover(handover)?;
        Ok(self.carry_out(machine, step))
    }

    /// Deals with what came of the migration of `machine`.
    fn finish_migration(&mut self, machine: &Machine, outcome: Result<MigrationReport, Error>) -> Option<Outcome> {
        let migration = self.migration.take()?;
        let arrived = outcome.is_ok();
        let event = migration.finish(outcome);
        self.log(event);
        if !arrived {
            return None;
        }
        self.hand_over(machine, Handover::Arrived).ok().flatten()
    }
}
