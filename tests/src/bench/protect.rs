//! Protection of a group: what a parallel job takes longer for it, what somebody outside waits longer for an answer, and
//! how long the group stands still when a member is lost.
//!
//! All of it is on one host, whose processor the standbys and the coordinator share with the guests: what is measured
//! includes what backup hosts do. Every contestant is Cutover; the one that is called so has the interval that the bars
//! are of.

use std::cell::RefCell;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::awake::Awake;
use super::{Contestant, Values};
use crate::environment::poll_until;
use crate::{Group, Guest, ParallelJob, Protection};

/// Where each member runs.
const PLACES: [usize; 4] = [0, 0, 1, 1];
/// Passes of the job that has little to do but send.
const SORTS: u32 = 5;
/// Questions that are asked from outside, of which the median counts.
const QUESTIONS: usize = 21;
/// Where they are answered.
const ECHO_PORT: u16 = 7;
/// The member that is lost.
const LOST: usize = 1;

/// A group that is cut as often as the bars say, whose hosts count as lost after a second of silence.
const TOGETHER: Protection = Protection {
    interval: "100ms",
    together: true,
    suspicion: ["--heartbeat", "50ms", "--lease", "800ms", "--suspicion", "1s"],
};

/// Guests that all ways of a turn are measured with, one after the other.
#[derive(Default)]
pub struct Turn {
    group: RefCell<Option<Group>>,
}

/// All ways in which the job is run; the last ends the turn with the loss of a member.
pub fn contestants(turn: &Turn) -> Vec<Contestant<'_>> {
    let every = |interval| Protection { interval, ..TOGETHER };
    let alone = Protection {
        together: false,
        ..TOGETHER
    };
    let ways = [
        ("unprotected", None),
        ("Cutover", Some(TOGETHER)),
        ("each alone", Some(alone)),
        ("25 ms", Some(every("25ms"))),
        ("200 ms", Some(every("200ms"))),
        ("400 ms", Some(every("400ms"))),
    ];
    let contestant = |(name, way): (&'static str, Option<Protection>)| Contestant {
        name,
        measure: Box::new(move || turn.measure(way.as_ref())),
    };
    let recovery = Contestant {
        name: "Cutover",
        measure: Box::new(|| turn.lose_member()),
    };
    ways.into_iter().map(contestant).chain([recovery]).collect()
}

impl Turn {
    /// What the job takes, and an answer.
    fn measure(&self, protection: Option<&Protection>) -> Result<Values> {
        let _awake = Awake::begin()?;
        let mut group = self.group.borrow_mut();
        let group = group.get_or_insert_with(boot);
        group.unprotect();
        if let Some(protection) = protection {
            group.protect_as(protection);
        }
        let mut values = vec![
            (
                "ep_ms",
                time(|| ParallelJob::begin(&group.members(), "ep", "S", 1).check_rest()),
            ),
            (
                "is_ms",
                time(|| ParallelJob::begin(&group.members(), "is", "S", SORTS).check_rest()),
            ),
            ("answer_ms", answer(group.members()[0].1)?),
        ];
        if protection.is_some_and(|protection| protection.together) {
            let pauses = group.status()["members"].as_array().context("no members")?.clone();
            let pauses = pauses.iter().filter_map(|member| member["pause_ns"].as_f64());
            values.push(("pause_ms", pauses.fold(0.0, f64::max) / 1e6));
        }
        Ok(values)
    }

    /// What a recovery takes; it ends the turn.
    fn lose_member(&self) -> Result<Values> {
        let _awake = Awake::begin()?;
        let mut group = self.group.take().context("nothing was measured")?;
        group.unprotect();
        group.protect_as(&TOGETHER);
        group.lose(&[LOST], 1, |group| group.vms[LOST].kill());
        let recovery = &group.status()["last_recovery"];
        let part = |(metric, part): (&'static str, &str)| {
            let ns = recovery[part].as_f64();
            Ok((metric, ns.with_context(|| format!("no {part}: {recovery}"))? / 1e6))
        };
        let parts = [
            ("detect_ms", "detect_ns"),
            ("decide_ms", "decide_ns"),
            ("restore_ms", "restore_ns"),
            ("resume_ms", "resume_ns"),
        ];
        parts.into_iter().map(part).collect()
    }
}

/// Guests that take the job, of which the first answers questions.
fn boot() -> Group {
    let group = Group::boot(2, &PLACES, || Guest::micro().memory("512M"));
    group.vms[0].check(&format!("busybox nc -ll -p {ECHO_PORT} -e /bin/cat >/dev/null 2>&1 &"));
    group
}

fn time(work: impl FnOnce()) -> f64 {
    let started = Instant::now();
    work();
    in_ms(started.elapsed())
}

fn in_ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

/// How long the guest at `address` takes to answer, as seen from outside of its group.
fn answer(address: Ipv4Addr) -> Result<f64> {
    let mut connection = poll_until("the guest answers", || TcpStream::connect((address, ECHO_PORT)).ok());
    connection.set_nodelay(true)?;
    let mut times = Vec::new();
    for question in 0..QUESTIONS {
        let asked = Instant::now();
        let question = u8::try_from(question)?;
        connection.write_all(&[question])?;
        let mut answer = [0];
        connection.read_exact(&mut answer)?;
        ensure!(answer == [question], "{question} was answered by {answer:?}");
        times.push(in_ms(asked.elapsed()));
    }
    times.sort_by(f64::total_cmp);
    Ok(times[QUESTIONS / 2])
}
