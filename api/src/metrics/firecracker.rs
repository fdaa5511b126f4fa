//! Metrics in the form of Firecracker's: a JSON object on a line, appended to a file or named pipe.
//!
//! Names and meaning are those of Firecracker's documentation (docs/metrics.md): groups of numbers, each how much was
//! added since the line before. There are those groups and numbers that this monitor counts; disks and interfaces have
//! one for each (`block_ID`, `net_ID`) and one for all (`block`, `net`).
//!
//! A line that cannot be written is not lost: what it would have said is part of the next.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use cutover_devices::stats::{DiskStats, NetStats};
use cutover_vmm::VmStats;
use jiff::Timestamp;
use serde::Serialize;

use crate::log::{LogCounts, open_for_lines, write_line};

/// How often a line is written, whoever else asks for one.
pub const PERIOD: Duration = Duration::from_secs(60);

/// Why metrics are not written.
#[derive(Debug, thiserror::Error)]
pub enum MetricsError {
    /// The file or pipe cannot be opened.
    #[error("cannot write metrics to {}", .path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// It takes no more: a full disk, a pipe that nobody reads.
    #[error("the metrics were not taken: {0}")]
    Write(#[source] io::Error),
}

/// What each line has besides the numbers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Extras {
    /// Under `id`.
    pub id: Option<String>,
    /// Under `properties`.
    pub properties: Option<BTreeMap<String, String>>,
}

/// Where metrics are written.
#[derive(Debug)]
pub struct MetricsFile {
    file: File,
    extras: Extras,
    /// What the lines before have told.
    told: Totals,
    /// Lines that were not taken.
    missed: u64,
}

/// A group's numbers by their names.
type Numbers = BTreeMap<&'static str, u64>;

/// Everything that was counted since the beginning.
#[derive(Clone, Debug, Default)]
struct Totals {
    /// Which build of the VM was counted: the VM's counters begin anew with each.
    boots: u64,
    vm: BTreeMap<String, Numbers>,
    logger: Numbers,
}

/// A line.
#[derive(Serialize)]
struct Line<'a> {
    utc_timestamp_ms: i64,
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    properties: Option<&'a BTreeMap<String, String>>,
    #[serde(flatten)]
    vm: BTreeMap<String, Numbers>,
    logger: Numbers,
}

impl MetricsFile {
    /// Opens the file or named pipe at `path`; a file that does not exist is made.
    ///
    /// # Errors
    /// It cannot be opened for writing.
    pub fn open(path: &Path, extras: Extras) -> Result<Self, MetricsError> {
        let file = open_for_lines(path).map_err(|source| MetricsError::Open {
            path: path.to_owned(),
            source,
        })?;
        Ok(Self {
            file,
            extras,
            told: Totals::default(),
            missed: 0,
        })
    }

    /// Writes what was added since the line before, at `now`.
    ///
    /// # Errors
    /// The line was not taken; the next one has what it would have said.
    pub fn write(&mut self, now: Timestamp, vm: &VmStats, log: LogCounts) -> Result<(), MetricsError> {
        let totals = Totals {
            boots: vm.boots,
            vm: groups(vm),
            logger: logger(log, self.missed),
        };
        let written = self.line(now, &totals).and_then(|line| write_line(&self.file, &line));
        match written {
            Ok(()) => self.told = totals,
            Err(_) => self.missed += 1,
        }
        written.map_err(MetricsError::Write)
    }

    fn line(&self, now: Timestamp, totals: &Totals) -> io::Result<String> {
        let vm = totals.vm.iter().map(|(name, numbers)| {
            let told = self.told.vm.get(name).filter(|_| self.told.boots == totals.boots);
            (name.clone(), added(numbers, told))
        });
        let line = Line {
            utc_timestamp_ms: now.as_millisecond(),
            id: self.extras.id.as_deref(),
            properties: self.extras.properties.as_ref(),
            vm: vm.collect(),
            logger: added(&totals.logger, Some(&self.told.logger)),
        };
        Ok(serde_json::to_string(&line)? + "\n")
    }
}

/// What `numbers` have more than those told.
fn added(numbers: &Numbers, told: Option<&Numbers>) -> Numbers {
    let told = |name| told.and_then(|told| told.get(name)).copied().unwrap_or(0);
    let added = numbers
        .iter()
        .map(|(name, total)| (*name, total.saturating_sub(told(name))));
    added.collect()
}

