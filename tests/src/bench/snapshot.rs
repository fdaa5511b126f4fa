//! What a snapshot costs its guest, by the size of its memory and by what it wrote since the last one, idle and at work;
//! and how soon a VM made of one gives a sign of life.
//!
//! Every guest has nearly all of its memory in use, with content that is not zero. Everybody's files are in the host's
//! memory.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::json;
use tempfile::TempDir;

use super::api::median;
use super::peers::{self, CMDLINE};
use super::qemu_monitor::QemuMonitor;
use super::stage::Stage;
use super::{Contestant, Values, mib};
use crate::{Api, Vm, scratch};

/// One size of guests, and what is measured with it.
struct Size {
    memory_mib: u32,
    /// MiB of it that the guest's program fills.
    filled_mib: u32,
    pause: &'static str,
    total: &'static str,
    bytes: &'static str,
    restore: &'static str,
    /// If it is measured how much slower the guest works while a full snapshot is made.
    slowdown: Option<&'static str>,
}

/// From the smallest guest to the largest that the host has room for, with its snapshot beside it.
const SIZES: [Size; 3] = [
    Size {
        memory_mib: 128,
        filled_mib: 32,
        pause: "full_pause_128_ms",
        total: "full_total_128_ms",
        bytes: "full_bytes_128_mib",
        restore: "restore_128_ms",
        slowdown: None,
    },
    Size {
        memory_mib: 512,
        filled_mib: 384,
        pause: "full_pause_512_ms",
        total: "full_total_512_ms",
        bytes: "full_bytes_512_mib",
        restore: "restore_512_ms",
        slowdown: Some("full_slowdown_512_percent"),
    },
    Size {
        memory_mib: 2048,
        filled_mib: 1800,
        pause: "full_pause_2048_ms",
        total: "full_total_2048_ms",
        bytes: "full_bytes_2048_mib",
        restore: "restore_2048_ms",
        slowdown: None,
    },
];

/// MiB written between two incremental snapshots of the guest of each size, and what the second one's pause is called.
const WRITTEN: [(u32, [&str; SIZES.len()]); 3] = [
    (
        0,
        ["diff_0_pause_128_ms", "diff_0_pause_512_ms", "diff_0_pause_2048_ms"],
    ),
    (
        16,
        ["diff_16_pause_128_ms", "diff_16_pause_512_ms", "diff_16_pause_2048_ms"],
    ),
    (64, ["", "diff_64_pause_512_ms", "diff_64_pause_2048_ms"]),
];

/// The pause of an incremental snapshot of a large guest that has written nothing: to look through the dirty log of all its
/// memory is most of that.
const LARGE_PAUSE: &str = "diff_0_pause_4096_ms";
const LARGE_MIB: u32 = 4096;

/// Restores of each snapshot that count.
const RESTORES: usize = 5;

/// Restores before these: Cutover notes what a guest wants first.
const REHEARSALS: usize = 2;
/// How often a guest that is rehearsed says something before it ends; it takes a few until it is noted.
const REHEARSED_TICKS: usize = 20;

/// The time of the first restore of all of a guest of the least size.
const FIRST_RESTORE: &str = "restore_first_ms";
/// The time of the last of a chain of that guest.
const CHAIN_RESTORE: &str = "restore_chain_ms";
/// Snapshots of the chain, and what the guest does between them.
const CHAIN: usize = 10;
const BETWEEN: &str = "head -c 1m /dev/urandom > /tmp/written";

/// What a guest with a ticker says.
const TICK: &str = ".";

/// Has the guest ready for its work.
const PREPARE_WORK: &str = "rm -f /tmp/written; head -c 24m /dev/urandom > /tmp/source; cp /tmp/source /tmp/target";
/// Work of the guest: it rewrites the same 24 MiB over and over, for longer than any full snapshot of it takes.
const WORK: &str =
    "for pass in $(seq 150); do dd if=/tmp/source of=/tmp/target bs=1M conv=notrunc 2>/dev/null || exit 1; done";

/// What became of a snapshot.
struct Made {
    pause_ms: f64,
    total_ms: f64,
    bytes: u64,
}

/// A monitor that makes snapshots.
trait Subject {
    /// Starts a guest.
    fn boot(&mut self, memory_mib: u32) -> Result<Vm>;
    /// Makes a snapshot of it: the first one, or what has changed since.
    fn snapshot(&mut self, full: bool) -> Result<Made>;
}

