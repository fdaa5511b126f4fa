//! `cargo xtask test` and `cargo xtask soak`: everything that is tested, with all of its set-up.
//!
//! Unit tests run on this machine. The tests of the crate `tests` start real guests, so their binaries run where guests
//! can run: here or in one nested host, which serves them all. What runs there is this program again, in `guests`.

pub mod guests;
mod libtest;

use std::ffi::OsString;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};

use crate::workspace::{Executable, Workspace, cargo};
use crate::{guest, host, setup, ui};

/// The package whose tests start guests.
const GUEST_TESTS: &str = "cutover-tests";

/// Its test binary that holds what repeats for long.
const SOAK: &str = "soak";

/// Room for the staged images, the tests' disks and the guests' memory.
const HOST_MEMORY_MIB: u32 = 6144;

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
    let code = run_guest_tests(workspace, binaries, filter)?;
    Ok(if unit.succeeded() { code } else { 1 })
}

/// Runs the soak tests, or those whose names contain `filter`. Returns 0 if all passed.
pub fn soak(workspace: &Workspace, filter: Option<&str>) -> Result<i32> {
    setup::ensure_packages()?;
    let binaries = guest_test_binaries(workspace)?;
    run_guest_tests(
        workspace,
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
    binaries: impl Iterator<Item = Executable>,
    filter: Option<&str>,
) -> Result<i32> {
    let mut chosen = Vec::new();
    for binary in binaries {
        if libtest::has_tests(&binary.path, filter)? {
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
    ui::say("tests with real guests");
    let mut command: Vec<OsString> = vec![std::env::current_exe()?.into(), guests::COMMAND.into()];
    command.extend([
        "--monitor".into(),
        monitor.into(),
        "--guests".into(),
        workspace.guests().into(),
    ]);
    if let Some(filter) = filter {
        command.extend(["--filter".into(), filter.into()]);
    }
    command.extend(chosen.into_iter().map(OsString::from));
    let options = host::Options {
        memory_mib: HOST_MEMORY_MIB,
        ..host::Options::default()
    };
    let code = host::run_where_guests_run(workspace, &options, &command)?;
    if code > 1 {
        bail!("the tests with guests ended with exit code {code}, before they were through");
    }
    Ok(code)
}