fn groups(stats: &VmStats) -> BTreeMap<String, Numbers> {
    let devices = &stats.devices;
    let mut groups = BTreeMap::from([
        ("vcpu".to_owned(), vcpu(stats)),
        (
            "uart".to_owned(),
            Numbers::from([
                ("read_count", devices.serial.input_bytes),
                ("write_count", devices.serial.output_bytes),
            ]),
        ),
    ]);
    add_each(
        "block",
        devices.disks.iter().map(|disk| (&disk.id, block(disk))),
        &mut groups,
    );
    add_each(
        "net",
        devices.nets.iter().map(|net| (&net.id, net_numbers(net))),
        &mut groups,
    );
    if let Some(rng) = &devices.rng {
        let numbers = Numbers::from([
            ("entropy_event_count", rng.requests),
            ("entropy_bytes", rng.bytes),
            ("entropy_rate_limiter_throttled", rng.throttled),
        ]);
        groups.insert("entropy".to_owned(), numbers);
    }
    if let Some(vsock) = &devices.vsock {
        let numbers = Numbers::from([
            ("rx_bytes_count", vsock.rx_bytes),
            ("rx_packets_count", vsock.rx_packets),
            ("tx_bytes_count", vsock.tx_bytes),
            ("tx_packets_count", vsock.tx_packets),
            ("conns_added", vsock.opened),
            ("conns_removed", vsock.closed),
        ]);
        groups.insert("vsock".to_owned(), numbers);
    }
    if let Some(mmds) = &devices.mmds {
        let numbers = Numbers::from([
            ("rx_count", mmds.rx_frames),
            ("rx_accepted", mmds.rx_frames - mmds.rx_dropped.min(mmds.rx_frames)),
            ("rx_accepted_err", mmds.rx_dropped),
            ("rx_no_token", mmds.no_token),
            ("rx_invalid_token", mmds.invalid_token),
            ("tx_count", mmds.requests),
            ("tx_frames", mmds.tx_frames),
            ("connections_created", mmds.opened),
            ("connections_destroyed", mmds.closed),
        ]);
        groups.insert("mmds".to_owned(), numbers);
    }
    if let Some(balloon) = &devices.balloon {
        let numbers = Numbers::from([
            ("inflate_count", balloon.inflated),
            ("deflate_count", balloon.deflated),
            ("stats_updates_count", balloon.statistics),
            ("free_page_report_count", balloon.reported),
            ("free_page_report_freed", balloon.reported_bytes),
        ]);
        groups.insert("balloon".to_owned(), numbers);
    }
    groups
}

/// Adds a group `KIND_ID` for each device, and the sum of them as group `KIND`.
fn add_each<'a>(
    kind: &str,
    devices: impl Iterator<Item = (&'a String, Numbers)>,
    groups: &mut BTreeMap<String, Numbers>,
) {
    let mut sum = Numbers::new();
    for (id, numbers) in devices {
        for (name, number) in &numbers {
            *sum.entry(name).or_default() += number;
        }
        groups.insert(format!("{kind}_{id}"), numbers);
    }
    groups.insert(kind.to_owned(), sum);
}

fn vcpu(stats: &VmStats) -> Numbers {
    let sum = |of: fn(&cutover_vmm::stats::VcpuExits) -> u64| stats.vcpus.iter().map(|vcpu| of(&vcpu.exits)).sum();
    Numbers::from([
        ("exit_io_in", sum(|exits| exits.io_in)),
        ("exit_io_out", sum(|exits| exits.io_out)),
        ("exit_mmio_read", sum(|exits| exits.mmio_read)),
        ("exit_mmio_write", sum(|exits| exits.mmio_write)),
        ("failures", sum(|exits| exits.failed)),
    ])
}

fn block(disk: &DiskStats) -> Numbers {
    Numbers::from([
        ("execute_fails", disk.failed),
        ("flush_count", disk.flushes),
        ("rate_limiter_throttled_events", disk.throttled),
        ("read_bytes", disk.read_bytes),
        ("read_count", disk.reads),
        ("write_bytes", disk.written_bytes),
        ("write_count", disk.writes),
    ])
}

fn net_numbers(net: &NetStats) -> Numbers {
    Numbers::from([
        ("rx_bytes_count", net.rx_bytes),
        ("rx_count", net.rx_frames),
        ("rx_packets_count", net.rx_frames),
        ("rx_rate_limiter_throttled", net.rx_throttled),
        ("tx_bytes_count", net.tx_bytes),
        ("tx_count", net.tx_frames),
        ("tx_fails", net.tx_dropped),
        ("tx_packets_count", net.tx_frames),
        ("tx_rate_limiter_throttled", net.tx_throttled),
    ])
}

fn logger(log: LogCounts, missed: u64) -> Numbers {
    Numbers::from([
        ("missed_log_count", log.lost),
        ("missed_metrics_count", missed),
        ("rate_limited_log_count", log.held_back),
    ])
}

#[cfg(test)]
mod tests {
    use std::fs;

    use serde_json::{Value, json};

    use super::*;
    use crate::metrics::testing::{boots, stats};

    const LOG: LogCounts = LogCounts { held_back: 7, lost: 1 };

    fn now() -> Timestamp {
        Timestamp::from_millisecond(1_739_000_000_000).expect("in range")
    }

    fn lines(path: &Path) -> Vec<Value> {
        let text = fs::read_to_string(path).expect("text");
        text.lines()
            .map(|line| serde_json::from_str(line).expect(line))
            .collect()
    }

    /// A file to write to, in a folder that goes away with the first value.
    fn file(extras: Extras) -> (tempfile::TempDir, PathBuf, MetricsFile) {
        let folder = tempfile::tempdir().expect("folder");
        let path = folder.path().join("metrics");
        let metrics = MetricsFile::open(&path, extras).expect("a new file");
        (folder, path, metrics)
    }

