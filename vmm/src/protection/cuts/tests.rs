//! Cuts against a reference: whole copies of memory, of what is written at random while cuts are taken at random.

use std::collections::{BTreeMap, BTreeSet};

use cutover_devices::GuestMemory;
use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::dirty::{Layout, PageRange, PageSet};
use crate::migration::MemoryImage;

/// Pages of the made-up VM, in two regions.
const PAGES: u64 = 20;
const LOW_PAGES: u64 = 14;
const HIGH: u64 = 0x1000_0000;

/// One number for each page.
type Content = Vec<u64>;

#[derive(Clone, Debug)]
enum Act {
    Write(u64, u64),
    Take,
    Validate,
    Invalidate,
    /// Of one of the cuts that are valid.
    Permanent(usize),
    /// To the last permanent one, or one of those that are valid.
    RollBack(usize),
}

fn act() -> impl Strategy<Value = Act> {
    prop_oneof![
        8 => (0..PAGES, any::<u64>()).prop_map(|(page, value)| Act::Write(page, value)),
        4 => Just(Act::Take),
        4 => Just(Act::Validate),
        1 => Just(Act::Invalidate),
        2 => any::<usize>().prop_map(Act::Permanent),
        1 => any::<usize>().prop_map(Act::RollBack),
    ]
}

fn memory() -> GuestMemory {
    let high_pages = (PAGES - LOW_PAGES) << 12;
    let ranges = [(GuestAddress(0), LOW_PAGES << 12), (GuestAddress(HIGH), high_pages)];
    let ranges = ranges.map(|(start, bytes)| (start, usize::try_from(bytes).expect("few pages")));
    GuestMemory::from_ranges(&ranges).expect("memory")
}

fn address(page: u64) -> u64 {
    if page < LOW_PAGES {
        page << 12
    } else {
        HIGH + ((page - LOW_PAGES) << 12)
    }
}

fn content(image: &dyn PageSource) -> Content {
    let mut bytes = vec![0; usize::try_from(PAGES).expect("few pages") * PAGE_BYTES];
    image.read(0..PAGES, &mut bytes).expect("all pages are there");
    let numbers = bytes.chunks_exact(PAGE_BYTES);
    numbers
        .map(|page| u64::from_le_bytes(page[8..16].try_into().expect("eight bytes")))
        .collect()
}

/// A VM, whoever protects it, and its standby.
struct World {
    memory: GuestMemory,
    /// What the tracker would tell.
    dirty: BTreeSet<u64>,
    /// With each tentative cut the pages that go back to the tracker.
    cuts: Cuts<BTreeSet<u64>>,
    last: u64,
    /// Memory at each cut that was taken.
    reference: BTreeMap<u64, Content>,
    /// Cuts that are valid and not permanent.
    valid: Vec<u64>,
    /// What the standby has of the cuts that it has applied.
    standby: Content,
    /// What it keeps of others.
    held: BTreeMap<u64, BTreeMap<u64, u64>>,
}

impl World {
    fn new() -> Self {
        let shadow = memory();
        Self {
            memory: memory(),
            dirty: BTreeSet::new(),
            cuts: Cuts::new(Arc::new(MemoryImage::of(&shadow))),
            last: 0,
            reference: BTreeMap::new(),
            valid: Vec::new(),
            standby: vec![0; usize::try_from(PAGES).expect("few pages")],
            held: BTreeMap::new(),
        }
    }

    fn now(&self) -> Content {
        let image: Arc<dyn Image> = Arc::new(MemoryImage::of(&self.memory));
        content(&image)
    }

    fn act(&mut self, act: &Act) {
        match act {
            Act::Write(page, value) => {
                self.memory
                    .write_obj(*value, GuestAddress(address(*page) + 8))
                    .expect("RAM");
                self.dirty.insert(*page);
            }
            Act::Take => self.take(),
            Act::Validate if self.is_undecided() => self.validate(),
            Act::Invalidate => {
                // Whoever has seen that it is valid ignores that it is not.
                let put_back = self.cuts.invalidate(self.last);
                self.dirty.extend(put_back.unwrap_or_default());
            }
            Act::Permanent(which) if !self.valid.is_empty() => {
                self.make_permanent(self.valid[which % self.valid.len()])
            }
            Act::RollBack(which) => self.roll_back(*which),
            Act::Validate | Act::Permanent(_) => {}
        }
    }

    fn is_undecided(&self) -> bool {
        matches!(self.cuts.check_next(self.last + 1), Err(Refusal::CutUndecided(_)))
    }

