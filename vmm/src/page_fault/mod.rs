//! Page faults of guest memory, taken care of by the monitor (userfaultfd): a snapshot that copies memory behind the
//! running guest, a restore that fills it before the running guest, a migration after which the rest of it is yet to come.
//!
//! ```text
//!                              writes to protected pages        accesses to missing pages
//!  vCPU, device, system call ───────────► kernel ◄───────────────────────── vCPU, device, system call
//!                                     fault │ ▲ go on
//!                                           ▼ │
//!    CopyOnWrite ◄── thread "page-fault" ───┴─┴─── threads "page-fault" ──► LazyMemory
//!     saves the page, ends its protection              reads the page from the image, puts it there
//!         │                                                     ▲
//!         └──► ImageWriter          (image of a snapshot)  Reader
//! ```
//! [`Arriving`] is as `LazyMemory`, but that what it reads comes from another host.
//!
//! Who faults waits in the kernel, holding whatever locks it has. So the threads here take no lock but their own, and
//! do nothing to guest memory but read pages that are there.

mod arriving;
mod batch;
mod copy_on_write;
mod end;
mod external;
mod faults;
mod lazy;
pub(crate) mod space;
pub mod uffd;
mod untouched;

#[cfg(test)]
pub(crate) mod tests;

use std::io;

pub use self::arriving::{Arriving, check_arriving};
pub use self::copy_on_write::{CopyOnWrite, FrozenPages};
pub use self::end::{end_process, with_sources};
pub use self::external::ExternalMemory;
pub use self::lazy::{LazyMemory, fill};
pub use self::untouched::untouched;

use self::uffd::Mode;

/// Why the monitor cannot take care of page faults here. Everything can be done without, but more slowly.
#[derive(Debug, thiserror::Error)]
pub enum Unavailable {
    /// The kernel is too old, or built without it.
    #[error(
        "this kernel's userfaultfd {}",
        match .mode {
            Mode::Missing => "is missing",
            Mode::WriteProtect => "cannot protect such memory from writes",
            Mode::Asynchronous => "does not note writes by itself (UFFD_FEATURE_WP_ASYNC, since Linux 6.7)",
        }
    )]
    NoSuchKernel {
        /// What was asked of it.
        mode: Mode,
    },
    /// The monitor may not.
    #[error(
        "the monitor may not handle page faults of the kernel ({0}): give it CAP_SYS_PTRACE or access to /dev/userfaultfd"
    )]
    NotPermitted(io::Error),
    /// Memory in huge pages, which would have to be saved and filled as such.
    #[error("guest memory is in huge pages")]
    HugePages,
    /// Memory that is a file mapped as it is, of which the kernel hands over no faults.
    #[error("guest memory is a mapped file")]
    MappedFile,
    /// Another descriptor has the memory.
    #[error("guest memory has a userfaultfd already: it is still being filled, or tracked with --dirty-log scan")]
    Busy,
    /// Something else.
    #[error("the kernel does not hand over page faults of guest memory: {0}")]
    Refused(io::Error),
    /// No thread for it.
    #[error("cannot create the page-fault thread: {0}")]
    Thread(io::Error),
}
