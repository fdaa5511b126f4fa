//! The cuts of a VM that somebody may yet go back to or rely on, and its memory as it was at the last permanent one.
//!
//! ```text
//!              take            validate            permanent
//!  (nothing) ───────► tentative ───────► valid ─────────────────► the shadow has it
//!                        │                 │
//!                        └── invalidate    └── stays until a later one is permanent: then both are, in order
//!                            (the next cut covers it)
//! ```
//! The shadow is what a way back needs, and, with the valid cuts over it, what a standby has: pages are shipped as what
//! differs from that. Knows no KVM: pages come copied, and with each cut the rest of what it has, of any type.

use std::collections::VecDeque;
use std::io;
use std::ops::Range;
use std::sync::Arc;

use cutover_migration::epoch::PageSource;
use cutover_migration::pages::{PAGE_BYTES, PageBits};
use cutover_migration::vm::Image;

use super::pages::{CutPages, PageBuffer};
use crate::Error;
use crate::lifecycle::Refusal;

/// Most cuts that are valid and not yet permanent. More come together only if every one of them fails elsewhere.
pub const CUTS_MAX: usize = 8;

/// See the module. A cut has its pages, and an `R`.
pub struct Cuts<R> {
    shadow: Arc<dyn Image>,
    /// Oldest first; only the last may be tentative.
    pending: VecDeque<Cut<R>>,
    /// The last permanent one, and what it has but pages.
    permanent: Option<(u64, R)>,
    /// Room of a cut that is over.
    spare: Option<PageBuffer>,
}

struct Cut<R> {
    number: u64,
    valid: bool,
    pages: Arc<CutPages>,
    rest: R,
}

/// What a way back takes.
pub struct WayBack<'a, R> {
    /// Pages that changed since, as far as they are in later cuts.
    pub pages: PageBits,
    /// What the cut has but pages.
    pub rest: &'a R,
}

impl<R> Cuts<R> {
    /// Of a VM whose memory the standby has as it is in `shadow`.
    pub fn new(shadow: Arc<dyn Image>) -> Self {
        Self {
            shadow,
            pending: VecDeque::new(),
            permanent: None,
            spare: None,
        }
    }

    /// Memory as it was at the last permanent cut; before the first, as it was sent.
    pub fn shadow(&self) -> &Arc<dyn Image> {
        &self.shadow
    }

    /// The number of the last permanent cut.
    pub fn permanent(&self) -> Option<u64> {
        self.permanent.as_ref().map(|(number, _)| *number)
    }

    /// How many cuts are not permanent yet.
    pub fn lag(&self) -> usize {
        self.pending.len()
    }

    /// A buffer for the pages of the next cut, from before if there is one.
    pub fn buffer(&mut self) -> PageBuffer {
        self.spare.take().unwrap_or_default()
    }

    /// Whether cut `number` may be taken next.
    ///
    /// # Errors
    /// Not before it was decided on the last, or there was one with a higher number, or there are too many.
    pub fn check_next(&self, number: u64) -> Result<(), Refusal> {
        let last = self.pending.back();
        if let Some(undecided) = last.filter(|cut| !cut.valid) {
            return Err(Refusal::CutUndecided(undecided.number));
        }
        let newest = last.map(|cut| cut.number).max(self.permanent());
        if newest.is_some_and(|newest| number <= newest) {
            return Err(Refusal::CutIsOver(number));
        }
        if self.pending.len() == CUTS_MAX {
            return Err(Refusal::TooManyCuts);
        }
        Ok(())
    }

    /// Adds a tentative cut, which [may be](Self::check_next) next.
    pub fn push(&mut self, number: u64, pages: CutPages, rest: R) {
        self.pending.push_back(Cut {
            number,
            valid: false,
            pages: Arc::new(pages),
            rest,
        });
    }

    /// Cut `number` was taken by all. Returns what it has but pages.
    ///
    /// # Errors
    /// There is none.
    pub fn validate(&mut self, number: u64) -> Result<&mut R, Error> {
        let cut = self.pending.iter_mut().find(|cut| cut.number == number);
        let cut = cut.ok_or(Error::NoSuchCut { cut: number })?;
        cut.valid = true;
        Ok(&mut cut.rest)
    }

    /// Cut `number` was not taken by all: if it is tentative, there is none. Returns what it had but pages, which have
    /// changed since the cut before and are to be in the next one.
    pub fn invalidate(&mut self, number: u64) -> Option<R> {
        let tentative = |cut: &Cut<R>| cut.number == number && !cut.valid;
        self.pending.back().filter(|cut| tentative(cut))?;
        let cut = self.pending.pop_back()?;
        self.recycle(cut.pages);
        Some(cut.rest)
    }

