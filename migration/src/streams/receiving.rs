//! The destination's end of page streams.

use std::collections::VecDeque;
use std::io::{self, Read};
use std::iter;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use super::{OnThread, Others, all, end_together};
use crate::batch::{self, HEADER_BYTES, Header, Kind, PAYLOAD_BYTES_MAX, RECORD_BYTES, RECORDS_MAX};
use crate::codec::Decoder;
use crate::error::Error;
use crate::transport::{Connection, link_error};
use crate::vm::{ArrivingMemory, Image, ImageShape};

/// How long a batch may take from the one before it until it is here.
const BATCH_MAX: Duration = Duration::from_secs(60);

/// The destination's end of all streams.
pub struct Incoming {
    images: Vec<(String, Arc<dyn Image>)>,
    lanes: Vec<Lane>,
    others: Others,
    on_thread: OnThread,
}

/// A batch that is kept, verified to its last byte, and not in place yet.
pub struct HeldBatch {
    header: Header,
    rest: Vec<u8>,
}

impl HeldBatch {
    /// Bytes of memory that it takes.
    pub fn bytes(&self) -> u64 {
        (size_of::<Self>() + self.rest.len()) as u64
    }
}

/// One stream: its decoder, and memory that is used again for each batch.
struct Lane {
    decoder: Decoder,
    rest: Vec<u8>,
    sequence: u64,
}

impl Incoming {
    /// Streams for `images`, which are called as in `shapes`: one, and those that are attached.
    pub fn new(images: Vec<Arc<dyn Image>>, shapes: &[ImageShape], on_thread: OnThread) -> Self {
        let names = shapes.iter().map(|shape| shape.name.clone());
        Self {
            images: names.zip(images).collect(),
            lanes: vec![Lane::new()],
            others: Others::new(),
            on_thread,
        }
    }

    /// The next stream goes over `connection`.
    pub fn attach(&mut self, connection: Connection) {
        self.lanes.push(Lane::new());
        self.others.push(connection);
    }

    /// From here on pages of the first image go to `memory`, whose guest runs.
    pub fn arrive_in(&mut self, memory: &Arc<dyn ArrivingMemory>) {
        if let Some((_, image)) = self.images.first_mut() {
            *image = Arc::new(Arrival {
                pages: image.pages(),
                memory: Arc::clone(memory),
            });
        }
    }

    /// Puts the pages of the next batch on `stream` in place, which is stream 0; answers whether there was one.
    ///
    /// # Errors
    /// As of [`receive_round`](Self::receive_round).
    pub fn receive_batch(&mut self, stream: &mut Connection, number: u32) -> Result<bool, Error> {
        let lane = self.lanes.first_mut().expect("there is at least one stream");
        lane.receive_batch(stream, number, &self.images)
            .map(|kind| kind == Kind::Pages)
    }

    /// The next batch on `stream`, which is stream 0, and the only one; none at the end of round `number`. Nothing is in
    /// place yet.
    ///
    /// # Errors
    /// As of [`receive_round`](Self::receive_round): what is returned can be [put](Self::put) in place, unless that fails
    /// of an image.
    pub fn hold_batch(&mut self, stream: &mut Connection, number: u32) -> Result<Option<HeldBatch>, Error> {
        let Lane {
            decoder,
            rest,
            sequence,
        } = self.lanes.first_mut().expect("there is at least one stream");
        let (header, rest) = next_batch(stream, number, sequence, rest)?;
        if header.kind == Kind::RoundEnd {
            return Ok(None);
        }
        let (name, image) = image_of(&header, &self.images)?;
        let nowhere = Nowhere(image.pages());
        for (record, bytes) in batch::records(&header, rest)? {
            decoder.apply(name, &nowhere, &record, bytes)?;
        }
        Ok(Some(HeldBatch {
            header,
            rest: rest.to_vec(),
        }))
    }

    /// Puts the pages of `batch` in place, after all that came before it.
    ///
    /// # Errors
    /// An image fails.
    pub fn put(&mut self, batch: &HeldBatch) -> Result<(), Error> {
        let lane = self.lanes.first_mut().expect("there is at least one stream");
        put(&mut lane.decoder, &batch.header, &batch.rest, &self.images)
    }

    /// Puts the pages of round `number` in place; `link` is stream 0. While the guest runs, each stream has a thread for it;
    /// in the `last` round they take turns, for few pages are left, and the guest waits for threads to be made.
    ///
    /// # Errors
    /// A stream broke, or what came is not what was sent, or not pages of these images.
    pub fn receive_round(&mut self, link: &mut Connection, number: u32, last: bool) -> Result<(), Error> {
        let Self {
            images,
            lanes,
            others,
            on_thread,
        } = self;
        let (first, rest) = lanes.split_first_mut().expect("there is at least one stream");
        let (images, broken, on_thread): (&[_], &AtomicBool, &OnThread) = (images, &others.broken, on_thread);
        if last {
            let others = rest.iter_mut().zip(&mut others.connections);
            return receive_in_turn(iter::once((first, link)).chain(others), number, images);
        }
        thread::scope(|scope| {
            let mut outcomes = Vec::new();
            let mut threads = Vec::new();
            for (index, (lane, connection)) in rest.iter_mut().zip(&mut others.connections).enumerate() {
                let body = move || {
                    on_thread();
                    end_together(lane.receive(connection, number, images, broken), broken)
                };
                let name = format!("migration-{}", index + 1);
                match thread::Builder::new().name(name).spawn_scoped(scope, body) {
                    Ok(thread) => threads.push(thread),
                    Err(error) => outcomes.push(end_together(Err(Error::Thread(error)), broken)),
                }
            }
            outcomes.push(end_together(first.receive(link, number, images, broken), broken));
            let joined = threads.into_iter().map(|thread| {
                let outcome = thread.join();
                outcome.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            });
            outcomes.extend(joined);
            all(outcomes).map(|_| ())
        })
    }
}

