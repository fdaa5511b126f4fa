//! QEMU as it does best: compressed differences where the link is narrow, and post-copy where they are not enough.

use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use cutover_guest::USER_SPACE_MARKER;
use tempfile::TempDir;

use super::{Case, DOWNTIME_GOAL_MS, Load, MEMORY_MIB, Manner, Moved, Subject};
use crate::bench::qemu_monitor::QemuMonitor;
use crate::bench::stage::Stage;
use crate::bench::{peers, read_until};
use crate::{Monitor, Vm, scratch};

/// The distribution's.
const PROGRAM: &str = "/usr/bin/qemu-system-x86_64";
/// Where the destination listens; nobody else does in a host made for the bench.
const ADDRESS: &str = "tcp:127.0.0.1:4444";
/// Where there is no cap: 128 MiB/s, QEMU's own default, would be one.
const UNCAPPED: &str = "100G";
/// What takes longer is taken to have no end: several times what all of the guest's memory takes over the narrowest link.
const ENDLESS: Duration = Duration::from_secs(60);
/// Bytes of earlier versions that differences are made against.
const XBZRLE_CACHE: &str = "64M";

/// Boots a guest once, waiting as long as it takes, so that all of QEMU's files are in the host's memory.
pub fn warm_up(stage: &Stage) -> Result<()> {
    Stage::warm(Path::new(PROGRAM))?;
    let monitor = Monitor::start(peers::qemu(&stage.kernel, &stage.initrd, MEMORY_MIB));
    let (mut console, _input) = monitor.take_pipes().context("a monitor is started with pipes")?;
    read_until(&mut console, USER_SPACE_MARKER)
}

/// Two QEMUs.
pub struct Qemu<'a> {
    stage: &'a Stage,
    source: QemuMonitor,
    destination: QemuMonitor,
    _directory: TempDir,
}

impl<'a> Qemu<'a> {
    pub fn new(stage: &'a Stage) -> Self {
        let directory = scratch();
        Self {
            stage,
            source: QemuMonitor::at(&directory.path().join("source")),
            destination: QemuMonitor::at(&directory.path().join("destination")),
            _directory: directory,
        }
    }

    /// Waits until the migration is over, and returns what is said about it; none if that takes too long.
    fn wait_until_over(&self) -> Result<Option<String>> {
        const PAUSE: Duration = Duration::from_millis(20);
        let start = Instant::now();
        while start.elapsed() < ENDLESS {
            let info = self.source.tell("info migrate")?;
            match field(&info, "Migration status")? {
                "completed" => return Ok(Some(info)),
                "failed" | "cancelled" => bail!("QEMU has not migrated: {info}"),
                _ => sleep(PAUSE),
            }
        }
        Ok(None)
    }
}

/// Whether the guest goes first.
fn post_copy(case: &Case) -> bool {
    case.manner == Manner::PostCopy || case.load == Load::Unthrottled
}

impl Subject for Qemu<'_> {
    fn can(&self, case: &Case) -> bool {
        case.manner != Manner::HandedOver
    }

    fn boot(&mut self, _case: &Case) -> Result<Vm> {
        let mut command = peers::qemu(&self.stage.kernel, &self.stage.initrd, MEMORY_MIB);
        self.source.listen(&mut command);
        Ok(peers::boot(command))
    }

    fn receiver(&mut self, case: &Case) -> Result<Vm> {
        let mut command = peers::qemu(&self.stage.kernel, &self.stage.initrd, MEMORY_MIB);
        self.destination.listen(&mut command);
        command.args(["-incoming", "defer"]);
        let vm = Vm::start_restored(command);
        crate::poll_until("QEMU listens", || self.destination.tell("info status").ok());
        let post_copy = post_copy(case);
        for monitor in [&self.source, &self.destination] {
            if post_copy {
                monitor.tell("migrate_set_capability postcopy-ram on")?;
            } else if case.cap_mib.is_some() {
                monitor.tell("migrate_set_capability xbzrle on")?;
                monitor.tell(&format!("migrate_set_parameter xbzrle-cache-size {XBZRLE_CACHE}"))?;
            }
        }
        self.destination.tell(&format!("migrate_incoming {ADDRESS}"))?;
        let cap = case
            .cap_mib
            .map_or_else(|| UNCAPPED.to_owned(), |mib| format!("{mib}M"));
        for parameter in [
            &format!("max-bandwidth {cap}"),
            &format!("max-postcopy-bandwidth {cap}"),
            &format!("downtime-limit {DOWNTIME_GOAL_MS}"),
        ] {
            self.source.tell(&format!("migrate_set_parameter {parameter}"))?;
        }
        Ok(vm)
    }

    fn migrate(&mut self, case: &Case) -> Result<Option<Moved>> {
        self.source.tell(&format!("migrate -d {ADDRESS}"))?;
        if post_copy(case) {
            self.source.tell("migrate_start_postcopy")?;
        }
        let Some(info) = self.wait_until_over()? else {
            return Ok(None);
        };
        let number = |key| -> Result<f64> {
            let words = field(&info, key)?;
            let number = words.split(' ').next().and_then(|word| word.parse().ok());
            number.with_context(|| format!("{key}: {words}"))
        };
        Ok(Some(Moved {
            total_ms: number("total time")?,
            downtime_ms: number("downtime")?,
            sent_mib: number("transferred ram")? / 1024.0,
        }))
    }
}

/// What follows `key: ` in a line of its own.
fn field<'a>(info: &'a str, key: &str) -> Result<&'a str> {
    let value = info.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(": "));
    value
        .map(str::trim)
        .with_context(|| format!("QEMU says nothing of {key}: {info}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_told_from_others_that_end_alike() {
        let info = "globals:\r\nMigration status: completed\r\ntotal time: 354 ms\r\nexpected downtime: 1 ms\r\n\
                    downtime: 135 ms\r\n";
        assert_eq!(field(info, "downtime").unwrap(), "135 ms");
        assert_eq!(field(info, "Migration status").unwrap(), "completed");
        assert!(field(info, "setup").is_err());
    }
}
