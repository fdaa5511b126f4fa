//! Made-up VMs that are replicated over real sockets.

mod faults;
mod hostile;
mod whole;

use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::Instant;

use cutover_snapshot::section::{Payload, SectionWriter, Sections, State};

use super::source::{Link, Replica};
use super::standby::{Notice, Standby};
use super::{Epoch, Options, PageSource, Part};
use crate::destination::Waiting;
use crate::error::Error;
use crate::options::Compression;
use crate::pages::{PAGE_BYTES, PageBits};
use crate::status::Status;
use crate::tests::made_up::{Bytes, Noise, Source, bytes_of};
use crate::transport::{Endpoint, Listener, Security};
use crate::vm::{ArrivingMemory, Descriptors, DestinationHost, DestinationVm, Image, Reservation, SourceVm, VmError};

/// Pages of memory and of a disk.
const PAGES: [u64; 2] = [300, 40];

/// An image as it was.
struct Frozen(Vec<u8>);

impl PageSource for Frozen {
    fn read(&self, pages: Range<u64>, into: &mut [u8]) -> io::Result<()> {
        into.copy_from_slice(&self.0[bytes_of(pages)]);
        Ok(())
    }
}

/// A guest as bytes, its cuts, and what it wrote since the last one.
struct Guest {
    noise: Noise,
    images: Vec<Vec<u8>>,
    dirty: Vec<PageBits>,
    /// What the images were at each cut, from 0, when it was seeded.
    cuts: Vec<Vec<Vec<u8>>>,
}

impl Guest {
    fn new(pages: &[u64], seed: u64) -> Self {
        let images = pages.iter().map(|&pages| Bytes::filled(pages).content()).collect();
        Self {
            noise: Noise(seed | 1),
            dirty: pages.iter().map(|&pages| PageBits::full(pages)).collect(),
            images,
            cuts: Vec::new(),
        }
    }

    /// Writes some pages: some a little, some all over, some to zero.
    fn run(&mut self) {
        for (content, dirty) in self.images.iter_mut().zip(&mut self.dirty) {
            for _ in 0..12 {
                let page = self.noise.next() % dirty.pages();
                dirty.insert(page);
                let bytes = &mut content[bytes_of(page..page + 1)];
                match self.noise.next() % 4 {
                    0 => bytes.fill(0),
                    1 => bytes
                        .iter_mut()
                        .for_each(|byte| *byte = self.noise.next().to_le_bytes()[3]),
                    _ => bytes[usize::try_from(self.noise.next() % 4096).expect("small")] ^= 0x5a,
                }
            }
        }
    }

    /// What changed since the last cut, or, before the first, all there is.
    fn parts(&self) -> Vec<Part> {
        let parts = self.images.iter().zip(&self.dirty).enumerate();
        parts
            .map(|(index, (content, dirty))| Part {
                pages: dirty.clone(),
                content: Arc::new(Frozen(content.clone())),
                // Of a disk nobody keeps what it was like.
                base: match self.cuts.last() {
                    Some(cut) if index == 0 => Some(Arc::new(Frozen(cut[index].clone()))),
                    _ => None,
                },
            })
            .collect()
    }

    fn cut(&mut self) -> Vec<Part> {
        let parts = self.parts();
        self.dirty.iter_mut().for_each(PageBits::clear);
        self.cuts.push(self.images.clone());
        parts
    }

    fn epoch(&mut self, number: u64) -> Epoch {
        Epoch {
            number,
            parts: self.cut(),
            state: state(number),
        }
    }

    /// Is again what it was at a cut.
    fn roll_back(&mut self, cut: u64) {
        let cut = usize::try_from(cut).expect("small");
        self.cuts.truncate(cut + 1);
        self.images = self.cuts[cut].clone();
        self.dirty.iter_mut().for_each(PageBits::clear);
    }

    fn at(&self, cut: u64) -> &[Vec<u8>] {
        &self.cuts[usize::try_from(cut).expect("small")]
    }
}

/// A state that tells of which cut it is.
fn state(cut: u64) -> Sections {
    let mut state = Sections::default();
    let payload = Payload {
        version: 1,
        bytes: &cut.to_le_bytes(),
    };
    state.payload("vm", &payload);
    state
}

/// A host that has a standby.
#[derive(Default)]
struct Host {
    refuses: Vec<String>,
    /// The disk's older copy.
    older: Option<Vec<u8>>,
    /// Set when its disk breaks.
    broken: Arc<AtomicBool>,
}

/// The VM of a standby.
struct Twin {
    images: Vec<Arc<Bytes>>,
    broken: Arc<AtomicBool>,
    restored: Option<u64>,
}

/// A disk that may break.
struct Disk {
    bytes: Arc<Bytes>,
    broken: Arc<AtomicBool>,
}

impl Disk {
    fn check(&self) -> io::Result<()> {
        match self.broken.load(Ordering::Relaxed) {
            true => Err(io::ErrorKind::StorageFull.into()),
            false => Ok(()),
        }
    }
}

impl Image for Disk {
    fn pages(&self) -> u64 {
        self.bytes.pages()
    }

    fn read(&self, pages: Range<u64>, into: &mut [u8]) -> io::Result<()> {
        self.bytes.read(pages, into)
    }

