//! `cargo xtask test` and `cargo xtask soak`: everything that is tested, with all of its set-up.
//!
//! Unit tests run on this machine. The tests of the crate `tests` start real guests, so their binaries run where guests
//! can run: here, or in nested hosts, which share them. What runs there is this program again, in `guests`.

pub mod guests;
mod libtest;

use std::ffi::OsString;
use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use tempfile::TempDir;

use crate::workspace::{Executable, Workspace, cargo};
use crate::{clients, guest, host, setup, ui};

/// The package whose tests start guests.
const GUEST_TESTS: &str = "cutover-tests";

/// Its test binary that holds what repeats for long.
const SOAK: &str = "soak";

/// The hosts that share the tests between them, where they are nested.
///
/// Two with one processor each use both processors of a small machine. Each has room for the staged images, the tests'
/// disks and the guests' memory, and still less than the 5 GiB that one of the guests is given.
const HOSTS: host::Options = host::Options {
    hosts: 2,
    cpus: 1,
    memory_mib: 4608,
    icount: false,
    exit_after_injection: true,
    silence_max: Some(Duration::from_secs(10 * 60)),
};

/// Runs all tests but the soak tests, or those whose names contain `filter`. Returns 0 if all passed.
pub fn test(workspace: &Workspace, filter: Option<&str>) -> Result<i32> {
    setup::ensure_packages()?;
    ui::say("unit tests");
    let unit = libtest::run(
        cargo()
            .args(["test", "--workspace", "--exclude", GUEST_TESTS, "--no-fail-fast"])
            .args(filter)
            .current_dir(&workspace.root),
    )?;
    unit.report();
    let binaries = guest_test_binaries(workspace)?;
    let binaries = binaries.into_iter().filter(|binary| binary.name != SOAK);
    let code = run_guest_tests(workspace, &HOSTS, binaries, filter)?;
    Ok(if unit.succeeded() { code } else { 1 })
}

/// Runs the soak tests, or those whose names contain `filter`. Returns 0 if all passed.
pub fn soak(workspace: &Workspace, filter: Option<&str>) -> Result<i32> {
    setup::ensure_packages()?;
    let binaries = guest_test_binaries(workspace)?;
    let hosts = host::Options {
        silence_max: None,
        ..HOSTS
    };
    run_guest_tests(
        workspace,
        &hosts,
        binaries.into_iter().filter(|binary| binary.name == SOAK),
        filter,
    )
}

/// Builds the `cutover` program as it is released: under emulation, an unoptimized one would take most of the time.
pub fn build_monitor(workspace: &Workspace) -> Result<PathBuf> {
    let programs = workspace.build(cargo().args(["build", "--release", "--package=cutover-api", "--bin=cutover"]))?;
    let monitor = programs
        .into_iter()
        .next()
        .context("cargo built no program called cutover")?;
    Ok(monitor.path)
}

fn guest_test_binaries(workspace: &Workspace) -> Result<Vec<Executable>> {
    let mut built = workspace.build(cargo().args(["test", "--release", "--no-run", "--package", GUEST_TESTS]))?;
    built.retain(|executable| executable.is_test);
    Ok(built)
}

fn run_guest_tests(
    workspace: &Workspace,
    hosts: &host::Options,
    binaries: impl Iterator<Item = Executable>,
    filter: Option<&str>,
) -> Result<i32> {
    let mut chosen = Vec::new();
    let mut later = false;
    for binary in binaries {
        let names = libtest::names(&binary.path, filter)?;
        later |= names.iter().any(|name| name.contains(guests::LATER));
        if !names.is_empty() {
            chosen.push(binary.path);
        }
    }
    if chosen.is_empty() {
        ui::say("no test with a guest has such a name");
        return Ok(0);
    }
    let monitor = build_monitor(workspace)?;
    guest::micro::build(workspace)?;
    guest::debian::build(workspace)?;
    let clients = clients::build(workspace)?;
    // The folder that nested hosts share with this machine.
    let shared = workspace.target.join("host");
    fs::create_dir_all(&shared)?;
    let legacy = TempDir::with_prefix_in("legacy-", &shared)?;
    ui::say("tests with real guests");
    let mut command: Vec<OsString> = vec![std::env::current_exe()?.into(), guests::COMMAND.into()];
    command.extend([
        "--monitor".into(),
        monitor.into(),
        "--guests".into(),
        workspace.guests().into(),
        "--clients".into(),
        clients.into(),
        "--legacy".into(),
        legacy.path().into(),
    ]);
    if let Some(filter) = filter {
        command.extend(["--filter".into(), filter.into()]);
    }
    command.extend(chosen.into_iter().map(OsString::from));
    let code = run_to_the_end(workspace, hosts, &command)?;
    if !later {
        return Ok(code);
    }
    ui::say("tests on a later host");
    command.push("--later".into());
    let one = host::Options {
        hosts: 1,
        ..hosts.clone()
    };
    Ok(code.max(run_to_the_end(workspace, &one, &command)?))
}

/// Runs guest tests; returns 0 if all passed, 1 if not.
fn run_to_the_end(workspace: &Workspace, hosts: &host::Options, command: &[OsString]) -> Result<i32> {
    let code = host::run_where_guests_run(workspace, hosts, command)?;
    if code > 1 {
        bail!("the tests with guests ended with exit code {code}, before they were through");
    }
    Ok(code)
}
