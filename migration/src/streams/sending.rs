//! The source's end of page streams.

use std::io::{self, IoSlice, Write};
use std::ops::{AddAssign, Range};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use super::{OnThread, Others, all, end_together};
use crate::batch::{BATCH_PAGES, Batch, HEADER_BYTES, Header, Kind, RECORD_BYTES, checksum};
use crate::codec::{Encoder, stream_of};
use crate::error::Error;
use crate::limit::Limit;
use crate::options::Options;
use crate::pages::{PAGE_BYTES, PageBits, WORD_PAGES, runs, set_words};
use crate::report::PageCounts;
use crate::status::Status;
use crate::transport::{Connection, link_error};
use crate::vm::{Image, ImageShape};

/// How long a batch may take to be sent.
const BATCH_MAX: Duration = Duration::from_secs(60);
/// So many batches a second at least, each so much smaller, where there is a limit: what is sent at once is not smooth.
const BATCHES_PER_SECOND: u64 = 10;

/// The source's end of all streams.
pub struct Outgoing {
    names: Arc<[String]>,
    images: Arc<[Arc<dyn Image>]>,
    lanes: Vec<Lane>,
    others: Others,
    limit: Limit,
    on_thread: OnThread,
}

/// What was sent.
#[derive(Clone, Copy, Debug, Default)]
pub struct Sent {
    /// Pages, by what was sent of them.
    pub pages: PageCounts,
    /// Bytes on the wire.
    pub wire_bytes: u64,
    /// How long the streams worked for it, each of them, without what they waited for the limit.
    pub busy: Duration,
}

/// Pages that can be read by their numbers.
pub trait PageSource: Send + Sync {
    /// Copies `pages` to `into`, which is as long as they are.
    ///
    /// # Errors
    /// Some of them are not there, or could not be read.
    fn read(&self, pages: Range<u64>, into: &mut [u8]) -> io::Result<()>;
}

/// An image as it is now.
impl PageSource for Arc<dyn Image> {
    fn read(&self, pages: Range<u64>, into: &mut [u8]) -> io::Result<()> {
        self.as_ref().read(pages, into)
    }
}

/// Pages to be sent of an image.
#[derive(Clone, Copy)]
pub struct Pages<'a> {
    /// Which image.
    pub image: usize,
    /// Which pages.
    pub set: &'a PageBits,
    /// Where they are read.
    pub content: &'a dyn PageSource,
    /// What the destination has of them, if that is known.
    pub base: Option<&'a dyn PageSource>,
}

/// What is the same for all streams in a round.
struct Round<'a> {
    number: u32,
    names: &'a [String],
    pages: &'a [Pages<'a>],
    streams: u64,
    limit: &'a Limit,
    batch_pages: usize,
    status: &'a Status,
    /// Whether another stream has failed.
    broken: &'a AtomicBool,
}

/// One stream: its encoder, and memory that is used again for each batch.
struct Lane {
    index: u64,
    encoder: Encoder,
    batch: Batch,
    content: Vec<u8>,
    /// What the destination has of these; made when that is known first.
    old: Vec<u8>,
    table: Vec<u8>,
    sequence: u64,
}

impl Outgoing {
    /// Streams for `images`, which are called as in `shapes`; of the streams from 1 on the connections are yet to come.
    /// Where it is said each time [what to send](Self::send_pages), there need be no images.
    pub fn new(images: Vec<Arc<dyn Image>>, shapes: &[ImageShape], options: &Options, on_thread: OnThread) -> Self {
        let sizes: Vec<u64> = shapes.iter().map(|shape| shape.pages).collect();
        let streams = u64::from(options.streams.max(1));
        Self {
            names: shapes.iter().map(|shape| shape.name.clone()).collect(),
            images: images.into(),
            lanes: (0..streams)
                .map(|index| Lane {
                    index,
                    encoder: Encoder::new(&sizes, streams, options.compression),
                    batch: Batch::default(),
                    content: vec![0; BATCH_PAGES * PAGE_BYTES],
                    old: Vec::new(),
                    table: Vec::new(),
                    sequence: 0,
                })
                .collect(),
            others: Others::new(),
            limit: Limit::new(options.bandwidth),
            on_thread,
        }
    }

    /// The next stream goes over `connection`.
    pub fn attach(&mut self, connection: Connection) {
        self.others.push(connection);
    }

