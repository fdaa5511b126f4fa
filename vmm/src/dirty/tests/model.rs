//! The tracker against a reference model: plain sets of pages, one per consumer.
//!
//! Writes by vCPUs come from a stand-in for KVM's log, those of the monitor through real guest memory.

use std::collections::BTreeSet;

use cutover_devices::GuestMemory;
use proptest::prelude::*;
use proptest::sample::Index;
use vm_memory::{Bytes, GuestAddress};

use super::super::page_set::Slot;
use super::super::*;

/// Guest addresses of pages.
type Pages = BTreeSet<u64>;

/// A stand-in for KVM: notices writes while it is on, as KVM does.
#[derive(Default)]
struct FakeLog {
    on: bool,
    /// Words and bits written.
    written: BTreeMap<usize, u64>,
    /// How many words it reports before the next collection fails.
    fails_after: Option<usize>,
    refuses_to_start: bool,
}

#[derive(Clone, Default)]
struct Shared(Arc<Mutex<FakeLog>>);

impl Shared {
    fn log(&self) -> MutexGuard<'_, FakeLog> {
        self.0.lock().unwrap()
    }
}

fn failure() -> Error {
    Error::KvmCapability { capability: "a test's" }
}

impl DirtySource for Shared {
    fn start(&mut self) -> Result<(), Error> {
        let mut log = self.log();
        log.on = true;
        if std::mem::take(&mut log.refuses_to_start) {
            return Err(failure());
        }
        Ok(())
    }

    fn stop(&mut self) -> Result<(), Error> {
        *self.log() = FakeLog::default();
        Ok(())
    }

    fn collect(&mut self, report: Report<'_>) -> Result<(), Error> {
        let mut log = self.log();
        assert!(log.on, "nobody asks a log that is off");
        let reported = log.fails_after.take();
        for _ in 0..reported.unwrap_or(usize::MAX) {
            let Some((word, bits)) = log.written.pop_first() else {
                break;
            };
            report(word, bits);
        }
        reported.map_or(Ok(()), |_| Err(failure()))
    }
}

/// What happens; indices choose among what there is.
#[derive(Clone, Debug)]
enum Event {
    GuestWrites(Index),
    MonitorWrites(Index, u16),
    Comes(Baseline),
    RefusedToCome(Baseline),
    Goes(Index),
    Takes(Index),
    FailsToTake(Index, usize),
    Commits(Index),
    PutsBack(Index),
}

fn event() -> impl Strategy<Value = Event> {
    let baseline = || prop_oneof![Just(Baseline::Now), Just(Baseline::Nothing)];
    let index = any::<Index>;
    prop_oneof![
        8 => index().prop_map(Event::GuestWrites),
        8 => (index(), any::<u16>()).prop_map(|(page, len)| Event::MonitorWrites(page, len)),
        2 => baseline().prop_map(Event::Comes),
        1 => baseline().prop_map(Event::RefusedToCome),
        1 => index().prop_map(Event::Goes),
        4 => index().prop_map(Event::Takes),
        1 => (index(), 0..4_usize).prop_map(|(who, words)| Event::FailsToTake(who, words)),
        3 => index().prop_map(Event::Commits),
        3 => index().prop_map(Event::PutsBack),
    ]
}

/// A consumer, and what it has to be told by its next take.
struct Client {
    consumer: Consumer,
    pending: Pages,
}

/// The real thing and the model of it, side by side.
struct World {
    memory: GuestMemory,
    layout: Arc<Layout>,
    log: Shared,
    tracker: Tracker,
    clients: Vec<Client>,
    taken: Vec<Taken>,
}

fn pages(set: &PageSet) -> Pages {
    let pages: Vec<u64> = set
        .ranges()
        .flat_map(|range| (range.start..range.end()).step_by(4096))
        .collect();
    assert!(pages.is_sorted());
    pages.into_iter().collect()
}

impl World {
    /// A VM with slots of so many pages, each followed by a gap of as many.
    fn new(slots: &[u64]) -> Self {
        let ranges: Vec<_> = slots
            .iter()
            .scan(0, |next, pages| {
                let start = GuestAddress(*next);
                *next += 2 * pages * PAGE_SIZE;
                Some((start, usize::try_from(pages * PAGE_SIZE).unwrap()))
            })
            .collect();
        let memory = GuestMemory::from_ranges(&ranges).unwrap();
        let layout = Arc::new(Layout::of(&memory));
        let log = Shared::default();
        let sources: Vec<Box<dyn DirtySource>> =
            vec![Box::new(log.clone()), Box::new(MonitorWrites::new(&memory, &layout))];
        let tracker = Tracker::of(layout.clone(), sources);
        Self {
            memory,
            layout,
            log,
            tracker,
            clients: Vec::new(),
            taken: Vec::new(),
        }
    }

