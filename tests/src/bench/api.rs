//! The API as orchestrators see it: how soon it answers, what pausing and resuming take, and what it costs in memory.
//!
//! Both contestants are told the same over the same API, that of Firecracker.

use std::mem::MaybeUninit;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use cutover_guest::USER_SPACE_MARKER;
use rustix::fs::inotify;
use serde_json::{Value, json};

use super::peers::CMDLINE;
use super::resident::Resident;
use super::stage::Stage;
use super::{Contestant, Values, mib, read_until};
use crate::{Api, Connection, Monitor, scratch};

const MEMORY_MIB: u32 = 128;

/// Times the guest is paused and resumed; the median counts.
const PAUSES: usize = 21;

/// Cutover, and Firecracker if it was given.
pub fn contestants(stage: &Stage) -> Vec<Contestant<'_>> {
    let mut contestants = vec![Contestant {
        name: "Cutover",
        measure: Box::new(|| measure(stage, &stage.cutover, &["vmm"])),
    }];
    if let Some(program) = &stage.firecracker {
        contestants.push(Contestant {
            name: "Firecracker",
            // Builds for glibc have no filters.
            measure: Box::new(|| measure(stage, program, &["--no-seccomp"])),
        });
    }
    contestants
}

fn measure(stage: &Stage, program: &Path, arguments: &[&str]) -> Result<Values> {
    let directory = scratch();
    let socket = directory.path().join("api");
    let mut command = stage.command(program)?;
    command.args(arguments).arg("--api-sock").arg(&socket);

    run_first()?;
    let birth = Birth::watch(directory.path())?;
    let monitor = Monitor::start(command);
    // The program has been executed. What came before, making a process, is not its doing, and takes whole ticks of the
    // host's clock at times.
    let start = Instant::now();
    birth.wait()?;
    let mut connection = connect(&Api::new(&socket));
    let up = start.elapsed();
    connection.request("GET", "/", None).success();
    let answered = start.elapsed();
    drop(birth);

    let put = |path: &str, body: Value| {
        Api::new(&socket).put(path, &body);
    };
    put(
        "/boot-source",
        json!({ "kernel_image_path": stage.kernel, "initrd_path": stage.initrd, "boot_args": CMDLINE }),
    );
    put(
        "/machine-config",
        json!({ "vcpu_count": 1, "mem_size_mib": MEMORY_MIB }),
    );
    put("/actions", json!({ "action_type": "InstanceStart" }));
    let (mut console, _input) = monitor.take_pipes().context("a monitor is started with pipes")?;
    read_until(&mut console, USER_SPACE_MARKER)?;
    let resident = Resident::of(&monitor, u64::from(MEMORY_MIB) << 20)?;

    let mut switch = |state: &str| {
        let start = Instant::now();
        let body = json!({ "state": state });
        connection.request("PATCH", "/vm", Some(&body)).success();
        start.elapsed()
    };
    let (pauses, resumes) = (0..PAUSES).map(|_| (switch("Paused"), switch("Resumed"))).unzip();
    Ok(vec![
        ("api_up_ms", milliseconds(up)),
        ("first_answer_ms", milliseconds(answered)),
        ("pause_ms", milliseconds(median(pauses))),
        ("resume_ms", milliseconds(median(resumes))),
        ("overhead_mib", mib(resident.overhead)),
    ])
}

/// Connects to a socket that has a name and is about to listen, for which its owner needs the processor.
fn connect(api: &Api) -> Connection {
    const PAUSE: Duration = Duration::from_micros(20);
    loop {
        match api.try_connect() {
            Ok(connection) => return connection,
            Err(_) => std::thread::sleep(PAUSE),
        }
    }
}

/// Has this thread get the processor as soon as it wants it, so that it notices at once what it waits for, also where
/// there is only one processor. Processes that it starts do not inherit this.
fn run_first() -> Result<()> {
    let parameters = libc::sched_param { sched_priority: 1 };
    let policy = libc::SCHED_FIFO | libc::SCHED_RESET_ON_FORK;
    // SAFETY: 0 is the calling thread, and the parameters are valid during the call.
    let changed = unsafe { libc::sched_setscheduler(0, policy, &raw const parameters) };
    ensure!(
        changed == 0,
        "cannot set a scheduling policy: {}",
        std::io::Error::last_os_error()
    );
    Ok(())
}

/// Waits for the first file in a directory without spending instructions on looking for it. To be dropped when time no
/// longer counts: the kernel waits for the next tick of its clock then.
struct Birth(rustix::fd::OwnedFd);

impl Birth {
    fn watch(directory: &Path) -> Result<Self> {
        let inotify = inotify::init(inotify::CreateFlags::CLOEXEC)?;
        inotify::add_watch(&inotify, directory, inotify::WatchFlags::CREATE)?;
        Ok(Self(inotify))
    }

    fn wait(&self) -> Result<()> {
        let mut buffer = [MaybeUninit::uninit(); 512];
        inotify::Reader::new(&self.0, &mut buffer).next()?;
        Ok(())
    }
}

/// The one in the middle of `times`, of which there are some.
pub(super) fn median(mut times: Vec<Duration>) -> Duration {
    times.sort();
    times[times.len() / 2]
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}
