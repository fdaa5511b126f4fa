//! The userfault descriptor: the kernel's calls (Linux admin-guide/mm/userfaultfd), for guest memory alone.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use linux_raw_sys::general::*;
use linux_raw_sys::ioctl::*;
use rustix::io::Errno;
use rustix::ioctl::{Ioctl, IoctlOutput, Opcode, Setter, Updater, ioctl, opcode};
use rustix::mm::{UserfaultfdFlags, userfaultfd};

use super::Unavailable;
use super::space::{Area, Backing};

/// The `ioctl` requests made here, for the filters of the threads that make them.
pub const REQUESTS: &[u64] = &[
    IOC_NEW as u64,
    UFFDIO_API as u64,
    UFFDIO_REGISTER as u64,
    UFFDIO_UNREGISTER as u64,
    UFFDIO_WAKE as u64,
    UFFDIO_COPY as u64,
    UFFDIO_ZEROPAGE as u64,
    UFFDIO_WRITEPROTECT as u64,
];

/// `USERFAULTFD_IOC_NEW`, which makes a descriptor for those who may open [`DEVICE`].
const IOC_NEW: Opcode = opcode::none(0xaa, 0x00);

/// Gives descriptors by permissions of files instead of capabilities (since Linux 6.1).
const DEVICE: &str = "/dev/userfaultfd";

/// The only version of the interface (`UFFD_API`).
const API: u64 = 0xaa;

/// Bytes of a `struct uffd_msg`, where its event is, and where the address of a page fault.
const MESSAGE: usize = size_of::<uffd_msg>();
const MESSAGE_EVENT: usize = 0;
const MESSAGE_ADDRESS: usize = 16;
const EVENT_PAGEFAULT: u8 = 0x12;

/// `UFFDIO_WRITEPROTECT_MODE_WP`; without it, protection ends.
const PROTECT: u64 = 1;

/// What is to be noticed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Accesses to pages that are not there.
    Missing,
    /// Writes to pages that are protected.
    WriteProtect,
    /// The same, but nobody waits: the kernel ends the protection of what is written (since Linux 6.7).
    Asynchronous,
}

/// A userfault descriptor. Faults of system calls and KVM are noticed too.
pub struct Uffd(pub(super) OwnedFd);

impl Uffd {
    /// A descriptor for `mode`, in memory with `backing`.
    ///
    /// # Errors
    /// The kernel lacks this, or does not permit it.
    pub fn open(mode: Mode, backing: Backing) -> Result<Self, Unavailable> {
        let features = match (mode, backing) {
            (Mode::Missing, Backing::Anonymous) => 0,
            (Mode::Missing, Backing::Shared) => UFFD_FEATURE_MISSING_SHMEM,
            (Mode::Missing, Backing::HugePages) => UFFD_FEATURE_MISSING_HUGETLBFS,
            (Mode::WriteProtect, Backing::Anonymous) => UFFD_FEATURE_PAGEFAULT_FLAG_WP,
            (Mode::WriteProtect, _) => UFFD_FEATURE_PAGEFAULT_FLAG_WP | UFFD_FEATURE_WP_HUGETLBFS_SHMEM,
            (Mode::Asynchronous, _) => {
                UFFD_FEATURE_PAGEFAULT_FLAG_WP | UFFD_FEATURE_WP_UNPOPULATED | UFFD_FEATURE_WP_ASYNC
            }
        };
        let uffd = Self(open().map_err(|error| match error {
            Errno::NOSYS => Unavailable::NoSuchKernel { mode },
            _ => Unavailable::NotPermitted(error.into()),
        })?);
        let mut api = uffdio_api {
            api: API,
            features: features.into(),
            ioctls: 0,
        };
        // SAFETY: UFFDIO_API takes this structure.
        match uffd.call(unsafe { Updater::<UFFDIO_API, _>::new(&mut api) }) {
            Ok(()) => Ok(uffd),
            // What the kernel says to features it does not know.
            Err(Errno::INVAL) => Err(Unavailable::NoSuchKernel { mode }),
            Err(error) => Err(Unavailable::NotPermitted(error.into())),
        }
    }

    /// From now on, faults in `area` are for who reads this descriptor.
    ///
    /// # Errors
    /// The kernel cannot do so for this kind of memory, or it is registered with another descriptor (`EBUSY`).
    pub fn register(&self, area: Area, mode: Mode) -> io::Result<()> {
        let mut register = uffdio_register {
            range: range(area),
            mode: u64::from(match mode {
                Mode::Missing => UFFDIO_REGISTER_MODE_MISSING,
                Mode::WriteProtect | Mode::Asynchronous => UFFDIO_REGISTER_MODE_WP,
            }),
            ioctls: 0,
        };
        // SAFETY: UFFDIO_REGISTER takes this structure; the area is of guest memory, where accesses may wait.
        Ok(self.call(unsafe { Updater::<UFFDIO_REGISTER, _>::new(&mut register) })?)
    }

    /// Faults in `area` are the kernel's again, protection ends, and who waited goes on.
    ///
    /// # Errors
    /// The kernel refused.
    pub fn unregister(&self, area: Area) -> io::Result<()> {
        // SAFETY: UFFDIO_UNREGISTER takes this structure; the area is of guest memory.
        self.call(unsafe { Setter::<UFFDIO_UNREGISTER, _>::new(range(area)) })?;
        // The kernel itself only wakes those who wait for missing pages.
        self.wake(area)
    }

    /// Has writes to `area` wait.
    ///
    /// # Errors
    /// The kernel refused.
    pub fn protect(&self, area: Area) -> io::Result<()> {
        self.write_protect(area, PROTECT)
    }

