//! Metrics in Prometheus's text format (OpenMetrics 1.0): totals with names, units, help, and labels for each part.

use std::fmt;

use cutover_vmm::VmStats;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric, text};
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::{Registry, Unit};

use super::migration::Migration;
use crate::log::LogCounts;
use crate::server::v1::types::MigrationStatusV1;

/// What the text is, for `Content-Type`.
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// What every name begins with.
const PREFIX: &str = "cutover";

/// What is shown: of one VM, at one moment.
#[derive(Debug)]
struct Snapshot {
    id: String,
    vm: VmStats,
    log: LogCounts,
}

/// The text for the VM called `id`.
///
/// # Errors
/// None: a String takes all that is written to it.
pub fn text(id: &str, vm: VmStats, migration: MigrationStatusV1, log: LogCounts) -> Result<String, fmt::Error> {
    let mut registry = Registry::with_prefix(PREFIX);
    registry.register_collector(Box::new(Snapshot {
        id: id.to_owned(),
        vm,
        log,
    }));
    registry.register_collector(Box::new(Migration(migration)));
    let mut text = String::new();
    text::encode(&mut text, &registry)?;
    Ok(text)
}

impl Collector for Snapshot {
    fn encode(&self, encoder: DescriptorEncoder) -> fmt::Result {
        let mut families = Families::new(encoder);
        self.encode_vm(&mut families)?;
        self.encode_vcpus(&mut families)?;
        self.encode_disks(&mut families)?;
        self.encode_nets(&mut families)?;
        self.encode_protection(&mut families)?;
        self.encode_others(&mut families)
    }
}

impl Snapshot {
    fn encode_vm(&self, families: &mut Families<'_>) -> fmt::Result {
        let state = self.vm.state.name().to_owned();
        let labels = [
            ("id", self.id.clone()),
            ("state", state),
            ("version", env!("CARGO_PKG_VERSION").to_owned()),
        ];
        families.gauges("vm", "Which VM this is and what it is doing", None, [(labels, 1)])?;
        families.counter(
            "vm_builds",
            "Times the VM was built: 1, and 1 more for each reboot or cycle",
            None,
            self.vm.boots,
        )?;
        families.gauge(
            "uptime",
            "Time since the VM first ran",
            Some(Unit::Seconds),
            seconds(self.vm.uptime_ns),
        )?;
        let memory = &self.vm.memory;
        families.gauge(
            "memory_size",
            "Memory the guest was given",
            Some(Unit::Bytes),
            signed(memory.size_bytes),
        )?;
        families.gauge(
            "memory_resident",
            "Guest memory that the host holds",
            Some(Unit::Bytes),
            signed(memory.resident_bytes),
        )
    }

    fn encode_vcpus(&self, families: &mut Families<'_>) -> fmt::Result {
        let vcpus = &self.vm.vcpus;
        let label = |cpu: u8| ("vcpu", cpu.to_string());
        let times = vcpus.iter().map(|vcpu| ([label(vcpu.cpu)], seconds(vcpu.cpu_time_ns)));
        families.counters(
            "vcpu_time",
            "Processor time of a vCPU's thread",
            Some(Unit::Seconds),
            times,
        )?;
        let exits = vcpus.iter().flat_map(|vcpu| {
            let exits = &vcpu.exits;
            [
                ("io_in", exits.io_in),
                ("io_out", exits.io_out),
                ("mmio_read", exits.mmio_read),
                ("mmio_write", exits.mmio_write),
                ("interrupted", exits.interrupted),
                ("failed", exits.failed),
            ]
            .map(|(reason, count)| ([label(vcpu.cpu), ("reason", reason.to_owned())], count))
        });
        families.counters(
            "vcpu_exits",
            "Times a vCPU left the guest for the monitor, by reason",
            None,
            exits,
        )
    }

    fn encode_disks(&self, families: &mut Families<'_>) -> fmt::Result {
        let disks = &self.vm.devices.disks;
        let each = |count: fn(&cutover_devices::stats::DiskStats) -> u64| {
            disks.iter().map(move |disk| ([("disk", disk.id.clone())], count(disk)))
        };
        families.counters(
            "disk_reads",
            "Read requests that succeeded",
            None,
            each(|disk| disk.reads),
        )?;
        families.counters(
            "disk_read",
            "Bytes read by the guest",
            Some(Unit::Bytes),
            each(|disk| disk.read_bytes),
        )?;
        families.counters(
            "disk_writes",
            "Write requests that succeeded",
            None,
            each(|disk| disk.writes),
        )?;
        families.counters(
            "disk_written",
            "Bytes written by the guest",
            Some(Unit::Bytes),
            each(|disk| disk.written_bytes),
        )?;
        families.counters(
            "disk_flushes",
            "Flushes that succeeded",
            None,
            each(|disk| disk.flushes),
        )?;
        families.counters(
            "disk_discards",
            "Discards and write-zeroes requests that succeeded",
            None,
            each(|disk| disk.discards),
        )?;
        families.counters("disk_failures", "Requests that failed", None, each(|disk| disk.failed))?;
        families.counters(
            "disk_throttled",
            "Times the rate limiter made the queue wait",
            None,
            each(|disk| disk.throttled),
        )
    }

