//! Where virtual machines can run: on this machine, or in a nested host.
//!
//! Without hardware virtualization, QEMU's emulator provides it: a Linux booted under it has a real `/dev/kvm`. That
//! *nested host* sees the machine's files through 9p and runs the same programs, so what works here works there.

mod exit_after_injection;
mod image;
mod qemu;
mod run;
mod switch;

use std::ffi::OsString;
use std::fs::OpenOptions;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::setup;
use crate::ui;
use crate::workspace::Workspace;

/// What kind of nested hosts a command is to run on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// How many hosts; more than one are joined by a network.
    pub hosts: u8,
    /// Memory of each, in MiB.
    pub memory_mib: u32,
    /// Processors of each. One is sound; with more, about one guest in fifty met a triple fault or hung, before the
    /// fault of the emulator that [`exit_after_injection`] mends was known.
    pub cpus: u8,
    /// Let the host's clock count instructions, so that timing repeats.
    pub icount: bool,
    /// Have every guest exit right after an interrupt was injected (see `exit_after_injection`): safe, but a cost that
    /// real processors do not know, and one that hits some monitors more than others.
    pub exit_after_injection: bool,
    /// How long a host may print nothing before it is taken for hung and ended.
    pub silence_max: Option<Duration>,
    /// The run is over when the first host is done. The others serve it, start again when they fail, and are ended then.
    pub first_leads: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            hosts: 1,
            memory_mib: 4096,
            cpus: 1,
            icount: false,
            exit_after_injection: true,
            silence_max: None,
            first_leads: false,
        }
    }
}

/// Whether this machine itself can run virtual machines, and if not, why.
pub fn machine_runs_guests() -> Result<(), String> {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    if !has_virtualization_flag(&info) {
        return Err("the processor shows neither vmx nor svm".to_owned());
    }
    OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .map(drop)
        .map_err(|error| format!("/dev/kvm: {error}"))
}

fn has_virtualization_flag(cpuinfo: &str) -> bool {
    cpuinfo
        .lines()
        .filter(|line| line.starts_with("flags"))
        .flat_map(str::split_whitespace)
        .any(|flag| flag == "vmx" || flag == "svm")
}

/// Runs `command` where virtual machines can run: here, or in one nested host. Returns its exit code.
pub fn run_where_guests_run(workspace: &Workspace, options: &Options, command: &[OsString]) -> Result<i32> {
    match machine_runs_guests() {
        Ok(()) => {
            ui::say("running on this machine: it has hardware virtualization");
            run_here(command)
        }
        Err(reason) => {
            ui::say(format_args!("running in a nested host: {reason}"));
            run_nested(workspace, options, command)
        }
    }
}

/// Runs `command` in nested hosts, whatever this machine can do. Returns the first exit code that is not 0.
///
/// Without a command, it is an interactive shell. The command has this process's environment and working directory,
/// and `CUTOVER_HOST` (its number, from 1), `CUTOVER_HOSTS` (how many there are) and `CUTOVER_OUT` (the one folder
/// where what it writes is kept).
pub fn run_nested(workspace: &Workspace, options: &Options, command: &[OsString]) -> Result<i32> {
    setup::ensure_packages()?;
    let image = image::build(workspace)?;
    run::run(workspace, &image, options, command)
}

fn run_here(command: &[OsString]) -> Result<i32> {
    let shell = [std::env::var_os("SHELL").unwrap_or_else(|| "/bin/sh".into())];
    let words = if command.is_empty() { &shell } else { command };
    let status = Command::new(&words[0])
        .args(&words[1..])
        .status()
        .with_context(|| format!("cannot run {}", Path::new(&words[0]).display()))?;
    match status.code() {
        Some(code) => Ok(code),
        None => bail!("{} was ended: {status}", Path::new(&words[0]).display()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn virtualization_is_read_from_the_processors_flags() {
        assert!(has_virtualization_flag("model name : x\nflags\t\t: fpu vmx sse\n"));
        assert!(has_virtualization_flag("flags\t\t: fpu svm\n"));
        assert!(!has_virtualization_flag(
            "model name : vmx svm\nflags\t\t: fpu sse hypervisor\n"
        ));
    }
}
