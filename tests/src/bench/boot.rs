//! Time from exec to the guest's user space, and what the monitor has resident by then beyond the guest's memory.

use std::path::Path;
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use cutover_guest::USER_SPACE_MARKER;

use super::peers::{self, CMDLINE};
use super::resident::Resident;
use super::stage::Stage;
use super::{Contestant, Values, mib, read_until};
use crate::Monitor;

const MEMORY_MIB: u32 = 128;

/// Cutover, QEMU, and Firecracker if it was given.
pub fn contestants(stage: &Stage) -> Vec<Contestant<'_>> {
    let mut contestants = vec![
        Contestant {
            name: "Cutover",
            measure: Box::new(|| measure(cutover(stage)?)),
        },
        Contestant {
            name: "QEMU microvm",
            measure: Box::new(|| measure(peers::qemu(&stage.kernel, &stage.initrd, MEMORY_MIB))),
        },
    ];
    if let Some(program) = &stage.firecracker {
        contestants.push(Contestant {
            name: "Firecracker",
            measure: Box::new(|| measure(firecracker(stage, program)?)),
        });
    }
    contestants
}

fn cutover(stage: &Stage) -> Result<Command> {
    let mut command = stage.command(&stage.cutover)?;
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
        .arg(&stage.kernel)
        .arg("--initrd")
        .arg(&stage.initrd);
    Ok(command)
}

fn firecracker(stage: &Stage, program: &Path) -> Result<Command> {
    let config = stage.directory().join("firecracker.json");
    let mut command = stage.command(program)?;
    peers::add_firecracker_arguments(&mut command, &config, &stage.kernel, &stage.initrd, MEMORY_MIB)?;
    Ok(command)
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