/// One that makes VMs of them.
trait Restorer: Subject {
    /// The command that starts the monitor for that.
    fn command(&self) -> Result<Command>;
    /// Starts a VM of the last snapshot with it.
    fn restore(&mut self, command: Command) -> Result<Vm>;
}

/// Snapshots: Cutover, QEMU, and Firecracker if it was given.
pub fn makers(stage: &Stage) -> Vec<Contestant<'_>> {
    let mut contestants = vec![
        Contestant {
            name: "Cutover",
            measure: Box::new(|| {
                let mut values = make(|| Cutover::new(stage, &[]), &[true, false])?;
                values.push((LARGE_PAUSE, large_pause(&mut Cutover::new(stage, &[])?)?));
                Ok(values)
            }),
        },
        Contestant {
            name: "QEMU microvm",
            measure: Box::new(|| make(|| Qemu::new(stage), &[true])),
        },
    ];
    if let Some(program) = &stage.firecracker {
        contestants.push(Contestant {
            name: "Firecracker",
            measure: Box::new(move || make(|| Firecracker::new(stage, program), &[true, false])),
        });
    }
    contestants
}

/// Restores: Cutover as it is and with the snapshot trusted, and Firecracker, which always trusts, if it was given.
pub fn restorers(stage: &Stage) -> Vec<Contestant<'_>> {
    let mut contestants = vec![
        Contestant {
            name: "Cutover",
            measure: Box::new(|| restore(|| Cutover::new(stage, &[]), true)),
        },
        Contestant {
            name: "Cutover --trusted",
            measure: Box::new(|| restore(|| Cutover::new(stage, &["--trusted"]), true)),
        },
    ];
    if let Some(program) = &stage.firecracker {
        contestants.push(Contestant {
            name: "Firecracker",
            measure: Box::new(move || restore(|| Firecracker::new(stage, program), false)),
        });
    }
    contestants
}

/// Starts a guest of this size with its memory in use.
fn fill(subject: &mut impl Subject, size: &Size) -> Result<Vm> {
    let vm = subject.boot(size.memory_mib)?;
    // The writer holds memory, and the guest is idle.
    vm.check(&format!("page-writer start {} 64", size.filled_mib));
    vm.check("page-writer verdict && killall -STOP page-writer");
    Ok(vm)
}

/// Measures full snapshots, and incremental ones if there are such.
fn make<S: Subject + Send>(new: impl Fn() -> Result<S>, kinds: &[bool]) -> Result<Values> {
    let mut values = Values::new();
    for (number, size) in SIZES.iter().enumerate() {
        let mut subject = new()?;
        let vm = fill(&mut subject, size)?;
        let full = subject.snapshot(true)?;
        values.extend([
            (size.pause, full.pause_ms),
            (size.total, full.total_ms),
            (size.bytes, mib(full.bytes)),
        ]);
        if kinds.contains(&false) {
            // What making the first one has changed is no matter of the second.
            subject.snapshot(false)?;
            for (written_mib, names) in WRITTEN {
                if !names[number].is_empty() {
                    vm.check(&format!("head -c {written_mib}m /dev/urandom > /tmp/written"));
                    values.push((names[number], subject.snapshot(false)?.pause_ms));
                }
            }
        }
        if let Some(name) = size.slowdown {
            values.push((name, slowdown(&mut subject, &vm)?));
        }
    }
    Ok(values)
}

/// Measures the pause of an idle guest that is large, but has touched little of its memory.
fn large_pause(subject: &mut impl Subject) -> Result<f64> {
    let _vm = subject.boot(LARGE_MIB)?;
    subject.snapshot(true)?;
    // What making the first one has changed is no matter of the second.
    subject.snapshot(false)?;
    Ok(subject.snapshot(false)?.pause_ms)
}

/// By how much the guest is slower while a full snapshot is made, in percent: 100 if it stands still.
fn slowdown(subject: &mut (impl Subject + Send), vm: &Vm) -> Result<f64> {
    let work = || {
        let start = Instant::now();
        vm.check(WORK);
        milliseconds(start)
    };
    vm.check(PREPARE_WORK);
    let alone = work();
    let (made, disturbed) = thread::scope(|scope| {
        let made = scope.spawn(|| subject.snapshot(true));
        let disturbed = work();
        (made.join().expect("a panic is that of this measurement"), disturbed)
    });
    let made = made?;
    ensure!(
        made.total_ms < disturbed,
        "a snapshot that takes {} ms is longer than the guest's work of {disturbed} ms",
        made.total_ms
    );
    Ok((disturbed - alone) / made.total_ms * 100.0)
}

