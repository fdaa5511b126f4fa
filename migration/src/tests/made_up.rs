//! A VM that is an array of bytes, with a guest that is a thread, and a world that notices when two of it run.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Instant;

use cutover_snapshot::manifest::{CpuNeeds, MemoryRegion};
use cutover_snapshot::section::{Payload, SectionWriter, Sections, State};
use cutover_snapshot::size::ByteSize;
use cutover_snapshot::spec::{BootProtocol, BootSpec, MemorySpec, SerialSpec, VmSpec};

use super::arriving::Arriving;
use crate::pages::{PAGE_BYTES, PageBits};
use crate::vm::{
    ArrivingMemory, Descriptors, DestinationHost, DestinationVm, Image, ImageShape, MEMORY_IMAGE, Outcome, Reservation,
    SourceVm, Stopped, VmError,
};

/// Who runs the VM.
#[derive(Default)]
pub struct World {
    running: AtomicU32,
    ever_two: AtomicBool,
}

impl World {
    fn run(&self) {
        if self.running.fetch_add(1, Ordering::SeqCst) > 0 {
            self.ever_two.store(true, Ordering::SeqCst);
        }
    }

    fn stop(&self) {
        self.running.fetch_sub(1, Ordering::SeqCst);
    }

    /// How many run now; two at no time.
    pub fn running(&self) -> u32 {
        assert!(!self.ever_two.load(Ordering::SeqCst), "two of one VM ran");
        self.running.load(Ordering::SeqCst)
    }
}

/// Memory, or a disk.
pub struct Bytes {
    content: Mutex<Vec<u8>>,
    dirty: Mutex<PageBits>,
    starts_empty: bool,
}

impl Bytes {
    pub fn new(pages: u64) -> Arc<Self> {
        let bytes = usize::try_from(pages).unwrap() * PAGE_BYTES;
        Arc::new(Self {
            content: Mutex::new(vec![0; bytes]),
            dirty: Mutex::new(PageBits::empty(pages)),
            starts_empty: true,
        })
    }

    /// What another migration left of a disk.
    pub fn older(content: Vec<u8>) -> Arc<Self> {
        let pages = content.len() / PAGE_BYTES;
        Arc::new(Self {
            content: Mutex::new(content),
            dirty: Mutex::new(PageBits::empty(pages.try_into().unwrap())),
            starts_empty: false,
        })
    }

    /// Some pages with content that shrinks, some with noise, some zero.
    pub fn filled(pages: u64) -> Arc<Self> {
        let this = Self::new(pages);
        let mut noise = Noise(pages + 1);
        for page in 0..pages {
            match page % 4 {
                0 => this.poke(page, |bytes| {
                    bytes.iter_mut().for_each(|byte| *byte = noise.next().to_le_bytes()[3])
                }),
                1 => this.poke(page, |bytes| bytes[7..900].fill(b'x')),
                2 => this.poke(page, |bytes| bytes[100] = 1),
                _ => (),
            }
        }
        this
    }

    pub fn content(&self) -> Vec<u8> {
        self.content.lock().unwrap().clone()
    }

    /// What the guest does.
    pub fn poke(&self, page: u64, write: impl FnOnce(&mut [u8])) {
        let mut content = self.content.lock().unwrap();
        write(&mut content[bytes_of(page..page + 1)]);
        self.dirty.lock().unwrap().insert(page);
    }

    fn take_dirty(&self) -> PageBits {
        let mut dirty = self.dirty.lock().unwrap();
        let taken = dirty.clone();
        dirty.clear();
        taken
    }
}

impl Image for Bytes {
    fn pages(&self) -> u64 {
        self.dirty.lock().unwrap().pages()
    }

    fn read(&self, pages: Range<u64>, into: &mut [u8]) -> io::Result<()> {
        let content = self.content.lock().unwrap();
        let pages = content.get(bytes_of(pages)).ok_or(io::ErrorKind::InvalidInput)?;
        into.copy_from_slice(pages);
        Ok(())
    }

    fn write(&self, pages: Range<u64>, content: &[u8]) -> io::Result<()> {
        let mut all = self.content.lock().unwrap();
        let pages = all.get_mut(bytes_of(pages)).ok_or(io::ErrorKind::InvalidInput)?;
        pages.copy_from_slice(content);
        Ok(())
    }

    fn zero(&self, pages: Range<u64>) -> io::Result<()> {
        let mut all = self.content.lock().unwrap();
        let pages = all.get_mut(bytes_of(pages)).ok_or(io::ErrorKind::InvalidInput)?;
        pages.fill(0);
        Ok(())
    }

    fn starts_empty(&self) -> bool {
        self.starts_empty
    }

    fn settle(&self) -> io::Result<()> {
        Ok(())
    }
}

pub fn bytes_of(pages: Range<u64>) -> Range<usize> {
    let byte = |page| usize::try_from(page).unwrap() * PAGE_BYTES;
    byte(pages.start)..byte(pages.end)
}

