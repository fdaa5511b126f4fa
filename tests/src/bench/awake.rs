//! [`Awake`]: keeps a host from having nothing to do.
//!
//! An emulated host that has nothing to do loses timers at times, and with them seconds. So somebody spins, whenever
//! nobody else wants the processor.

use std::hint::spin_loop;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

use anyhow::{Result, ensure};

/// Spins until it is dropped, by the kernel's scheduling policy for what is less important than all else.
pub struct Awake {
    enough: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Awake {
    /// Begins.
    pub fn begin() -> Result<Self> {
        let enough = Arc::new(AtomicBool::new(false));
        let told = enough.clone();
        let (began, heard) = std::sync::mpsc::channel();
        let thread = thread::spawn(move || {
            let idle = become_idle();
            let spins = idle.is_ok();
            // Whoever began this waits for it.
            let _ = began.send(idle);
            while spins && !told.load(Ordering::Relaxed) {
                spin_loop();
            }
        });
        heard.recv()??;
        Ok(Self {
            enough,
            thread: Some(thread),
        })
    }
}

impl Drop for Awake {
    fn drop(&mut self) {
        self.enough.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // It has nothing to say.
            let _ = thread.join();
        }
    }
}

/// Has the calling thread run only when no other wants to (sched(7), `SCHED_IDLE`).
fn become_idle() -> Result<()> {
    let parameters = libc::sched_param { sched_priority: 0 };
    // SAFETY: 0 is the calling thread, and the parameters are valid during the call.
    let changed = unsafe { libc::sched_setscheduler(0, libc::SCHED_IDLE, &raw const parameters) };
    ensure!(
        changed == 0,
        "cannot set a scheduling policy: {}",
        io::Error::last_os_error()
    );
    Ok(())
}