/// Measures restores of guests that say something every 10 ms, up to the first that is heard: the median of several from
/// the same snapshot, and the first of the smallest guest. Also of the last of a chain, if there can be `chains`.
fn restore<S: Restorer>(new: impl Fn() -> Result<S>, chains: bool) -> Result<Values> {
    let mut values = Values::new();
    let whole = SIZES.iter().map(|size| (size, size.restore, 1));
    let chain = chains.then_some((&SIZES[0], CHAIN_RESTORE, CHAIN));
    for (size, name, snapshots) in whole.chain(chain) {
        let mut subject = new()?;
        let vm = fill(&mut subject, size)?;
        vm.check("ticker > /dev/console &");
        subject.snapshot(true)?;
        for _ in 1..snapshots {
            vm.check(BETWEEN);
            subject.snapshot(false)?;
        }
        drop(vm);
        let mut first = None;
        for _ in 0..REHEARSALS {
            let (restored, time) = restore_once(&mut subject)?;
            (0..REHEARSED_TICKS).for_each(|_| restored.console().wait_for(TICK));
            first.get_or_insert(time);
        }
        if let Some(first) = first.filter(|_| name == SIZES[0].restore) {
            values.push((FIRST_RESTORE, first.as_secs_f64() * 1e3));
        }
        let times: Result<_> = (0..RESTORES).map(|_| Ok(restore_once(&mut subject)?.1)).collect();
        values.push((name, median(times?).as_secs_f64() * 1e3));
    }
    Ok(values)
}

/// A VM of the last snapshot, and the time from the monitor's start until it was heard.
fn restore_once(subject: &mut impl Restorer) -> Result<(Vm, Duration)> {
    let command = subject.command()?;
    let start = Instant::now();
    let restored = subject.restore(command)?;
    restored.console().wait_for(TICK);
    Ok((restored, start.elapsed()))
}

fn milliseconds(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1e3
}

/// Starts `command`, a monitor with Firecracker's API at `api`, and a guest in it.
fn boot_by_api(stage: &Stage, command: Command, api: &Api, memory_mib: u32) -> Vm {
    let vm = Vm::start(command);
    api.wait_ready();
    api.put(
        "/boot-source",
        &json!({ "kernel_image_path": stage.kernel, "initrd_path": stage.initrd, "boot_args": CMDLINE }),
    );
    api.put(
        "/machine-config",
        &json!({ "vcpu_count": 1, "mem_size_mib": memory_mib, "track_dirty_pages": true }),
    );
    api.put("/actions", &json!({ "action_type": "InstanceStart" }));
    vm.wait_agent();
    vm
}

/// Cutover, live.
struct Cutover<'a> {
    stage: &'a Stage,
    /// Further arguments of a restore.
    arguments: &'a [&'a str],
    directory: TempDir,
    api: Api,
    snapshots: u32,
}

impl<'a> Cutover<'a> {
    fn new(stage: &'a Stage, arguments: &'a [&'a str]) -> Result<Self> {
        let directory = scratch();
        Ok(Self {
            stage,
            arguments,
            api: Api::new(&directory.path().join("api")),
            directory,
            snapshots: 0,
        })
    }
}

impl Subject for Cutover<'_> {
    fn boot(&mut self, memory_mib: u32) -> Result<Vm> {
        let mut command = self.stage.command(&self.stage.cutover)?;
        command.args(["vmm", "--api-sock"]).arg(self.api.socket());
        Ok(boot_by_api(self.stage, command, &self.api, memory_mib))
    }

    fn snapshot(&mut self, full: bool) -> Result<Made> {
        let name = format!("s{}", self.snapshots);
        self.snapshots += 1;
        let kind = if full { "full" } else { "incremental" };
        let body = json!({ "store": self.directory.path(), "name": name, "kind": kind, "disks": "referenced" });
        let report = self.api.request("POST", "/v1/snapshots", Some(&body)).success().json();
        ensure!(report["method"] == "copy_on_write", "not made live: {report}");
        let number = |key: &str| report[key].as_u64().with_context(|| format!("{key} in {report}"));
        Ok(Made {
            pause_ms: number("pause_ns")? as f64 / 1e6,
            total_ms: number("total_ns")? as f64 / 1e6,
            bytes: number("file_bytes")?,
        })
    }
}

