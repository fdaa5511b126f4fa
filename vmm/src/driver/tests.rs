//! The state driver with real VMs, of a few instructions each: any KVM runs them, one that emulates them too. All is
//! confined as in production, so that a call missing from a filter's list ends the test.

use std::path::Path;
use std::sync::mpsc::{Receiver, channel};
use std::thread::JoinHandle;

use cutover_snapshot::spec::{DiskIo, DiskSpec, RateLimiterSpec, RngSpec, SerialSpec};
use tempfile::NamedTempFile;

use super::*;
use crate::events::Event;
use crate::testing::{has_kvm, kernel, tiny_spec};

mod migrations;
mod protections;
mod snapshots;
mod standbys;

/// Longest wait for something that must happen.
const PATIENCE: Duration = Duration::from_secs(60);

/// Halts for good.
const IDLE: &[u8] = &[
    0xf4, // hlt
    0xeb, 0xfd, // jmp to it
];
/// Writes to a port that nobody listens at, over and over.
const BUSY: &[u8] = &[
    0xe6, 0x80, // out 0x80, al
    0xeb, 0xfc, // jmp to it
];
/// Writes to each of 256 pages and to a port that nobody listens at, over and over.
const WRITING: &[u8] = &[
    0x31, 0xff, // xor edi, edi
    0x88, 0x87, 0x00, 0x00, 0x20, 0x00, // again: mov [rdi + 0x20_0000], al
    0x81, 0xc7, 0x00, 0x10, 0x00, 0x00, // add edi, 0x1000
    0x81, 0xe7, 0xff, 0xff, 0x0f, 0x00, // and edi, 0xf_ffff
    0xe6, 0x80, // out 0x80, al
    0xeb, 0xea, // jmp again
];
/// Powers itself off when its power button is pressed, which it sees among the interrupts that the 8259 knows of.
const OBEDIENT: &[u8] = &[
    0xb0, 0x0a, // mov al, 0x0a: OCW3, read the requested interrupts
    0xe6, 0x20, // out 0x20, al
    0xe4, 0x20, // in al, 0x20
    0xa8, 0x20, // test al, 1 << POWER_BUTTON_GSI
    0x74, 0xf6, // jz to the beginning
    0x66, 0xba, 0x00, 0x06, // mov dx, POWER_PORT
    0xb0, 0x34, // mov al, POWER_OFF_VALUE
    0xee, // out dx, al
    0xeb, 0xfd, // jmp to it
];
/// Resets the machine.
const RESETTING: &[u8] = &[
    0x66, 0xba, 0x00, 0x06, // mov dx, POWER_PORT
    0xb0, 0x01, // mov al, RESET_VALUE
    0xee, // out dx, al
    0xeb, 0xfd, // jmp to it
];
/// Tells of a panic.
const PANICKING: &[u8] = &[
    0x66, 0xba, 0x05, 0x05, // mov dx, PVPANIC_PORT
    0xb0, 0x01, // mov al, PVPANIC_PANICKED
    0xee, // out dx, al
    0xeb, 0xfd, // jmp to it
];

/// A VM with its state driver on a thread of its own.
struct RunningVm {
    vm: Controller,
    events: EventLog,
    driver: JoinHandle<Result<Exit, Error>>,
    /// What it was booted from, if it was.
    kernel: Option<NamedTempFile>,
    /// What it has done when it ends; of a managed VM only.
    last: Receiver<VmStats>,
}

/// Runs `program` on a VM without devices but those that every VM has.
fn run(program: &[u8], managed: bool) -> Option<RunningVm> {
    run_with(program, managed, |_| {})
}

/// Runs `program` on what `change` makes of such a VM; none, with a note, where there is no KVM at all.
fn run_with(program: &[u8], managed: bool, change: impl FnOnce(&mut VmSpec)) -> Option<RunningVm> {
    if !has_kvm() {
        return None;
    }
    let kernel = kernel(program);
    let mut spec = tiny_spec(kernel.path());
    change(&mut spec);
    let vm = start(managed, move |options| Vmm::build(&spec, options));
    Some(RunningVm {
        kernel: Some(kernel),
        ..vm
    })
}

/// Has a thread of its own drive what `make` makes.
fn start(managed: bool, make: impl FnOnce(&Options) -> Result<Vmm, Error> + Send + 'static) -> RunningVm {
    try_start(managed, make).unwrap_or_else(|error| panic!("the VM cannot be built: {error}"))
}

