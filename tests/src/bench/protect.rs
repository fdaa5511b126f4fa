//! Protection of a group: what a parallel job takes longer for it, what somebody outside waits longer for an answer, and
//! how long the group stands still when a member is lost.
//!
//! All of it is on one host, whose processor the standbys and the coordinator share with the guests: what is measured
//! includes what backup hosts do. Every contestant is Cutover; the one that is called so has the interval that the bars
//! are of.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::awake::Awake;
use super::{Contestant, Values};
use crate::environment::poll_until;
use crate::{Group, Guest, ParallelJob, Protection, Vm};

/// Where each member runs.
const PLACES: [usize; 4] = [0, 0, 1, 1];
/// Passes of the job that has little to do but send.
const SORTS: u32 = 20;
/// Questions that are asked from outside, of which the median counts.
const QUESTIONS: usize = 21;
/// Where they are answered.
const ECHO_PORT: u16 = 7;
/// The member that is lost.
const LOST: usize = 1;

/// How soon a silent member counts as lost.
const SUSPICION: [&str; 6] = ["--heartbeat", "50ms", "--lease", "800ms", "--suspicion", "1s"];

/// All ways in which the job is run.
pub fn contestants<'a>() -> Vec<Contestant<'a>> {
    let ways = [
        ("unprotected", None),
        ("Cutover", Some(("100ms", true))),
        ("each alone", Some(("100ms", false))),
        ("400 ms", Some(("400ms", true))),
        ("200 ms", Some(("200ms", true))),
        ("25 ms", Some(("25ms", true))),
    ];
    let contestant = |(name, way): (&'static str, Option<(&'static str, bool)>)| Contestant {
        name,
        measure: Box::new(move || {
            measure(way.map(|(interval, together)| Protection {
                interval,
                together,
                suspicion: SUSPICION,
            }))
        }),
    };
    ways.into_iter().map(contestant).collect()
}

fn measure(protection: Option<Protection>) -> Result<Values> {
    let _awake = Awake::begin()?;
    let mut group = Group::boot(2, &PLACES, || Guest::micro().memory("512M"));
    if let Some(protection) = &protection {
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
    ];
    let (vm, address) = group.members()[0];
    values.push(("answer_ms", answer(vm, address)?));
    if protection.is_some_and(|protection| protection.together) {
        let pauses = group.status()["members"].as_array().context("no members")?.clone();
        let pauses = pauses.iter().filter_map(|member| member["pause_ns"].as_f64());
        values.push(("pause_ms", pauses.fold(0.0, f64::max) / 1e6));
        group.lose(&[LOST], 1, |group| group.vms[LOST].kill());
        let recovery = &group.status()["last_recovery"];
        let ms = |part: &str| {
            recovery[part]
                .as_f64()
                .with_context(|| format!("no {part}: {recovery}"))
        };
        for (metric, part) in [
            ("detect_ms", "detect_ns"),
            ("decide_ms", "decide_ns"),
            ("restore_ms", "restore_ns"),
            ("resume_ms", "resume_ns"),
        ] {
            values.push((metric, ms(part)? / 1e6));
        }
    }
    Ok(values)
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
fn answer(vm: &Vm, address: Ipv4Addr) -> Result<f64> {
    vm.check(&format!("busybox nc -lk -p {ECHO_PORT} -e /bin/cat >/dev/null 2>&1 &"));
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
