//! Live migration over the loopback interface, between two monitors on one host: how long it takes in all, how long the
//! guest stands still by the monitor's account and as seen from outside, and what goes over the wire.
//!
//! The guest prints a byte every 10 ms, on the console of whichever monitor it runs under: the longest gap between two
//! is what anybody who depends on the guest sees, whatever the monitor counts as downtime.

mod cutover;
mod qemu;

use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use self::cutover::Cutover;
use self::qemu::Qemu;
use super::awake::Awake;
use super::stage::Stage;
use super::{Contestant, Values};
use crate::Vm;

/// Guest memory.
const MEMORY_MIB: u32 = 256;
/// MiB of it that the guest's program owns, and rewrites if it is not idle.
const WRITTEN_MIB: u32 = 64;
/// How long a guest may stand still between its last instruction there and its first here: what both are told.
const DOWNTIME_GOAL_MS: u32 = 30;

/// What the guest does, and how it is moved.
struct Case {
    /// What it is called as a part of the bench.
    name: &'static str,
    load: Load,
    /// Most MiB a second over the wire while the guest runs.
    cap_mib: Option<u32>,
    manner: Manner,
    /// What the values are called: the whole time, the monitor's own figure of the downtime, the gap, and the bytes.
    metrics: [&'static str; 4],
}

/// What the guest's program does.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Load {
    /// Nothing.
    Idle,
    /// Rewrites so many pages a second.
    PagesPerSecond(u32),
    /// Rewrites pages as fast as it can.
    Unthrottled,
}

/// How a guest is moved.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Manner {
    /// Its memory first, the guest last; by whatever the monitor does best where the link is narrow.
    PreCopy,
    /// The guest first, its memory last.
    PostCopy,
    /// To another process of the host, which is given the memory itself.
    HandedOver,
}

const CASES: [Case; 6] = [
    Case {
        name: "idle",
        load: Load::Idle,
        cap_mib: None,
        manner: Manner::PreCopy,
        metrics: ["idle_total_ms", "idle_downtime_ms", "idle_gap_ms", "idle_sent_mib"],
    },
    Case {
        name: "busy",
        load: Load::PagesPerSecond(20_000),
        cap_mib: None,
        manner: Manner::PreCopy,
        metrics: ["busy_total_ms", "busy_downtime_ms", "busy_gap_ms", "busy_sent_mib"],
    },
    Case {
        name: "narrow",
        load: Load::PagesPerSecond(20_000),
        cap_mib: Some(64),
        manner: Manner::PreCopy,
        metrics: [
            "narrow_total_ms",
            "narrow_downtime_ms",
            "narrow_gap_ms",
            "narrow_sent_mib",
        ],
    },
    Case {
        name: "flat",
        load: Load::Unthrottled,
        cap_mib: Some(8),
        manner: Manner::PreCopy,
        metrics: ["flat_total_ms", "flat_downtime_ms", "flat_gap_ms", "flat_sent_mib"],
    },
    Case {
        name: "post",
        load: Load::Idle,
        cap_mib: None,
        manner: Manner::PostCopy,
        metrics: ["post_total_ms", "post_downtime_ms", "post_gap_ms", "post_sent_mib"],
    },
    Case {
        name: "local",
        load: Load::Idle,
        cap_mib: None,
        manner: Manner::HandedOver,
        metrics: ["local_total_ms", "local_downtime_ms", "local_gap_ms", "local_sent_mib"],
    },
];

/// What a monitor says about a migration that is over.
struct Moved {
    total_ms: f64,
    downtime_ms: f64,
    sent_mib: f64,
}

/// A monitor that moves guests.
trait Subject {
    /// Whether it can do that.
    fn can(&self, case: &Case) -> bool;
    /// Starts a guest.
    fn boot(&mut self, case: &Case) -> Result<Vm>;
    /// Starts what it is to move to.
    fn receiver(&mut self, case: &Case) -> Result<Vm>;
    /// Moves it; none if there is no end to it.
    fn migrate(&mut self, case: &Case) -> Result<Option<Moved>>;
}