    fn take(&mut self) {
        if self.cuts.check_next(self.last + 1).is_err() {
            return;
        }
        self.last += 1;
        let mut set = PageSet::empty(&Arc::new(Layout::of(&self.memory)));
        self.dirty
            .iter()
            .for_each(|page| set.insert_range(PageRange::page(address(*page))));
        let mut buffer = self.cuts.buffer();
        buffer.copy(&self.memory, &set).expect("RAM");
        self.cuts
            .push(self.last, buffer.seal(PAGES), std::mem::take(&mut self.dirty));
        self.reference.insert(self.last, self.now());
    }

    fn validate(&mut self) {
        // The pages are the cut's from here on.
        self.cuts.validate(self.last).expect("it is there").clear();
        let (pages, before, _) = self.cuts.to_ship(self.last).expect("it is valid");
        let previous = self.valid.last().copied().or(self.cuts.permanent());
        let nothing = vec![0; usize::try_from(PAGES).expect("few pages")];
        assert_eq!(
            &content(&before),
            previous.map_or(&nothing, |cut| &self.reference[&cut]),
            "what it is based on"
        );
        let held = pages.iter().map(|(page, bytes)| {
            let value = u64::from_le_bytes(bytes[8..16].try_into().expect("eight bytes"));
            (page, value)
        });
        self.held.insert(self.last, held.collect());
        self.valid.push(self.last);
    }

    fn make_permanent(&mut self, cut: u64) {
        self.cuts.make_permanent(cut).expect("it is valid");
        self.standby_applies(cut);
    }

    fn standby_applies(&mut self, cut: u64) {
        let later = self.held.split_off(&(cut + 1));
        for (page, value) in std::mem::replace(&mut self.held, later).into_values().flatten() {
            self.standby[usize::try_from(page).expect("few pages")] = value;
        }
        self.valid.retain(|valid| *valid > cut);
        assert_eq!(content(self.cuts.shadow()), self.reference[&cut], "the shadow");
        assert_eq!(self.standby, self.reference[&cut], "the standby");
    }

    fn roll_back(&mut self, which: usize) {
        let possible: Vec<u64> = self
            .cuts
            .permanent()
            .into_iter()
            .chain(self.valid.iter().copied())
            .collect();
        if possible.is_empty() {
            assert!(self.cuts.roll_back(self.last).is_err(), "there is no cut yet");
            return;
        }
        let cut = possible[which % possible.len()];
        let changed = self.cuts.roll_back(cut).expect("it is there").pages;
        let changed: BTreeSet<u64> = changed.iter().chain(std::mem::take(&mut self.dirty)).collect();
        self.standby_applies(cut);
        self.held.clear();
        self.valid.clear();
        let mut bytes = [0; PAGE_BYTES];
        for page in changed {
            self.cuts
                .shadow()
                .read(page..page + 1, &mut bytes)
                .expect("a page of it");
            self.memory
                .write_slice(&bytes, GuestAddress(address(page)))
                .expect("RAM");
        }
        assert_eq!(self.now(), self.reference[&cut], "memory after the way back");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]
    #[test]
    fn shadow_standby_and_the_way_back_are_what_memory_was_at_the_cut(acts in prop::collection::vec(act(), 1..120)) {
        let mut world = World::new();
        acts.iter().for_each(|act| world.act(act));
    }
}

#[test]
fn a_valid_cut_that_never_becomes_permanent_is_in_the_next_that_does() {
    let mut world = World::new();
    for act in [
        Act::Write(1, 1),
        Act::Take,
        Act::Validate,
        Act::Write(2, 2),
        Act::Invalidate,
        Act::Take,
        Act::Validate,
    ] {
        world.act(&act);
    }
    world.make_permanent(2);
    assert_eq!(world.cuts.lag(), 0);
}

#[test]
fn cuts_are_decided_one_after_the_other_and_are_bounded() {
    let mut world = World::new();
    world.act(&Act::Take);
    assert_eq!(world.cuts.check_next(2), Err(Refusal::CutUndecided(1)));
    world.act(&Act::Validate);
    assert_eq!(world.cuts.check_next(1), Err(Refusal::CutIsOver(1)));
    for _ in 1..CUTS_MAX {
        world.act(&Act::Take);
        world.act(&Act::Validate);
    }
    assert_eq!(world.cuts.check_next(world.last + 1), Err(Refusal::TooManyCuts));
}