impl Lane {
    fn new() -> Self {
        Self {
            decoder: Decoder::default(),
            rest: vec![0; RECORDS_MAX * RECORD_BYTES + PAYLOAD_BYTES_MAX],
            sequence: 0,
        }
    }

    /// Puts the pages of this stream in place until it says that there are no more.
    fn receive(
        &mut self,
        from: &mut Connection,
        round: u32,
        images: &[(String, Arc<dyn Image>)],
        broken: &AtomicBool,
    ) -> Result<(), Error> {
        while self.receive_batch(from, round, images)? == Kind::Pages {
            if broken.load(Ordering::Relaxed) {
                return Err(Error::Cancelled);
            }
        }
        Ok(())
    }

    fn receive_batch(
        &mut self,
        from: &mut Connection,
        round: u32,
        images: &[(String, Arc<dyn Image>)],
    ) -> Result<Kind, Error> {
        let Self {
            decoder,
            rest,
            sequence,
        } = self;
        let (header, rest) = next_batch(from, round, sequence, rest)?;
        if header.kind == Kind::Pages {
            put(decoder, &header, rest, images)?;
        }
        Ok(header.kind)
    }
}

/// What every batch is, wherever its pages go: the next one of round `round` from `from`, read to `room`. It is what was
/// sent, and the one that has to come next.
fn next_batch<'a>(
    from: &mut Connection,
    round: u32,
    sequence: &mut u64,
    room: &'a mut [u8],
) -> Result<(Header, &'a [u8]), Error> {
    from.steadily_within(BATCH_MAX);
    let failed = || link_error("receive pages", "a batch of pages");
    let mut wire = [0; HEADER_BYTES];
    from.read_exact(&mut wire).map_err(failed())?;
    let header = Header::from_wire(&wire)?;
    let rest = &mut room[..header.rest_bytes()];
    from.read_exact(rest).map_err(failed())?;
    batch::verify(&header, rest)?;
    check(&header, round, *sequence)?;
    *sequence += 1;
    Ok((header, rest))
}

/// Puts the pages of a batch in place.
fn put(decoder: &mut Decoder, header: &Header, rest: &[u8], images: &[(String, Arc<dyn Image>)]) -> Result<(), Error> {
    let (name, image) = image_of(header, images)?;
    for (record, bytes) in batch::records(header, rest)? {
        decoder.apply(name, image.as_ref(), &record, bytes)?;
    }
    Ok(())
}

/// Whose pages these are.
fn image_of<'a>(
    header: &Header,
    images: &'a [(String, Arc<dyn Image>)],
) -> Result<&'a (String, Arc<dyn Image>), Error> {
    let image = images.get(usize::from(header.image));
    image.ok_or_else(|| invalid(format!("it is of image {} of {}", header.image, images.len())))
}

/// An image of so many pages, for what is only to be verified.
struct Nowhere(u64);

impl Image for Nowhere {
    fn pages(&self) -> u64 {
        self.0
    }

    fn read(&self, _: Range<u64>, into: &mut [u8]) -> io::Result<()> {
        // A delta is well-formed or not, whatever it is applied to.
        into.fill(0);
        Ok(())
    }

    fn write(&self, _: Range<u64>, _: &[u8]) -> io::Result<()> {
        Ok(())
    }

    fn zero(&self, _: Range<u64>) -> io::Result<()> {
        Ok(())
    }

    fn starts_empty(&self) -> bool {
        true
    }

    fn settle(&self) -> io::Result<()> {
        Ok(())
    }
}

/// Puts the pages of all `lanes` in place, in turn a batch of each that has more: were one not read until others have
/// ended, its sender would take this side for silent.
fn receive_in_turn<'l>(
    lanes: impl Iterator<Item = (&'l mut Lane, &'l mut Connection)>,
    round: u32,
    images: &[(String, Arc<dyn Image>)],
) -> Result<(), Error> {
    let mut lanes: VecDeque<_> = lanes.collect();
    while let Some((lane, connection)) = lanes.pop_front() {
        if lane.receive_batch(connection, round, images)? == Kind::Pages {
            lanes.push_back((lane, connection));
        }
    }
    Ok(())
}

/// Memory that arrives while the guest runs, as an image of `pages`.
struct Arrival {
    pages: u64,
    memory: Arc<dyn ArrivingMemory>,
}

impl Image for Arrival {
    fn pages(&self) -> u64 {
        self.pages
    }

    fn read(&self, _: Range<u64>, _: &mut [u8]) -> io::Result<()> {
        // Only a delta reads, and there is none to a page that is missing.
        Err(io::ErrorKind::Unsupported.into())
    }

    fn write(&self, pages: Range<u64>, content: &[u8]) -> io::Result<()> {
        self.memory.arrive(pages, content)
    }

    fn zero(&self, pages: Range<u64>) -> io::Result<()> {
        self.memory.arrive_zero(pages)
    }

    fn starts_empty(&self) -> bool {
        true
    }

    /// Memory does not last.
    fn settle(&self) -> io::Result<()> {
        Ok(())
    }
}

/// Whether the batch is the one that has to come next.
fn check(header: &Header, round: u32, sequence: u64) -> Result<(), Error> {
    if header.round != round {
        return Err(invalid(format!("it is of round {} in round {round}", header.round)));
    }
    if header.sequence != sequence {
        return Err(invalid(format!(
            "it is number {} where {sequence} was next",
            header.sequence
        )));
    }
    Ok(())
}

fn invalid(reason: String) -> Error {
    Error::Invalid {
        what: "a batch of pages",
        reason,
    }
}