/// As [`start`], or why there is nothing to drive.
fn try_start(
    managed: bool,
    make: impl FnOnce(&Options) -> Result<Vmm, Error> + Send + 'static,
) -> Result<RunningVm, Error> {
    let options = Options {
        managed,
        ..Options::default()
    };
    let events = options.events.clone();
    let (build, built) = channel();
    let (tell, last) = channel();
    let driver = std::thread::spawn(move || {
        let vmm = make(&options)?;
        build.send(vmm.controller()).expect("the test listens");
        match managed {
            true => vmm.run_counted(move |stats| drop(tell.send(stats))),
            false => vmm.run(),
        }
    });
    let Ok(vm) = built.recv() else {
        let made = driver.join().expect("the state driver does not panic");
        return Err(made.expect_err("it did not begin to run"));
    };
    Ok(RunningVm {
        vm,
        events,
        driver,
        kernel: None,
        last,
    })
}

impl RunningVm {
    /// Waits until what has happened so far is enough, and returns it.
    fn wait_until(&self, enough: impl Fn(&[EventKind]) -> bool) -> Vec<EventKind> {
        let (wake, woken) = channel();
        let _subscription = self.events.subscribe(move || {
            // The test may have seen enough.
            let _ = wake.send(());
        });
        let deadline = Instant::now() + PATIENCE;
        loop {
            let happened: Vec<_> = self.happened();
            if enough(&happened) {
                return happened;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            assert!(woken.recv_timeout(left).is_ok(), "not enough: {happened:?}");
        }
    }

    fn happened(&self) -> Vec<EventKind> {
        let events = self.events.since(0).events;
        events.into_iter().map(|Event { kind, .. }| kind).collect()
    }

    /// Waits until the VM has been running for the `times`th time, not counting what goes on after a pause.
    fn wait_until_booted(&self, times: usize) {
        self.wait_until(|happened| {
            let booted = happened.iter().filter(|kind| state_of(kind) == Some("built")).count();
            booted + 1 == times && happened.last().and_then(state_of) == Some("running")
        });
    }

    /// Waits for the end of the VM.
    fn exit(self) -> (Exit, Vec<EventKind>) {
        let happened = self.wait_until(|happened| {
            matches!(
                happened.last(),
                Some(EventKind::VmEnded { .. } | EventKind::VmFailed { .. })
            )
        });
        let exit = self.driver.join().expect("the state driver does not panic");
        (exit.unwrap_or_else(|error| panic!("{error}")), happened)
    }
}

fn state_of(kind: &EventKind) -> Option<&'static str> {
    match kind {
        EventKind::VmState { state } => Some(state.name()),
        _ => None,
    }
}

/// The names of the states a VM went through.
fn states(happened: &[EventKind]) -> Vec<&'static str> {
    happened.iter().filter_map(state_of).collect()
}

fn refusal(result: Result<(), Error>) -> Refusal {
    match result {
        Err(Error::Refused(refusal)) => refusal,
        other => panic!("not refused: {other:?}"),
    }
}

#[test]
fn a_guest_that_ends_itself_ends_the_vm_and_it_is_told_how() {
    for (program, exit, end) in [
        (RESETTING, Exit::Reboot, EventKind::GuestReset),
        (PANICKING, Exit::Panic, EventKind::GuestPanic),
    ] {
        let Some(guest) = run(program, false) else { return };
        let (ended, happened) = guest.exit();
        assert_eq!(ended, exit);
        assert_eq!(states(&happened), ["running", "ended"]);
        assert_eq!(happened[1], end);
        assert_eq!(happened.last(), Some(&EventKind::VmEnded { exit }));
    }
}

#[test]
fn a_managed_vm_tells_at_its_end_what_it_has_done() {
    let Some(mut guest) = run(RESETTING, true) else { return };
    let last = std::mem::replace(&mut guest.last, channel().1);
    assert_eq!(guest.exit().0, Exit::Reboot);
    let stats = last.recv().expect("told before the end");
    assert_eq!(stats.state, State::Ended);
    assert!(
        stats.vcpus[0].exits.io_out > 0,
        "it wrote to a port to reset the machine"
    );
}

#[test]
fn pauses_and_resumes_in_a_row_lose_nothing() {
    let Some(guest) = run(BUSY, false) else { return };
    let written = || guest.vm.stats().expect("stats").vcpus[0].exits.io_out;
    let mut before = 0;
    for round in 0..200 {
        guest.vm.pause().expect("a running VM can be paused");
        let paused = written();
        assert_eq!(written(), paused, "a paused guest went on in round {round}");
        assert!(paused >= before);
        before = paused;
        guest.vm.resume().expect("a paused VM can be resumed");
    }
    // It still runs.
    while written() == before {
        std::thread::yield_now();
    }
    guest.vm.destroy().expect("a running VM can be destroyed");
    let (exit, happened) = guest.exit();
    assert_eq!(exit, Exit::Ended);
    assert_eq!(states(&happened).len(), 2 * 200 + 2);
}

