//! The VM of this process as a member of a group: what the group's runtime asks of it, passed on to the monitor.

use std::path::PathBuf;
use std::sync::mpsc::Receiver;

use cutover_cluster::runtime::seat::Notices;
use cutover_cluster::vm::{CutReport, MemberStatus, MemberVm, Notice, StandbyAddress, VmError};
use cutover_migration::transport::Endpoint;
use cutover_snapshot::spec::MacAddr;
use cutover_vmm::protection::{self, Protection};

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
        }
    }
}

/// Passes on what the VM tells, until it tells nothing more.
pub fn pass_on(from: &Receiver<protection::Notice>, to: &Notices) {
    for notice in from {
        to.tell(match notice {
            protection::Notice::Holds(epoch) => Notice::Holds(epoch),
            protection::Notice::StandbyLost(reason) => Notice::StandbyLost(reason),
            protection::Notice::OutputWaits => Notice::OutputWaits,
            protection::Notice::GuestEnded(reason) => Notice::GuestEnded(reason),
            protection::Notice::GuestFailed(reason) => Notice::GuestFailed(reason),
        });
    }
}