    /// Lets writes to `area` go on.
    ///
    /// # Errors
    /// The kernel refused.
    pub fn unprotect(&self, area: Area) -> io::Result<()> {
        self.write_protect(area, 0)
    }

    fn write_protect(&self, area: Area, mode: u64) -> io::Result<()> {
        let mut call = uffdio_writeprotect {
            range: range(area),
            mode,
        };
        loop {
            // SAFETY: UFFDIO_WRITEPROTECT takes this structure; no content changes.
            match self.call(unsafe { Updater::<UFFDIO_WRITEPROTECT, _>::new(&mut call) }) {
                // The address space was changing.
                Err(Errno::AGAIN) => {}
                result => return Ok(result?),
            }
        }
    }

    /// Lets those go on that wait in `area`.
    ///
    /// # Errors
    /// The kernel refused.
    pub fn wake(&self, area: Area) -> io::Result<()> {
        // SAFETY: UFFDIO_WAKE takes this structure; who was woken too early faults again.
        Ok(self.call(unsafe { Setter::<UFFDIO_WAKE, _>::new(range(area)) })?)
    }

    /// Fills `area`, of which nothing is there, with `content`, which is as long; who waits for a page goes on.
    ///
    /// # Errors
    /// A page is there (`EEXIST`), the kernel refused, or has no memory.
    pub fn copy(&self, area: Area, content: &[u8]) -> io::Result<()> {
        assert_eq!(area.bytes, content.len() as u64);
        area.in_steps(|rest| {
            let mut call = uffdio_copy {
                dst: rest.start,
                src: content.as_ptr().addr() as u64 + (rest.start - area.start),
                len: rest.bytes,
                mode: 0,
                copy: 0,
            };
            // SAFETY: UFFDIO_COPY takes this structure. It reads within `content`, and writes pages of guest memory
            // that nobody has seen.
            let result = self.call(unsafe { Updater::<UFFDIO_COPY, _>::new(&mut call) });
            filled(rest, result, call.copy)
        })
    }

    /// Fills `area`, of which nothing is there, with zeros; who waits for a page goes on.
    ///
    /// # Errors
    /// A page is there (`EEXIST`), the kernel refused, or has no memory.
    pub fn zero(&self, area: Area) -> io::Result<()> {
        area.in_steps(|rest| {
            let mut call = uffdio_zeropage {
                range: range(rest),
                mode: 0,
                zeropage: 0,
            };
            // SAFETY: UFFDIO_ZEROPAGE takes this structure, and writes pages of guest memory that nobody has seen.
            let result = self.call(unsafe { Updater::<UFFDIO_ZEROPAGE, _>::new(&mut call) });
            filled(rest, result, call.zeropage)
        })
    }

    /// The address of the next page fault, if there is one; it is that of the page.
    ///
    /// # Errors
    /// The kernel refused.
    pub fn next_fault(&self) -> io::Result<Option<u64>> {
        loop {
            let mut message = [0; MESSAGE];
            match rustix::io::read(&self.0, &mut message) {
                // Other events were not asked for.
                Ok(_) if message[MESSAGE_EVENT] != EVENT_PAGEFAULT => {}
                Ok(_) => {
                    let (address, _) = message[MESSAGE_ADDRESS..]
                        .split_first_chunk()
                        .expect("within a message");
                    return Ok(Some(u64::from_ne_bytes(*address)));
                }
                Err(Errno::AGAIN) => return Ok(None),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn call(&self, request: impl Ioctl<Output = ()>) -> Result<(), Errno> {
        // SAFETY: the requests made in this file are those of this descriptor, with the arguments they take.
        unsafe { ioctl(&self.0, request) }
    }
}

impl AsFd for Uffd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// How many bytes of `area` a call with this result has filled.
fn filled(area: Area, result: Result<(), Errno>, filled: i64) -> io::Result<u64> {
    match result {
        Ok(()) => Ok(area.bytes),
        // Part of it, or none as the address space was changing.
        Err(Errno::AGAIN) => Ok(u64::try_from(filled).unwrap_or(0)),
        Err(error) => Err(error.into()),
    }
}

fn range(area: Area) -> uffdio_range {
    uffdio_range {
        start: area.start,
        len: area.bytes,
    }
}

/// Makes a descriptor by the system call, which takes `CAP_SYS_PTRACE` or a sysctl, or else by the device.
fn open() -> Result<OwnedFd, Errno> {
    let flags = UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::NONBLOCK;
    // SAFETY: what the descriptor can do to memory is up to what is registered with it.
    match unsafe { userfaultfd(flags) } {
        Err(Errno::PERM) => {}
        result => return result,
    }
    let device = OpenOptions::new().read(true).write(true).open(DEVICE);
    let device = device.map_err(|_| Errno::PERM)?;
    // SAFETY: the device's only request; it takes the flags by value and gives a descriptor.
    unsafe { ioctl(&device, NewDescriptor(flags)) }
}

/// The argument of [`IOC_NEW`].
struct NewDescriptor(UserfaultfdFlags);

// SAFETY: the request's argument is a number, so no memory is accessed, and its result is a new descriptor.
unsafe impl Ioctl for NewDescriptor {
    type Output = OwnedFd;
    const IS_MUTATING: bool = false;

    fn opcode(&self) -> Opcode {
        IOC_NEW
    }

    fn as_ptr(&mut self) -> *mut rustix::ffi::c_void {
        std::ptr::without_provenance_mut(self.0.bits() as usize)
    }

    unsafe fn output_from_ptr(out: IoctlOutput, _: *mut rustix::ffi::c_void) -> rustix::io::Result<OwnedFd> {
        let descriptor: RawFd = out;
        // SAFETY: the call did not fail, so this is a descriptor nobody owns yet.
        Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
    }
}
