//! Migrations of the VM of a process, as its API tells of them: the one that brings it, and what came of the last.
//!
//! The one that takes it away is the state driver's.

use std::sync::{Arc, Mutex};

use cutover_vmm::Error;
use cutover_vmm::migration::{MigrationReport, MigrationStatus};

use super::instance::lock;
use super::v1::types::MigrationEndV1;
use crate::exit::with_causes;

/// See the module. Clones are of the same process.
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
