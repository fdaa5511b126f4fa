//! Making a snapshot, after the moment it is of: memory and disks are copied behind the running guest.

use std::sync::Arc;

use cutover_snapshot::error::Error as SnapshotError;
use cutover_snapshot::image::{PageSource, Pages};
use cutover_snapshot::manifest::Parent;

use super::create::Frozen;
use super::disks::Watch;
use super::job::Status;
use super::output::{Finished, Output};
use super::request::SnapshotReport;
use crate::Error;

impl Frozen {
    /// Copies what is not yet copied, and makes the snapshot permanent.
    ///
    /// # Errors
    /// It was cancelled, or cannot be written: then there is nothing of it, and the next one has what it would have had.
    pub fn copy(mut self, status: &Arc<Status>) -> Result<SnapshotReport, Error> {
        let (kind, compress) = (self.inputs.request.kind, self.inputs.request.compress);
        let pages_total = self.pages_total();
        let disk_bytes = self.disks.bytes();
        status.expect(self.memory_bytes + disk_bytes);
        // Disks have threads of their own: what the guest waits for is not behind its memory.
        let disks = self.disks;
        let copies = match &mut self.output {
            Output::Store(writer) => {
                Some(disks.start(writer, compress, &watch(status), &self.inputs.on_copy_thread)?)
            }
            Output::Files { .. } => None,
        };
        match self.memory.take() {
            Some(mut source) => {
                let mut source = Watched {
                    source: &mut *source,
                    status,
                };
                self.output.memory(kind, compress, pages_total, &mut source)?;
            }
            None => status.advance(self.memory_bytes),
        }
        let copied = match (copies, &mut self.output) {
            (Some(copies), Output::Store(writer)) => Some(copies.finish(writer)?),
            _ => None,
        };
        status.check()?;
        let Finished {
            path,
            snapshot,
            file_bytes,
        } = self.output.finish(&self.state)?;
        let base = self.inputs.base;
        let parent = base.parent(kind, &self.inputs.request.target)?;
        let report = SnapshotReport {
            path,
            id: snapshot.as_ref().map(|snapshot| snapshot.id()),
            parent: parent.map(|parent| parent.name.clone()),
            kind,
            method: self.method.0,
            method_reason: self.method.1,
            pause_ns: self.pause_ns,
            total_ns: u64::try_from(self.inputs.started.elapsed().as_nanos()).unwrap_or(u64::MAX),
            memory_bytes: self.memory_bytes,
            disk_bytes,
            file_bytes,
        };
        self.taken.into_iter().for_each(|taken| taken.commit());
        if let Some(copied) = copied {
            copied.commit();
        }
        if let Some(snapshot) = snapshot {
            base.build_on(Parent::from(&snapshot));
        }
        Ok(report)
    }
}

/// Counts bytes of disks in `status`, until somebody wants no more of them.
fn watch(status: &Arc<Status>) -> Watch {
    let status = status.clone();
    Arc::new(move |bytes| {
        status.advance(bytes);
        status.check()
    })
}

/// Pages that are counted as they pass, until somebody wants no more of them.
struct Watched<'a> {
    source: &'a mut dyn PageSource,
    status: &'a Status,
}

impl PageSource for Watched<'_> {
    fn bytes_total(&self) -> u64 {
        self.source.bytes_total()
    }

    fn next_pages(&mut self) -> Result<Option<Pages<'_>>, SnapshotError> {
        self.status
            .check()
            .map_err(|cancelled| SnapshotError::Source(Box::new(cancelled)))?;
        let pages = self.source.next_pages()?;
        if let Some(pages) = &pages {
            self.status.advance(pages.bytes.len() as u64);
        }
        Ok(pages)
    }
}
