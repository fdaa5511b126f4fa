//! Machines that are saved while their guests run, and go on elsewhere. All is confined as in production, so that a call
//! missing from a filter's list ends the test.

use std::os::unix::net::{UnixListener, UnixStream};
use std::thread;
use std::time::{Duration, Instant};

use cutover_migration::pages::PageBits;
use cutover_migration::vm::ArrivingMemory;
use cutover_snapshot::manifest::{Draft, MemoryRegion};
use cutover_snapshot::size::ByteSize;
use cutover_snapshot::spec::{BalloonSpec, DiskIo, DiskSpec, RateLimiterSpec, RngSpec, SerialSpec, VsockSpec};
use cutover_snapshot::state_file::{self, StateFile};
use tempfile::TempDir;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::*;
use crate::control::Message;
use crate::dirty::PAGE_SIZE;
use crate::layout::VM_GENERATION_ID;
use crate::page_fault::Arriving;
use crate::snapshot::ClockPolicy;
use crate::state::check_cpu;
use crate::testing::{has_kvm, kernel, tiny_spec};

/// Counts in memory, and powers the machine off at [`ENOUGH`].
const COUNTING: &[u8] = &[
    0xbf, 0x00, 0x00, 0x20, 0x00, // mov edi, COUNT
    0x48, 0xff, 0x07, // again: inc qword [rdi]
    0xe6, 0x80, // out 0x80, al: nobody listens
    0x81, 0x3f, 0x00, 0x00, 0x01, 0x00, // cmp dword [rdi], ENOUGH
    0x72, 0xf3, // jb again
    0x66, 0xba, 0x00, 0x06, // mov dx, POWER_PORT
    0xb0, 0x34, // mov al, POWER_OFF_VALUE
    0xee, // out dx, al
    0xeb, 0xfe, // jmp to itself
];
const COUNT: GuestAddress = GuestAddress(0x20_0000);
const ENOUGH: u64 = 0x1_0000;
/// Longest wait for something that must happen.
const PATIENCE: Duration = Duration::from_secs(60);

fn count(memory: &GuestMemory) -> u64 {
    memory.read_obj(COUNT).unwrap()
}

/// Lets `machine` run until its guest has counted to something, then stops it.
fn run_a_while(machine: &Machine) -> u64 {
    machine.run();
    let end = Instant::now() + PATIENCE;
    while count(machine.memory()) == 0 {
        assert!(Instant::now() < end, "the guest does not count");
        std::thread::yield_now();
    }
    machine.stop();
    count(machine.memory())
}

fn copy_of(memory: &GuestMemory, spec: &VmSpec) -> GuestMemory {
    let copy = memory::map(&spec.memory).unwrap();
    for region in memory.iter() {
        let mut content = vec![0; usize::try_from(region.len()).unwrap()];
        memory.read_slice(&mut content, region.start_addr()).unwrap();
        copy.write_slice(&content, region.start_addr()).unwrap();
    }
    copy
}

/// Writes `state` to a file and reads it back.
fn through_a_file(state: &MachineState, spec: &VmSpec) -> Result<MachineState, Error> {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("state");
    let mut file = StateFile::new(Draft {
        created: "2026-01-01T00:00:00Z".parse().unwrap(),
        parent: None,
        spec: spec.clone(),
        memory: memory::ram_ranges(spec.memory.size.bytes())
            .iter()
            .map(|range| MemoryRegion {
                start: range.start,
                bytes: range.size,
            })
            .collect(),
        cpu: state.cpu_needs(),
    });
    state.write(&mut file)?;
    file.write(&path)?;
    let (manifest, sections) = state_file::read(&path)?;
    check_cpu(&manifest.cpu)?;
    MachineState::read(spec, &sections)
}