impl Restorer for Cutover<'_> {
    fn command(&self) -> Result<Command> {
        let mut command = self.stage.command(&self.stage.cutover)?;
        let last = self.directory.path().join(format!("s{}", self.snapshots - 1));
        command.args(["snapshot", "restore"]).arg(last).args(self.arguments);
        Ok(command)
    }

    fn restore(&mut self, command: Command) -> Result<Vm> {
        Ok(Vm::start_restored(command))
    }
}

/// Firecracker, whose guest is paused for each snapshot.
struct Firecracker<'a> {
    stage: &'a Stage,
    program: &'a Path,
    directory: TempDir,
    api: Api,
}

impl<'a> Firecracker<'a> {
    fn new(stage: &'a Stage, program: &'a Path) -> Result<Self> {
        let directory = scratch();
        Ok(Self {
            stage,
            program,
            api: Api::new(&directory.path().join("api")),
            directory,
        })
    }

    fn files(&self, full: bool) -> (PathBuf, PathBuf) {
        let name = |what| self.directory.path().join(format!("{what}-{full}"));
        (name("state"), name("memory"))
    }
}

impl Subject for Firecracker<'_> {
    fn boot(&mut self, memory_mib: u32) -> Result<Vm> {
        Ok(boot_by_api(self.stage, self.command()?, &self.api, memory_mib))
    }

    fn snapshot(&mut self, full: bool) -> Result<Made> {
        let (state, memory) = self.files(full);
        let kind = if full { "Full" } else { "Diff" };
        let switch = |to: &str| self.api.patch("/vm", &json!({ "state": to }));
        let start = Instant::now();
        switch("Paused");
        self.api.put(
            "/snapshot/create",
            &json!({ "snapshot_type": kind, "snapshot_path": state, "mem_file_path": memory }),
        );
        switch("Resumed");
        let time = milliseconds(start);
        Ok(Made {
            pause_ms: time,
            total_ms: time,
            bytes: state.metadata()?.len() + memory.metadata()?.len(),
        })
    }
}

impl Restorer for Firecracker<'_> {
    fn command(&self) -> Result<Command> {
        let mut command = self.stage.command(self.program)?;
        command.args(["--no-seccomp", "--api-sock"]).arg(self.api.socket());
        Ok(command)
    }

    fn restore(&mut self, command: Command) -> Result<Vm> {
        std::fs::remove_file(self.api.socket())?;
        let vm = Vm::start_restored(command);
        self.api.wait_ready();
        let (state, memory) = self.files(true);
        self.api.put(
            "/snapshot/load",
            &json!({
                "snapshot_path": state,
                "mem_backend": { "backend_type": "File", "backend_path": memory },
                "resume_vm": true,
            }),
        );
        Ok(vm)
    }
}

/// QEMU, whose snapshots go into a disk image.
struct Qemu<'a> {
    stage: &'a Stage,
    directory: TempDir,
    memory_mib: u32,
}

impl<'a> Qemu<'a> {
    fn new(stage: &'a Stage) -> Result<Self> {
        let directory = scratch();
        let made = Command::new("qemu-img")
            .args(["create", "-q", "-f", "qcow2"])
            .arg(directory.path().join("disk"))
            .arg("16M")
            .status()
            .context("cannot run qemu-img")?;
        ensure!(made.success(), "qemu-img made no image");
        Ok(Self {
            stage,
            directory,
            memory_mib: 0,
        })
    }

    fn disk(&self) -> PathBuf {
        self.directory.path().join("disk")
    }

    fn monitor(&self) -> QemuMonitor {
        QemuMonitor::at(&self.directory.path().join("monitor"))
    }

    fn command(&self) -> Command {
        let mut command = peers::qemu(&self.stage.kernel, &self.stage.initrd, self.memory_mib);
        command
            .arg("-drive")
            .arg(format!("if=none,id=disk,format=qcow2,file={}", self.disk().display()));
        command.args(["-device", "virtio-blk-device,drive=disk"]);
        self.monitor().listen(&mut command);
        command
    }
}

impl Subject for Qemu<'_> {
    fn boot(&mut self, memory_mib: u32) -> Result<Vm> {
        self.memory_mib = memory_mib;
        Ok(peers::boot(self.command()))
    }

    fn snapshot(&mut self, _full: bool) -> Result<Made> {
        let before = self.disk().metadata()?.len();
        let start = Instant::now();
        self.monitor().tell("savevm s")?;
        let time = milliseconds(start);
        Ok(Made {
            pause_ms: time,
            total_ms: time,
            bytes: self.disk().metadata()?.len() - before,
        })
    }
}
