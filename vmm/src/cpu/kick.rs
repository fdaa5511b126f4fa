//! Getting a vCPU thread out of `KVM_RUN` without a race.
//!
//! The kicker sets `immediate_exit` in the `kvm_run` page, then sends a signal. Whichever way the two fall, before the
//! call, during it or after it, the next `KVM_RUN` returns `EINTR`. The page is mapped here a second time, so that the
//! kicker needs nothing of the vCPU thread but its number.

use std::ffi::c_int;
use std::mem::offset_of;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU8, Ordering};

use kvm_bindings::kvm_run;
use kvm_ioctls::VcpuFd;
use rustix::mm::{MapFlags, ProtFlags};
use rustix::process::{Pid, getpid};
use rustix::thread::gettid;
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

use crate::Error;

/// The signal that interrupts `KVM_RUN`; nobody else uses it.
pub fn signal() -> c_int {
    SIGRTMIN()
}

/// Installs the handler of [`signal`], which does nothing: being interrupted is all that is wanted.
///
/// # Errors
/// The operating system refused.
pub fn install_handler() -> Result<(), Error> {
    extern "C" fn interrupted(_: c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
    register_signal_handler(signal(), interrupted).map_err(Error::os("install the vCPU kick signal's handler"))
}

/// Gets one vCPU's thread out of `KVM_RUN`, from any thread.
pub struct Kicker {
    /// Makes `KVM_RUN` return.
    pub immediate_exit: ImmediateExit,
    /// The vCPU's thread, once it is there.
    thread: OnceLock<Pid>,
}

impl Kicker {
    /// One that sets `immediate_exit`.
    pub fn new(immediate_exit: ImmediateExit) -> Self {
        Self {
            immediate_exit,
            thread: OnceLock::new(),
        }
    }

    /// The calling thread is that of the vCPU. Comes before its first `KVM_RUN`.
    pub fn is_for_this_thread(&self) {
        self.thread.get_or_init(gettid);
    }

    /// Has `KVM_RUN` return, or the next one if there is none. A thread that has ended is not kicked; another one of
    /// this process that has its number by now is interrupted for nothing.
    pub fn kick(&self) {
        self.immediate_exit.set();
        // A thread that is not there yet finds `immediate_exit` set.
        let Some(thread) = self.thread.get() else { return };
        let (process, thread) = (getpid().as_raw_nonzero().get(), thread.as_raw_nonzero().get());
        // SAFETY: the system call takes three numbers; the signal's handler does nothing.
        let result = unsafe { libc::syscall(libc::SYS_tgkill, process, thread, signal()) };
        if result != 0 {
            tracing::debug!(thread, error = %std::io::Error::last_os_error(), "vCPU thread is gone");
        }
    }
}

/// A mapping of one vCPU's `kvm_run` page of which only `immediate_exit` is used.
pub struct ImmediateExit {
    page: *mut libc::c_void,
    size: usize,
}

// SAFETY: the mapping is owned and its one used byte is accessed atomically.
unsafe impl Send for ImmediateExit {}
// SAFETY: as above.
unsafe impl Sync for ImmediateExit {}

impl ImmediateExit {
    /// Maps the page of `vcpu`; `size` is what KVM says its `kvm_run` mapping has.
    ///
    /// # Errors
    /// The operating system refused.
    pub fn map(vcpu: &VcpuFd, size: usize) -> Result<Self, Error> {
        // SAFETY: `vcpu` keeps the descriptor open during this call.
        let fd = unsafe { BorrowedFd::borrow_raw(vcpu.as_raw_fd()) };
        let access = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice touches no memory in use.
        let page = unsafe { rustix::mm::mmap(ptr::null_mut(), size, access, MapFlags::SHARED, fd, 0) }
            .map_err(Error::os("map a vCPU's run page"))?;
        Ok(Self { page, size })
    }

    /// Makes the next `KVM_RUN` return at once.
    pub fn set(&self) {
        self.byte().store(1, Ordering::SeqCst);
    }

    /// Lets `KVM_RUN` run again.
    pub fn clear(&self) {
        self.byte().store(0, Ordering::SeqCst);
    }

    fn byte(&self) -> &AtomicU8 {
        // SAFETY: the page is mapped, readable and writable as long as `self` lives and begins with a kvm_run; KVM only
        // reads this byte, and every writer in this process goes through this atomic.
        unsafe { AtomicU8::from_ptr(self.page.cast::<u8>().add(offset_of!(kvm_run, immediate_exit))) }
    }
}

impl Drop for ImmediateExit {
    fn drop(&mut self) {
        // SAFETY: this is the mapping made in `map`, and no reference into it outlives `self`.
        let unmapped = unsafe { rustix::mm::munmap(self.page, self.size) };
        debug_assert!(unmapped.is_ok(), "the mapping was made by mmap with the same size");
    }
}