    /// The most bytes that may be sent in each second, if there is a limit.
    pub fn bytes_per_second(&self) -> Option<u64> {
        self.limit.bytes_per_second()
    }

    /// Pages to be sent at once on stream 0 alone, so that under the limit something always moves.
    pub fn pages_at_once(&self) -> u64 {
        batch_pages(self.bytes_per_second(), 1) as u64
    }

    /// Bytes that went over the streams from 1 on.
    pub fn bytes_moved(&self) -> u64 {
        self.others.connections.iter().map(Connection::bytes_moved).sum()
    }

    /// From here on everything is sent as fast as it can be.
    pub fn lift_limit(&self) {
        self.limit.lift();
    }

    /// From here on pages of the destination are not what was sent of them last: each is sent whole.
    pub fn stop_deltas(&mut self) {
        self.lanes.iter_mut().for_each(|lane| lane.encoder.stop_deltas());
    }

    /// Pages of the destination are not what was sent of them: each is sent whole once more.
    pub fn forget(&mut self) {
        self.lanes.iter_mut().for_each(|lane| lane.encoder.forget());
    }

    /// What the limit was at first holds again.
    pub fn limit_again(&mut self, options: &Options) {
        self.limit = Limit::new(options.bandwidth);
    }

    /// Sends the pages of `ranges`, no more than a batch has, of the first image on `stream`, which is stream 0: as they
    /// are now, in an order of the caller's.
    ///
    /// # Errors
    /// A page could not be read or sent.
    pub fn send_ranges(
        &mut self,
        stream: &mut Connection,
        number: u32,
        ranges: &[Range<u64>],
        status: &Status,
    ) -> Result<Sent, Error> {
        let images = self.images.clone();
        let memory = Pages {
            image: 0,
            set: &PageBits::empty(0),
            content: &images[0],
            base: None,
        };
        let (round, lane) = self.round(number, status);
        lane.send_batch(stream, &round, &memory, ranges)
    }

    /// Says on `stream`, which is stream 0, that no more pages of round `number` come.
    ///
    /// # Errors
    /// The stream broke.
    pub fn end_round(&mut self, stream: &mut Connection, number: u32, status: &Status) -> Result<Sent, Error> {
        let (round, lane) = self.round(number, status);
        lane.end_round(stream, &round)
    }

    /// A round of stream 0 alone, whose pages the caller chooses.
    fn round<'a>(&'a mut self, number: u32, status: &'a Status) -> (Round<'a>, &'a mut Lane) {
        let round = Round {
            number,
            names: &self.names,
            pages: &[],
            streams: 1,
            limit: &self.limit,
            batch_pages: batch_pages(self.limit.bytes_per_second(), 1),
            status,
            broken: &self.others.broken,
        };
        (round, self.lanes.first_mut().expect("there is at least one stream"))
    }

    /// Sends the pages of `sets`, one for each image, as round `number`; `link` is stream 0.
    ///
    /// # Errors
    /// A page could not be read or sent, or the migration was cancelled.
    pub fn send_round(
        &mut self,
        link: &mut Connection,
        number: u32,
        sets: &[PageBits],
        status: &Status,
    ) -> Result<Sent, Error> {
        let images = self.images.clone();
        let pages = images.iter().zip(sets).enumerate();
        let pages: Vec<_> = pages
            .map(|(image, (content, set))| Pages {
                image,
                set,
                content,
                base: None,
            })
            .collect();
        self.send_pages(link, number, &pages, status)
    }

    /// Sends `pages` as round `number`; `link` is stream 0.
    ///
    /// # Errors
    /// As of [`send_round`](Self::send_round).
    pub fn send_pages(
        &mut self,
        link: &mut Connection,
        number: u32,
        pages: &[Pages<'_>],
        status: &Status,
    ) -> Result<Sent, Error> {
        let Self {
            names,
            images: _,
            lanes,
            others,
            limit,
            on_thread,
        } = self;
        let streams = lanes.len() as u64;
        let bandwidth = limit.bytes_per_second();
        for lane in lanes.iter_mut() {
            lane.encoder.begin_round(number, bandwidth.map(|bytes| bytes / streams));
        }
        let round = Round {
            number,
            names,
            pages,
            streams,
            limit,
            batch_pages: batch_pages(bandwidth, streams),
            status,
            broken: &others.broken,
        };
        let (first, rest) = lanes.split_first_mut().expect("there is at least one stream");
        let connections = rest.iter_mut().zip(&mut others.connections);
        let sent = round.send_on_all(first, link, connections, on_thread)?;
        let mut all = Sent::default();
        sent.into_iter().for_each(|one| all += one);
        // They worked at the same time.
        all.busy /= u32::try_from(streams).expect("a few");
        Ok(all)
    }
}