    fn encode_nets(&self, families: &mut Families<'_>) -> fmt::Result {
        let nets = &self.vm.devices.nets;
        let each = |count: fn(&cutover_devices::stats::NetStats) -> u64| {
            nets.iter().map(move |net| ([("net", net.id.clone())], count(net)))
        };
        families.counters(
            "net_received_frames",
            "Frames given to the guest",
            None,
            each(|net| net.rx_frames),
        )?;
        families.counters(
            "net_received",
            "Bytes given to the guest",
            Some(Unit::Bytes),
            each(|net| net.rx_bytes),
        )?;
        families.counters(
            "net_receive_throttled",
            "Times the rate limiter kept frames for the guest waiting",
            None,
            each(|net| net.rx_throttled),
        )?;
        families.counters(
            "net_sent_frames",
            "Frames of the guest that left",
            None,
            each(|net| net.tx_frames),
        )?;
        families.counters(
            "net_sent",
            "Bytes of the guest that left",
            Some(Unit::Bytes),
            each(|net| net.tx_bytes),
        )?;
        families.counters(
            "net_send_dropped",
            "Frames of the guest that were dropped",
            None,
            each(|net| net.tx_dropped),
        )?;
        families.counters(
            "net_send_throttled",
            "Times the rate limiter kept frames of the guest waiting",
            None,
            each(|net| net.tx_throttled),
        )
    }

    /// Nothing of a VM that nobody speaks for in a group.
    fn encode_protection(&self, families: &mut Families<'_>) -> fmt::Result {
        let Some(protection) = &self.vm.protection else {
            return Ok(());
        };
        families.counter(
            "protection_checkpoints",
            "Checkpoints of the VM that were taken",
            None,
            protection.cuts,
        )?;
        families.gauge(
            "protection_lag",
            "Checkpoints of the VM that are not permanent",
            None,
            signed(protection.lag),
        )?;
        families.gauge(
            "protection_pause",
            "Time the guest stood still for the last checkpoint",
            Some(Unit::Seconds),
            seconds(protection.pause_ns),
        )?;
        families.gauge(
            "protection_changed_pages",
            "Pages of memory in the last checkpoint",
            None,
            signed(protection.dirty_pages),
        )?;
        families.gauge(
            "protection_held_frames",
            "Frames of the guest that wait until they may leave",
            None,
            signed(protection.held_frames),
        )?;
        families.gauge(
            "protection_held",
            "Bytes of frames that wait until they may leave",
            Some(Unit::Bytes),
            signed(protection.held_bytes),
        )?;
        families.counter(
            "protection_shipped",
            "Bytes sent to standbys",
            Some(Unit::Bytes),
            protection.shipped_bytes,
        )
    }

