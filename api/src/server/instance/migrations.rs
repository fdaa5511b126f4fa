//! Migrations of the VM of a process: asked for, told of, cancelled.
//!
//! The one that takes it away is the state driver's. The one that brings it is known here, and what came of the last.

use std::sync::{Arc, Mutex};

use axum::http::StatusCode;
use cutover_vmm::events::TooManySubscribers;
use cutover_vmm::migration::{MigrateRequest, MigrationReport, MigrationStatus, ReceiveRequest};
use cutover_vmm::{Command, Error, Options, Refusal};

use super::{Instance, lock};
use crate::exit::with_causes;
use crate::log::Logger;
use crate::plan::Plan;
use crate::server::firecracker::setup::Setup;
use crate::server::http::{Failure, Outcome};
use crate::server::v1::types::{MigrationEndV1, MigrationProgressV1, MigrationStatusV1};

/// What is known of migrations. Clones are of the same process.
#[derive(Clone, Default)]
pub struct Migrations(Arc<Mutex<Known>>);

#[derive(Default)]
struct Known {
    arriving: Option<Arc<MigrationStatus>>,
    last: Option<MigrationEndV1>,
}

impl Migrations {
    /// How far the VM is that is waited for, if one is.
    pub fn arriving(&self) -> Option<Arc<MigrationStatus>> {
        lock(&self.0).arriving.clone()
    }

    /// What came of the last migration that is over.
    pub fn last(&self) -> Option<MigrationEndV1> {
        lock(&self.0).last.clone()
    }

    /// A VM is waited for; `status` tells how far that is.
    pub fn arrives(&self, status: Arc<MigrationStatus>) {
        lock(&self.0).arriving = Some(status);
    }

    /// As [`arrives`](Self::arrives), with a status that is returned.
    pub fn begin_arrival(&self) -> Arc<MigrationStatus> {
        let status = Arc::<MigrationStatus>::default();
        self.arrives(status.clone());
        status
    }

    /// None is waited for any more, if one was: it failed to come.
    pub fn end_arrival(&self, error: &Error) {
        let mut known = lock(&self.0);
        if known.arriving.take().is_some() {
            known.last = Some(failed(error));
        }
    }

    /// What came of a migration that takes the VM away. One that was refused never was.
    pub fn note_down(&self, moved: &Result<MigrationReport, Error>) {
        let end = match moved {
            Ok(report) => MigrationEndV1::Moved { report: report.into() },
            Err(Error::Refused(_)) => return,
            Err(error) => failed(error),
        };
        lock(&self.0).last = Some(end);
    }
}

fn failed(error: &Error) -> MigrationEndV1 {
    MigrationEndV1::Failed {
        reason: with_causes(error),
    }
}

impl Instance {
    /// A VM that another monitor is to send, which [`finish_start`](Self::finish_start) has to be told of.
    ///
    /// # Errors
    /// Too many watch the events already.
    pub fn of_arriving(
        id: String,
        status: Arc<MigrationStatus>,
        options: &Options,
        logger: Logger,
    ) -> Result<Self, TooManySubscribers> {
        let instance = Self::with(id, Setup::of_arriving(), Box::new(|_| ()), options, logger)?;
        instance.migrations.arrives(status);
        Ok(instance)
    }

    /// Has the VM go on under another monitor; the answer comes when it does, and is perhaps the last of this process.
    ///
    /// # Errors
    /// Refused, failed, or cancelled; then it goes on here. Or it was handed over, and is not known to run there.
    pub async fn migrate(&self, request: MigrateRequest) -> Result<MigrationReport, Failure> {
        let migrations = self.migrations.clone();
        self.ask(
            |reply| Command::Migrate { request, reply },
            move |moved| migrations.note_down(moved),
        )
        .await
    }

    /// How far the migration is that is under way, from here or to here, and what came of the last one.
    ///
    /// # Errors
    /// The VM has ended.
    pub async fn migration(&self) -> Result<MigrationStatusV1, Failure> {
        let under_way = match self.vm.get() {
            Some(_) => self.ask(Command::MigrationProgress, |_| ()).await?,
            None => self.migrations.arriving().map(|status| status.progress()),
        };
        Ok(MigrationStatusV1 {
            under_way: under_way.map(MigrationProgressV1::from),
            last: self.migrations.last(),
        })
    }

    /// Cancels the migration that is under way, from here or to here.
    ///
    /// # Errors
    /// None is, or it is too late.
    pub async fn cancel_migration(&self) -> Outcome {
        match (self.vm.get(), self.migrations.arriving()) {
            (None, Some(status)) => status.cancel(),
            (None, None) => return Err(Error::from(Refusal::NoMigrationUnderWay).into()),
            (Some(_), _) => self.ask(Command::CancelMigration, |_| ()).await?,
        }
        Ok(StatusCode::NO_CONTENT)
    }

    /// Waits for a VM that another monitor sends, which then is the one of this process, with its name and console.
    ///
    /// # Errors
    /// It has been started, something of it is configured already, or no VM has arrived; then that can be tried again.
    pub async fn receive(self: &Arc<Self>, request: ReceiveRequest) -> Outcome {
        let serial = self.setup().restore(false)?;
        let request = ReceiveRequest {
            name: Some(self.id.clone()),
            serial,
            ..request
        };
        self.build(Plan::Receive(request, self.migrations.begin_arrival()))
            .await
    }

    /// Whether there is no VM, but one is waited for.
    pub fn is_arriving(&self) -> bool {
        self.vm.get().is_none() && self.migrations.arriving().is_some()
    }

    /// Gives up waiting for a VM, if one is waited for.
    pub fn cancel_arrival(&self) {
        if let Some(status) = self.migrations.arriving() {
            status.cancel();
        }
    }
}