/// Numbers that look random and are always the same (xorshift64).
pub struct Noise(pub u64);

impl Noise {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

/// The guest: writes pages until it is stopped.
struct Guest {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

impl Guest {
    fn start(memory: Arc<Bytes>, hot_pages: u64) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = thread::spawn(move || {
            let mut noise = Noise(4711);
            while !stopped.load(Ordering::Relaxed) {
                let (page, value) = (noise.next() % hot_pages, noise.next());
                let at = usize::try_from(value % 4088).unwrap();
                memory.poke(page, |bytes| bytes[at..at + 8].copy_from_slice(&value.to_le_bytes()));
                // As fast as it can be would never be fast enough to be sent, in a debug build.
                thread::yield_now();
            }
        });
        Self { stop, thread }
    }

    fn stop(self) {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap();
    }
}

/// The VM at the source.
pub struct Source {
    pub world: Arc<World>,
    pub images: Vec<Arc<Bytes>>,
    /// How many pages of memory the guest writes, if it writes.
    pub hot_pages: Option<u64>,
    /// A page of memory that the guest writes a little of just before it is stopped.
    pub last_written: Option<u64>,
    guest: Option<Guest>,
    runs: bool,
    pub outcome: Option<Outcome>,
    pub resumed: bool,
    pub throttle: u8,
    /// Names of what is handed over.
    pub handed: Vec<String>,
    first_time: bool,
}

impl Source {
    /// One that runs.
    pub fn new(images: Vec<Arc<Bytes>>, hot_pages: Option<u64>) -> Self {
        let world = Arc::<World>::default();
        world.run();
        let guest = hot_pages.map(|pages| Guest::start(Arc::clone(&images[0]), pages));
        Self {
            world,
            images,
            hot_pages,
            last_written: None,
            guest,
            runs: true,
            outcome: None,
            resumed: false,
            throttle: 0,
            handed: Vec::new(),
            first_time: true,
        }
    }

    pub fn contents(&self) -> Vec<Vec<u8>> {
        self.images.iter().map(|image| image.content()).collect()
    }
}

impl Drop for Source {
    fn drop(&mut self) {
        if let Some(guest) = self.guest.take() {
            guest.stop();
        }
    }
}

pub const STATE: &[u8] = b"registers, clocks and queues";

impl SourceVm for Source {
    fn reservation(&self) -> Reservation {
        let pages: Vec<u64> = self.images.iter().map(|image| image.pages()).collect();
        let bytes = pages.first().copied().unwrap_or(0) * PAGE_BYTES as u64;
        Reservation {
            generation: 7,
            monitor: "made up".to_owned(),
            spec: spec(bytes),
            memory: vec![MemoryRegion { start: 0, bytes }],
            cpu: CpuNeeds::default(),
            images: pages
                .iter()
                .enumerate()
                .map(|(index, &pages)| ImageShape {
                    bytes: pages * PAGE_BYTES as u64,
                    data: pages * PAGE_BYTES as u64,
                    name: match index {
                        0 => MEMORY_IMAGE.to_owned(),
                        disk => format!("disk-{disk}"),
                    },
                    pages,
                })
                .collect(),
        }
    }

    fn descriptors(&self) -> Result<Descriptors, VmError> {
        let open = |name: &String| Ok((name.clone(), std::fs::File::open("/dev/null")?.into()));
        self.handed.iter().map(open).collect()
    }

    fn images(&self) -> Vec<Arc<dyn Image>> {
        self.images
            .iter()
            .map(|image| Arc::clone(image) as Arc<dyn Image>)
            .collect()
    }

    fn dirty(&mut self) -> Result<Vec<PageBits>, VmError> {
        let first_time = std::mem::take(&mut self.first_time);
        let of = |image: &Arc<Bytes>| {
            let dirty = image.take_dirty();
            if first_time {
                PageBits::full(dirty.pages())
            } else {
                dirty
            }
        };
        Ok(self.images.iter().map(of).collect())
    }

    fn throttle(&mut self, percent: u8) -> Result<(), VmError> {
        self.throttle = percent;
        Ok(())
    }

    fn stop(&mut self) -> Result<Stopped, VmError> {
        let at = Instant::now();
        if let Some(guest) = self.guest.take() {
            guest.stop();
        }
        if let Some(page) = self.last_written {
            self.images[0].poke(page, |bytes| bytes[700] ^= 0xff);
        }
        self.world.stop();
        self.runs = false;
        let mut state = Sections::default();
        let payload = Payload {
            version: 1,
            bytes: STATE,
        };
        state.payload("vm", &payload);
        Ok(Stopped {
            dirty: self.dirty()?,
            state,
            at,
        })
    }

