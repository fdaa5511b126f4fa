//! `cutover backup`: the agent of a host, which has its VMs join groups and keeps standbys of others.
//!
//! ```text
//!  coordinator ══ agent ─┬─ Join ──────────► PUT /v1/protection at the VM's API
//!                        ├─ the same, with a snapshot ──► `cutover snapshot restore` first
//!                        └─ StartStandby ──► `cutover standby`, which prints where it listens
//! ```

// Documentation here is help text, in which brackets mean that something can be left out.
#![allow(rustdoc::broken_intra_doc_links)]

use std::env;
use std::ffi::OsString;
use std::fs;
use std::io::{self, BufRead, BufReader};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::mpsc::{Sender, channel};
use std::thread;
use std::time::Duration;

use clap::{Args, ValueEnum};
use cutover_cluster::runtime::agent::{Agent, HostWork, Place};
use cutover_migration::transport::{Endpoint, HostPort};
use hyper::Method;
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use serde_json::json;
use tokio::runtime;
use tokio::sync::oneshot;
use tokio::time::interval;

use super::{GroupError, LinkArgs};
use crate::client::{ClientError, INFO, LOOK_EVERY, Vm, VmRef, one};
use crate::exit::{ExitStatus, report, with_causes};
use crate::log::{self, LogArgs};
use crate::runtime_dir::RuntimeDir;
use crate::server::v1::types::{InfoV1, ProtectionV1, StateV1};

/// How long a standby may take until it listens: it opens nothing but a socket by then.
const STANDBY_START_MAX: Duration = Duration::from_secs(30);
/// How long a VM may take to answer.
const ANSWER_MAX: Duration = Duration::from_secs(30);

/// Arguments of `cutover backup`.
#[derive(Debug, Args)]
pub struct BackupArgs {
    /// Where to listen.
    #[command(flatten)]
    link: LinkArgs,

    /// Directory for the disks of standbys, as VM.ID.img [default: the working directory]
    #[arg(long = "disks", value_name = "DIR")]
    disks_dir: Option<PathBuf>,

    /// Directory for the consoles of standbys: VM.console is a socket there once it has become the VM [default: they
    /// have none]
    #[arg(long = "consoles", value_name = "DIR")]
    consoles: Option<PathBuf>,

    /// What is logged, how, and where to.
    #[command(flatten)]
    log: LogArgs,
}

/// Shown with `cutover backup --help`.
pub const HELP: &str = "\
Each host that has members of groups, or is to keep standbys of members elsewhere, has one of these
processes. It has VMs of this host join a group when that is created, starts standbys, and tells the
coordinator at once when one of them dies. It does not have to stay: without it, members and standbys
go on, but nothing new begins on this host.

A standby has the whole memory of its VM, and becomes the VM when that is lost: under its name in this
user's runtime directory, with its taps, which have to be there as for `cutover receive`.

Examples:
  With a certificate (see `cutover tls init --help`):
    cutover backup --listen tls://host1.example.com:7200 --disks /srv/standbys

  On a network that nobody else is on:
    cutover backup --listen tcp://192.0.2.1:7200 --insecure

Exit codes:
  1  it cannot listen
  2  the command line is wrong";

/// Serves coordinators until the process is ended.
pub fn run(args: &BackupArgs) -> ExitStatus {
    match log::start(&args.log) {
        Ok(_) => {}
        Err(error) => {
            report(&error);
            return ExitStatus::Usage;
        }
    }
    match serve(args) {
        Ok(agent) => wait_for_ever(agent),
        Err(error) => {
            report(&error);
            error.status()
        }
    }
}

fn serve(args: &BackupArgs) -> Result<Agent, GroupError> {
    let security = args.link.security()?;
    let listener = args.link.listener(&security)?;
    let endpoint = listener.endpoint().clone();
    let work = Work {
        listen: endpoint.clone(),
        options: options(args),
        runtime_dir: RuntimeDir::locate(),
        insecure: args.link.insecure,
        tls_dir: args.link.tls_dir.clone(),
        disks_dir: args.disks_dir.clone(),
        consoles: args.consoles.clone(),
    };
    let agent = Agent::start(listener, work)?;
    tracing::info!(%endpoint, "coordinators can call");
    Ok(agent)
}

/// Does not return: signals end the process.
pub(super) fn wait_for_ever<T>(_kept: T) -> ! {
    loop {
        thread::park();
    }
}

