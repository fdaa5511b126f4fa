//! The standby's end: a VM that is built, and an image of it that is always that of a permanent cut.
//!
//! ```text
//!  primary ══► thread "standby": Serving ──► Held ── permanent ──► image, in order ── promote ──► the VM, standing still
//! ```

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Sender;
use std::thread::{self, JoinHandle};

use cutover_snapshot::section::State;

use super::held::{Held, HeldEpoch};
use super::serving::{Serving, Shared};
use super::{Options, PROTECT, StandbyLink};
use crate::destination::Waiting;
use crate::error::Error;
use crate::handshake::{self, Built};
use crate::link::DestinationLink;
use crate::status::Phase;
use crate::streams::Incoming;
use crate::vm::{DestinationHost, DestinationVm};

/// What a standby tells by itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Notice {
    /// All of the VM was sent once: what follows are epochs.
    Seeded,
    /// It holds all of this epoch.
    Holds(u64),
    /// The primary, or the link to it, is gone: why. What is held stays.
    PrimaryLost(String),
}

/// See the module. Dropped, it leaves nothing behind.
pub struct Standby<Vm> {
    vm: Vm,
    /// What applies epochs; what receives them is the thread's.
    applying: Incoming,
    held: Shared,
    image: Image,
    serving: Thread,
}

/// What the image is.
enum Image {
    /// What was sent while the guest ran: of no use by itself.
    Seed,
    /// That of a cut.
    At(Box<State>),
    /// An epoch was applied in part: why not all of it.
    Torn(String),
}

/// The thread that has the link.
struct Thread {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl<Vm: DestinationVm> Standby<Vm> {
    /// Waits for a primary, and has `host` build what it replicates; returns when that is done and pages begin to come.
    /// Who connects and is no primary is turned away. After the first one there is no other.
    ///
    /// # Errors
    /// The host cannot build it, nobody waits any more, or the link broke: nothing is left behind.
    pub fn accept<H: DestinationHost<Vm = Vm>>(
        waiting: &Waiting<'_>,
        host: &mut H,
        options: &Options,
        notices: Sender<Notice>,
    ) -> Result<Self, Error> {
        let (mut link, _) = waiting.next_peer(PROTECT)?;
        let begun = || waiting.status.step(|progress| progress.phase = Phase::Reserving);
        let built = handshake::build(&mut link, host, &waiting.on_thread, begun).and_then(|built| {
            let Built { streams, pull, .. } = built;
            if streams == 1 && !pull {
                return Ok(built);
            }
            Err(Error::Invalid {
                what: "Reserve",
                reason: format!("{streams} streams, or one to ask for pages, are not for a standby"),
            })
        });
        match built {
            Ok(built) => Self::serve(link, built, waiting, options, notices),
            Err(error) => Err(link.part(error)),
        }
    }

    fn serve(
        link: DestinationLink,
        built: Built<Vm>,
        waiting: &Waiting<'_>,
        options: &Options,
        notices: Sender<Notice>,
    ) -> Result<Self, Error> {
        let Built { reservation, vm, .. } = built;
        let incoming = || Incoming::new(vm.images(), &reservation.images, waiting.on_thread.clone());
        let stop = Arc::new(AtomicBool::new(false));
        let mut connection = link.into_connection();
        // Whoever waited for it has it.
        connection.watch_nothing();
        connection.watch(stop.clone());
        connection.silent_at_most(options.silence);
        let held = Shared::new(Held::new(options.held_bytes_max));
        let serving = Serving::new(
            StandbyLink::new(connection),
            &reservation,
            vm.images(),
            incoming(),
            held.clone(),
            notices,
            options.silence,
        );
        let on_thread = waiting.on_thread.clone();
        let body = move || {
            on_thread();
            serving.run();
        };
        let thread = thread::Builder::new().name("standby".to_owned()).spawn(body);
        Ok(Self {
            applying: incoming(),
            vm,
            held,
            image: Image::Seed,
            serving: Thread {
                stop,
                thread: Some(thread.map_err(Error::Thread)?),
            },
        })
    }

    /// What was built.
    pub fn vm(&self) -> &Vm {
        &self.vm
    }

    /// What is held up to `epoch` is permanent: the image becomes that of its cut. Nothing, if it is so already.
    ///
    /// # Errors
    /// That epoch is not held. Or an image could not be written: then the standby is of no use any more.
    pub fn permanent(&mut self, epoch: u64) -> Result<(), Error> {
        self.held.with(|held| held.check_cut("make permanent epoch", epoch))?;
        self.apply_up_to(epoch)
    }

    /// Becomes the VM as it was at `cut`, complete with its state; it stands still. From here on nothing of its primary
    /// is listened to.
    ///
    /// # Errors
    /// It cannot be at that cut, or the state is none that this host can take.
    pub fn promote(mut self, cut: u64) -> Result<Vm, Error> {
        self.held.with(|held| {
            held.close();
            held.check_cut("be promoted at cut", cut)?;
            held.drop_after(cut)
        })?;
        self.serving.stop_soon();
        self.apply_up_to(cut)?;
        let Image::At(state) = &self.image else {
            return Err(self.unusable("be promoted at cut", cut));
        };
        // What the guest was told is on its disks has to be there also if this host fails next.
        for image in self.vm.images() {
            image
                .settle()
                .map_err(|error| Error::vm("make a disk permanent")(error.into()))?;
        }
        let restored = self.vm.restore(state, None);
        restored.map_err(Error::vm("take over the state"))?;
        Ok(self.vm)
    }

    fn apply_up_to(&mut self, cut: u64) -> Result<(), Error> {
        if let Image::Torn(_) = self.image {
            return Err(self.unusable("apply epochs up to", cut));
        }
        while let Some(epoch) = self.held.with(|held| held.take_next(cut)) {
            self.apply(epoch)?;
        }
        Ok(())
    }

    /// The image becomes that of the cut of `epoch`, which comes next.
    fn apply(&mut self, epoch: HeldEpoch) -> Result<(), Error> {
        let HeldEpoch { state, batches, .. } = epoch;
        match batches.iter().try_for_each(|batch| self.applying.put(batch)) {
            Ok(()) => {
                self.image = Image::At(Box::new(state));
                Ok(())
            }
            Err(error) => {
                self.image = Image::Torn(error.to_string());
                Err(error)
            }
        }
    }

    fn unusable(&self, action: &'static str, cut: u64) -> Error {
        let reason = match &self.image {
            Image::Torn(reason) => format!("an epoch was applied in part only: {reason}"),
            Image::Seed | Image::At(_) => "no epoch was permanent yet".to_owned(),
        };
        Error::NoSuchCut { action, cut, reason }
    }
}

impl Thread {
    /// Has it end, without waiting for that: it takes nothing in any more.
    fn stop_soon(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.thread = None;
    }
}

impl Drop for Thread {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // If it panicked, that was reported.
            let _ = thread.join();
        }
    }
}
