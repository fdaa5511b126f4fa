//! The VM of this process as a member of a group: what the group's runtime asks of it, passed on to the monitor.

use std::path::PathBuf;
use std::sync::mpsc::Receiver;

use cutover_cluster::checkpoint::{CheckpointId, Order, StoredSnapshot};
use cutover_cluster::runtime::seat::Notices;
use cutover_cluster::vm::{CutReport, MemberStatus, MemberVm, Notice, StandbyAddress, VmError};
use cutover_migration::transport::Endpoint;
use cutover_snapshot::spec::MacAddr;
use cutover_vmm::protection::{self, Protection};
use cutover_vmm::snapshot::{CutSnapshot, SnapshotReport};

/// A protected VM.
pub struct Member {
    protection: Protection,
    /// Allow standbys at `tcp://`.
    insecure: bool,
    /// Where this host's certificate is, for those at `tls://`.
    tls_dir: Option<PathBuf>,
}

impl Member {
    /// The VM that `protection` is of.
    pub fn new(protection: Protection, insecure: bool, tls_dir: Option<PathBuf>) -> Self {
        Self {
            protection,
            insecure,
            tls_dir,
        }
    }

    fn address(&self, to: &StandbyAddress) -> Result<protection::StandbyAddress, VmError> {
        let endpoint: Endpoint = to.0.parse()?;
        if matches!(endpoint, Endpoint::Tcp(_)) && !self.insecure {
            return Err(cutover_migration::Error::Insecure(endpoint.to_string()).into());
        }
        let tls = matches!(endpoint, Endpoint::Tls(_)).then(|| self.tls_dir.clone());
        Ok(protection::StandbyAddress {
            endpoint,
            tls: tls.flatten(),
            link: Default::default(),
        })
    }
}

impl MemberVm for Member {
    fn macs(&self) -> Vec<MacAddr> {
        self.protection.macs().to_vec()
    }

    fn seed(&mut self, to: &StandbyAddress, group: &[MacAddr], epoch: u64) -> Result<(), VmError> {
        let address = self.address(to)?;
        Ok(self.protection.seed(&address, group, epoch)?)
    }

    fn block(&mut self, epoch: u64) -> Result<(), VmError> {
        Ok(self.protection.block(epoch)?)
    }

    fn take(&mut self, epoch: u64) -> Result<CutReport, VmError> {
        let report = self.protection.take(epoch)?;
        Ok(CutReport {
            pause_ns: report.pause_ns,
            dirty_pages: report.dirty_pages,
            disk_bytes: report.disk_bytes,
        })
    }

    fn validate(&mut self, epoch: u64) -> Result<(), VmError> {
        Ok(self.protection.validate(epoch)?)
    }

    fn invalidate(&mut self, epoch: u64) -> Result<(), VmError> {
        Ok(self.protection.invalidate(epoch)?)
    }

    fn permanent(&mut self, epoch: u64) -> Result<(), VmError> {
        Ok(self.protection.permanent(epoch)?)
    }

    fn prepare_snapshot(&mut self, order: &Order) -> Result<(), VmError> {
        let order = order.clone();
        Ok(self.protection.prepare_snapshot(CutSnapshot {
            id: order.id.0,
            root: order.store,
            chain: order.chain,
            name: order.snapshot,
            full: order.full,
            compress: order.compress,
        })?)
    }

    fn snapshot_at(&mut self, epoch: u64) -> Result<(), VmError> {
        Ok(self.protection.snapshot_at(epoch)?)
    }

    fn no_snapshot(&mut self, id: CheckpointId) -> Result<(), VmError> {
        Ok(self.protection.no_snapshot(id.0)?)
    }

    fn roll_back(&mut self, cut: u64) -> Result<(), VmError> {
        Ok(self.protection.roll_back(cut)?)
    }

    fn resume(&mut self) -> Result<(), VmError> {
        Ok(self.protection.resume()?)
    }

    fn fence(&mut self) -> Result<(), VmError> {
        Ok(self.protection.fence()?)
    }

    fn unprotect(&mut self) -> Result<(), VmError> {
        Ok(self.protection.unprotect()?)
    }

    fn status(&self) -> MemberStatus {
        // A VM that has ended has no status; that it has is told in another way.
        let status = self.protection.status().unwrap_or_default();
        MemberStatus {
            held_frames: status.held_frames,
            held_bytes: status.held_bytes,
            pause_ns: status.pause_ns,
            dirty_pages: status.dirty_pages,
            lag: status.lag,
            shipped_bytes: status.shipped_bytes,
            stored_bytes: status.stored_bytes,
            to_store_bytes: status.to_store_bytes,
        }
    }
}

/// A snapshot that is permanent, as the group sees it.
fn stored(report: &SnapshotReport) -> StoredSnapshot {
    let name = report.path.file_name().map(|name| name.to_string_lossy().into_owned());
    StoredSnapshot {
        id: report.id.unwrap_or_default(),
        name: name.unwrap_or_default(),
        parent: report.parent.clone(),
        file_bytes: report.file_bytes,
        pause_ns: report.pause_ns,
    }
}

/// Passes on what the VM tells, until it tells nothing more.
pub fn pass_on(from: &Receiver<protection::Notice>, to: &Notices) {
    for notice in from {
        to.tell(match notice {
            protection::Notice::Holds(epoch) => Notice::Holds(epoch),
            protection::Notice::StandbyLost(reason) => Notice::StandbyLost(reason),
            protection::Notice::OutputWaits => Notice::OutputWaits,
            protection::Notice::SnapshotPrepared(id) => Notice::SnapshotPrepared(CheckpointId(id)),
            protection::Notice::SnapshotOver(id, outcome) => {
                Notice::SnapshotOver(CheckpointId(id), outcome.map(|report| stored(&report)))
            }
            protection::Notice::GuestEnded(reason) => Notice::GuestEnded(reason),
            protection::Notice::GuestFailed(reason) => Notice::GuestFailed(reason),
        });
    }
}
