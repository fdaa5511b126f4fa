//! `cutover vm stats --watch`: what VMs use per second, line after line.

use std::collections::HashMap;
use std::io;
use std::time::Duration;

use tokio::time::{MissedTickBehavior, interval};

use super::error::ClientError;
use super::http::Vm;
use super::many::{Screen, ask_each};
use super::show::bytes;
use crate::server::v1::types::StatsV1;

/// Lines after which the heading is shown again.
const HEADING_EVERY: usize = 20;

/// What a VM used in a time, per second of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Rates {
    /// Of one processor.
    cpu_percent: u64,
    exits: u64,
    read_bytes: u64,
    written_bytes: u64,
    received_bytes: u64,
    sent_bytes: u64,
}

/// The sums of a VM's counters, in the order of [`Rates`].
fn sums(stats: &StatsV1) -> [u64; 6] {
    [
        stats.cpus.iter().map(|cpu| cpu.time_ns).sum(),
        stats.cpus.iter().flat_map(|cpu| cpu.exits.values()).sum(),
        stats.disks.iter().map(|disk| disk.read_bytes).sum(),
        stats.disks.iter().map(|disk| disk.written_bytes).sum(),
        stats.nets.iter().map(|net| net.rx_bytes).sum(),
        stats.nets.iter().map(|net| net.tx_bytes).sum(),
    ]
}

impl Rates {
    /// From the counters at two times. Counters that began anew in between, because the VM did, count from zero.
    fn between(before: &StatsV1, after: &StatsV1) -> Self {
        const NS_PER_SECOND: u128 = 1_000_000_000;
        let began_anew = after.boots != before.boots;
        let (before, start) = if began_anew {
            ([0; 6], 0)
        } else {
            (sums(before), before.uptime_ns)
        };
        let elapsed_ns = u128::from(after.uptime_ns - start).max(1);
        let after = sums(after);
        let rate = |index: usize, scale: u128| {
            let count = u128::from(after[index].saturating_sub(before[index]));
            u64::try_from(count * scale / elapsed_ns).unwrap_or(u64::MAX)
        };
        Self {
            cpu_percent: rate(0, 100),
            exits: rate(1, NS_PER_SECOND),
            read_bytes: rate(2, NS_PER_SECOND),
            written_bytes: rate(3, NS_PER_SECOND),
            received_bytes: rate(4, NS_PER_SECOND),
            sent_bytes: rate(5, NS_PER_SECOND),
        }
    }
}

/// Shows what `vms` use every `period`, until all of them are gone.
///
/// # Errors
/// The output cannot be written.
pub async fn watch(mut vms: Vec<Vm>, period: Duration, limit: Duration, screen: &mut Screen) -> io::Result<()> {
    let mut ticks = interval(period);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut before: HashMap<Vm, StatsV1> = HashMap::new();
    let mut lines = 0;
    while !vms.is_empty() {
        ticks.tick().await;
        let mut answers = Vec::new();
        let ask = |vm: Vm| async move { vm.get::<StatsV1>("/v1/stats", limit).await };
        let asked = std::mem::take(&mut vms);
        ask_each(asked, ask, |vm, answer| {
            answers.push((vm.clone(), answer));
            Ok(())
        })
        .await?;
        for (vm, answer) in answers {
            match (answer, before.remove(&vm)) {
                (Ok(stats), earlier) => {
                    show(&vm, &stats, earlier.as_ref(), &mut lines, screen)?;
                    before.insert(vm.clone(), stats);
                    vms.push(vm);
                }
                // It was watched to its end.
                (Err(ClientError::NotThere(_)), Some(_)) => screen.count(true),
                (Err(error), _) => screen.failure(&vm, error)?,
            }
        }
    }
    Ok(())
}

fn show(vm: &Vm, stats: &StatsV1, before: Option<&StatsV1>, lines: &mut usize, screen: &mut Screen) -> io::Result<()> {
    if screen.is_json() {
        return screen.object(&vm.name, true, "result", serde_json::to_value(stats)?);
    }
    // A rate takes two answers.
    let Some(before) = before else { return Ok(()) };
    if lines.is_multiple_of(HEADING_EVERY) {
        screen.text(&heading())?;
    }
    *lines += 1;
    screen.text(&line(&vm.name, stats, Rates::between(before, stats)))
}

fn heading() -> String {
    format!(
        "{:<16} {:<13} {:>5} {:>9} {:>10} {:>12} {:>12} {:>12} {:>12}\n",
        "NAME", "STATE", "CPU%", "EXITS/s", "RESIDENT", "DISK READ/s", "WRITTEN/s", "NET IN/s", "OUT/s"
    )
}

fn line(name: &str, stats: &StatsV1, rates: Rates) -> String {
    format!(
        "{name:<16} {:<13} {:>5} {:>9} {:>10} {:>12} {:>12} {:>12} {:>12}\n",
        stats.state,
        rates.cpu_percent,
        rates.exits,
        bytes(stats.memory.resident_bytes),
        bytes(rates.read_bytes),
        bytes(rates.written_bytes),
        bytes(rates.received_bytes),
        bytes(rates.sent_bytes)
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::client::testing;

    #[test]
    fn rates_are_per_second_of_the_vms_time() {
        let before = testing::stats(1_000_000_000, 10);
        let after = testing::stats(3_000_000_000, 30);
        let rates = Rates {
            cpu_percent: 0,
            exits: 20,
            read_bytes: 10,
            written_bytes: 10,
            received_bytes: 10,
            sent_bytes: 10,
        };
        assert_eq!(Rates::between(&before, &after), rates);
    }

    #[test]
    fn a_vm_that_was_rebooted_counts_from_zero() {
        let before = testing::stats(9_000_000_000, 1000);
        let after = StatsV1 {
            boots: 2,
            ..testing::stats(500_000_000, 10)
        };
        assert_eq!(Rates::between(&before, &after).read_bytes, 20);
        assert_eq!(Rates::between(&after, &after), Rates::default());
    }

    #[test]
    fn lines_stand_under_their_heading() {
        let line = line("web", &testing::stats(1, 1), Rates::default());
        assert_eq!(line.find("running"), heading().find("STATE"));
        assert_eq!(line.len(), heading().len());
    }
}
