//! What the VM of a process is made of: a description, which is booted, a snapshot, which is restored, or what another
//! monitor sends.

use std::sync::Arc;

use cutover_snapshot::spec::VmSpec;
use cutover_vmm::migration::{MigrationStatus, ReceiveRequest};
use cutover_vmm::snapshot::RestoreRequest;
use cutover_vmm::{Error, Options, Vmm};

/// What a VM is made of.
#[derive(Clone)]
pub enum Plan {
    /// A description.
    Boot(VmSpec),
    /// A snapshot.
    Restore(RestoreRequest),
    /// A VM that another monitor sends; this tells how far it is.
    Receive(ReceiveRequest, Arc<MigrationStatus>),
}

impl Plan {
    /// What the VM is to be called, if the plan says so.
    pub fn name(&self) -> Option<&str> {
        match self {
            Self::Boot(spec) => spec.name.as_deref(),
            Self::Restore(request) => request.name.as_deref(),
            Self::Receive(request, _) => request.name.as_deref(),
        }
    }

    /// Builds the VM.
    ///
    /// # Errors
    /// The plan is wrong, a file is missing or damaged, or the host lacks something. Nothing is left behind.
    pub fn build(&self, options: &Options) -> Result<Vmm, Error> {
        match self {
            Self::Boot(spec) => Vmm::build(spec, options),
            Self::Restore(request) => Vmm::restore(request, options),
            Self::Receive(request, status) => Vmm::receive(request, options, status, &mut |_| Ok(())),
        }
    }
}
