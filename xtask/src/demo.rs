//! `cargo xtask demo`: a whole Debian under `cutover run`, from nothing.
//!
//! On a terminal its console is the person's. Otherwise the demo plays one: it waits for the login prompt, logs in, looks
//! around, powers the guest off, and fails unless all of that happened.

use std::ffi::OsString;
use std::io::{IsTerminal, Read, Write};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use tempfile::TempDir;

use crate::test::guests::copy;
use crate::workspace::Workspace;
use crate::{guest, host, setup, test, ui};

/// Name of the hidden task that does the part that happens where guests can run.
pub const COMMAND: &str = "run-demo";

/// How long the guest may take for any one thing; emulation on a busy machine is slow.
const PATIENCE: Duration = Duration::from_secs(300);

const LOGIN_PROMPT: &str = "cutover login: ";
const SHELL_PROMPT: &str = "root@cutover:~# ";

/// What a visitor looks at.
const COMMANDS: [&str; 4] = [
    "uname -a",
    "systemctl is-system-running --wait",
    "grep -m 5 . /proc/cpuinfo",
    "df -h /",
];

/// What the part that happens where guests can run has to know.
#[derive(Args)]
pub struct Arguments {
    /// The `cutover` program
    #[arg(long)]
    monitor: PathBuf,
    /// The directory of the `debian` guest
    #[arg(long)]
    guest: PathBuf,
}

/// Sets everything up, then boots the guest where guests can run. Returns 0 if all went well.
pub fn demo(workspace: &Workspace) -> Result<i32> {
    setup::ensure_packages()?;
    let monitor = test::build_monitor(workspace)?;
    let guest = guest::debian::build(workspace)?;
    let command: [OsString; 6] = [
        std::env::current_exe()?.into(),
        COMMAND.into(),
        "--monitor".into(),
        monitor.into(),
        "--guest".into(),
        guest.into(),
    ];
    host::run_where_guests_run(workspace, &host::Options::default(), &command)
}

/// Boots the guest on a copy of its root file system. Returns 0 if it shut down cleanly.
pub fn run(arguments: &Arguments) -> Result<i32> {
    let scratch =
        TempDir::with_prefix_in("cutover-demo-", "/dev/shm").context("cannot create a directory in /dev/shm")?;
    let disk = scratch.path().join("root.ext4");
    ui::step("copying the guest's disk to memory", || {
        copy(&arguments.guest.join("root.ext4"), scratch.path())
    })?;
    let mut monitor = Command::new(&arguments.monitor);
    monitor
        .args(["run", "--name=demo", "--cpus=2", "--memory=768M", "--rng"])
        .arg("--kernel")
        .arg(arguments.guest.join("vmlinuz"))
        .arg("--initrd")
        .arg(arguments.guest.join("initrd"))
        .args(["--cmdline", "console=ttyS0 quiet panic=-1 root=/dev/vda rw"])
        .arg("--disk")
        .arg(format!("path={}", disk.display()));
    ui::say(format_args!("{monitor:?}"));
    let code = if std::io::stdin().is_terminal() && std::io::stdout().is_terminal() {
        ui::say("log in as root, without a password; 'poweroff' or Ctrl-A x ends the guest");
        monitor.status().context("cannot run cutover")?.code()
    } else {
        visit(&mut monitor)?
    };
    match code {
        Some(0) => {
            ui::say("the guest shut itself down");
            Ok(0)
        }
        Some(code) => {
            ui::say(format_args!("cutover ended with exit code {code}"));
            Ok(code)
        }
        None => bail!("cutover was killed by a signal"),
    }
}

/// Plays the person at the console. Returns the monitor's exit code.
fn visit(monitor: &mut Command) -> Result<Option<i32>> {
    let mut console = Console::start(monitor)?;
    ui::say("waiting for the login prompt");
    console.wait_for(LOGIN_PROMPT)?;
    console.enter("root")?;
    for command in COMMANDS {
        console.wait_for(SHELL_PROMPT)?;
        console.enter(command)?;
    }
    console.wait_for(SHELL_PROMPT)?;
    console.enter("poweroff")?;
    console.wait_for_end()
}