/// Cutover and QEMU in all cases, or in the one called `part`.
///
/// # Errors
/// There is no such case, or QEMU does not start.
pub fn contestants<'a>(stage: &'a Stage, part: Option<&'a str>) -> Result<Vec<Contestant<'a>>> {
    let is_meant = move |case: &Case| part.is_none_or(|part| part == case.name);
    ensure!(CASES.iter().any(is_meant), "there is no part called {part:?}");
    qemu::warm_up(stage)?;
    Ok(vec![
        Contestant {
            name: "Cutover",
            measure: Box::new(move || measure(is_meant, || Cutover::new(stage))),
        },
        Contestant {
            name: "QEMU",
            measure: Box::new(move || measure(is_meant, || Qemu::new(stage))),
        },
    ])
}

fn measure<S: Subject>(is_meant: impl Fn(&Case) -> bool, new: impl Fn() -> S) -> Result<Values> {
    let mut values = Values::new();
    for case in CASES.iter().filter(|case| is_meant(case)) {
        let mut subject = new();
        if !subject.can(case) {
            continue;
        }
        if let Some((moved, gap)) = migrate(&mut subject, case)? {
            let measured = [moved.total_ms, moved.downtime_ms, milliseconds(gap), moved.sent_mib];
            values.extend(case.metrics.into_iter().zip(measured));
        }
    }
    Ok(values)
}

/// Moves a guest, and finds the longest time nothing was heard of it; none if it cannot be moved so.
fn migrate(subject: &mut impl Subject, case: &Case) -> Result<Option<(Moved, Duration)>> {
    // From the boot on: a clock that jumps makes it seem to take minutes.
    let _awake = Awake::begin()?;
    let source = subject.boot(case)?;
    load(&source, case.load);
    let destination = subject.receiver(case)?;
    source.check("ticker > /dev/console &");
    let heard = source.console().arrivals().len();
    wait_for_ticks(&source, heard)?;
    let start = Instant::now();
    let Some(moved) = subject.migrate(case)? else {
        return Ok(None);
    };
    let heard = destination.console().arrivals().len();
    wait_for_ticks(&destination, heard)?;
    let gap = longest_gap(&source, &destination, start);
    destination.check("killall -CONT page-writer");
    destination.check_pages();
    Ok(Some((moved, gap)))
}

/// Has the guest's program own its memory, and begin.
fn load(vm: &Vm, load: Load) {
    match load {
        Load::Idle => {
            vm.start_page_writer(WRITTEN_MIB, Some(64));
            vm.check("page-writer verdict && killall -STOP page-writer");
        }
        Load::PagesPerSecond(rate) => vm.start_page_writer(WRITTEN_MIB, Some(rate)),
        Load::Unthrottled => vm.start_page_writer(WRITTEN_MIB, None),
    }
}

/// Waits until the guest has printed a while more than `heard` pieces here.
fn wait_for_ticks(vm: &Vm, heard: usize) -> Result<()> {
    const PAUSE: Duration = Duration::from_millis(1);
    const PATIENCE: Duration = Duration::from_secs(60);
    const TICKS: usize = 20;
    let start = Instant::now();
    while vm.console().arrivals().len() < heard + TICKS {
        ensure!(start.elapsed() < PATIENCE, "the guest gives no sign of life");
        sleep(PAUSE);
    }
    Ok(())
}

/// The longest time between two bytes, on whichever console, since shortly before `start`.
fn longest_gap(source: &Vm, destination: &Vm, start: Instant) -> Duration {
    let mut arrivals = [source.console().arrivals(), destination.console().arrivals()].concat();
    arrivals.sort();
    let first = arrivals.partition_point(|&arrival| arrival < start).saturating_sub(1);
    let gaps = arrivals[first..].windows(2).map(|pair| pair[1] - pair[0]);
    gaps.max().unwrap_or_default()
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}
