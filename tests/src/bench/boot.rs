//! Time from exec to the guest's user space, and what the monitor has resident by then beyond the guest's memory.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use cutover_guest::USER_SPACE_MARKER;
use tempfile::TempDir;

use super::peers::{self, CMDLINE};
use super::resident::Resident;
use super::{Contestant, Values};
use crate::Monitor;
use crate::environment::{guest_file, monitor_binary, scratch};

const MEMORY_MIB: u32 = 128;

/// Copies on tmpfs of everything a contestant reads, so that no measurement waits for a slower file system.
pub struct Stage {
    directory: TempDir,
    kernel: PathBuf,
    initrd: PathBuf,
    cutover: PathBuf,
    firecracker: Option<PathBuf>,
}

impl Stage {
    pub fn new(firecracker: Option<&Path>) -> Result<Self> {
        let directory = scratch();
        let copy = |from: &Path| {
            let to = directory.path().join(from.file_name().context("a program has a name")?);
            fs::copy(from, &to).with_context(|| format!("cannot copy {}", from.display()))?;
            Ok::<_, anyhow::Error>(to)
        };
        Ok(Self {
            kernel: copy(&guest_file("micro/vmlinux"))?,
            initrd: copy(&guest_file("micro/initrd"))?,
            cutover: copy(&monitor_binary())?,
            firecracker: firecracker.map(copy).transpose()?,
            directory,
        })
    }

    /// Cutover, QEMU, and Firecracker if it was given.
    pub fn contestants(&self) -> Vec<Contestant<'_>> {
        let mut contestants = vec![
            Contestant {
                name: "Cutover",
                measure: Box::new(|| measure(self.cutover())),
            },
            Contestant {
                name: "QEMU microvm",
                measure: Box::new(|| measure(self.qemu())),
            },
        ];
        if let Some(program) = &self.firecracker {
            contestants.push(Contestant {
                name: "Firecracker",
                measure: Box::new(|| measure(self.firecracker(program)?)),
            });
        }
        contestants
    }

    fn cutover(&self) -> Command {
        let mut command = Command::new(&self.cutover);
        command.args([
            "run",
            "--cpus",
            "1",
            "--memory",
            &format!("{MEMORY_MIB}M"),
            "--cmdline",
            CMDLINE,
        ]);
        command
            .arg("--kernel")
            .arg(&self.kernel)
            .arg("--initrd")
            .arg(&self.initrd);
        command
    }

    fn qemu(&self) -> Command {
        peers::qemu(&self.kernel, &self.initrd, MEMORY_MIB)
    }

    fn firecracker(&self, program: &Path) -> Result<Command> {
        let config = self.directory.path().join("firecracker.json");
        peers::firecracker(program, &config, &self.kernel, &self.initrd, MEMORY_MIB)
    }
}

fn measure(command: Command) -> Result<Values> {
    let start = Instant::now();
    let monitor = Monitor::start(command);
    let (mut console, _input) = monitor.take_pipes().context("a monitor is started with pipes")?;
    if let Err(error) = read_until(&mut console, USER_SPACE_MARKER) {
        bail!("{error:#}; the monitor's log: {}", monitor.log());
    }
    let time = start.elapsed();
    let resident = Resident::of(&monitor, u64::from(MEMORY_MIB) << 20)?;
    Ok(vec![
        ("user_space_ms", time.as_secs_f64() * 1e3),
        ("overhead_mib", mib(resident.overhead)),
        ("guest_resident_mib", mib(resident.guest)),
    ])
}

/// Reads up to and including `marker`.
fn read_until(console: &mut impl Read, marker: &str) -> Result<()> {
    let mut seen = Vec::new();
    let mut buffer = [0; 4096];
    loop {
        let length = console.read(&mut buffer).context("cannot read the console")?;
        if length == 0 {
            bail!(
                "the console ended before '{marker}', after: {}",
                String::from_utf8_lossy(&seen)
            );
        }
        seen.extend_from_slice(&buffer[..length]);
        if seen.windows(marker.len()).any(|window| window == marker.as_bytes()) {
            return Ok(());
        }
    }
}

fn mib(bytes: u64) -> f64 {
    // Exact up to 2^53 bytes.
    bytes as f64 / f64::from(1 << 20)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_marker_is_found_in_pieces_and_its_absence_is_an_error() {
        let mut pieces = b"noise guest: us".chain(&b"er space\nmore"[..]);
        read_until(&mut pieces, USER_SPACE_MARKER).unwrap();
        let error = read_until(&mut &b"Kernel panic"[..], USER_SPACE_MARKER).unwrap_err();
        assert!(error.to_string().contains("Kernel panic"), "{error}");
    }
}