/// Pages of a batch if so many bytes a second may be sent on so many streams.
fn batch_pages(bandwidth: Option<u64>, streams: u64) -> usize {
    let pages = bandwidth.map(|bytes| bytes / streams / BATCHES_PER_SECOND / PAGE_BYTES as u64);
    let pages = pages.and_then(|pages| usize::try_from(pages).ok());
    pages.unwrap_or(BATCH_PAGES).clamp(1, BATCH_PAGES)
}

impl Round<'_> {
    /// Sends on each stream what is its own, each on its thread if there is anything for it.
    fn send_on_all<'l>(
        &self,
        first: &mut Lane,
        link: &mut Connection,
        rest: impl Iterator<Item = (&'l mut Lane, &'l mut Connection)>,
        on_thread: &OnThread,
    ) -> Result<Vec<Sent>, Error> {
        let broken = self.broken;
        thread::scope(|scope| {
            let mut outcomes = Vec::new();
            let mut threads = Vec::new();
            for (lane, connection) in rest {
                let nothing = |pages: &Pages<'_>| self.ranges(pages.set, lane.index).next().is_none();
                if self.pages.iter().all(nothing) {
                    outcomes.push(end_together(lane.end_round(connection, self), broken));
                    continue;
                }
                let body = move || {
                    on_thread();
                    end_together(lane.send(connection, self), broken)
                };
                let name = format!("migration-{}", threads.len() + 1);
                match thread::Builder::new().name(name).spawn_scoped(scope, body) {
                    Ok(thread) => threads.push(thread),
                    Err(error) => outcomes.push(end_together(Err(Error::Thread(error)), broken)),
                }
            }
            outcomes.push(end_together(first.send(link, self), broken));
            let joined = threads.into_iter().map(|thread| {
                let outcome = thread.join();
                outcome.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            });
            outcomes.extend(joined);
            all(outcomes)
        })
    }

    /// Those pages of `set` that go over this stream.
    fn ranges(&self, set: &PageBits, stream: u64) -> impl Iterator<Item = Range<u64>> {
        let words = set_words(set.words()).map(|(word, bits)| (word as u64 * WORD_PAGES, bits));
        let own = words.filter(move |&(first, _)| stream_of(first, self.streams) == stream);
        own.flat_map(|(first, bits)| {
            runs(bits).map(move |(start, length)| {
                let start = first + u64::from(start);
                start..start + u64::from(length)
            })
        })
    }
}

impl Lane {
    /// Sends the pages of a round that are this stream's own.
    fn send(&mut self, to: &mut Connection, round: &Round<'_>) -> Result<Sent, Error> {
        let mut sent = Sent::default();
        for of in round.pages {
            let mut ranges = Vec::new();
            let mut pages = 0;
            for mut range in round.ranges(of.set, self.index) {
                if round.status.is_cancelled() || round.broken.load(Ordering::Relaxed) {
                    return Err(Error::Cancelled);
                }
                while !range.is_empty() {
                    let taken = take(&mut range, round.batch_pages - pages);
                    pages += count(&taken);
                    ranges.push(taken);
                    if pages == round.batch_pages {
                        sent += self.send_batch(to, round, of, &ranges)?;
                        ranges.clear();
                        pages = 0;
                    }
                }
            }
            if !ranges.is_empty() {
                sent += self.send_batch(to, round, of, &ranges)?;
            }
        }
        sent += self.end_round(to, round)?;
        Ok(sent)
    }

