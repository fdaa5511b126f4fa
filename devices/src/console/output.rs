//! The sending half of a console: takes every byte at once and never makes the guest wait.
//!
//! A byte is written through as long as the other end takes it. When a pipe, terminal, socket or pseudo-terminal is
//! full, up to [`PENDING_MAX`] bytes wait for the event loop to send them; beyond that the newest are dropped, counted
//! and reported in the log. Where nobody listens, bytes are discarded. An error of the other end (reader gone, disk
//! full) costs the bytes, never the guest.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FileType, Mode, OFlags, fcntl_getfl, fcntl_setfl, fstat, open};
use rustix::io::Errno;

/// Most bytes that wait for a slow reader.
pub const PENDING_MAX: usize = 256 << 10;

/// How long the end of a VM waits for a reader to take something of what is pending.
const FINISH_WAIT: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 500_000_000,
};

/// Where a console's output goes. Writing to it always succeeds.
#[derive(Default)]
pub struct Output {
    /// Does not block, unless it is a regular file; none: discard.
    stream: Option<OwnedFd>,
    /// Status flags to give back to a descriptor that is shared with other processes.
    flags_before: Option<OFlags>,
    pending: VecDeque<u8>,
    dropped: u64,
    failure: Option<Errno>,
}

impl Output {
    /// Output to a descriptor of ours, which must not block (a regular file may).
    pub fn new(stream: OwnedFd) -> Self {
        let mut output = Self::default();
        output.stream = Some(stream);
        output
    }

    /// Output to the standard output.
    ///
    /// Pipes and terminals are opened once more, since making the descriptor itself non-blocking would do so for every
    /// process that shares it.
    ///
    /// # Errors
    /// The standard output cannot be duplicated.
    pub fn stdout() -> io::Result<Self> {
        let stdout = rustix::stdio::stdout();
        let file_type = FileType::from_raw_mode(fstat(stdout)?.st_mode);
        if matches!(file_type, FileType::Fifo | FileType::CharacterDevice) {
            let flags = OFlags::WRONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
            if let Ok(own) = open("/proc/self/fd/1", flags, Mode::empty()) {
                return Ok(Self::new(own));
            }
        }
        let mut output = Self::new(rustix::io::fcntl_dupfd_cloexec(stdout, super::FIRST_OWN_FD)?);
        if file_type != FileType::RegularFile {
            let before = fcntl_getfl(stdout)?;
            fcntl_setfl(stdout, before | OFlags::NONBLOCK)?;
            output.flags_before = Some(before);
        }
        Ok(output)
    }

    /// The descriptor to watch until it takes more, if bytes are pending.
    pub fn blocked_on(&self) -> Option<RawFd> {
        self.stream
            .as_ref()
            .filter(|_| !self.pending.is_empty())
            .map(AsRawFd::as_raw_fd)
    }

    /// Whether the last bytes were lost to an error of the other end.
    pub fn is_broken(&self) -> bool {
        self.failure.is_some()
    }

    /// Sends what is pending, as far as the other end takes it.
    pub fn drain(&mut self) {
        while !self.pending.is_empty() {
            let sent = match &self.stream {
                Some(stream) => rustix::io::write(stream, self.pending.as_slices().0),
                None => Ok(self.pending.len()),
            };
            match sent {
                Ok(sent) => drop(self.pending.drain(..sent)),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return,
                Err(error) => {
                    self.dropped += self.pending.len() as u64;
                    self.pending.clear();
                    return self.fail(error);
                }
            }
        }
        self.recover();
    }

    /// Ends without waiting for a reader that has left.
    pub fn abandon(mut self) {
        self.pending.clear();
        self.dropped = 0;
    }

    fn write_through(&mut self, byte: u8) {
        let Some(stream) = &self.stream else {
            return;
        };
        loop {
            match rustix::io::write(stream, &[byte]) {
                Ok(_) if self.failure.is_some() => return self.recover(),
                Ok(_) => return,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return self.pending.push_back(byte),
                Err(error) => {
                    self.dropped += 1;
                    return self.fail(error);
                }
            }
        }
    }

    fn put(&mut self, byte: u8) {
        if self.pending.is_empty() {
            self.write_through(byte);
        } else if self.pending.len() < PENDING_MAX {
            self.pending.push_back(byte);
        } else {
            if self.dropped == 0 {
                tracing::warn!("nobody reads the console's output, it is being dropped");
            }
            self.dropped += 1;
        }
    }

    fn fail(&mut self, error: Errno) {
        if self.failure.replace(error).is_none() {
            tracing::warn!(%error, "the console's output is lost");
        }
    }