    fn write(&self, pages: Range<u64>, content: &[u8]) -> io::Result<()> {
        self.check()?;
        self.bytes.write(pages, content)
    }

    fn zero(&self, pages: Range<u64>) -> io::Result<()> {
        self.check()?;
        self.bytes.zero(pages)
    }

    fn starts_empty(&self) -> bool {
        self.bytes.starts_empty()
    }

    fn settle(&self) -> io::Result<()> {
        self.check()
    }
}

impl DestinationHost for Host {
    type Vm = Twin;

    fn reserve(&mut self, reservation: &Reservation, _: Descriptors, _: bool) -> Result<Twin, Vec<String>> {
        if !self.refuses.is_empty() {
            return Err(self.refuses.clone());
        }
        let mut images: Vec<_> = reservation.images.iter().map(|image| Bytes::new(image.pages)).collect();
        if let Some(older) = self.older.take() {
            images[1] = Bytes::older(older);
        }
        Ok(Twin {
            images,
            broken: self.broken.clone(),
            restored: None,
        })
    }
}

impl DestinationVm for Twin {
    type Running = ();

    fn images(&self) -> Vec<Arc<dyn Image>> {
        let images = self.images.iter().enumerate();
        let image = |(index, image): (usize, &Arc<Bytes>)| match index {
            0 => Arc::clone(image) as Arc<dyn Image>,
            _ => Arc::new(Disk {
                bytes: image.clone(),
                broken: self.broken.clone(),
            }),
        };
        images.map(image).collect()
    }

    fn restore(&mut self, state: &State, _: Option<PageBits>) -> Result<Option<Arc<dyn ArrivingMemory>>, VmError> {
        let bytes = state.payload("vm")?.bytes.first_chunk().copied();
        self.restored = Some(u64::from_le_bytes(bytes.ok_or("a state of 8 bytes")?));
        Ok(None)
    }

    fn run(self) -> Result<((), Instant), VmError> {
        Ok(((), Instant::now()))
    }
}

impl Twin {
    fn contents(&self) -> Vec<Vec<u8>> {
        self.images.iter().map(|image| image.content()).collect()
    }
}

/// A primary and its standby.
struct Pair {
    guest: Guest,
    replica: Result<Replica, Error>,
    standby: Result<Standby<Twin>, Error>,
    /// What the standby told.
    notices: Receiver<Notice>,
    /// What the primary heard of its standby in the end.
    lost: Receiver<String>,
    /// The images of the standby, if it was built.
    images: Vec<Arc<Bytes>>,
}

fn options() -> Options {
    Options {
        compression: Compression::Never,
        ..Options::default()
    }
}

fn reservation(pages: &[u64]) -> Reservation {
    Source::new(pages.iter().map(|&pages| Bytes::new(pages)).collect(), None).reservation()
}

/// Waits at `far` for a primary that connects to `near`, on a thread of its own.
fn connect(near: &Path, far: &Path, guest: Guest, mut host: Host, options: &Options) -> Pair {
    let security = Security::default();
    let pages: Vec<u64> = guest.dirty.iter().map(PageBits::pages).collect();
    let listener = Listener::bind(&Endpoint::Unix(far.to_owned()), &security).expect("a socket");
    let status = Status::default();
    let waiting = Waiting {
        listener: &listener,
        status: &status,
        on_thread: Arc::new(|| ()),
    };
    let (notices, told) = channel();
    let (lost, heard) = channel();
    let (replica, standby) = thread::scope(|scope| {
        let accepting = scope.spawn(|| Standby::accept(&waiting, &mut host, options, notices));
        let replica = Replica::connect(
            &reservation(&pages),
            Link {
                to: &Endpoint::Unix(near.to_owned()),
                security: &security,
                options: options.clone(),
                on_thread: Arc::new(|| ()),
                let_go: Arc::default(),
                lost: Box::new(move |reason| drop(lost.send(reason))),
            },
        );
        // It may not have heard of the primary, and wait for the next.
        status.cancel();
        (replica, accepting.join().expect("no panic"))
    });
    let images = standby
        .as_ref()
        .map(|standby| standby.vm().images.clone())
        .unwrap_or_default();
    Pair {
        guest,
        replica,
        standby,
        notices: told,
        lost: heard,
        images,
    }
}

impl Pair {
    /// Without anything in between.
    fn new(guest: Guest, host: Host, options: &Options) -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("standby");
        connect(&path, &path, guest, host, options)
    }

    fn replica(&self) -> &Replica {
        self.replica.as_ref().expect("it is connected")
    }

    fn standby(&mut self) -> &mut Standby<Twin> {
        self.standby.as_mut().expect("it is built")
    }

    /// Sends all there is in two rounds, between which the guest runs.
    fn seed(&mut self) -> Result<(), Error> {
        let first = self.guest.parts();
        self.guest.dirty.iter_mut().for_each(PageBits::clear);
        self.replica().round(first)?;
        self.guest.run();
        let second = self.guest.cut();
        self.replica().round(second)?;
        self.replica().seeded()
    }

    fn ship(&mut self, number: u64) -> Result<(), Error> {
        self.guest.run();
        let epoch = self.guest.epoch(number);
        self.replica().ship(epoch).map(|_| ())
    }

    fn image(&self) -> Vec<Vec<u8>> {
        self.images.iter().map(|image| image.content()).collect()
    }
}
