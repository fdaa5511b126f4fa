//! [`Vm`]: a guest that has been started.

use std::thread;

use cutover_guest::USER_SPACE_MARKER;
use cutover_guest::agent::Reply;
use rustix::process::Signal;

use crate::agent::Agent;
use crate::guest::Greeting;
use crate::{Console, Exit, GuestMemory, Monitor, Terminal};

/// How many of the last lines of console and log a failing test shows.
const REPORTED_LINES: usize = 60;

/// A guest under its monitor, killed when dropped.
pub struct Vm {
    monitor: Monitor,
    console: Console,
    agent: Agent,
}

/// What a command in the guest came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Output {
    /// Exit code as shells count: 128 and more for signals.
    pub exit_code: i32,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

impl Vm {
    /// Starts a monitor by a command put together by hand; [`Guest`](crate::Guest) does it for most tests.
    #[track_caller]
    pub fn start(command: std::process::Command) -> Self {
        let monitor = Monitor::start(command);
        let (output, input) = monitor.take_pipes().expect("a monitor is started with pipes");
        Self {
            monitor,
            console: Console::attach(output, input),
            agent: Agent::default(),
        }
    }

    /// The same for a monitor that goes on with a guest which took commands before.
    #[track_caller]
    pub fn start_restored(command: std::process::Command) -> Self {
        let mut vm = Self::start(command);
        vm.agent = Agent::of_restored();
        vm
    }

    #[track_caller]
    pub(crate) fn start_on(command: std::process::Command, terminal: &Terminal) -> Self {
        Self {
            monitor: Monitor::start_on(command, terminal.inner_end()),
            console: terminal.console(),
            agent: Agent::default(),
        }
    }

    #[track_caller]
    pub(crate) fn wait_ready(&self, greeting: Greeting) {
        match greeting {
            Greeting::Agent => self.wait_agent(),
            Greeting::LoginPrompt => self.console.wait_for("login: "),
        }
    }

    /// Waits until the guest takes commands; [`Guest::boot`](crate::Guest::boot) has done so already.
    #[track_caller]
    pub fn wait_agent(&self) {
        self.console.wait_for(USER_SPACE_MARKER);
        self.agent.wait_ready(&self.console);
    }

    /// Goes on with another console than the monitor's standard input and output.
    pub fn use_console(&mut self, console: Console) {
        self.console = console;
    }

    /// Goes on with the guest where another monitor runs it now, from some earlier moment: on its console there.
    pub(crate) fn go_on_elsewhere(&mut self, console: Console) {
        self.console = console;
        self.agent = Agent::of_restored();
    }

    /// The guest's console.
    pub fn console(&self) -> &Console {
        &self.console
    }

    /// The monitor's process.
    pub fn monitor(&self) -> &Monitor {
        &self.monitor
    }

    /// Runs a shell command in the guest.
    #[track_caller]
    pub fn run(&self, command: &str) -> Output {
        let reply = self.agent.run(&self.console, command);
        assert!(!reply.truncated, "'{command}' printed more than the agent sends");
        Output::from(reply)
    }

    /// Runs a shell command that must succeed, and returns what it printed.
    #[track_caller]
    pub fn check(&self, command: &str) -> String {
        self.run(command).success(command)
    }

    /// Has the guest run a shell command that it does not live to answer.
    #[track_caller]
    pub fn run_to_the_end(&self, command: &str) {
        self.agent.tell(&self.console, command);
    }

    /// Has the guest power itself off.
    #[track_caller]
    pub fn power_off(&self) {
        self.run_to_the_end("poweroff -f");
    }

    /// Stops every thread of the monitor, and with it the guest.
    #[track_caller]
    pub fn pause(&self) {
        self.monitor.signal(Signal::STOP);
        self.monitor.wait_stopped();
    }

    /// Lets a paused VM go on.
    #[track_caller]
    pub fn resume(&self) {
        self.monitor.signal(Signal::CONT);
    }

    /// The guest's memory as it is now; of a paused VM, so that it is of one moment.
    #[track_caller]
    pub fn memory(&self) -> GuestMemory {
        GuestMemory::read(&self.monitor)
    }

    /// Kills the monitor without warning.
    #[track_caller]
    pub fn kill(&self) {
        self.monitor.signal(Signal::KILL);
    }

    /// Waits until the monitor has ended.
    #[track_caller]
    pub fn wait(&self) -> Exit {
        self.monitor.wait()
    }

    /// What the monitor reported.
    pub fn log(&self) -> String {
        self.monitor.log()
    }
}

impl Output {
    /// What was printed by a command that must have succeeded.
    #[track_caller]
    pub(crate) fn success(self, command: &str) -> String {
        let Self {
            exit_code,
            stdout,
            stderr,
        } = self;
        assert!(exit_code == 0, "'{command}' ended with {exit_code}: {stdout}{stderr}");
        stdout
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!(
                "---- the guest's console ends with ----\n{}",
                tail(&self.console.text())
            );
            eprintln!("---- the monitor's log ends with ----\n{}", tail(&self.log()));
            if let Some(test) = thread::current().name().filter(|&name| name != "main") {
                eprintln!("---- to run just this test: cargo xtask test {test}");
            }
        }
    }
}

impl From<Reply> for Output {
    fn from(reply: Reply) -> Self {
        Self {
            exit_code: reply.exit_code,
            stdout: String::from_utf8_lossy(&reply.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&reply.stderr).into_owned(),
        }
    }
}

fn tail(text: &str) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(REPORTED_LINES)..].join("\n")
}
