//! Metrics of the migration that is under way, and of the last one, in Prometheus's text format.

use std::fmt;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::DescriptorEncoder;
use prometheus_client::registry::Unit;

use super::prometheus::{Families, seconds, signed};
use crate::server::v1::types::{MigrationEndV1, MigrationProgressV1, MigrationReportV1, MigrationStatusV1};

/// What is shown: nothing of a VM that was never migrated.
#[derive(Debug)]
pub struct Migration(pub MigrationStatusV1);

impl Collector for Migration {
    fn encode(&self, encoder: DescriptorEncoder) -> fmt::Result {
        let mut families = Families::new(encoder);
        families.gauge(
            "migration_under_way",
            "Whether the VM is being migrated",
            None,
            i64::from(self.0.under_way.is_some()),
        )?;
        if let Some(progress) = &self.0.under_way {
            encode_progress(progress, &mut families)?;
        }
        match &self.0.last {
            Some(MigrationEndV1::Moved { report }) => encode_report(report, &mut families),
            Some(MigrationEndV1::Failed { .. }) | None => Ok(()),
        }
    }
}

fn encode_progress(progress: &MigrationProgressV1, families: &mut Families<'_>) -> fmt::Result {
    families.gauge(
        "migration_round",
        "Round of sending pages, from 1",
        None,
        i64::from(progress.round),
    )?;
    families.gauge(
        "migration_pages_left",
        "Pages that this round has yet to send",
        None,
        signed(progress.pages_left),
    )?;
    families.counter(
        "migration_sent_pages",
        "Pages sent in all rounds",
        None,
        progress.pages_sent,
    )?;
    families.counter(
        "migration_sent",
        "Bytes sent, all that is on the wire",
        Some(Unit::Bytes),
        progress.bytes_sent,
    )?;
    families.gauge(
        "migration_dirty_pages_per_second",
        "Pages that the guest wrote in each second of the last round",
        None,
        signed(progress.dirty_pages_per_second),
    )?;
    if let Some(downtime) = progress.expected_downtime_ns {
        families.gauge(
            "migration_expected_downtime",
            "How long the guest would stand still if it were stopped now",
            Some(Unit::Seconds),
            seconds(downtime),
        )?;
    }
    families.gauge(
        "migration_throttle_percent",
        "How much of the time the vCPUs are made to stand still",
        None,
        i64::from(progress.throttle_percent),
    )
}

fn encode_report(report: &MigrationReportV1, families: &mut Families<'_>) -> fmt::Result {
    let downtime = &report.downtime;
    let times = [
        ("preparation", report.preparation_ns),
        ("resume", report.resume_ns),
        ("total", report.total_ns),
        ("throttled", report.throttled_ns),
    ];
    families.gauges(
        "migration_last_time",
        "How long the last migration took, by what for",
        Some(Unit::Seconds),
        times.map(|(part, time)| ([("part", part)], seconds(time))),
    )?;
    let parts = [
        ("total", downtime.total_ns),
        ("stop", downtime.stop_ns),
        ("pages", downtime.pages_ns),
        ("state", downtime.state_ns),
        ("handoff", downtime.handoff_ns),
    ];
    families.gauges(
        "migration_last_downtime",
        "How long the guest stood still in the last migration, by what for",
        Some(Unit::Seconds),
        parts.map(|(part, time)| ([("part", part)], seconds(time))),
    )?;
    let pages = &report.pages;
    let kinds = [
        ("zero", pages.zero),
        ("unchanged", pages.unchanged),
        ("delta", pages.delta),
        ("compressed", pages.compressed),
        ("raw", pages.raw),
    ];
    families.gauges(
        "migration_last_pages",
        "Pages of the last migration, by what was sent of them",
        None,
        kinds.map(|(kind, count)| ([("kind", kind)], signed(count))),
    )?;
    families.gauge(
        "migration_last_duplicate_pages",
        "Pages that the last migration sent more than once",
        None,
        signed(report.duplicate_pages),
    )?;
    families.gauge(
        "migration_last_wire",
        "Bytes of the last migration, all that was on the wire",
        Some(Unit::Bytes),
        signed(report.wire_bytes),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::log::LogCounts;
    use crate::metrics::prometheus::text;
    use crate::metrics::testing::stats;
    use crate::server::v1::types::{DowntimeV1, MigrationPhaseV1, PageCountsV1};

    fn lines(status: MigrationStatusV1) -> Vec<String> {
        let text = text("web", stats(1), status, LogCounts::default()).expect("a String takes it");
        text.lines()
            .filter(|line| line.contains("migration"))
            .map(str::to_owned)
            .collect()
    }

    fn assert_has(lines: &[String], expected: &[&str]) {
        for line in expected {
            assert!(lines.iter().any(|found| found == line), "{line}: {lines:#?}");
        }
    }

    #[test]
    fn a_vm_that_was_never_migrated_says_just_that() {
        let lines = lines(MigrationStatusV1::default());
        assert_eq!(lines.last().map(String::as_str), Some("cutover_migration_under_way 0"));
        assert_eq!(lines.len(), 3, "type, help and number: {lines:?}");
    }

    #[test]
    fn a_migration_that_is_under_way_is_seen_with_its_round_and_what_it_has_sent() {
        let progress = MigrationProgressV1 {
            phase: MigrationPhaseV1::PreCopy,
            round: 3,
            pages_sent: 1000,
            pages_left: 20,
            bytes_sent: 4096,
            bytes_per_second: 1,
            dirty_pages_per_second: 7,
            expected_downtime_ns: Some(12_000_000),
            throttle_percent: 30,
        };
        let lines = lines(MigrationStatusV1 {
            under_way: Some(progress),
            last: None,
        });
        assert_has(
            &lines,
            &[
                "cutover_migration_under_way 1",
                "cutover_migration_round 3",
                "cutover_migration_pages_left 20",
                "cutover_migration_sent_pages_total 1000",
                "cutover_migration_sent_bytes_total 4096",
                "cutover_migration_expected_downtime_seconds 0.012",
                "cutover_migration_throttle_percent 30",
            ],
        );
    }

    #[test]
    fn the_last_migration_is_seen_with_its_times_and_pages() {
        let report = MigrationReportV1 {
            downtime: DowntimeV1 {
                total_ns: 6_000_000,
                ..DowntimeV1::default()
            },
            total_ns: 1_500_000_000,
            pages: PageCountsV1 {
                delta: 5,
                ..PageCountsV1::default()
            },
            ..MigrationReportV1::default()
        };
        let lines = lines(MigrationStatusV1 {
            under_way: None,
            last: Some(MigrationEndV1::Moved { report }),
        });
        assert_has(
            &lines,
            &[
                "cutover_migration_under_way 0",
                "cutover_migration_last_time_seconds{part=\"total\"} 1.5",
                "cutover_migration_last_downtime_seconds{part=\"total\"} 0.006",
                "cutover_migration_last_pages{kind=\"delta\"} 5",
            ],
        );
    }
}