/// What each standby is started with besides who it is.
fn options(args: &BackupArgs) -> Vec<OsString> {
    let mut options = Vec::new();
    let mut option = |name: &str, value: Option<OsString>| {
        if let Some(value) = value {
            options.extend([name.into(), value]);
        }
    };
    option("--tls-dir", args.link.tls_dir.clone().map(Into::into));
    option("--disks", args.disks_dir.clone().map(Into::into));
    option("--consoles", args.consoles.clone().map(Into::into));
    option("--log-level", Some(args.log.log_level.to_string().into()));
    let form = args.log.log_format.to_possible_value();
    option("--log-format", form.map(|form| form.get_name().into()));
    option("--log-file", args.log.log_file.clone().map(Into::into));
    if args.link.insecure {
        options.push("--insecure".into());
    }
    options
}

/// This host.
struct Work {
    /// Where the agent listens, and with another port its standbys.
    listen: Endpoint,
    options: Vec<OsString>,
    runtime_dir: RuntimeDir,
    insecure: bool,
    tls_dir: Option<PathBuf>,
    /// Where disks of VMs that are started are.
    disks_dir: Option<PathBuf>,
    /// Where their consoles are.
    consoles: Option<PathBuf>,
}

impl HostWork for Work {
    fn start_standby(&self, place: &Place) -> Result<(OwnedFd, Endpoint), String> {
        let started = self.spawn(place).and_then(|mut child| {
            let process = open_process(child.id())?;
            let output = child.stdout.take().ok_or(io::ErrorKind::BrokenPipe)?;
            Ok((child, process, output))
        });
        let (child, process, output) = started.map_err(|error| format!("cannot start a standby: {error}"))?;
        let (listens, is_listening) = channel();
        // Whoever starts a process has to learn of its end, too.
        thread::Builder::new()
            .name("standby".to_owned())
            .spawn(move || accompany(child, output, &listens))
            .map_err(|error| format!("cannot start a thread: {error}"))?;
        match is_listening.recv_timeout(STANDBY_START_MAX) {
            Ok(line) => {
                let endpoint = line
                    .trim_end()
                    .parse()
                    .map_err(|error| format!("a standby says: {error}"));
                endpoint.map(|endpoint| (process, endpoint))
            }
            Err(_) => Err("the standby does not listen: its messages say why".to_owned()),
        }
    }

    fn join(&self, place: &Place) -> Result<OwnedFd, String> {
        let name = place.vm.parse().map_err(|error| format!("{error}"))?;
        let vm = one(&VmRef::Name(name), &self.runtime_dir);
        let runtime = runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.map_err(|error| format!("cannot ask VMs: {error}"))?;
        if let Some(snapshot) = &place.restore {
            runtime.block_on(self.start(&vm, snapshot, place))?;
        }
        let joined = runtime.block_on(self.have_join(&vm, place));
        joined.map_err(|error| with_causes(&error))
    }

    fn resume(&self, place: &Place) -> Result<(), String> {
        let name = place.vm.parse().map_err(|error| format!("{error}"))?;
        let vm = one(&VmRef::Name(name), &self.runtime_dir);
        let runtime = runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.map_err(|error| format!("cannot ask VMs: {error}"))?;
        let resumed = runtime.block_on(async {
            let info: InfoV1 = vm.get(INFO, ANSWER_MAX).await?;
            if info.state == StateV1::Paused {
                let running = json!({ "state": "Resumed" });
                vm.tell(Method::PATCH, "/vm", &running, ANSWER_MAX).await?;
            }
            Ok::<_, ClientError>(())
        });
        resumed.map_err(|error| with_causes(&error))
    }
}

impl Work {
    fn spawn(&self, place: &Place) -> io::Result<Child> {
        let listen = match &self.listen {
            Endpoint::Tcp(at) => Endpoint::Tcp(HostPort { port: 0, ..at.clone() }),
            Endpoint::Tls(at) => Endpoint::Tls(HostPort { port: 0, ..at.clone() }),
            Endpoint::Unix(path) => {
                let mut path = path.clone().into_os_string();
                path.push(format!(".{}.{}", place.group, place.seat));
                Endpoint::Unix(path.into())
            }
        };
        Command::new(env::current_exe()?)
            .arg("standby")
            .args(["--group", &place.group.to_string(), "--seat", &place.seat.to_string()])
            .args(["--vm", &place.vm, "--host", &place.host.0])
            .args(["--coordinator", &place.coordinator.to_string()])
            .args(["--listen", &listen.to_string()])
            .args(&self.options)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
    }