/// A machine of `spec` that has run a while, its state, and what its guest had counted to.
fn saved(spec: &VmSpec) -> (Machine, MachineState, u64) {
    let machine = Machine::build(spec, &Options::default(), &Arc::default()).unwrap();
    let counted = run_a_while(&machine);
    let state = machine.save().unwrap();
    (machine, state, counted)
}

fn restore(
    spec: &VmSpec,
    memory: GuestMemory,
    state: &MachineState,
    clock: ClockPolicy,
    driver: &Arc<Mailbox>,
) -> Result<Machine, Error> {
    let reserved = Reserved::create(spec, memory, DiskLocks::Taken, &Options::default(), driver)?;
    reserved.load(state, state.vm.passed_ns(clock))
}

#[test]
fn a_machine_goes_on_where_it_was_saved_and_so_does_the_one_it_was_saved_from() {
    if !has_kvm() {
        return;
    }
    let kernel = kernel(COUNTING);
    let spec = tiny_spec(kernel.path());
    let (machine, state, counted) = saved(&spec);
    assert!(counted < ENOUGH, "it has gone on too long to tell anything");
    let memory = copy_of(machine.memory(), &spec);
    let generation = |memory: &GuestMemory| memory.read_obj::<u128>(GuestAddress(VM_GENERATION_ID)).unwrap();
    let first_generation = generation(&memory);
    let state = through_a_file(&state, &spec).unwrap();
    let driver = Arc::<Mailbox>::default();
    let restored = restore(&spec, memory, &state, ClockPolicy::Corrected, &driver).unwrap();
    restored.renew_generation().unwrap();
    assert_eq!(count(restored.memory()), counted, "it does not run by itself");
    assert_ne!(generation(restored.memory()), first_generation);
    assert_eq!(generation(machine.memory()), first_generation);
    restored.run();
    assert!(matches!(
        driver.receive(Some(Instant::now() + PATIENCE)),
        Message::Ended(Ending::Guest(GuestEnd::Shutdown))
    ));
    assert_eq!(count(restored.memory()), ENOUGH);
    assert_eq!(count(machine.memory()), counted);
    machine.run();
    machine.stop();
    machine.save().unwrap();
}

#[test]
fn a_machine_can_be_saved_before_it_has_run_and_again_after_it_was_restored() {
    if !has_kvm() {
        return;
    }
    let kernel = kernel(COUNTING);
    let spec = tiny_spec(kernel.path());
    let (options, driver) = (Options::default(), Arc::default());
    let machine = Machine::build(&spec, &options, &driver).unwrap();
    machine.stop();
    let state = machine.save().unwrap();
    let mut memory = copy_of(machine.memory(), &spec);
    for _ in 0..2 {
        let machine = restore(&spec, memory, &state, ClockPolicy::Stopped, &driver).unwrap();
        machine.stop();
        let state = machine.save().unwrap();
        memory = copy_of(machine.memory(), &spec);
        assert_eq!(count(&memory), 0);
        drop(through_a_file(&state, &spec).unwrap());
    }
    let machine = restore(&spec, memory, &state, ClockPolicy::Stopped, &driver).unwrap();
    assert!(run_a_while(&machine) > 0);
}

/// A VM with a device of each kind that needs no network.
fn with_devices(kernel: &std::path::Path, dir: &TempDir) -> VmSpec {
    let disk = dir.path().join("disk");
    std::fs::write(&disk, vec![0; 1 << 20]).unwrap();
    let mut spec = tiny_spec(kernel);
    spec.disks.push(DiskSpec {
        id: Some("data".to_owned()),
        path: disk,
        readonly: false,
        serial: None,
        io: DiskIo::Threads,
        rate_limiter: RateLimiterSpec::default(),
    });
    spec.rng = Some(RngSpec::default());
    spec.vsock = Some(VsockSpec {
        cid: 3,
        uds: dir.path().join("v.sock"),
    });
    spec.balloon = Some(BalloonSpec {
        amount: ByteSize::from_mib(8),
        deflate_on_oom: true,
        stats_interval_s: 1,
        free_page_reporting: true,
    });
    spec.serial = SerialSpec::File(dir.path().join("console"));
    spec
}