    /// What a standby needs of cut `number`, which is valid: its pages, what they are based on, and the rest.
    ///
    /// # Errors
    /// There is none.
    pub fn to_ship(&self, number: u64) -> Result<(Arc<CutPages>, Before, &R), Error> {
        let position = self.pending.iter().position(|cut| cut.number == number && cut.valid);
        let position = position.ok_or(Error::NoSuchCut { cut: number })?;
        let cut = &self.pending[position];
        let before = Before {
            cuts: self
                .pending
                .range(..position)
                .rev()
                .map(|cut| cut.pages.clone())
                .collect(),
            shadow: self.shadow.clone(),
        };
        Ok((cut.pages.clone(), before, &cut.rest))
    }

    /// What the cut has but pages that has `pages`, if it is still wanted.
    pub fn wanted(&mut self, pages: &Arc<CutPages>) -> Option<&mut R> {
        let cut = self.pending.iter_mut().find(|cut| Arc::ptr_eq(&cut.pages, pages));
        cut.map(|cut| &mut cut.rest)
    }

    /// Whether cut `number` may become permanent.
    ///
    /// # Errors
    /// There is no such cut that is valid.
    pub fn check_valid(&self, number: u64) -> Result<(), Error> {
        let found = self.pending.iter().any(|cut| cut.number == number && cut.valid);
        found.then_some(()).ok_or(Error::NoSuchCut { cut: number })
    }

    /// All go back to cut `number` from here on, if to any. Brings the shadow there, cut by cut.
    ///
    /// # Errors
    /// There is no such cut that is valid, nor a later one that is permanent, or the shadow cannot be written.
    pub fn make_permanent(&mut self, number: u64) -> Result<(), Error> {
        if self.permanent() >= Some(number) {
            return Ok(());
        }
        self.check_valid(number)?;
        while self.pending.front().is_some_and(|cut| cut.number <= number)
            && let Some(cut) = self.pending.pop_front()
        {
            for (page, content) in cut.pages.iter() {
                let written = self.shadow.write(page..page + 1, content);
                written.map_err(Error::os("write the memory of the last cut"))?;
            }
            self.permanent = Some((cut.number, cut.rest));
            self.recycle(cut.pages);
        }
        Ok(())
    }

    /// Goes back to cut `number`: there is none after it.
    ///
    /// # Errors
    /// It is not permanent and cannot be, or is not the last one that is.
    pub fn roll_back(&mut self, number: u64) -> Result<WayBack<'_, R>, Error> {
        self.make_permanent(number)?;
        let permanent = self.permanent.as_ref().filter(|(permanent, _)| *permanent == number);
        let (_, rest) = permanent.ok_or(Error::NoSuchCut { cut: number })?;
        let mut pages = PageBits::empty(self.shadow.pages());
        self.pending.iter().for_each(|cut| pages.union(cut.pages.numbers()));
        self.pending.clear();
        Ok(WayBack { pages, rest })
    }

    fn recycle(&mut self, pages: Arc<CutPages>) {
        if let Some(pages) = Arc::into_inner(pages) {
            self.spare = Some(pages.into_buffer());
        }
    }
}

/// Memory as it was before a cut: as the standby has it that holds all cuts before.
pub struct Before {
    /// Newest first.
    cuts: Vec<Arc<CutPages>>,
    shadow: Arc<dyn Image>,
}

impl PageSource for Before {
    fn read(&self, pages: Range<u64>, into: &mut [u8]) -> io::Result<()> {
        for_each_page(pages, into, |page, into| {
            match self.cuts.iter().find_map(|cut| cut.get(page)) {
                Some(content) => into.copy_from_slice(content),
                None => self.shadow.read(page..page + 1, into)?,
            }
            Ok(())
        })
    }
}

impl PageSource for CutPages {
    fn read(&self, pages: Range<u64>, into: &mut [u8]) -> io::Result<()> {
        for_each_page(pages, into, |page, into| {
            into.copy_from_slice(self.get(page).ok_or(io::ErrorKind::NotFound)?);
            Ok(())
        })
    }
}

fn for_each_page(
    pages: Range<u64>,
    into: &mut [u8],
    mut read: impl FnMut(u64, &mut [u8]) -> io::Result<()>,
) -> io::Result<()> {
    let mut places = into.chunks_exact_mut(PAGE_BYTES);
    pages.zip(&mut places).try_for_each(|(page, into)| read(page, into))
}

#[cfg(test)]
mod tests;