    fn resume(&mut self) {
        assert!(!self.resumed, "resumed twice");
        self.resumed = true;
        if !std::mem::replace(&mut self.runs, true) {
            self.world.run();
            self.guest = self
                .hot_pages
                .map(|pages| Guest::start(Arc::clone(&self.images[0]), pages));
        }
    }

    fn hand_over(&mut self) -> Result<(), VmError> {
        assert!(!self.runs, "handed over while it runs");
        Ok(())
    }

    fn gone(&mut self, outcome: &Outcome) {
        assert!(!self.resumed, "gone and resumed");
        self.outcome = Some(outcome.clone());
    }
}

/// A host that takes in VMs.
pub struct Host {
    pub world: Arc<World>,
    /// Why it does not.
    pub refuses: Vec<String>,
    /// Whether it cannot run a VM it was handed.
    pub cannot_run: bool,
    /// What it has of some images already, by their numbers.
    pub older: BTreeMap<usize, Vec<u8>>,
    /// How many VMs were built and not run.
    pub built: Arc<AtomicU32>,
    /// Names of what was handed over.
    pub handed: Arc<Mutex<Vec<String>>>,
}

impl Host {
    pub fn new(world: &Arc<World>) -> Self {
        Self {
            world: Arc::clone(world),
            refuses: Vec::new(),
            cannot_run: false,
            older: BTreeMap::new(),
            built: Arc::default(),
            handed: Arc::default(),
        }
    }
}

/// The VM at the destination.
pub struct Destination {
    world: Arc<World>,
    images: Vec<Arc<Bytes>>,
    arriving: Option<Arc<Arriving>>,
    cannot_run: bool,
    built: Arc<AtomicU32>,
}

impl DestinationHost for Host {
    type Vm = Destination;

    fn reserve(
        &mut self,
        reservation: &Reservation,
        handed: Descriptors,
        _may_follow: bool,
    ) -> Result<Destination, Vec<String>> {
        if !self.refuses.is_empty() {
            return Err(self.refuses.clone());
        }
        self.handed.lock().unwrap().extend(handed.into_keys());
        self.built.fetch_add(1, Ordering::SeqCst);
        Ok(Destination {
            world: Arc::clone(&self.world),
            images: (0..)
                .zip(&reservation.images)
                .map(|(number, image)| match self.older.remove(&number) {
                    Some(older) => Bytes::older(older),
                    None => Bytes::new(image.pages),
                })
                .collect(),
            arriving: None,
            cannot_run: self.cannot_run,
            built: Arc::clone(&self.built),
        })
    }
}

impl DestinationVm for Destination {
    type Running = Ran;

    fn images(&self) -> Vec<Arc<dyn Image>> {
        self.images
            .iter()
            .map(|image| Arc::clone(image) as Arc<dyn Image>)
            .collect()
    }

    fn restore(
        &mut self,
        state: &State,
        missing: Option<PageBits>,
    ) -> Result<Option<Arc<dyn ArrivingMemory>>, VmError> {
        assert_eq!(state.payload("vm").unwrap().bytes, STATE);
        self.arriving = missing.map(|missing| Arriving::new(&self.images[0], missing));
        Ok(self.arriving.clone().map(|memory| memory as Arc<dyn ArrivingMemory>))
    }

    fn run(mut self) -> Result<(Ran, Instant), VmError> {
        if self.cannot_run {
            return Err("its disk is locked".into());
        }
        if let Some(arriving) = &self.arriving {
            // As if a device looked at the guest's memory when it is started.
            arriving.touch(3);
        }
        self.world.run();
        let ran = Ran {
            images: std::mem::take(&mut self.images),
            arriving: self.arriving.take(),
        };
        Ok((ran, Instant::now()))
    }
}

impl fmt::Debug for Ran {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a VM that runs")
    }
}

/// A VM that runs at the destination.
pub struct Ran {
    images: Vec<Arc<Bytes>>,
    pub arriving: Option<Arc<Arriving>>,
}

impl Ran {
    /// What its images contain when all is there; the reason if it is lost.
    pub fn contents(&self) -> Result<Vec<Vec<u8>>, String> {
        if let Some(arriving) = &self.arriving {
            arriving.wait()?;
        }
        Ok(self.images.iter().map(|image| image.content()).collect())
    }
}

impl Drop for Destination {
    fn drop(&mut self) {
        self.built.fetch_sub(1, Ordering::SeqCst);
    }
}

fn spec(bytes: u64) -> VmSpec {
    VmSpec {
        name: Some("made-up".to_owned()),
        cpus: 1,
        memory: MemorySpec {
            size: ByteSize::from_bytes(bytes),
            shared: false,
            hugepages: false,
        },
        boot: BootSpec {
            kernel: "vmlinux".into(),
            initrd: None,
            protocol: BootProtocol::Auto,
            cmdline: String::new(),
        },
        disks: Vec::new(),
        nets: Vec::new(),
        rng: None,
        vsock: None,
        mmds: None,
        balloon: None,
        serial: SerialSpec::Null,
    }
}
