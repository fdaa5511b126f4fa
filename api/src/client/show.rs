//! Answers of VMs as people read them.

use std::fmt::{self, Write};
use std::str::FromStr;
use std::time::Duration;

use anstyle::{AnsiColor, Style};
use cutover_snapshot::size::ByteSize;
use jiff::{SignedDuration, Timestamp};
use serde_json::Value;

use super::events::Seen;
use super::table::{Cell, Side, Table};
use crate::server::v1::types::{EventKindV1, InfoV1, SerialInfoV1, StateV1, StatsV1};
use crate::text::escaped;

/// Shown where nothing is known.
pub const UNKNOWN: &str = "-";

/// Width of the names of properties in [`info`].
const NAME_WIDTH: usize = 9;

impl fmt::Display for StateV1 {
    /// The name it has in the API.
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match serde_json::to_value(self) {
            Ok(Value::String(name)) => formatter.pad(&name),
            _ => Err(fmt::Error),
        }
    }
}

impl FromStr for StateV1 {
    type Err = serde_json::Error;

    fn from_str(text: &str) -> Result<Self, serde_json::Error> {
        serde_json::from_value(text.into())
    }
}

/// The columns of `cutover vm list`.
pub fn list_table() -> Table {
    Table::new(&[
        ("NAME", Side::Left),
        ("STATE", Side::Left),
        ("CPUS", Side::Right),
        ("MEMORY", Side::Right),
        ("PID", Side::Right),
        ("VERSION", Side::Left),
    ])
}

/// A row of [`list_table`]; of a VM that does not answer nothing but the name is known.
pub fn list_row(name: &str, info: Option<&InfoV1>) -> Vec<Cell> {
    let mut row = vec![name.into()];
    match info {
        Some(info) => row.extend([
            state(info.state),
            info.cpus.into(),
            bytes(info.memory_bytes).into(),
            info.pid.into(),
            Cell::from(&info.version),
        ]),
        None => {
            row.push(Cell::styled("no answer", AnsiColor::Red.on_default()));
            row.extend(std::iter::repeat_n(UNKNOWN.into(), 4));
        }
    }
    row
}

/// What a VM consists of, a line for each part.
pub fn info(name: &str, info: &InfoV1) -> String {
    let mut text = String::new();
    let mut line = |label: &str, value: &str| text.push_str(&format!("{label:NAME_WIDTH$} {}\n", escaped(value)));
    line("name", name);
    line("state", &info.state.to_string());
    line("id", &info.id);
    line("version", &info.version);
    line("pid", &info.pid.to_string());
    line("cpus", &info.cpus.to_string());
    line("memory", &bytes(info.memory_bytes));
    for (label, value) in [
        ("kernel", &info.kernel),
        ("initrd", &info.initrd),
        ("cmdline", &info.cmdline),
    ] {
        if let Some(value) = value {
            line(label, value);
        }
    }
    for disk in &info.disks {
        let readonly = if disk.readonly { " (read-only)" } else { "" };
        line("disk", &format!("{} {}{readonly}", disk.id, disk.path));
    }
    for net in &info.nets {
        let tap = net.tap.as_deref().unwrap_or(UNKNOWN);
        let mac = net.mac.as_deref().unwrap_or(UNKNOWN);
        line("net", &format!("{} tap {tap} mac {mac}", net.id));
    }
    line("rng", if info.rng { "yes" } else { "no" });
    if let Some(vsock) = &info.vsock {
        line("vsock", &format!("cid {} uds {}", vsock.cid, vsock.uds));
    }
    if let Some(balloon) = &info.balloon {
        let reporting = if balloon.free_page_reporting { " reporting" } else { "" };
        let amount = ByteSize::from_bytes(balloon.amount_bytes);
        line("balloon", &format!("amount {amount}{reporting}"));
    }
    line("console", &console(&info.serial));
    text
}