#[test]
fn each_device_has_a_section_under_its_name() {
    if !has_kvm() {
        return;
    }
    let (kernel, dir) = (kernel(COUNTING), TempDir::new().unwrap());
    let spec = with_devices(kernel.path(), &dir);
    let (machine, state, _) = saved(&spec);
    let names: Vec<_> = state.devices.virtio.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, ["disk/data", "rng", "vsock", "balloon"]);
    let memory = copy_of(machine.memory(), &spec);
    // A disk has one user at a time.
    drop(machine);
    let read = through_a_file(&state, &spec).unwrap();
    assert_eq!(read.devices, state.devices);
    restore(&spec, memory, &read, ClockPolicy::Corrected, &Arc::default()).unwrap();
}

/// Counts in memory for ever.
const COUNTING_ON: &[u8] = &[
    0xbf, 0x00, 0x00, 0x20, 0x00, // mov edi, COUNT
    0x48, 0xff, 0x07, // again: inc qword [rdi]
    0xeb, 0xfb, // jmp again
];

#[test]
fn a_guest_that_is_slowed_down_stands_still_most_of_the_time_and_pauses_at_once() {
    const KICKS: u64 = 50;
    if !has_kvm() {
        return;
    }
    let kernel = kernel(COUNTING_ON);
    let machine = Machine::build(&tiny_spec(kernel.path()), &Options::default(), &Arc::default()).unwrap();
    let stats = || machine.vcpu_stats().remove(0);
    let wait = |done: &dyn Fn() -> bool| {
        let end = Instant::now() + PATIENCE;
        while !done() {
            assert!(Instant::now() < end, "it does not happen");
            std::thread::yield_now();
        }
    };
    let mut throttle = machine.throttle();
    machine.run();
    // As the thread of a migration does it.
    thread::scope(|scope| {
        scope.spawn(|| {
            seccomp::confine_or_abort(ThreadKind::Migration);
            throttle.set(95).unwrap();
        });
    });
    wait(&|| stats().exits.interrupted > 0);
    let (began, first, counted) = (Instant::now(), stats(), count(machine.memory()));
    wait(&|| stats().exits.interrupted >= first.exits.interrupted + KICKS);
    let ran = Duration::from_nanos(stats().cpu_time_ns - first.cpu_time_ns);
    let time = began.elapsed();
    assert!(ran * 2 < time, "it ran for {ran:?} of {time:?}");
    assert!(
        count(machine.memory()) > counted,
        "it does not stand still all the time"
    );
    // Whether it stands still just now or not.
    for _ in 0..10 {
        machine.stop();
        machine.run();
    }
    throttle.set(0).unwrap();
    let (undone, counted) = (stats().exits.interrupted, count(machine.memory()));
    wait(&|| count(machine.memory()) > counted);
    machine.stop();
    // One that was on its way, and the pause.
    assert!(stats().exits.interrupted <= undone + 2, "somebody still kicks it");
}

#[test]
fn a_machine_goes_on_while_its_memory_is_still_on_its_way() {
    if !has_kvm() {
        return;
    }
    let kernel = kernel(COUNTING);
    let spec = tiny_spec(kernel.path());
    let (source, state, counted) = saved(&spec);
    let driver = Arc::<Mailbox>::default();
    // As it was some time before.
    let memory = memory::map(&spec.memory).unwrap();
    memory.write_obj(counted / 2, COUNT).unwrap();
    let machine = restore(&spec, memory, &state, ClockPolicy::Corrected, &driver).unwrap();
    let pages = spec.memory.size.bytes() / PAGE_SIZE;
    let arriving = Arriving::start(machine.memory(), &PageBits::full(pages)).unwrap();
    machine.run();
    let mut pulled = Vec::new();
    let ended = loop {
        for page in arriving.wanted(Duration::from_millis(10)) {
            let mut content = [0; 4096];
            source
                .memory()
                .read_slice(&mut content, GuestAddress(page * PAGE_SIZE))
                .unwrap();
            arriving.arrive(page..page + 1, &content).unwrap();
            pulled.push(page);
        }
        if let Message::Ended(ending) = driver.receive(Some(Instant::now())) {
            break ending;
        }
    };
    assert!(matches!(ended, Ending::Guest(GuestEnd::Shutdown)));
    assert_eq!(count(machine.memory()), ENOUGH);
    assert!(pulled.contains(&(COUNT.0 / PAGE_SIZE)), "{pulled:?}");
    assert!(
        (pulled.len() as u64) < pages,
        "only what it touches, and what is around that"
    );
    machine.stop();
}