#[test]
fn statistics_tell_of_a_vm_that_runs_what_it_is() {
    let Some(guest) = run(BUSY, false) else { return };
    let first = guest.vm.stats().expect("stats");
    let later = loop {
        let later = guest.vm.stats().expect("stats");
        if later.vcpus[0].exits.io_out > first.vcpus[0].exits.io_out && later.vcpus[0].cpu_time_ns > 0 {
            break later;
        }
    };
    assert_eq!((later.state, later.boots, later.vcpus.len()), (State::Running, 1, 2));
    assert_eq!(later.memory.size_bytes, 32 << 20);
    assert!((1..=32 << 20).contains(&later.memory.resident_bytes));
    assert!(later.uptime_ns > first.uptime_ns);
    guest.vm.destroy().expect("a running VM can be destroyed");
    guest.exit();
}

#[test]
fn the_rate_of_changing_memory_is_that_since_somebody_asked() {
    for managed in [false, true] {
        let Some(guest) = run(WRITING, managed) else { return };
        let rate = || guest.vm.dirty_rate().expect("a rate");
        assert_eq!(rate(), DirtyRate::default(), "nobody has asked before");
        let writes = || guest.vm.stats().expect("stats").vcpus[0].exits.io_out;
        let before = writes();
        while writes() <= before + 256 {
            std::thread::yield_now();
        }
        let changed = rate();
        assert!(changed.pages >= 256 && changed.interval > Duration::ZERO, "{changed:?}");
        guest.vm.pause().expect("a running VM can be paused");
        rate();
        assert_eq!(rate().pages, 0, "a paused guest changed memory");
        if managed {
            guest.vm.cycle().expect("a paused VM can be cycled");
            guest.wait_until_booted(2);
            assert_eq!(rate(), DirtyRate::default(), "nobody has asked since");
        }
        guest.vm.destroy().expect("any VM can be destroyed");
        guest.exit();
    }
}

#[test]
fn a_guest_that_obeys_is_shut_down_in_time() {
    let Some(guest) = run(OBEDIENT, false) else { return };
    guest.vm.shutdown(PATIENCE).expect("a running VM can be shut down");
    let (exit, happened) = guest.exit();
    assert_eq!(exit, Exit::Shutdown);
    assert_eq!(states(&happened), ["running", "shutting_down", "ended"]);
    assert!(happened.contains(&EventKind::OperationRequested { operation: "shutdown" }));
}

#[test]
fn a_guest_that_does_not_obey_is_ended_by_force_at_the_time_limit() {
    let Some(guest) = run(IDLE, false) else { return };
    let limit = Duration::from_millis(50);
    guest.vm.shutdown(limit).expect("a running VM can be shut down");
    let (exit, happened) = guest.exit();
    assert_eq!(exit, Exit::Ended);
    assert!(matches!(
        happened[..],
        [
            ..,
            EventKind::OperationForced { .. },
            EventKind::VmState { state: State::Ended },
            EventKind::VmEnded { .. }
        ]
    ));
}

#[test]
fn a_second_operation_is_refused_and_force_is_not() {
    let Some(guest) = run(IDLE, true) else { return };
    guest.vm.shutdown(PATIENCE).expect("a running VM can be shut down");
    for second in [guest.vm.reboot(PATIENCE), guest.vm.cycle(), guest.vm.pause()] {
        assert!(matches!(refusal(second), Refusal::Busy(_)));
    }
    guest.vm.destroy().expect("force is always allowed");
    assert_eq!(guest.exit().0, Exit::Ended);
}

#[test]
fn a_reboot_builds_the_vm_anew_gracefully_or_by_force() {
    for (program, limit) in [(OBEDIENT, PATIENCE), (IDLE, Duration::from_millis(50))] {
        let Some(guest) = run(program, true) else { return };
        for boots in 2..4 {
            guest.vm.reboot(limit).expect("a running VM can be rebooted");
            guest.wait_until_booted(boots);
            let stats = guest.vm.stats().expect("stats");
            assert_eq!((stats.boots, stats.state), (boots as u64, State::Running));
        }
        guest.vm.destroy().expect("a running VM can be destroyed");
        let (exit, happened) = guest.exit();
        assert_eq!(exit, Exit::Ended);
        let round = ["rebooting", "built", "running"];
        assert_eq!(
            states(&happened),
            [&["running"][..], &round, &round, &["ended"]].concat()
        );
    }
}

fn image() -> NamedTempFile {
    let image = NamedTempFile::new().expect("temporary file");
    image.as_file().set_len(1 << 20).expect("temporary file");
    image
}