fn console(serial: &SerialInfoV1) -> String {
    match serial {
        SerialInfoV1::Stdio => "standard input and output of the monitor".to_owned(),
        SerialInfoV1::File { path } => format!("file {path}"),
        SerialInfoV1::Socket { path } => format!("socket {path}"),
        SerialInfoV1::Pty => "pseudo-terminal".to_owned(),
        SerialInfoV1::Null => "none".to_owned(),
    }
}

/// The counters of a VM: a summary, then a table for each kind of part it has.
pub fn stats(name: &str, stats: &StatsV1) -> String {
    let bold = Style::new().bold();
    let state = stats.state;
    let mut text = format!(
        "{bold}{name}{bold:#}: {state}, up {}, memory {} of which {} resident\n",
        time(stats.uptime_ns),
        bytes(stats.memory.size_bytes),
        bytes(stats.memory.resident_bytes)
    );
    text.push_str(&indented(&cpu_table(stats)));
    if !stats.disks.is_empty() {
        text.push_str(&indented(&disk_table(stats)));
    }
    if !stats.nets.is_empty() {
        text.push_str(&indented(&net_table(stats)));
    }
    text
}

fn cpu_table(stats: &StatsV1) -> Table {
    let mut table = Table::new(&[("VCPU", Side::Right), ("TIME", Side::Right), ("EXITS", Side::Left)]);
    for cpu in &stats.cpus {
        let exits = cpu.exits.iter().map(|(reason, count)| format!("{reason} {count}"));
        let exits = exits.collect::<Vec<_>>().join(", ");
        table.row([cpu.cpu.into(), time(cpu.time_ns).into(), exits.into()]);
    }
    table
}

fn disk_table(stats: &StatsV1) -> Table {
    let mut table = Table::new(&[
        ("DISK", Side::Left),
        ("READS", Side::Right),
        ("READ", Side::Right),
        ("WRITES", Side::Right),
        ("WRITTEN", Side::Right),
        ("FLUSHES", Side::Right),
        ("FAILED", Side::Right),
        ("THROTTLED", Side::Right),
    ]);
    for disk in &stats.disks {
        table.row([
            Cell::from(&disk.id),
            disk.reads.into(),
            bytes(disk.read_bytes).into(),
            disk.writes.into(),
            bytes(disk.written_bytes).into(),
            disk.flushes.into(),
            disk.failed.into(),
            disk.throttled.into(),
        ]);
    }
    table
}

fn net_table(stats: &StatsV1) -> Table {
    let mut table = Table::new(&[
        ("NET", Side::Left),
        ("FRAMES IN", Side::Right),
        ("IN", Side::Right),
        ("FRAMES OUT", Side::Right),
        ("OUT", Side::Right),
        ("DROPPED", Side::Right),
        ("THROTTLED", Side::Right),
    ]);
    for net in &stats.nets {
        table.row([
            Cell::from(&net.id),
            net.rx_frames.into(),
            bytes(net.rx_bytes).into(),
            net.tx_frames.into(),
            bytes(net.tx_bytes).into(),
            net.tx_dropped.into(),
            (net.rx_throttled + net.tx_throttled).into(),
        ]);
    }
    table
}

fn indented(table: &Table) -> String {
    table.render().lines().map(|line| format!("  {line}\n")).collect()
}

/// An event on a line.
pub fn event(name: &str, event: &Seen) -> String {
    let faint = Style::new().dimmed();
    let time = Timestamp::from_nanosecond(event.unix_time_ns.into()).ok();
    let time = time.map_or_else(|| UNKNOWN.to_owned(), |time| format!("{time:.3}"));
    if event.kind == EventKindV1::Gap {
        let yellow = AnsiColor::Yellow.on_default();
        let sequence = event.sequence;
        return format!("{faint}{time}{faint:#} {name} {yellow}gap: the events up to {sequence} are lost{yellow:#}\n");
    }
    let kind = escaped(event.json.get("kind").and_then(Value::as_str).unwrap_or(UNKNOWN));
    let mut text = format!("{faint}{time}{faint:#} {name} {} {kind}", event.sequence);
    for (key, value) in event.json.as_object().into_iter().flatten() {
        if !matches!(key.as_str(), "sequence" | "unix_time_ns" | "kind") {
            let value = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
            let _ = write!(text, " {}={}", escaped(key), escaped(&value));
        }
    }
    text + "\n"
}