    /// Sends the pages of `ranges`, which are no more than a batch has.
    fn send_batch(
        &mut self,
        to: &mut Connection,
        round: &Round<'_>,
        of: &Pages<'_>,
        ranges: &[Range<u64>],
    ) -> Result<Sent, Error> {
        let began = Instant::now();
        let (image, name) = (of.image, &round.names[of.image]);
        let bytes = read(name, of.content, ranges, &mut self.content)?;
        let old = match of.base {
            Some(base) => {
                self.old.resize(BATCH_PAGES * PAGE_BYTES, 0);
                read(name, base, ranges, &mut self.old)?;
                Some(&self.old[..bytes])
            }
            None => None,
        };
        self.batch.clear();
        let content = &self.content[..bytes];
        let pages = self
            .encoder
            .encode_against(old, image, ranges, content, &mut self.batch);
        let encoded = began.elapsed();
        let mut sent = Sent {
            pages,
            wire_bytes: 0,
            busy: encoded,
        };
        if !self.batch.records.is_empty() {
            round.limit.wait(self.batch_bytes());
            let began = Instant::now();
            sent.wire_bytes = self.write(to, round.number, Kind::Pages, image, bytes)?;
            let took = began.elapsed();
            self.encoder.sent(sent.wire_bytes, took);
            sent.busy += took;
        }
        round.status.update(|progress| {
            progress.pages_sent += pages.total();
            progress.pages_left = progress.pages_left.saturating_sub(pages.total());
            progress.bytes_sent += sent.wire_bytes;
        });
        Ok(sent)
    }

    fn end_round(&mut self, to: &mut Connection, round: &Round<'_>) -> Result<Sent, Error> {
        self.batch.clear();
        Ok(Sent {
            wire_bytes: self.write(to, round.number, Kind::RoundEnd, 0, 0)?,
            ..Sent::default()
        })
    }

    fn batch_bytes(&self) -> u64 {
        let payload: u64 = self.batch.records.iter().map(|record| u64::from(record.bytes)).sum();
        payload + (self.batch.records.len() * RECORD_BYTES + HEADER_BYTES) as u64
    }

    /// Writes the batch, of whose pages the first `bytes` of the content are what was read. Returns its length.
    fn write(&mut self, to: &mut Connection, round: u32, kind: Kind, image: usize, bytes: usize) -> Result<u64, Error> {
        self.batch.records_to_wire(&mut self.table);
        let mut pieces = vec![IoSlice::new(&[]), IoSlice::new(&self.table)];
        pieces.extend(self.batch.payload(&self.content[..bytes]).map(IoSlice::new));
        let payload: usize = pieces[2..].iter().map(|piece| piece.len()).sum();
        let header = Header {
            kind,
            image: u8::try_from(image).expect("a VM has fewer than 256 disks"),
            records: u16::try_from(self.batch.records.len()).expect("a batch has few records"),
            round,
            payload: u32::try_from(payload).expect("a batch has few pages"),
            sequence: self.sequence,
            checksum: checksum(&pieces[1..]),
        };
        let header = header.to_wire();
        pieces[0] = IoSlice::new(&header);
        let total: usize = pieces.iter().map(|piece| piece.len()).sum();
        self.sequence += 1;
        to.steadily_within(BATCH_MAX);
        to.write_all_pieces(&mut pieces)
            .and_then(|()| to.flush())
            .map_err(link_error("send pages", "that pages are taken"))?;
        Ok(total as u64)
    }
}

impl AddAssign for Sent {
    fn add_assign(&mut self, more: Self) {
        self.pages += more.pages;
        self.wire_bytes += more.wire_bytes;
        self.busy += more.busy;
    }
}

/// Copies the pages of `ranges`, of the image called `name`, to the beginning of `to`: while they are looked at and sent
/// they must not change. Returns their bytes.
fn read(name: &str, from: &dyn PageSource, ranges: &[Range<u64>], to: &mut [u8]) -> Result<usize, Error> {
    let mut end = 0;
    for range in ranges {
        let start = end;
        end += count(range) * PAGE_BYTES;
        from.read(range.clone(), &mut to[start..end])
            .map_err(|source| Error::Pages {
                action: "read",
                image: name.to_owned(),
                first: range.start,
                last: range.end - 1,
                source,
            })?;
    }
    Ok(end)
}

/// Takes at most `most` pages from the beginning of `range`.
fn take(range: &mut Range<u64>, most: usize) -> Range<u64> {
    let end = range.end.min(range.start + most as u64);
    let taken = range.start..end;
    range.start = end;
    taken
}

fn count(range: &Range<u64>) -> usize {
    usize::try_from(range.end - range.start).expect("a batch has few pages")
}