fn disk(image: &NamedTempFile, io: DiskIo) -> DiskSpec {
    DiskSpec {
        id: None,
        path: image.path().to_owned(),
        readonly: false,
        serial: None,
        io,
        rate_limiter: RateLimiterSpec::default(),
    }
}

#[test]
fn a_disk_changes_for_this_machine_and_the_next_or_for_none() {
    let images = [image(), image(), image()];
    let guest = run_with(IDLE, true, |spec| {
        spec.disks = images[..2].iter().map(|image| disk(image, DiskIo::Auto)).collect();
    });
    let Some(guest) = guest else { return };
    let update = |id: &str, path: &Path| {
        let update = DiskUpdate {
            path: Some(path.to_owned()),
            rate_limiter: None,
        };
        guest.vm.update_disk(id.to_owned(), update)
    };
    for (id, path) in [
        ("disk7", images[2].path()),
        ("disk1", Path::new("/nonexistent")),
        // It is disk0 already.
        ("disk1", images[0].path()),
    ] {
        let error = update(id, path).expect_err("cannot be");
        assert!(!matches!(error, Error::Refused(_)), "{error}");
    }
    update("disk1", images[2].path()).expect("an image like the others");
    let updated = EventKind::DriveUpdated {
        drive: "disk1".to_owned(),
    };
    let happened = guest.happened();
    assert_eq!(happened.iter().filter(|kind| **kind == updated).count(), 1);
    // Were the next machine built with it, it would not be.
    let [kept, replaced, replacing] = images;
    drop(replaced);
    guest.vm.cycle().expect("a running VM can be cycled");
    guest.wait_until_booted(2);
    guest.vm.destroy().expect("a running VM can be destroyed");
    guest.exit();
    drop((kept, replacing));
}

#[test]
fn a_vm_with_files_of_every_kind_is_built_anew() {
    let images = [image(), image()];
    let directory = tempfile::tempdir().expect("temporary directory");
    for serial in [
        SerialSpec::Socket(directory.path().join("socket")),
        SerialSpec::File(directory.path().join("file")),
        SerialSpec::Pty,
    ] {
        let guest = run_with(IDLE, true, |spec| {
            spec.disks = vec![disk(&images[0], DiskIo::Auto), disk(&images[1], DiskIo::Threads)];
            spec.rng = Some(RngSpec::default());
            spec.memory.shared = true;
            spec.serial = serial;
        });
        let Some(guest) = guest else { return };
        guest.vm.cycle().expect("a running VM can be cycled");
        guest.wait_until_booted(2);
        guest.vm.destroy().expect("a running VM can be destroyed");
        guest.exit();
    }
}

#[test]
fn a_vm_is_cycled_from_a_pause_and_runs() {
    let Some(guest) = run(BUSY, true) else { return };
    guest.vm.pause().expect("a running VM can be paused");
    guest.vm.cycle().expect("a paused VM can be cycled");
    guest.wait_until_booted(2);
    while guest.vm.stats().expect("stats").vcpus[0].exits.io_out == 0 {
        std::thread::yield_now();
    }
    guest.vm.destroy().expect("a running VM can be destroyed");
    guest.exit();
}

#[test]
fn a_vm_that_cannot_be_built_anew_is_over_and_says_why() {
    let Some(guest) = run(IDLE, true) else { return };
    let RunningVm {
        vm,
        events,
        driver,
        kernel,
        ..
    } = guest;
    drop(kernel);
    vm.cycle().expect("a running VM can be cycled");
    let error = driver.join().expect("no panic").expect_err("the kernel is gone");
    assert!(matches!(error, Error::BootFile { what: "kernel", .. }), "{error}");
    let happened = events.since(0).events;
    let reason = error.to_string();
    assert_eq!(
        happened.last().map(|event| &event.kind),
        Some(&EventKind::VmFailed { reason })
    );
    assert_eq!(refusal(vm.pause()), Refusal::Ended);
}

#[test]
fn a_vm_that_is_not_managed_is_not_built_anew() {
    let Some(guest) = run(IDLE, false) else { return };
    assert_eq!(refusal(guest.vm.cycle()), Refusal::Confined);
    assert_eq!(refusal(guest.vm.reboot(PATIENCE)), Refusal::Confined);
    guest.vm.destroy().expect("a running VM can be destroyed");
    guest.exit();
}

#[test]
fn requests_after_the_end_are_refused() {
    let Some(guest) = run(RESETTING, false) else { return };
    let vm = guest.vm.clone();
    guest.exit();
    assert_eq!(refusal(vm.resume()), Refusal::Ended);
    assert!(matches!(vm.state(), Err(Error::Refused(Refusal::Ended))));
}
