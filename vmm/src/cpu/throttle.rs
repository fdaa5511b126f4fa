//! Slowing a guest down: each vCPU stands still for a share of the time, so that a guest that dirties memory faster than a
//! migration can send it dirties less (auto-converge).
//!
//! ```text
//!  thread "throttle"   rest until …, kick    rest until …, kick    once in 10 ms
//!                       │                     │
//!  vCPU thread   ▓▓▓▓▓▓▓░░░░░░░░░░░░░░▓▓▓▓▓▓▓▓░░░░░░░░░░░░░░▓▓▓▓▓▓▓   ▓ runs   ░ waits for a command, so long
//! ```
//! When its rest ends is settled before a vCPU is kicked: one that comes to it late goes on in time, and so runs in each
//! period. It rests where its commands come in, so whoever wants it to pause gets an answer at once. A guest that is not
//! slowed down pays nothing: there is no thread that kicks.

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use cutover_devices::THREAD_STACK_SIZE;

use super::kick::Kicker;
use crate::Error;

/// Once in which each vCPU rests.
const PERIOD: Duration = Duration::from_millis(10);

/// Most percent of the time that a vCPU can rest.
const PERCENT_MAX: u8 = 99;

/// Until when a vCPU is to stand still; it is told so by a kick.
#[derive(Default)]
pub struct Rest(Mutex<Option<Instant>>);

impl Rest {
    /// How long it still has to; none if it may run.
    pub fn left(&self) -> Option<Duration> {
        let end = (*self.end())?;
        end.checked_duration_since(Instant::now())
            .filter(|left| !left.is_zero())
    }

    fn end(&self) -> MutexGuard<'_, Option<Instant>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Slows down the vCPUs of a machine. Dropping it undoes that.
pub struct Throttle {
    vcpus: Vec<Throttled>,
    /// Percent of the time that each is to rest.
    percent: Arc<AtomicU8>,
    /// While there is anything to do.
    ticker: Option<Ticker>,
}

/// A vCPU as it is seen by who slows it down.
#[derive(Clone)]
pub struct Throttled {
    /// Has it look at its rest.
    pub kicker: Arc<Kicker>,
    /// Its rest.
    pub rest: Arc<Rest>,
}

/// The thread that kicks; dropping it ends the thread.
struct Ticker {
    /// Until the thread is to end.
    going: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Throttle {
    /// One for `vcpus`, at full speed.
    pub fn of(vcpus: Vec<Throttled>) -> Self {
        Self {
            vcpus,
            percent: Arc::default(),
            ticker: None,
        }
    }

    /// Has each vCPU stand still for `percent` of the time, at most 99; 0 undoes it.
    ///
    /// # Errors
    /// There is no thread to be had; nothing has changed.
    pub fn set(&mut self, percent: u8) -> Result<(), Error> {
        if percent == 0 {
            self.undo();
            return Ok(());
        }
        self.percent.store(percent.min(PERCENT_MAX), Ordering::Relaxed);
        if self.ticker.is_none() {
            self.ticker = Some(Ticker::start(self.vcpus.clone(), self.percent.clone())?);
        }
        Ok(())
    }

    /// Lets the guest run at full speed.
    pub fn undo(&mut self) {
        self.ticker = None;
        for vcpu in &self.vcpus {
            *vcpu.rest.end() = None;
        }
    }
}

impl Drop for Throttle {
    fn drop(&mut self) {
        self.undo();
    }
}

impl Ticker {
    fn start(vcpus: Vec<Throttled>, percent: Arc<AtomicU8>) -> Result<Self, Error> {
        let (going, gone) = channel::<()>();
        let thread = std::thread::Builder::new()
            .name("throttle".to_owned())
            .stack_size(THREAD_STACK_SIZE)
            .spawn(move || {
                while gone.recv_timeout(PERIOD) == Err(RecvTimeoutError::Timeout) {
                    let rest = PERIOD * u32::from(percent.load(Ordering::Relaxed)) / 100;
                    let end = Instant::now() + rest;
                    for vcpu in &vcpus {
                        *vcpu.rest.end() = Some(end);
                        vcpu.kicker.kick();
                    }
                }
            })
            .map_err(Error::os("create the thread that slows vCPUs down"))?;
        Ok(Self {
            going: Some(going),
            thread: Some(thread),
        })
    }
}

impl Drop for Ticker {
    fn drop(&mut self) {
        self.going = None;
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread that slows vCPUs down panicked");
        }
    }
}
