//! Work of a VM that takes long, waited for by a person: shown on the way, cancelled by Ctrl-C.
//!
//! ```text
//!  POST path ─────────────────────── … ───────────────────────► the answer, when it is done
//!    meanwhile, every LOOK_EVERY:  GET current ──► shown
//!    after Ctrl-C:                 DELETE current, until the answer tells that it is cancelled
//!    after Ctrl-C once more:       it is left to the VM
//! ```

use std::io;
use std::pin::pin;
use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::runtime;
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};
use tokio::time::interval;

use super::error::ClientError;
use super::http::Vm;
use crate::signals::{Blocked, Time};

/// How often the VM is asked how far it is.
pub const LOOK_EVERY: Duration = Duration::from_millis(200);
/// How long it may take to say so.
const LOOK_LIMIT: Duration = Duration::from_secs(10);

/// A kind of work that a VM does when it is asked to.
#[derive(Clone, Copy, Debug)]
pub struct Work<'a> {
    /// What comes of it, for people.
    pub what: &'static str,
    /// Where it is asked for.
    pub path: &'a str,
    /// Where the VM tells how far it is, and can be told to give it up.
    pub current: &'a str,
    /// What tells what becomes of it if nobody waits.
    pub look: &'static str,
}

/// Why work came to nothing, as far as one can tell.
#[derive(Debug, thiserror::Error)]
pub enum WorkError {
    /// The operating system refused what waiting takes.
    #[error("cannot prepare for waiting")]
    Prepare(#[source] io::Error),
    /// The VM refused, failed, or was told to give it up.
    #[error("{vm}")]
    Vm {
        /// Its name.
        vm: String,
        /// What it said.
        source: ClientError,
    },
    /// Nobody waits for it any more.
    #[error("{vm}: nobody waits for the {what} any more: {look}")]
    Left {
        /// Name of the VM.
        vm: String,
        /// What was asked of it.
        what: &'static str,
        /// What tells about it.
        look: &'static str,
    },
}

impl Work<'_> {
    /// Has `vm` do what `body` says. How far it is goes to `show`, if anybody looks. Takes the signals of this process
    /// for itself.
    ///
    /// # Errors
    /// It was refused, has failed, was cancelled, or is left to the VM.
    pub fn ask<P: DeserializeOwned, R: DeserializeOwned>(
        self,
        vm: &Vm,
        body: &impl Serialize,
        show: Option<impl FnMut(P)>,
    ) -> Result<R, WorkError> {
        let signals = Blocked::block().map_err(WorkError::Prepare)?;
        let (told, hear) = unbounded_channel();
        let tell = move |time| {
            // Nobody hears what comes when the work is done.
            let _ = told.send(time);
        };
        signals.serve(tell, false).map_err(WorkError::Prepare)?;
        let runtime = runtime::Builder::new_current_thread().enable_all().build();
        runtime
            .map_err(WorkError::Prepare)?
            .block_on(self.wait(vm, body, hear, show))
    }

    async fn wait<P: DeserializeOwned, R: DeserializeOwned>(
        self,
        vm: &Vm,
        body: &impl Serialize,
        mut signals: UnboundedReceiver<Time>,
        mut show: Option<impl FnMut(P)>,
    ) -> Result<R, WorkError> {
        let name = || vm.name.clone();
        let mut answer = pin!(vm.have(self.path, body));
        let mut looks = interval(LOOK_EVERY);
        let mut is_unwanted = false;
        loop {
            tokio::select! {
                result = &mut answer => return result.map_err(|source| WorkError::Vm { vm: name(), source }),
                Some(time) = signals.recv() => match time {
                    Time::First => is_unwanted = true,
                    Time::Again => return Err(WorkError::Left { vm: name(), what: self.what, look: self.look }),
                },
                _ = looks.tick(), if is_unwanted || show.is_some() => {
                    if is_unwanted {
                        // What goes wrong shows in the answer; what has not begun yet is cancelled at the next look.
                        let _ = vm.delete(self.current, LOOK_LIMIT).await;
                    } else if let (Some(show), Ok(progress)) = (&mut show, vm.get(self.current, LOOK_LIMIT).await) {
                        show(progress);
                    }
                }
            }
        }
    }
}
