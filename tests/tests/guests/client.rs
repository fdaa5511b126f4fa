//! `cutover vm`: running guests, seen and steered by name.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use cutover_tests::cli::finish;
use cutover_tests::{Exit, Guest, Monitor, Vm, scratch};
use serde_json::Value;
use tempfile::TempDir;

/// A runtime directory of its own, for VMs and commands.
struct Directory(TempDir);

impl Directory {
    fn new() -> Self {
        Self(scratch())
    }

    fn path(&self) -> PathBuf {
        self.0.path().join("cutover")
    }

    /// Boots a guest under `cutover run --name NAME --api`.
    #[track_caller]
    fn boot(&self, name: &str) -> Vm {
        let directory = format!("CUTOVER_RUNTIME_DIR={}", self.path().display());
        Guest::micro()
            .through(["env", &directory])
            .arguments(["--name", name, "--api"])
            .boot()
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = self.program();
        command.arg("vm").args(arguments);
        command
    }

    /// `cutover`, to be completed with arguments.
    fn program(&self) -> Command {
        let mut command = Monitor::command();
        command.env("CUTOVER_RUNTIME_DIR", self.path());
        command
    }

    /// What `cutover vm` with these arguments prints; it must succeed.
    #[track_caller]
    fn vm(&self, arguments: &[&str]) -> String {
        printed(&mut self.command(arguments))
    }

    /// The lines of what `cutover vm` with these arguments prints, which is JSON.
    #[track_caller]
    fn json(&self, arguments: &[&str]) -> Vec<Value> {
        let arguments = [arguments, &["--json"]].concat();
        json_lines(&self.vm(&arguments))
    }

    /// Follows all events of `names` to their ends, into a file.
    fn follow(&self, names: &[&str]) -> (Child, PathBuf) {
        let path = self.0.path().join("events");
        let mut command = self.command(&["events", "--since", "0", "--json"]);
        let follower = command
            .args(names)
            .stdin(Stdio::null())
            .stdout(File::create(&path).unwrap());
        (follower.spawn().unwrap(), path)
    }
}

/// What `command` prints; it must succeed.
#[track_caller]
fn printed(command: &mut Command) -> String {
    let output = command.output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {errors}");
    String::from_utf8(output.stdout).unwrap()
}