/// A state in the colour of its urgency.
pub fn state(state: StateV1) -> Cell {
    let colour = match state {
        StateV1::Running => AnsiColor::Green,
        StateV1::Ended => AnsiColor::Red,
        _ => AnsiColor::Yellow,
    };
    Cell::styled(state.to_string(), colour.on_default())
}

/// A number of bytes, to three digits or so.
pub fn bytes(count: u64) -> String {
    const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
    if count < 1024 {
        return format!("{count} B");
    }
    // Precise enough for people.
    #[expect(clippy::cast_precision_loss)]
    let mut number = count as f64 / 1024.0;
    let mut unit = 0;
    while number >= 1024.0 && unit + 1 < UNITS.len() {
        number /= 1024.0;
        unit += 1;
    }
    let decimals = usize::from(number < 100.0 && number.fract() != 0.0);
    format!("{number:.decimals$} {}", UNITS[unit])
}

/// A time, to the hundredth of a second while that matters.
pub fn time(nanoseconds: u64) -> String {
    let duration = SignedDuration::from_nanos(i64::try_from(nanoseconds).unwrap_or(i64::MAX));
    if duration.as_secs() < 60 {
        format!("{:.2}s", duration.as_secs_f64())
    } else {
        format!("{:#}", SignedDuration::from_secs(duration.as_secs()))
    }
}

/// A time in milliseconds, for what is short.
pub fn milliseconds(nanoseconds: u64) -> String {
    let milliseconds = Duration::from_nanos(nanoseconds).as_secs_f64() * 1000.0;
    format!("{milliseconds:.2} ms")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_short() {
        for (count, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1 KiB"),
            (1536, "1.5 KiB"),
            (256 << 20, "256 MiB"),
            ((3 << 30) + (1 << 29), "3.5 GiB"),
            (150 << 40, "150 TiB"),
            (u64::MAX, "16384 PiB"),
        ] {
            assert_eq!(bytes(count), text);
        }
    }

    #[test]
    fn times_are_short() {
        for (nanoseconds, text) in [
            (0, "0.00s"),
            (1_234_567_890, "1.23s"),
            (61_000_000_000, "1m 1s"),
            (90_061_500_000_000, "25h 1m 1s"),
        ] {
            assert_eq!(time(nanoseconds), text);
        }
    }

    #[test]
    fn every_state_is_written_and_read_by_its_name_in_the_api() {
        assert_eq!(StateV1::ShuttingDown.to_string(), "shutting_down");
        assert_eq!(
            "shutting_down".parse::<StateV1>().expect("a state"),
            StateV1::ShuttingDown
        );
        assert!("asleep".parse::<StateV1>().is_err());
    }

    #[test]
    fn an_event_is_one_line_whatever_is_in_it() {
        let json = serde_json::json!({
            "sequence": 7, "unix_time_ns": 1_500_000_000_u64, "kind": "device_failed", "device": "disk0", "reason": "a\n\u{1b}[2Jb", "queue": 3,
        });
        let seen = Seen {
            sequence: 7,
            unix_time_ns: 1_500_000_000,
            kind: EventKindV1::Unknown,
            json,
        };
        let faint = Style::new().dimmed();
        assert_eq!(
            event("web", &seen),
            format!(
                "{faint}1970-01-01T00:00:01.500Z{faint:#} web 7 device_failed device=disk0 queue=3 \
                 reason=a\\n\\u{{1b}}[2Jb\n"
            )
        );
    }
}
