//! The link that messages go over, and what to do when it ends.

use std::io::{Read, Write};
use std::marker::PhantomData;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use crate::error::Error;
use crate::message::{Message, ToDestination, ToSource};
use crate::streams::OnThread;
use crate::transport::{Connection, link_error};
use crate::wire;

/// How long a message may take to be sent.
const SEND_MAX: Duration = Duration::from_secs(10);
/// How long the peer has to hear why this side gives up, and to end the link.
const PART_MAX: Duration = Duration::from_secs(1);
/// Most bytes that are read and thrown away meanwhile.
const PART_BYTES_MAX: u64 = 64 << 20;
/// How often the destination says that it works, where that may take long.
const ALIVE_EVERY: Duration = Duration::from_secs(2);

/// A link on which `Out` is sent and `In` received.
#[derive(Debug)]
pub struct Link<Out, In> {
    connection: Connection,
    messages: PhantomData<fn(Out) -> In>,
}

/// The source's end.
pub type SourceLink = Link<ToDestination, ToSource>;
/// The destination's end.
pub type DestinationLink = Link<ToSource, ToDestination>;

impl<Out: Message, In: Message> Link<Out, In> {
    /// A link over `connection`.
    pub fn new(connection: Connection) -> Self {
        Self {
            connection,
            messages: PhantomData,
        }
    }

    /// What it goes over: also a page stream.
    pub fn connection(&mut self) -> &mut Connection {
        &mut self.connection
    }

    /// The connection, which is no link any more.
    pub fn into_connection(self) -> Connection {
        self.connection
    }

    /// Sends `message`.
    ///
    /// # Errors
    /// The link broke.
    pub fn send(&mut self, message: &Out) -> Result<(), Error> {
        self.send_within(message, SEND_MAX)
    }

    /// Sends `message`, which may take so long.
    ///
    /// # Errors
    /// The link broke.
    pub fn send_within(&mut self, message: &Out, limit: Duration) -> Result<(), Error> {
        let bytes = wire::encode(message)?;
        self.connection.within(limit);
        self.connection
            .write_all(&bytes)
            .and_then(|()| self.connection.flush())
            .map_err(link_error("send a message", "that it is taken"))
    }

    /// The next message, which comes within `limit`.
    ///
    /// # Errors
    /// The peer gave up, the link broke, or what came is no message.
    pub fn receive(&mut self, expected: &'static str, limit: Duration) -> Result<In, Error> {
        self.receive_long(expected, limit, wire::MESSAGE_BYTES_MAX)
    }

    /// The next message, of at most `bytes_max` bytes.
    ///
    /// # Errors
    /// As of [`receive`](Self::receive).
    pub fn receive_long(&mut self, expected: &'static str, limit: Duration, bytes_max: usize) -> Result<In, Error> {
        self.connection.within(limit);
        let failed = |error| link_error("receive a message", expected)(error);
        let message: In = wire::decode(&mut self.connection, bytes_max, failed)?;
        match message.abort_reason() {
            Some(reason) => Err(Error::Aborted(reason.to_owned())),
            None => Ok(message),
        }
    }

    /// Ends the link as `error` says, of which the peer hears unless it is from there. Returns what there is to be told:
    /// that the link ended may have its reason in what the peer says last.
    pub fn part(&mut self, error: Error) -> Error {
        self.connection.watch_nothing();
        if matches!(error, Error::Aborted(_) | Error::Refused(_)) {
            return error;
        }
        let told = self.send_within(&Out::abort(error.to_string()), PART_MAX);
        if error.is_of_link() {
            return match self.receive("a reason", PART_MAX) {
                Err(reason @ Error::Aborted(_)) => reason,
                _ => error,
            };
        }
        if told.is_ok() {
            self.drain();
        }
        error
    }

    /// Reads what is still on its way, until the peer ends the link: closing it before would take back what was said.
    fn drain(&mut self) {
        self.connection.within(PART_MAX);
        let mut rest = (&mut self.connection).take(PART_BYTES_MAX);
        if let Err(error) = std::io::copy(&mut rest, &mut std::io::sink()) {
            tracing::debug!(%error, "the peer did not end the link");
        }
    }
}

impl SourceLink {
    /// The answer of a destination that may work on it for `limit`, as long as it says that it does: for longer than
    /// `silence` it does not say nothing.
    ///
    /// # Errors
    /// As of [`receive`](Self::receive).
    pub fn receive_from_busy(
        &mut self,
        expected: &'static str,
        silence: Duration,
        limit: Duration,
    ) -> Result<ToSource, Error> {
        let until = Instant::now() + limit;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            match self.receive(expected, left.min(silence))? {
                ToSource::Alive => (),
                answer => return Ok(answer),
            }
        }
    }
}

impl DestinationLink {
    /// Does `work`, and says meanwhile that it is being done, on a thread that calls `on_thread` first.
    ///
    /// # Errors
    /// There is no thread to be had; what was done is dropped.
    pub fn alive_during<T>(&mut self, on_thread: &OnThread, work: impl FnOnce() -> T) -> Result<T, Error> {
        let (working, over) = channel::<()>();
        thread::scope(|scope| {
            let saying = move || {
                on_thread();
                while let Err(RecvTimeoutError::Timeout) = over.recv_timeout(ALIVE_EVERY) {
                    if let Err(error) = self.send(&ToSource::Alive) {
                        // Whoever sends the answer will be told too.
                        tracing::debug!(%error, "the source is not told that this side works");
                        break;
                    }
                }
            };
            let name = "migration-alive".to_owned();
            let thread = thread::Builder::new().name(name).spawn_scoped(scope, saying);
            thread.map_err(Error::Thread)?;
            let done = work();
            drop(working);
            Ok(done)
        })
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;
    use std::sync::Arc;

    use super::*;
    use crate::transport::SILENCE_MAX;

    /// Both ends of a link.
    fn pair() -> (SourceLink, DestinationLink) {
        let (near, far) = UnixStream::pair().unwrap();
        let [near, far] = [near, far].map(|end| Connection::unix(end).unwrap());
        (Link::new(near), Link::new(far))
    }

    #[test]
    fn a_destination_says_that_it_works_until_it_is_done() {
        let (mut source, mut destination) = pair();
        let heard = destination.alive_during(&(Arc::new(|| ()) as OnThread), || {
            [(); 2].map(|()| source.receive("Alive", SILENCE_MAX).unwrap())
        });
        assert_eq!(heard.unwrap(), [ToSource::Alive, ToSource::Alive]);
        destination.send(&ToSource::Ready).unwrap();
        assert_eq!(source.receive("Ready", SILENCE_MAX).unwrap(), ToSource::Ready);
    }

    #[test]
    fn a_destination_that_works_is_waited_for_but_not_for_ever() {
        let (mut source, mut destination) = pair();
        for message in [ToSource::Alive, ToSource::Alive, ToSource::Ready] {
            destination.send(&message).unwrap();
        }
        assert_eq!(
            source.receive_from_busy("Ready", SILENCE_MAX, SILENCE_MAX * 2).unwrap(),
            ToSource::Ready
        );
        destination.send(&ToSource::Alive).unwrap();
        let error = source.receive_from_busy("Ready", SILENCE_MAX, Duration::from_millis(500));
        assert!(matches!(error, Err(Error::Silent { expected: "Ready" })), "{error:?}");
    }
}