    #[test]
    fn a_line_has_the_numbers_of_firecracker_under_their_names() {
        let (_folder, path, mut metrics) = file(Extras::default());
        metrics.write(now(), &stats(10), LOG).expect("written");
        let disk = json!({
            "execute_fails": 10, "flush_count": 10, "rate_limiter_throttled_events": 10, "read_bytes": 10,
            "read_count": 10, "write_bytes": 10, "write_count": 10,
        });
        let net = json!({
            "rx_bytes_count": 10, "rx_count": 10, "rx_packets_count": 10, "rx_rate_limiter_throttled": 10,
            "tx_bytes_count": 10, "tx_count": 10, "tx_fails": 10, "tx_packets_count": 10,
            "tx_rate_limiter_throttled": 10,
        });
        let twice = |numbers: &Value| {
            let numbers = numbers.as_object().expect("a group").iter();
            numbers
                .map(|(name, number)| (name.clone(), json!(number.as_u64().expect("a number") * 2)))
                .collect::<Value>()
        };
        assert_eq!(
            lines(&path),
            [json!({
                "utc_timestamp_ms": 1_739_000_000_000_u64,
                "block": twice(&disk), "block_root": disk, "block_data": disk,
                "net": net, "net_eth0": net,
                "entropy": { "entropy_event_count": 10, "entropy_bytes": 10, "entropy_rate_limiter_throttled": 10 },
                "vsock": {
                    "rx_bytes_count": 10, "rx_packets_count": 10, "tx_bytes_count": 10, "tx_packets_count": 10,
                    "conns_added": 10, "conns_removed": 10,
                },
                "mmds": {
                    "rx_count": 10, "rx_accepted": 0, "rx_accepted_err": 10, "rx_no_token": 10, "rx_invalid_token": 10,
                    "tx_count": 10, "tx_frames": 10, "connections_created": 10, "connections_destroyed": 10,
                },
                "balloon": {
                    "inflate_count": 10, "deflate_count": 10, "stats_updates_count": 10,
                    "free_page_report_count": 10, "free_page_report_freed": 10,
                },
                "uart": { "read_count": 10, "write_count": 10 },
                "vcpu": {
                    "exit_io_in": 20, "exit_io_out": 20, "exit_mmio_read": 20, "exit_mmio_write": 20, "failures": 20,
                },
                "logger": { "missed_log_count": 1, "missed_metrics_count": 0, "rate_limited_log_count": 7 },
            })]
        );
    }

    #[test]
    fn each_line_tells_what_was_added_since_the_one_before() {
        let (_folder, path, mut metrics) = file(Extras::default());
        for total in [10, 25, 25] {
            metrics.write(now(), &stats(total), LOG).expect("written");
        }
        let reads: Vec<_> = lines(&path)
            .iter()
            .map(|line| line["block_root"]["read_count"].clone())
            .collect();
        assert_eq!(reads, [10, 15, 0]);
        assert_eq!(lines(&path)[1]["logger"]["rate_limited_log_count"], 0);
    }

    #[test]
    fn a_vm_that_was_built_anew_counts_from_zero() {
        let (_folder, path, mut metrics) = file(Extras::default());
        metrics.write(now(), &stats(10), LOG).expect("written");
        metrics.write(now(), &boots(2, stats(30)), LOG).expect("written");
        assert_eq!(lines(&path)[1]["vcpu"]["exit_io_in"], 60);
    }

    #[test]
    fn the_id_and_properties_are_there_if_asked_for() {
        let properties = BTreeMap::from([("customer".to_owned(), "7".to_owned())]);
        let (_folder, path, mut metrics) = file(Extras {
            id: Some("web".to_owned()),
            properties: Some(properties),
        });
        metrics.write(now(), &stats(1), LOG).expect("written");
        let line = &lines(&path)[0];
        assert_eq!(
            (&line["id"], &line["properties"]),
            (&json!("web"), &json!({ "customer": "7" }))
        );
    }

    #[test]
    fn what_a_line_that_was_not_taken_would_have_said_is_in_the_next() {
        let full = MetricsFile::open(Path::new("/dev/full"), Extras::default()).expect("it can be opened");
        let (_folder, path, mut metrics) = file(Extras::default());
        let writable = std::mem::replace(&mut metrics.file, full.file);
        metrics.write(now(), &stats(10), LOG).expect_err("no space");
        metrics.file = writable;
        metrics.write(now(), &stats(15), LOG).expect("written");
        let line = &lines(&path)[0];
        assert_eq!(line["uart"]["write_count"], 15);
        assert_eq!(line["logger"]["missed_metrics_count"], 1);
    }

    #[test]
    fn a_file_that_cannot_be_opened_is_named() {
        let error = MetricsFile::open(Path::new("/nonexistent/metrics"), Extras::default()).expect_err("no folder");
        assert_eq!(error.to_string(), "cannot write metrics to /nonexistent/metrics");
    }
}
