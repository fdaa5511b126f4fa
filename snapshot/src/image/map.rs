//! Where the newest version of each page is: the pages of all layers of a chain laid over each other.

/// Pages that follow each other, both in the image and where they are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Extent {
    /// Number of the first page.
    pub first: u64,
    /// How many.
    pub count: u64,
    /// Where the first one is; the others follow.
    pub place: Place,
}

/// Where a page is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// Nowhere: it is zero.
    Zero,
    /// In a chunk.
    Stored {
        /// Snapshot of the chain, the newest being 0.
        layer: u32,
        /// Chunk of that snapshot's file.
        chunk: u32,
        /// Position among the chunk's pages.
        slot: u32,
    },
}

/// The newest place of every page; one search however long the chain is.
#[derive(Debug, Default)]
pub(crate) struct PageMap {
    /// In order, without overlaps. Pages in gaps are zero.
    extents: Vec<Extent>,
}

impl Extent {
    /// Number of the page after the last.
    pub fn end(&self) -> u64 {
        self.first + self.count
    }

    /// The part of this extent from page `first` to before `end`, both within it.
    fn part(&self, first: u64, end: u64) -> Self {
        let place = match self.place {
            Place::Zero => Place::Zero,
            Place::Stored { layer, chunk, slot } => Place::Stored {
                layer,
                chunk,
                // Within a chunk, whose number of pages is small.
                slot: slot + u32::try_from(first - self.first).expect("a slot of a chunk"),
            },
        };
        Self {
            first,
            count: end - first,
            place,
        }
    }
}

impl PageMap {
    /// Puts the pages of an older layer (in order, without overlaps), as far as they are below `limit`, where no newer
    /// layer has any.
    pub fn put_below(&mut self, older: Vec<Extent>, limit: u64) {
        if self.extents.is_empty() && older.last().is_none_or(|last| last.end() <= limit) {
            self.extents = older;
            return;
        }
        let mut merged = Vec::with_capacity(self.extents.len() + older.len());
        let mut newer = self.extents.iter().copied().peekable();
        for extent in older {
            let end = extent.end().min(limit);
            let mut at = extent.first;
            while at < end {
                match newer.peek() {
                    Some(next) if next.first <= at => {
                        at = at.max(next.end());
                        // It may also cover pages of the next older extent.
                        if next.end() <= end {
                            merged.extend(newer.next());
                        } else {
                            break;
                        }
                    }
                    next => {
                        let gap_end = next.map_or(end, |next| next.first.min(end));
                        merged.push(extent.part(at, gap_end));
                        at = gap_end;
                    }
                }
            }
        }
        merged.extend(newer);
        self.extents = merged;
    }

    /// Where page `page` is, and how many pages follow there, itself included, before `end`.
    pub fn find(&self, page: u64, end: u64) -> (Place, u64) {
        let next = self.extents.partition_point(|extent| extent.end() <= page);
        match self.extents.get(next) {
            Some(extent) if extent.first <= page => {
                let rest = extent.part(page, extent.end());
                (rest.place, rest.count)
            }
            Some(extent) => (Place::Zero, extent.first - page),
            None => (Place::Zero, end - page),
        }
    }

    /// Pages that are stored.
    pub fn stored_pages(&self) -> u64 {
        let stored = |extent: &&Extent| extent.place != Place::Zero;
        self.extents.iter().filter(stored).map(|extent| extent.count).sum()
    }
}