    /// Starts the VM of `place` from `snapshot`, paused, if it does not run; returns when it answers.
    async fn start(&self, vm: &Vm, snapshot: &Path, place: &Place) -> Result<(), String> {
        if vm.get::<InfoV1>(INFO, ANSWER_MAX).await.is_ok() {
            return Ok(());
        }
        let cannot = |reason: String| format!("cannot start '{}' from {}: {reason}", place.vm, snapshot.display());
        let started = self
            .restore(snapshot, place)
            .map_err(|error| cannot(error.to_string()))?;
        let (ended, mut has_ended) = oneshot::channel();
        let pid = started.id();
        // Whoever starts a process has to learn of its end, too.
        let waiting = thread::Builder::new().name("restored".to_owned()).spawn(move || {
            let mut child = started;
            let status = child.wait();
            tracing::info!(pid, ?status, "a VM that was started from a snapshot has ended");
            // Nobody waits for that once it answers.
            let _ = ended.send(status);
        });
        waiting.map_err(|error| cannot(error.to_string()))?;
        let mut looks = interval(LOOK_EVERY);
        loop {
            tokio::select! {
                status = &mut has_ended => {
                    let status = status.map(|status| status.map_or_else(|error| error.to_string(), |status| status.to_string()));
                    return Err(cannot(format!("it ended ({}): its messages say why", status.unwrap_or_default())));
                }
                _ = looks.tick() => {
                    if vm.get::<InfoV1>(INFO, ANSWER_MAX).await.is_ok() {
                        return Ok(());
                    }
                }
            }
        }
    }

    fn restore(&self, snapshot: &Path, place: &Place) -> io::Result<Child> {
        let mut command = Command::new(env::current_exe()?);
        command.args(["snapshot", "restore"]).arg(snapshot);
        command.args(["--name", &place.vm, "--api", "--paused", "--track"]);
        let own = format!("{}-{}-{}", place.vm, place.group, place.seat);
        let disks = self.disks_dir.clone().unwrap_or_default().join(own);
        fs::create_dir_all(&disks)?;
        command.arg("--disks").arg(disks);
        match &self.consoles {
            Some(dir) => {
                let console = dir.join(format!("{}.console", place.vm));
                command.arg("--serial").arg(format!("socket={}", console.display()));
            }
            None => {
                command.args(["--serial", "null"]);
            }
        }
        command.stdin(Stdio::null()).stdout(Stdio::null()).spawn()
    }

    async fn have_join(&self, vm: &Vm, place: &Place) -> Result<OwnedFd, ClientError> {
        let info: InfoV1 = vm.get(INFO, ANSWER_MAX).await?;
        let process = open_process(info.pid).map_err(|source| ClientError::Connect {
            socket: vm.socket.clone(),
            source,
        })?;
        let body = ProtectionV1 {
            group: place.group.to_string(),
            member: place.seat.member.0,
            incarnation: place.seat.incarnation.0,
            host: place.host.0.clone(),
            coordinator: place.coordinator.to_string(),
            insecure: self.insecure,
            tls_dir: crate::tls_dir::for_endpoint(&place.coordinator, self.tls_dir.as_deref())
                .map(|path| path.display().to_string()),
        };
        // By now the process is held, so whoever answers is the one that will be watched.
        vm.tell(Method::PUT, "/v1/protection", &body, ANSWER_MAX).await?;
        Ok(process)
    }
}

/// Hands on the first line of a standby, and waits for its end.
fn accompany(mut child: Child, output: ChildStdout, listens: &Sender<String>) {
    let mut line = String::new();
    if let Ok(1..) = BufReader::new(output).read_line(&mut line) {
        // If it took too long, it is not waited for any more.
        let _ = listens.send(line);
    }
    match child.wait() {
        Ok(status) => tracing::info!(pid = child.id(), %status, "a standby has ended"),
        Err(error) => tracing::warn!(pid = child.id(), %error, "a standby is lost sight of"),
    }
}

/// The process `pid`, which from then on is that one and no later one of that number.
fn open_process(pid: u32) -> io::Result<OwnedFd> {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
    let pid = pid.ok_or_else(|| io::Error::other("it has no process number"))?;
    Ok(pidfd_open(pid, PidfdFlags::empty())?)
}