    fn recover(&mut self) {
        self.failure = None;
        if self.dropped > 0 {
            tracing::warn!(
                bytes = self.dropped,
                "the console's output goes on after bytes were dropped"
            );
            self.dropped = 0;
        }
    }

    /// Waits for a reader that goes on reading, for as long as it does.
    fn finish(&mut self) {
        while let (false, Some(stream)) = (self.pending.is_empty(), &self.stream) {
            let mut waiting = [PollFd::from_borrowed_fd(stream.as_fd(), PollFlags::OUT)];
            match poll(&mut waiting, Some(&FINISH_WAIT)) {
                Ok(0) => break,
                Ok(_) => self.drain(),
                Err(Errno::INTR) => {}
                Err(_) => break,
            }
        }
        if self.dropped > 0 || !self.pending.is_empty() {
            let bytes = self.dropped + self.pending.len() as u64;
            tracing::warn!(bytes, "the console's last output was not read");
        }
    }
}

impl io::Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        for &byte in bytes {
            self.put(byte);
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for Output {
    fn drop(&mut self) {
        self.finish();
        if let (Some(stream), Some(flags)) = (&self.stream, self.flags_before)
            && let Err(error) = fcntl_setfl(stream, flags)
        {
            tracing::warn!(%error, "cannot make the standard output block again");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    use super::*;

    fn pair() -> (Output, UnixStream) {
        let (ours, theirs) = UnixStream::pair().expect("socket pair");
        ours.set_nonblocking(true).expect("a socket can be non-blocking");
        (Output::new(ours.into()), theirs)
    }

    /// Bytes that tell their position, so that a gap or a repetition shows.
    fn numbered(len: usize) -> Vec<u8> {
        (0..=250).cycle().take(len).collect()
    }

    #[test]
    fn bytes_are_written_through_while_the_reader_keeps_up() {
        let (mut output, mut reader) = pair();
        output.write_all(b"login: ").expect("infallible");
        let mut seen = [0; 7];
        reader.read_exact(&mut seen).expect("bytes are there");
        assert_eq!(&seen, b"login: ");
        assert_eq!(output.blocked_on(), None);
    }

    #[test]
    fn a_reader_that_comes_late_gets_what_was_pending_in_order() {
        let (mut output, mut reader) = pair();
        let sent = numbered(PENDING_MAX);
        output.write_all(&sent).expect("infallible");
        assert!(output.blocked_on().is_some(), "more was sent than a socket holds");
        let mut seen = vec![0; sent.len()];
        let mut received = 0;
        while received < seen.len() {
            received += reader.read(&mut seen[received..]).expect("bytes are there");
            output.drain();
        }
        assert_eq!(seen, sent);
        assert_eq!(output.blocked_on(), None);
    }

    #[test]
    fn beyond_the_limit_the_newest_bytes_are_dropped_and_the_writer_goes_on() {
        let (mut output, mut reader) = pair();
        let sent = numbered(4 * PENDING_MAX);
        output.write_all(&sent).expect("infallible");
        assert!(output.dropped > 0);
        let kept = sent.len() - usize::try_from(output.dropped).expect("small");
        let mut seen = vec![0; kept];
        let mut received = 0;
        while received < kept {
            received += reader.read(&mut seen[received..]).expect("bytes are there");
            output.drain();
        }
        assert_eq!(seen, sent[..kept]);
    }

    #[test]
    fn a_reader_that_has_gone_costs_only_the_bytes() {
        let (mut output, reader) = pair();
        drop(reader);
        output.write_all(b"hello").expect("infallible");
        assert!(output.is_broken());
        assert_eq!(output.blocked_on(), None);
    }

    #[test]
    fn a_full_disk_costs_only_the_bytes() {
        let full = std::fs::OpenOptions::new()
            .write(true)
            .open("/dev/full")
            .expect("Linux has it");
        let mut output = Output::new(full.into());
        output.write_all(b"hello").expect("infallible");
        assert!(output.is_broken());
    }

    #[test]
    fn what_is_pending_at_the_end_still_reaches_a_slow_reader() {
        let (mut output, mut reader) = pair();
        let sent = numbered(PENDING_MAX);
        output.write_all(&sent).expect("infallible");
        let reading = std::thread::spawn(move || {
            let mut seen = Vec::new();
            reader.read_to_end(&mut seen).expect("bytes, then the end");
            seen
        });
        drop(output);
        assert_eq!(reading.join().expect("no panic"), sent);
    }
}
