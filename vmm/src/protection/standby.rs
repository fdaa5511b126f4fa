//! A standby: a VM that is built and waits to be another one, of which it holds every permanent cut.
//!
//! ```text
//!  listen ─► accept ─► (its primary seeds it) ─► permanent, permanent, … ─► promote ─► Vmm, standing still ─► run
//!                         machine built, stopped    image of the last cut      state loaded, disks are this host's
//! ```
//! All that takes time is done when it is accepted: memory, devices, vCPUs and threads are there. Disks have their names
//! only once it is promoted: until then they are files that nobody finds, and an older file is what it was.

use std::sync::mpsc::Sender;

use cutover_migration::destination::Waiting;
use cutover_migration::epoch::{self, standby};
use cutover_migration::transport::{Endpoint, Listener};
use cutover_snapshot::spec::VmSpec;

use crate::Error;
use crate::driver::{Options, Vmm};
use crate::machine::confined;
use crate::migration::{Host, Incoming, MigrationStatus, ReceiveRequest, security};
use crate::seccomp::ThreadKind;

pub use cutover_migration::epoch::standby::Notice as StandbyNotice;

/// A standby to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StandbyRequest {
    /// Where to wait for the VM, and what it is to have here. Its disks are files in [`ReceiveRequest::disks_dir`], or
    /// where [`ReceiveRequest::disks`] says.
    pub receive: ReceiveRequest,
    /// How the link is to be.
    pub link: epoch::Options,
}

/// Where a standby waits for its primary.
pub struct StandbyListener {
    request: StandbyRequest,
    listener: Listener,
}

/// See the module. Dropped, it leaves nothing behind.
pub struct Standby {
    standby: standby::Standby<Incoming>,
    spec: VmSpec,
}

impl StandbyListener {
    /// Listens as `request` says.
    ///
    /// # Errors
    /// It cannot be listened there, or there are no certificates.
    pub fn bind(request: StandbyRequest) -> Result<Self, Error> {
        let security = security(request.receive.tls.as_deref())?;
        let listener = Listener::bind(&request.receive.listen, &security)?;
        Ok(Self { request, listener })
    }

    /// Where it listens, with the port that was free if any would do.
    pub fn endpoint(&self) -> &Endpoint {
        self.listener.endpoint()
    }

    /// Waits for a primary and builds its VM if it can be and `admit` has nothing against it; returns when what is in it
    /// begins to come, of which `notices` are told. There is no other primary from then on. `status` tells how far it has
    /// come, and that nobody waits any more.
    ///
    /// # Errors
    /// The VM cannot run here, nobody waits any more, or the link broke: nothing is left of the VM here.
    pub fn accept(
        self,
        options: &Options,
        status: &MigrationStatus,
        admit: &mut dyn FnMut(&VmSpec) -> Result<(), String>,
        notices: Sender<StandbyNotice>,
    ) -> Result<Standby, Error> {
        let Self { request, listener } = self;
        let waiting = Waiting {
            listener: &listener,
            status,
            on_thread: confined(options, ThreadKind::Migration),
        };
        let mut host = Host {
            request: &request.receive,
            options,
            admit,
        };
        let standby = standby::Standby::accept(&waiting, &mut host, &request.link, notices)?;
        let spec = standby.vm().spec().clone();
        Ok(Standby { standby, spec })
    }
}

impl Standby {
    /// What it will be.
    pub fn spec(&self) -> &VmSpec {
        &self.spec
    }

    /// The cut of `epoch` is permanent, and with it all before: the image becomes that of the cut. Nothing if it is so
    /// already.
    ///
    /// # Errors
    /// It does not hold that epoch. Or a disk could not be written: then it is of no use any more.
    pub fn permanent(&mut self, epoch: u64) -> Result<(), Error> {
        Ok(self.standby.permanent(epoch)?)
    }

    /// Becomes the VM as it was at `cut`. Its clocks have gone on meanwhile. It stands still until it is
    /// [resumed](super::Protection::resume) by whoever [protects](Vmm::protect) it, and what it sends then is held.
    ///
    /// # Errors
    /// It cannot be at that cut, its state is none that this host can take, or something that only one of the two may
    /// have could not be had, such as the lock of a disk.
    pub fn promote(self, cut: u64) -> Result<Vmm, Error> {
        self.standby.promote(cut)?.stand_still(cut)
    }
}