    fn encode_others(&self, families: &mut Families<'_>) -> fmt::Result {
        if let Some(rng) = &self.vm.devices.rng {
            families.counter("rng_requests", "Requests for random bytes answered", None, rng.requests)?;
            families.counter("rng", "Random bytes given to the guest", Some(Unit::Bytes), rng.bytes)?;
            families.counter(
                "rng_throttled",
                "Times the rate limiter made the guest wait",
                None,
                rng.throttled,
            )?;
        }
        if let Some(vsock) = &self.vm.devices.vsock {
            for (name, help, unit, count) in [
                (
                    "vsock_received_packets",
                    "Packets given to the guest",
                    None,
                    vsock.rx_packets,
                ),
                (
                    "vsock_received",
                    "Bytes of data given to the guest",
                    Some(Unit::Bytes),
                    vsock.rx_bytes,
                ),
                (
                    "vsock_sent_packets",
                    "Packets taken from the guest",
                    None,
                    vsock.tx_packets,
                ),
                (
                    "vsock_sent",
                    "Bytes of data taken from the guest",
                    Some(Unit::Bytes),
                    vsock.tx_bytes,
                ),
                (
                    "vsock_opened",
                    "Connections to which both ends agreed",
                    None,
                    vsock.opened,
                ),
                ("vsock_closed", "Such connections that are over", None, vsock.closed),
                (
                    "vsock_refused",
                    "Connections to which one end did not agree",
                    None,
                    vsock.refused,
                ),
            ] {
                families.counter(name, help, unit, count)?;
            }
        }
        if let Some(mmds) = &self.vm.devices.mmds {
            for (name, help, count) in [
                (
                    "mmds_received_frames",
                    "Frames of the guest for the metadata service",
                    mmds.rx_frames,
                ),
                (
                    "mmds_dropped_frames",
                    "Of these, those that it has no use or room for",
                    mmds.rx_dropped,
                ),
                ("mmds_sent_frames", "Frames of the metadata service", mmds.tx_frames),
                ("mmds_opened", "Connections to the metadata service", mmds.opened),
                ("mmds_closed", "Such connections that are over", mmds.closed),
                ("mmds_requests", "Requests answered, in whatever way", mmds.requests),
                ("mmds_no_token", "Requests for metadata without a token", mmds.no_token),
                (
                    "mmds_invalid_token",
                    "Requests for metadata with a token that is not good",
                    mmds.invalid_token,
                ),
            ] {
                families.counter(name, help, None, count)?;
            }
        }
        if let Some(balloon) = &self.vm.devices.balloon {
            for (name, help, unit, count) in [
                ("inflated", "Lists of pages put into it", None, balloon.inflated),
                ("deflated", "Lists of pages taken out", None, balloon.deflated),
                ("told", "Times the guest told", None, balloon.statistics),
                ("reports", "Lists of free pages", None, balloon.reported),
                ("reported", "Bytes of these", Some(Unit::Bytes), balloon.reported_bytes),
                (
                    "reclaimed",
                    "Bytes the host got",
                    Some(Unit::Bytes),
                    balloon.reclaimed_bytes,
                ),
            ] {
                families.counter(&format!("balloon_{name}"), help, unit, count)?;
            }
        }
        let serial = &self.vm.devices.serial;
        families.counter(
            "serial_output",
            "Bytes the guest wrote to its serial port",
            Some(Unit::Bytes),
            serial.output_bytes,
        )?;
        families.counter(
            "serial_input",
            "Bytes the guest read from its serial port",
            Some(Unit::Bytes),
            serial.input_bytes,
        )?;
        families.counter(
            "log_held_back",
            "Log messages held back because there were too many",
            None,
            self.log.held_back,
        )?;
        families.counter(
            "log_lost",
            "Log messages that could not be written",
            None,
            self.log.lost,
        )
    }
}

/// Writes families of numbers: one name, one number for each set of labels.
pub struct Families<'a>(DescriptorEncoder<'a>);

impl<'a> Families<'a> {
    /// To be written by `encoder`.
    pub fn new(encoder: DescriptorEncoder<'a>) -> Self {
        Self(encoder)
    }

    /// A number that only grows.
    ///
    /// # Errors
    /// Those of the encoder.
    pub fn counter<N>(&mut self, name: &str, help: &str, unit: Option<Unit>, number: N) -> fmt::Result
    where
        ConstCounter<N>: EncodeMetric,
    {
        self.single(name, help, unit, &ConstCounter::new(number))
    }

    /// A number.
    ///
    /// # Errors
    /// Those of the encoder.
    pub fn gauge<N>(&mut self, name: &str, help: &str, unit: Option<Unit>, number: N) -> fmt::Result
    where
        ConstGauge<N>: EncodeMetric,
    {
        self.single(name, help, unit, &ConstGauge::new(number))
    }

    fn single(&mut self, name: &str, help: &str, unit: Option<Unit>, metric: &impl EncodeMetric) -> fmt::Result {
        let encoder = self
            .0
            .encode_descriptor(name, help, unit.as_ref(), metric.metric_type())?;
        metric.encode(encoder)
    }

    fn counters<L, N>(
        &mut self,
        name: &str,
        help: &str,
        unit: Option<Unit>,
        numbers: impl IntoIterator<Item = (L, N)>,
    ) -> fmt::Result
    where
        L: EncodeLabelSet,
        ConstCounter<N>: EncodeMetric,
    {
        let numbers = numbers.into_iter();
        self.family(
            name,
            help,
            unit,
            numbers.map(|(labels, number)| (labels, ConstCounter::new(number))),
        )
    }

    /// A number for each set of labels.
    ///
    /// # Errors
    /// Those of the encoder.
    pub fn gauges<L, N>(
        &mut self,
        name: &str,
        help: &str,
        unit: Option<Unit>,
        numbers: impl IntoIterator<Item = (L, N)>,
    ) -> fmt::Result
    where
        L: EncodeLabelSet,
        ConstGauge<N>: EncodeMetric,
    {
        let numbers = numbers.into_iter();
        self.family(
            name,
            help,
            unit,
            numbers.map(|(labels, number)| (labels, ConstGauge::new(number))),
        )
    }