/// The console of a running guest: what it prints is shown, and can be waited for.
struct Console {
    monitor: Child,
    input: ChildStdin,
    output: Receiver<Vec<u8>>,
    /// What was printed and not yet matched.
    pending: Vec<u8>,
}

impl Console {
    fn start(monitor: &mut Command) -> Result<Self> {
        let mut monitor = monitor
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot run cutover")?;
        let input = monitor.stdin.take().context("cutover has no input")?;
        let mut from = monitor.stdout.take().context("cutover has no output")?;
        let (sender, output) = mpsc::channel();
        thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(length @ 1..) = from.read(&mut buffer) {
                let mut shown = std::io::stdout().lock();
                // Nobody watching is no reason to stop.
                let _ = shown.write_all(&buffer[..length]).and_then(|()| shown.flush());
                if sender.send(buffer[..length].to_vec()).is_err() {
                    return;
                }
            }
        });
        Ok(Self {
            monitor,
            input,
            output,
            pending: Vec::new(),
        })
    }

    /// Waits until the guest has printed `text`; what came before it is done with.
    fn wait_for(&mut self, text: &str) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(end) = find_end(&self.pending, text.as_bytes()) {
                self.pending.drain(..end);
                return Ok(());
            }
            match self
                .output
                .recv_timeout(deadline.saturating_duration_since(Instant::now()))
            {
                Ok(more) => self.pending.extend(more),
                Err(mpsc::RecvTimeoutError::Timeout) => bail!("no {text:?} on the console within {PATIENCE:?}"),
                Err(mpsc::RecvTimeoutError::Disconnected) => bail!("cutover ended before {text:?} was on the console"),
            }
        }
    }

    fn enter(&mut self, line: &str) -> Result<()> {
        writeln!(self.input, "{line}").context("cutover takes no more input")
    }

    /// Waits until the console is closed, which the monitor's end does.
    fn wait_for_end(mut self) -> Result<Option<i32>> {
        let deadline = Instant::now() + PATIENCE;
        while self
            .output
            .recv_timeout(deadline.saturating_duration_since(Instant::now()))
            .is_ok()
        {}
        ensure!(
            Instant::now() < deadline,
            "the guest did not power off within {PATIENCE:?}"
        );
        Ok(self.monitor.wait()?.code())
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        // Fails only if it has ended already.
        let _ = self.monitor.kill();
        let _ = self.monitor.wait();
    }
}

/// Where the first `needle` in `haystack` ends.
fn find_end(haystack: &[u8], needle: &[u8]) -> Option<usize> {
    haystack
        .windows(needle.len())
        .position(|window| window == needle)
        .map(|start| start + needle.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_console_waits_for_text_and_answers() {
        let mut echo = Command::new("sh");
        echo.args([
            "-c",
            "printf 'name: '; read name; printf \"hello $name\\n\"; read end; exit 3",
        ]);
        let mut console = Console::start(&mut echo).unwrap();
        console.wait_for("name: ").unwrap();
        console.enter("visitor").unwrap();
        console.wait_for("hello visitor").unwrap();
        console.enter("").unwrap();
        assert_eq!(console.wait_for_end().unwrap(), Some(3));
    }

    #[test]
    fn a_monitor_that_ends_early_is_reported_with_what_was_awaited() {
        let mut console = Console::start(&mut Command::new("true")).unwrap();
        let error = console.wait_for("login: ").unwrap_err();
        assert!(error.to_string().contains("login: "), "{error}");
    }

    #[test]
    fn text_is_found_wherever_it_is_split() {
        assert_eq!(find_end(b"xx login: ", b"login: "), Some(10));
        assert_eq!(find_end(b"logi", b"login: "), None);
    }
}
