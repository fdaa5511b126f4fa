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

use self::guests::Setting;
use crate::workspace::{Executable, Workspace, cargo};
use crate::{clients, guest, host, setup, ui};

/// The package whose tests start guests.
const GUEST_TESTS: &str = "cutover-tests";

/// Its program by which a test runs others on another host.
const ON_OTHER_HOST: &str = "on-other-host";

/// Its test binary that holds what repeats for long.
const SOAK: &str = "soak";

/// Its test binary that is there to be watched.
const DEMONSTRATION: &str = "demonstration";

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
    first_leads: false,
};

/// Two hosts for the tests that need two, joined by a network. The tests run on the first; the second runs programs for
/// them. Nested also where the machine itself can run guests: it is one host.
const JOINED_HOSTS: host::Options = host::Options {
    memory_mib: 3072,
    first_leads: true,
    ..HOSTS
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
    let tests = GuestTests::build(workspace, |name| ![SOAK, DEMONSTRATION].contains(&name))?;
    let code = run_guest_tests(workspace, &HOSTS, &tests, filter, Shown::OfFailures)?;
    Ok(if unit.succeeded() { code } else { 1 })
}

/// Runs the soak tests, or those whose names contain `filter`. Returns 0 if all passed.
pub fn soak(workspace: &Workspace, filter: Option<&str>) -> Result<i32> {
    setup::ensure_packages()?;
    let tests = GuestTests::build(workspace, |name| name == SOAK)?;
    let hosts = host::Options {
        silence_max: None,
        ..HOSTS
    };
    run_guest_tests(workspace, &hosts, &tests, filter, Shown::OfFailures)
}

/// Shows a group of guests that loses a host. Returns 0 if it went on.
pub fn demonstrate(workspace: &Workspace) -> Result<i32> {
    setup::ensure_packages()?;
    let tests = GuestTests::build(workspace, |name| name == DEMONSTRATION)?;
    run_guest_tests(workspace, &HOSTS, &tests, None, Shown::All)
}

/// What is shown of what tests print.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Shown {
    /// That of those that fail.
    OfFailures,
    /// All, at once.
    All,
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

/// Programs that test with guests.
struct GuestTests {
    binaries: Vec<Executable>,
    /// By which a test runs others on another host.
    on_other_host: PathBuf,
}

impl GuestTests {
    /// Builds them, and of the test binaries keeps those whose names are `wanted`.
    fn build(workspace: &Workspace, wanted: impl Fn(&str) -> bool) -> Result<Self> {
        let mut binaries =
            workspace.build(cargo().args(["test", "--release", "--no-run", "--package", GUEST_TESTS]))?;
        let on_other_host = binaries
            .iter()
            .find(|built| !built.is_test && built.name == ON_OTHER_HOST)
            .with_context(|| format!("cargo built no program called {ON_OTHER_HOST}"))?;
        let on_other_host = on_other_host.path.clone();
        binaries.retain(|built| built.is_test && wanted(&built.name));
        Ok(Self {
            binaries,
            on_other_host,
        })
    }
}

fn run_guest_tests(
    workspace: &Workspace,
    hosts: &host::Options,
    tests: &GuestTests,
    filter: Option<&str>,
    shown: Shown,
) -> Result<i32> {
    let mut chosen = Vec::new();
    let mut settings = Vec::new();
    for binary in &tests.binaries {
        let names = libtest::names(&binary.path, filter)?;
        settings.extend(names.iter().map(|name| Setting::of(name)));
        if !names.is_empty() {
            chosen.push(OsString::from(&binary.path));
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
        "--on-other-host".into(),
        tests.on_other_host.clone().into(),
    ]);
    if let Some(filter) = filter {
        command.extend(["--filter".into(), filter.into()]);
    }
    if shown == Shown::All {
        command.push("--show".into());
    }
    command.extend(chosen);
    let mut worst = 0;
    for setting in [Setting::Any, Setting::Later, Setting::Joined] {
        if settings.contains(&setting) {
            let arguments = ["--setting", setting.name()].map(OsString::from);
            let command = [&command[..], &arguments].concat();
            worst = worst.max(run_in(workspace, setting, hosts, &command)?);
        }
    }
    Ok(worst)
}

/// Runs guest tests on the hosts they need; returns 0 if all passed, 1 if not.
fn run_in(workspace: &Workspace, setting: Setting, hosts: &host::Options, command: &[OsString]) -> Result<i32> {
    let code = match setting {
        Setting::Any => {
            ui::say("tests with real guests");
            host::run_where_guests_run(workspace, hosts, command)?
        }
        Setting::Later => {
            ui::say("tests on a later host");
            let one = host::Options {
                hosts: 1,
                ..hosts.clone()
            };
            host::run_where_guests_run(workspace, &one, command)?
        }
        Setting::Joined => {
            ui::say("tests between two hosts");
            host::run_nested(workspace, &JOINED_HOSTS, command)?
        }
    };
    if code > 1 {
        bail!("the tests with guests ended with exit code {code}, before they were through");
    }
    Ok(code)
}
