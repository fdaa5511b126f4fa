//! Rewrites memory for as long as the guest lives, and notices any page that does not hold what was written last, and
//! any clock that goes back: what a guest can say about its own snapshots.
//!
//! ```text
//!  page-writer start MIB [PAGES-PER-SECOND]    begins in the background; as fast as possible if no rate is given
//!  page-writer verdict                         checks every page, and prints what has been seen so far
//! ```
//! Faults, and a heartbeat with all counters every second, go to `/run/page-writer.log`.
#![forbid(unsafe_code)]

use std::error::Error;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{Command, ExitCode};
use std::time::Duration;

use cutover_guest::pages::{Fault, PAGE_BYTES, Pages, Verdict};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::time::{ClockId, clock_gettime};

/// Where the writer is asked.
const SOCKET: &str = "/run/page-writer.sock";
/// What it has to say unasked.
const LOG: &str = "/run/page-writer.log";
/// Pages rewritten between looks at clocks and socket.
const BATCH: u64 = 64;
/// How often all counters are printed.
const HEARTBEAT_NS: u64 = NS_PER_SECOND;
const NS_PER_SECOND: u64 = 1_000_000_000;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let done = match arguments[..] {
        ["start", mib] => start(mib, "0"),
        ["start", mib, rate] => start(mib, rate),
        ["serve", mib, rate] => serve(mib, rate),
        ["verdict"] => verdict(),
        _ => Err("usage: page-writer start MIB [PAGES-PER-SECOND] | page-writer verdict".into()),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("page-writer: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Starts the writer, which has the socket as its standard input: whoever asks after this returned is answered.
fn start(mib: &str, rate: &str) -> Result<(), Box<dyn Error>> {
    let listener = UnixListener::bind(SOCKET)?;
    let log = File::create(LOG)?;
    Command::new(std::env::current_exe()?)
        .args(["serve", mib, rate])
        .stdin(OwnedFd::from(listener))
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn()?;
    Ok(())
}

/// Asks the writer.
fn verdict() -> Result<(), Box<dyn Error>> {
    let mut answer = String::new();
    UnixStream::connect(SOCKET)?.read_to_string(&mut answer)?;
    println!("{answer}");
    Ok(())
}

/// Writes until the guest is no more.
fn serve(mib: &str, rate: &str) -> Result<(), Box<dyn Error>> {
    let listener = UnixListener::from(io::stdin().as_fd().try_clone_to_owned()?);
    let count = mib.parse::<usize>()? * (1 << 20) / PAGE_BYTES;
    if count == 0 {
        return Err("there is nothing to write: give at least 1 MiB".into());
    }
    let mut writer = Writer {
        pages: Pages::new(count),
        verdict: Verdict::default(),
        last_heartbeat_ns: 0,
    };
    let pause = pause_between_batches(rate.parse()?);
    loop {
        writer.rewrite_batch();
        writer.take_time();
        // The pace is kept by waiting for somebody to ask.
        let pause = Timespec::try_from(pause)?;
        if poll(&mut [PollFd::new(&listener, PollFlags::IN)], Some(&pause))? > 0 {
            let (client, _) = listener.accept()?;
            if let Err(error) = writer.answer(client) {
                println!("nobody was told: {error}");
            }
        }
    }
}

/// Time between batches that comes to `rate` pages a second, writing taking none.
fn pause_between_batches(rate: u64) -> Duration {
    match rate {
        0 => Duration::ZERO,
        rate => Duration::from_nanos(BATCH * NS_PER_SECOND / rate),
    }
}

struct Writer {
    pages: Pages,
    verdict: Verdict,
    last_heartbeat_ns: u64,
}

impl Writer {
    fn rewrite_batch(&mut self) {
        for _ in 0..BATCH {
            if let Err(fault) = self.pages.rewrite_next() {
                self.note(fault);
            }
        }
        self.verdict.pages += BATCH;
        self.verdict.pass = self.pages.pass();
    }

    fn note(&mut self, (page, fault): (usize, Fault)) {
        self.verdict.faults += 1;
        println!("page {page}: {fault}");
    }

    fn take_time(&mut self) {
        let (before, faults) = (self.verdict, self.verdict.clock_faults);
        self.verdict
            .take_time(clock(ClockId::Monotonic), clock(ClockId::Realtime));
        if self.verdict.clock_faults > faults {
            println!("a clock went back from {before}");
            println!("a clock went back to   {}", self.verdict);
        }
        if self.verdict.monotonic_ns.abs_diff(self.last_heartbeat_ns) >= HEARTBEAT_NS {
            self.last_heartbeat_ns = self.verdict.monotonic_ns;
            println!("{}", self.verdict);
        }
    }

    /// Checks every page, and tells what has been seen.
    fn answer(&mut self, mut client: UnixStream) -> io::Result<()> {
        for fault in self.pages.faults().collect::<Vec<_>>() {
            self.note(fault);
        }
        self.take_time();
        client.write_all(self.verdict.to_string().as_bytes())
    }
}

/// The time in nanoseconds; both clocks begin at or after 1970.
fn clock(id: ClockId) -> u64 {
    let time = clock_gettime(id);
    let part = |number: i64| u64::try_from(number).unwrap_or(0);
    part(time.tv_sec) * NS_PER_SECOND + part(time.tv_nsec)
}
