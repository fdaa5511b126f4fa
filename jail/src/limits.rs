//! Resource limits of the process (setrlimit(2)).

use rustix::process::{Resource, Rlimit, setrlimit};

use crate::Error;

/// Descriptors that a monitor may have open, if nothing else is said: its devices take tens, its API and its guest's
/// connections hundreds.
const DESCRIPTORS: u64 = 4096;

/// Resource limits of a process. Of memory that is written to disk when it crashes, there is never any: the guest's is in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Descriptors it may have open.
    pub descriptors: u64,
    /// Bytes of the largest file it may make or extend; shared guest memory is a file, too.
    pub file_size: Option<u64>,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            descriptors: DESCRIPTORS,
            file_size: None,
        }
    }
}

impl Limits {
    /// Puts them in force, for good.
    pub(crate) fn apply(&self) -> Result<(), Error> {
        let limits = [
            (Resource::Core, Some(0)),
            (Resource::Nofile, Some(self.descriptors)),
            (Resource::Fsize, self.file_size),
        ];
        for (resource, most) in limits {
            let Some(most) = most else { continue };
            let limit = Rlimit {
                current: Some(most),
                maximum: Some(most),
            };
            setrlimit(resource, limit).map_err(Error::step(
                "limit what the process uses",
                "limits no higher than they are, or CAP_SYS_RESOURCE",
            ))?;
        }
        Ok(())
    }
}