fn json_lines(text: &str) -> Vec<Value> {
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// The value called `name` of what each VM answered.
fn answers(lines: &[Value], name: &str) -> Vec<Value> {
    lines.iter().map(|line| line["result"][name].clone()).collect()
}

/// The states that `vm` was in, and the numbers of its events.
fn history(events: &Path, vm: &str) -> (Vec<String>, Vec<u64>) {
    let events = json_lines(&std::fs::read_to_string(events).unwrap());
    let events: Vec<_> = events.iter().filter(|event| event["vm"] == vm).collect();
    let states = events.iter().filter_map(|event| event["event"]["state"].as_str());
    let sequences = events.iter().map(|event| event["event"]["sequence"].as_u64().unwrap());
    (states.map(str::to_owned).collect(), sequences.collect())
}

#[test]
fn two_guests_are_listed_paused_resumed_watched_and_shut_down_together() {
    let directory = Directory::new();
    let (web, database) = (directory.boot("web"), directory.boot("database"));
    let (mut follower, events) = directory.follow(&["web", "database"]);

    let list = directory.vm(&["list"]);
    let names: Vec<_> = list.lines().filter_map(|line| line.split_whitespace().next()).collect();
    assert_eq!(names, ["NAME", "database", "web"], "{list}");
    let info = directory.json(&["info", "web", "database"]);
    assert_eq!(answers(&info, "state"), ["running", "running"]);
    assert_eq!(answers(&info, "pid"), [web.monitor().pid(), database.monitor().pid()]);

    assert_eq!(
        directory.vm(&["pause", "--all"]),
        "database  paused\nweb       paused\n"
    );
    assert_eq!(
        answers(&directory.json(&["info", "--all"]), "state"),
        ["paused", "paused"]
    );
    directory.vm(&["resume", "web"]);
    assert_eq!(web.check("echo awake"), "awake\n");
    directory.vm(&["resume", "database"]);
    assert_eq!(database.check("echo awake"), "awake\n");

    for stats in directory.json(&["stats", "--all"]) {
        let vcpu = &stats["result"]["cpus"][0];
        assert!(
            vcpu["time_ns"].as_u64() > Some(0) && vcpu["exits"]["io_out"].as_u64() > Some(0),
            "{stats}"
        );
        assert!(
            stats["result"]["memory"]["resident_bytes"].as_u64() > Some(1 << 20),
            "{stats}"
        );
    }
    assert!(
        directory
            .vm(&["metrics", "web"])
            .contains("\ncutover_vcpu_exits_total{vcpu=\"0\",reason=\"io_out\"} ")
    );

    let down = directory.vm(&["shutdown", "--all", "--timeout", "3m"]);
    assert_eq!(down, "database  shut down\nweb       shut down\n");
    assert_eq!((web.wait(), database.wait()), (Exit::Shutdown, Exit::Shutdown));
    let followed = follower.wait().unwrap();
    assert!(followed.success(), "{}", std::fs::read_to_string(&events).unwrap());
    for vm in ["web", "database"] {
        let (states, sequences) = history(&events, vm);
        assert_eq!(
            states,
            ["running", "paused", "running", "shutting_down", "ended"],
            "{vm}"
        );
        let all: Vec<u64> = (1..=sequences.len() as u64).collect();
        assert_eq!(sequences, all, "{vm}");
    }
    assert_eq!(directory.json(&["list"]), [Value::Null; 0]);
}

#[test]
fn a_reboot_is_waited_for_and_a_vm_that_was_killed_is_forgotten() {
    let directory = Directory::new();
    let vm = directory.boot("web");
    vm.check("touch /tmp/lost");
    assert_eq!(directory.vm(&["reboot", "web", "--timeout", "3m"]), "web  rebooted\n");
    vm.wait_agent();
    assert_eq!(vm.run("test -e /tmp/lost").exit_code, 1);
    vm.kill();
    vm.wait();
    let socket = directory.path().join("web.sock");
    assert!(socket.exists(), "nobody was left to remove it");
    assert_eq!(directory.json(&["list"]), [Value::Null; 0]);
    assert!(!socket.exists());
}

#[test]
fn a_vm_is_saved_by_its_name_and_runs_again_beside_itself_under_another() {
    let (directory, store) = (Directory::new(), scratch());
    let vm = directory.boot("web");
    vm.check("echo before > /tmp/note");
    let create = |name: &str| {
        let mut command = directory.program();
        command
            .args(["snapshot", "create", "web", "--json", "--name", name, "--store"])
            .arg(store.path());
        command
    };
    let report: Value = serde_json::from_str(&printed(&mut create("s0"))).unwrap();
    assert_eq!(report["kind"], "full", "{report}");
    assert_eq!(report["path"], store.path().join("s0").display().to_string());
    vm.check("echo after > /tmp/note");
    let again = finish(create("s0"));
    assert_eq!(again.exit, Exit::Error, "{again:?}");
    assert!(again.stderr.starts_with("cutover: error: web: "), "{again:?}");

    let mut restore = directory.program();
    restore.args(["snapshot", "restore", "--name", "copy", "--api"]);
    restore.arg(store.path().join("s0"));
    let copy = Vm::start_restored(restore);
    assert_eq!(copy.check("cat /tmp/note"), "before\n");
    assert_eq!(vm.check("cat /tmp/note"), "after\n");
    let infos = directory.json(&["info", "copy", "web"]);
    assert_eq!(answers(&infos, "id"), ["copy", "web"]);
    assert_eq!(answers(&infos, "state"), ["running", "running"]);
    copy.power_off();
    assert_eq!(copy.wait(), Exit::Shutdown);
    vm.power_off();
    assert_eq!(vm.wait(), Exit::Shutdown);
}
