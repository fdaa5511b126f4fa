//! What can go wrong while a VM moves, each with what was expected and what came.

use std::io;
use std::path::PathBuf;

use crate::message::Message;
use crate::vm::VmError;

/// Why a migration, or a part of it, failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The destination cannot be reached.
    #[error("{endpoint}: cannot connect")]
    Connect {
        /// Where to.
        endpoint: String,
        /// Why.
        source: io::Error,
    },
    /// It cannot be listened there.
    #[error("{endpoint}: cannot listen")]
    Listen {
        /// Where.
        endpoint: String,
        /// Why.
        source: io::Error,
    },
    /// A certificate or key cannot be used.
    #[error("{}: {reason}", .path.display())]
    Certificate {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A file of certificates cannot be read or written.
    #[error("{}: cannot {action}", .path.display())]
    File {
        /// What was tried.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// Nothing protects what would be sent.
    #[error("{0} is neither encrypted nor authenticated: use tls://host:port, or say that an insecure link will do")]
    Insecure(String),
    /// There are no certificates to prove who this host is.
    #[error("{0} needs certificates: say in which directory they are")]
    NoIdentity(String),
    /// Bytes could not be sent or received.
    #[error("the link to the peer broke: cannot {action}")]
    Link {
        /// What was tried.
        action: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// The peer ended the link.
    #[error("the peer ended the link where {expected} was expected")]
    Ended {
        /// What should have come.
        expected: &'static str,
    },
    /// The peer is there but does not answer.
    #[error("the peer is silent: {expected} did not come in time")]
    Silent {
        /// What should have come.
        expected: &'static str,
    },
    /// The peer is not a Cutover that migrates.
    #[error("the peer does not speak Cutover's migration protocol: its first bytes are {0:02x?}")]
    NotAPeer([u8; 8]),
    /// No version in common.
    #[error(
        "the peer speaks versions {theirs_min} to {theirs_max} of the protocol, this release {ours_min} to {ours_max}"
    )]
    Version {
        /// The oldest of the peer.
        theirs_min: u16,
        /// The newest of the peer.
        theirs_max: u16,
        /// The oldest of this release.
        ours_min: u16,
        /// The newest of this release.
        ours_max: u16,
    },
    /// A message that may not come now.
    #[error("the peer sent {found} where {expected} was expected")]
    Unexpected {
        /// What should have come.
        expected: &'static str,
        /// What came.
        found: &'static str,
    },
    /// What came is not what was sent.
    #[error("{what} arrived damaged: its checksum is {found:016x}, but {expected:016x} was sent")]
    Damaged {
        /// What it is, such as a message or pages.
        what: String,
        /// The checksum that was sent.
        expected: u64,
        /// That of what came.
        found: u64,
    },
    /// What came cannot be.
    #[error("the peer sent {what} that cannot be: {reason}")]
    Invalid {
        /// What it is.
        what: &'static str,
        /// Why it cannot be.
        reason: String,
    },
    /// The destination cannot run the VM.
    #[error("the destination cannot take the VM: {}", .0.join("; "))]
    Refused(Vec<String>),
    /// The peer gave up.
    #[error("the peer gave up: {0}")]
    Aborted(String),
    /// It was cancelled.
    #[error("the migration was cancelled")]
    Cancelled,
    /// The goal for the downtime is out of reach.
    #[error("the downtime that was asked for is out of reach: {0}; allow a longer one, or post-copy")]
    NoConvergence(String),
    /// The source's or destination's VM could not do its part.
    #[error("cannot {action}")]
    Vm {
        /// What was tried.
        action: &'static str,
        /// Why it failed.
        source: VmError,
    },
    /// Pages could not be read or written here.
    #[error("cannot {action} pages {first} to {last} of image '{image}'")]
    Pages {
        /// What was tried.
        action: &'static str,
        /// The image.
        image: String,
        /// First of the pages.
        first: u64,
        /// Last of the pages.
        last: u64,
        /// Why it failed.
        source: io::Error,
    },
    /// A thread could not be had.
    #[error("cannot start a thread for a page stream")]
    Thread(#[source] io::Error),
    /// The VM was handed over, and the answer never came.
    #[error(
        "the VM was handed over, but whether it runs at the destination is not known ({0}): this one stays stopped; if the \
         other is certainly gone, reclaim it"
    )]
    OutcomeUnknown(String),
    /// The destination took the VM over and then could not run it; it goes on at the source.
    #[error("the destination could not run the VM: {0}")]
    Declined(String),
    /// Part of the memory of a VM that runs is gone.
    #[error("the VM is lost: it ran at the destination before all of its memory was there: {0}")]
    Lost(String),
    /// The link to the standby ended before.
    #[error("there is no standby any more")]
    StandbyLost,
    /// A standby was asked for a cut that it cannot be at.
    #[error("the standby cannot {action} {cut}: {reason}")]
    NoSuchCut {
        /// What was asked.
        action: &'static str,
        /// The cut.
        cut: u64,
        /// Why it cannot.
        reason: String,
    },
}

impl Error {
    /// Whether it says no more than that the link ended: why, the peer may know.
    pub(crate) fn is_of_link(&self) -> bool {
        matches!(self, Self::Link { .. } | Self::Ended { .. } | Self::Silent { .. })
    }

    /// That `found` came.
    pub(crate) fn unexpected(expected: &'static str, found: &impl Message) -> Self {
        Self::Unexpected {
            expected,
            found: found.name(),
        }
    }

    /// The VM, of this host, could not `action`.
    pub(crate) fn vm(action: &'static str) -> impl FnOnce(VmError) -> Self {
        move |source| Self::Vm { action, source }
    }
}