#[test]
fn disks_are_of_one_machine_at_a_time_and_go_over_together() {
    if !has_kvm() {
        return;
    }
    let (kernel, dir) = (kernel(COUNTING), TempDir::new().unwrap());
    let mut spec = with_devices(kernel.path(), &dir);
    let second = DiskSpec {
        id: Some("more".to_owned()),
        path: dir.path().join("more"),
        ..spec.disks[0].clone()
    };
    std::fs::write(&second.path, vec![0; 4096]).unwrap();
    spec.disks.push(second.clone());
    let (source, state, _) = saved(&spec);
    let memory = copy_of(source.memory(), &spec);
    let (options, driver) = (Options::default(), Arc::<Mailbox>::default());
    let reserved = Reserved::create(&spec, memory, DiskLocks::Later, &options, &driver).unwrap();
    let destination = reserved.load(&state, 0).unwrap();
    let in_use = |machine: &Machine| {
        let refused = machine.devices.take_over().unwrap_err().to_string();
        assert!(refused.contains("is in use by"), "{refused}");
    };
    in_use(&destination);
    let clients = dir.path().join("v.sock");
    UnixStream::connect(&clients).unwrap();
    source.devices.let_go().unwrap();
    UnixStream::connect(&clients).unwrap_err();
    // Of two disks, of which somebody else has the second, neither is taken.
    let other = VmSpec {
        disks: vec![second],
        ..tiny_spec(kernel.path())
    };
    let other = Machine::build(&other, &options, &driver).unwrap();
    in_use(&destination);
    drop(other);
    source.devices.take_over().unwrap();
    source.devices.let_go().unwrap();
    // Nor are they if somebody else has the path of the socket device.
    let listener = UnixListener::bind(&clients).unwrap();
    let refused = destination.devices.take_over().unwrap_err().to_string();
    assert!(refused.contains("another process does"), "{refused}");
    drop(listener);
    // Its file stays, and is nobody's.
    destination.devices.take_over().unwrap();
    UnixStream::connect(&clients).unwrap();
    in_use(&source);
}

#[test]
fn state_of_another_vm_is_refused() {
    if !has_kvm() {
        return;
    }
    let kernel = kernel(COUNTING);
    let spec = tiny_spec(kernel.path());
    let (_machine, state, _) = saved(&spec);
    let more_cpus = VmSpec {
        cpus: 3,
        ..spec.clone()
    };
    let refused = through_a_file(&state, &more_cpus).unwrap_err().to_string();
    assert!(refused.contains("vcpu/2"), "{refused}");
    let memory = memory::map(&spec.memory).unwrap();
    let restored = restore(&more_cpus, memory, &state, ClockPolicy::Stopped, &Arc::default());
    assert!(matches!(restored, Err(Error::SavedState(reason)) if reason == "it has 2 vCPUs, the VM has 3"));
    let mut more_devices = spec.clone();
    more_devices.rng = Some(RngSpec::default());
    let refused = through_a_file(&state, &more_devices).unwrap_err().to_string();
    assert!(refused.contains("rng"), "{refused}");
}