    fn family<L: EncodeLabelSet, M: EncodeMetric>(
        &mut self,
        name: &str,
        help: &str,
        unit: Option<Unit>,
        metrics: impl IntoIterator<Item = (L, M)>,
    ) -> fmt::Result {
        let mut metrics = metrics.into_iter().peekable();
        let Some((_, first)) = metrics.peek() else {
            return Ok(());
        };
        let mut family = self
            .0
            .encode_descriptor(name, help, unit.as_ref(), first.metric_type())?;
        for (labels, metric) in metrics {
            metric.encode(family.encode_family(&labels)?)?;
        }
        Ok(())
    }
}

/// As seconds; precise to the microsecond for the first 285 years.
#[expect(clippy::cast_precision_loss)]
pub fn seconds(nanoseconds: u64) -> f64 {
    nanoseconds as f64 / 1e9
}

/// The same number, as far as a gauge can have it.
pub fn signed(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use cutover_vmm::protection::MemberStatus;

    use super::*;
    use crate::metrics::testing::stats;

    #[test]
    fn every_number_has_a_type_a_help_and_the_labels_of_its_part() {
        let log = LogCounts { held_back: 7, lost: 1 };
        let text = text("web", stats(10), MigrationStatusV1::default(), log).expect("a String takes it");
        for line in [
            "# TYPE cutover_vcpu_exits counter",
            "# HELP cutover_vcpu_exits Times a vCPU left the guest for the monitor, by reason",
            "cutover_vcpu_exits_total{vcpu=\"1\",reason=\"mmio_write\"} 10",
            "# UNIT cutover_vcpu_time_seconds seconds",
            "cutover_vcpu_time_seconds_total{vcpu=\"0\"} 5.0",
            "cutover_disk_read_bytes_total{disk=\"data\"} 10",
            "cutover_net_sent_frames_total{net=\"eth0\"} 10",
            "cutover_memory_resident_bytes 67108864",
            "cutover_uptime_seconds 1.5",
            "cutover_log_held_back_total 7",
        ] {
            assert!(text.lines().any(|found| found == line), "{line}\n{text}");
        }
        assert!(
            text.contains("cutover_vm{id=\"web\",state=\"running\",version="),
            "{text}"
        );
        assert!(text.ends_with("# EOF\n"));
    }

    #[test]
    fn every_family_is_described_exactly_once() {
        let text =
            text("web", stats(1), MigrationStatusV1::default(), LogCounts::default()).expect("a String takes it");
        let types: Vec<_> = text.lines().filter(|line| line.starts_with("# TYPE ")).collect();
        let mut distinct = types.clone();
        distinct.sort_unstable();
        distinct.dedup();
        assert_eq!(types.len(), distinct.len());
        assert_eq!(
            types.len(),
            text.lines().filter(|line| line.starts_with("# HELP ")).count()
        );
    }

    #[test]
    fn kinds_of_devices_that_are_not_there_have_no_numbers() {
        let mut vm = stats(1);
        vm.devices.disks.clear();
        (vm.devices.rng, vm.devices.vsock, vm.devices.mmds, vm.devices.balloon) = (None, None, None, None);
        let text = text("web", vm, MigrationStatusV1::default(), LogCounts::default()).expect("a String takes it");
        assert!(
            !["disk", "rng", "vsock", "mmds", "balloon"]
                .iter()
                .any(|kind| text.contains(kind)),
            "{text}"
        );
    }

    #[test]
    fn a_protected_vm_tells_of_its_last_checkpoint() {
        let mut vm = stats(1);
        vm.protection = Some(MemberStatus {
            cuts: 12,
            pause_ns: 1_500_000,
            held_bytes: 300,
            ..MemberStatus::default()
        });
        let text = text("web", vm, MigrationStatusV1::default(), LogCounts::default()).expect("a String takes it");
        for line in [
            "cutover_protection_checkpoints_total 12",
            "cutover_protection_pause_seconds 0.0015",
            "cutover_protection_held_bytes 300",
        ] {
            assert!(text.lines().any(|found| found == line), "{line}\n{text}");
        }
    }

    #[test]
    fn text_in_labels_cannot_break_out_of_them() {
        let text =
            text("a\"}\n", stats(1), MigrationStatusV1::default(), LogCounts::default()).expect("a String takes it");
        assert!(text.contains(r#"id="a\"}\n""#), "{text}");
    }
}