    /// Which page that is: slot and number within.
    fn choose(&self, page: &Index) -> (Slot, u64) {
        let slots = self.layout.slots();
        let all = slots
            .iter()
            .flat_map(|slot| (0..slot.pages).map(move |page| (*slot, page)));
        let all: Vec<_> = all.collect();
        *page.get(&all)
    }

    fn wrote(&mut self, first: u64, end: u64) {
        for client in &mut self.clients {
            client.pending.extend((first..end).step_by(4096));
        }
    }

    fn guest_writes(&mut self, page: &Index) {
        let (slot, page) = self.choose(page);
        let mut log = self.log.log();
        if log.on {
            let word = slot.first_word + usize::try_from(page / 64).unwrap();
            *log.written.entry(word).or_default() |= 1 << (page % 64);
        }
        drop(log);
        let address = slot.start + page * PAGE_SIZE;
        self.wrote(address, address + PAGE_SIZE);
    }

    fn monitor_writes(&mut self, page: &Index, len: u16) {
        let (slot, page) = self.choose(page);
        let address = slot.start + page * PAGE_SIZE;
        let end = (address + u64::from(len)).min(slot.start + slot.pages * PAGE_SIZE);
        let data = vec![1; usize::try_from(end - address).unwrap()];
        self.memory.write_slice(&data, GuestAddress(address)).unwrap();
        self.wrote(address, end);
    }

    fn comes(&mut self, baseline: Baseline) {
        let pending = match baseline {
            Baseline::Now => Pages::new(),
            Baseline::Nothing => pages(&PageSet::full(&self.layout)),
        };
        let consumer = self.tracker.register(baseline).unwrap();
        self.clients.push(Client { consumer, pending });
    }

    /// A refusal is as if nobody had come.
    fn refused_to_come(&mut self, baseline: Baseline) {
        let mut log = self.log.log();
        log.refuses_to_start = true;
        log.fails_after = Some(0);
        drop(log);
        drop(self.tracker.register(baseline));
        let mut log = self.log.log();
        (log.refuses_to_start, log.fails_after) = (false, None);
    }

    fn takes(&mut self, who: &Index) {
        let Some(who) = self.client(who) else { return };
        let client = &mut self.clients[who];
        let taken = client.consumer.take().unwrap();
        assert_eq!(pages(&taken), std::mem::take(&mut client.pending));
        self.taken.push(taken);
    }

    fn fails_to_take(&mut self, who: &Index, words: usize) {
        let Some(who) = self.client(who) else { return };
        self.log.log().fails_after = Some(words);
        assert!(self.clients[who].consumer.take().is_err());
    }

    fn puts_back(&mut self, which: &Index) {
        let Some(taken) = self.taken_one(which) else { return };
        let owner = taken.owner.as_ref().unwrap().1;
        if let Some(client) = self.clients.iter_mut().find(|client| client.consumer.id == owner) {
            client.pending.append(&mut pages(&taken));
        }
        drop(taken);
    }

    fn client(&self, which: &Index) -> Option<usize> {
        (!self.clients.is_empty()).then(|| which.index(self.clients.len()))
    }

    fn taken_one(&mut self, which: &Index) -> Option<Taken> {
        (!self.taken.is_empty()).then(|| self.taken.swap_remove(which.index(self.taken.len())))
    }

    fn happen(&mut self, event: &Event) {
        match event {
            Event::GuestWrites(page) => self.guest_writes(page),
            Event::MonitorWrites(page, len) => self.monitor_writes(page, *len),
            Event::Comes(baseline) => self.comes(*baseline),
            Event::RefusedToCome(baseline) => self.refused_to_come(*baseline),
            Event::Goes(who) => {
                self.client(who).map(|who| self.clients.swap_remove(who));
            }
            Event::Takes(who) => self.takes(who),
            Event::FailsToTake(who, words) => self.fails_to_take(who, *words),
            Event::Commits(which) => self.taken_one(which).into_iter().for_each(Taken::commit),
            Event::PutsBack(which) => self.puts_back(which),
        }
        assert_eq!(
            self.log.log().on,
            !self.clients.is_empty(),
            "on just while somebody wants to know"
        );
    }
}

proptest! {
    #[test]
    fn each_consumer_is_told_of_every_change_since_its_own_last_take(
        slots in prop::collection::vec(1..200_u64, 1..4),
        events in prop::collection::vec(event(), 1..120),
    ) {
        let mut world = World::new(&slots);
        for event in &events {
            world.happen(event);
        }
    }
}
