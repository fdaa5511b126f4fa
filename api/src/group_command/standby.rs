//! `cutover standby`: keeps the image of a member, and is its monitor once it is promoted. `cutover backup` starts it.
//!
//! ```text
//!  main thread   listen, say where ─ accept ─ Standby: permanent, permanent, … promote ─► Vmm::run (state driver)
//!  seat              └─► the coordinator's word ── Work ──┘           answers ─┘ ▲ Protection
//! ```
//! What becomes the VM is the main thread's from the beginning, as it will be the state driver.

use std::fs;
use std::io::{self, Write};
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, OnceLock};
use std::thread;

use clap::Args;
use cutover_cluster::id::{GroupId, Host, Identity, Incarnation, MemberId, Seat as SeatId};
use cutover_cluster::message::Ending;
use cutover_cluster::runtime::seat::{Notices, Seat, SeatOptions, SharedView};
use cutover_cluster::vm::{StandbyNotice, StandbyVm, VmError};
use cutover_migration::transport::Endpoint;
use cutover_snapshot::spec::SerialSpec;
use cutover_vmm::migration::{MigrationStatus, ReceiveRequest};
use cutover_vmm::protection::{self, Standby, StandbyListener, StandbyRequest};
use cutover_vmm::seccomp::{self, ThreadKind};
use cutover_vmm::{Controller, Exit, Options, Vmm};

use super::security;
use crate::exit::{ExitStatus, report};
use crate::log::{self, LogArgs, Logger};
use crate::member::{self, Member};
use crate::run;
use crate::runtime_dir::{RuntimeDir, VmName};
use crate::server::Server;
use crate::server::instance::{Instance, Membership, obey};
use crate::signals::{self, Blocked};
use crate::tls_dir;

/// Arguments of `cutover standby`.
#[derive(Clone, Debug, Args)]
pub struct StandbyArgs {
    /// The group
    #[arg(long, value_parser = group)]
    group: GroupId,

    /// The seat in it: MEMBER.INCARNATION
    #[arg(long, value_parser = seat)]
    seat: SeatId,

    /// Name of the VM
    #[arg(long)]
    vm: VmName,

    /// What the coordinator calls this host
    #[arg(long)]
    host: String,

    /// Where the coordinator listens
    #[arg(long)]
    coordinator: Endpoint,

    /// Where to wait for the image
    #[arg(long)]
    listen: Endpoint,

    /// Directory of this host's certificate
    #[arg(long)]
    tls_dir: Option<PathBuf>,

    /// Allow tcp://
    #[arg(long)]
    insecure: bool,

    /// Directory for its disks
    #[arg(long)]
    disks: Option<PathBuf>,

    /// Directory for its console
    #[arg(long)]
    consoles: Option<PathBuf>,

    /// Do not confine threads
    #[arg(long)]
    no_seccomp: bool,

    /// What is logged, how, and where to.
    #[command(flatten)]
    log: LogArgs,
}

/// Shown with `cutover standby --help`.
pub const HELP: &str = "\
`cutover backup` starts it, by the word of a coordinator. It prints where it waits for the image, keeps that, and is the
VM's monitor once it is promoted.

Examples:
  cutover standby --group 0d5f8a1e-6c1b-4b53-9f0e-0a8b6a2f9c11 --seat 0.1 --vm web --host tls://host2:7200 \\
      --coordinator tls://host1:7100 --listen tls://host2:0 --disks /srv/standbys

Exit codes:
  0  it was not wanted any more, or as `cutover run`
  1  it could not be a standby
  and those of `cutover run`, once it is the VM";

fn group(text: &str) -> Result<GroupId, String> {
    text.parse().map(GroupId).map_err(|_| "write a UUID".to_owned())
}

fn seat(text: &str) -> Result<SeatId, String> {
    let parsed = text.split_once('.').and_then(|(member, incarnation)| {
        Some(SeatId {
            member: MemberId(member.parse().ok()?),
            incarnation: Incarnation(incarnation.parse().ok()?),
        })
    });
    parsed.ok_or_else(|| "write MEMBER.INCARNATION".to_owned())
}

/// Why a standby cannot be one.
#[derive(Debug, thiserror::Error)]
enum StandbyError {
    #[error(transparent)]
    Vmm(#[from] cutover_vmm::Error),
    #[error(transparent)]
    Cluster(#[from] cutover_cluster::Error),
    #[error(transparent)]
    Link(#[from] cutover_migration::Error),
    #[error("cannot use the directory for disks {}", .0.display())]
    Disks(PathBuf, #[source] io::Error),
    #[error("cannot prepare")]
    Prepare(#[source] io::Error),
}

/// What the seat has the main thread do.
enum Work {
    /// See [`StandbyVm::permanent`].
    Permanent(u64, Sender<Result<(), VmError>>),
    /// See [`StandbyVm::promote`].
    Promote(u64, Sender<Result<Member, VmError>>),
    /// It is not wanted any more.
    End,
}

/// The standby as its seat has it: what it is asked goes to the main thread.
struct Remote(Sender<Work>);

impl Remote {
    fn ask<T>(&self, work: impl FnOnce(Sender<Result<T, VmError>>) -> Work) -> Result<T, VmError> {
        let (answer, answered) = channel();
        let gone = || VmError::from("the standby has ended");
        self.0.send(work(answer)).map_err(|_| gone())?;
        answered.recv().map_err(|_| gone())?
    }
}

impl StandbyVm for Remote {
    type Member = Member;

    fn permanent(&mut self, epoch: u64) -> Result<(), VmError> {
        self.ask(|answer| Work::Permanent(epoch, answer))
    }

    fn promote(self, cut: u64) -> Result<Member, VmError> {
        self.ask(|answer| Work::Promote(cut, answer))
    }
}

/// Keeps an image until it is not wanted any more, or is that of the VM; then runs that to its end.
pub fn run(args: &StandbyArgs) -> ExitStatus {
    let logger = match log::start(&args.log) {
        Ok(logger) => logger,
        Err(error) => {
            report(&error);
            return ExitStatus::Usage;
        }
    };
    let status = match keep(args, &logger) {
        Ok(Some(exit)) => exit.into(),
        Ok(None) => ExitStatus::Success,
        Err(error) => {
            report(&error);
            ExitStatus::Failure
        }
    };
    logger.tell_untold();
    status
}

/// What the threads of a standby have in common.
#[derive(Clone)]
struct Common {
    work: Sender<Work>,
    /// How far the arrival of the VM is, and that nobody waits for it.
    arrival: Arc<MigrationStatus>,
    /// The VM, once it is one.
    controller: Arc<OnceLock<Controller>>,
    membership: Membership,
}

impl Common {
    /// The coordinator has no use for it any more.
    fn ended(&self, ending: Ending) {
        self.membership.end();
        match self.controller.get() {
            Some(vm) => obey(ending, vm),
            None => self.give_up(),
        }
    }

    fn give_up(&self) {
        self.arrival.cancel();
        // A main thread that is gone has given up already.
        let _ = self.work.send(Work::End);
    }
}

/// How the VM ended, if this ever was one.
fn keep(args: &StandbyArgs, logger: &Logger) -> Result<Option<Exit>, StandbyError> {
    let options = Options {
        seccomp: !args.no_seccomp,
        managed: true,
        ..Options::default()
    };
    let listener = StandbyListener::bind(request(args)?)?;
    let (work, asked) = channel();
    let common = Common {
        work,
        arrival: Arc::default(),
        controller: Arc::default(),
        membership: Membership::default(),
    };
    serve_signals(&common, &options)?;
    let (notices, view) = take_seat(args, &common, options.seccomp)?;
    say_where(listener.endpoint()).map_err(StandbyError::Prepare)?;
    let (told, tells) = channel();
    let passing_on = notices.clone();
    spawn("standby-notices", move || pass_on(&tells, &passing_on))?;
    let standby = match listener.accept(&options, &common.arrival, &mut |_| Ok(()), told) {
        Err(error) if is_cancelled(&error) => return Ok(None),
        standby => standby?,
    };
    let promoted = serve(standby, &asked, &notices, args)?;
    promoted
        .map(|vmm| run_promoted(vmm, &common, view, args, &options, logger))
        .transpose()
}

/// Whether nobody wanted it any more.
fn is_cancelled(error: &cutover_vmm::Error) -> bool {
    matches!(
        error,
        cutover_vmm::Error::Migration(cutover_migration::Error::Cancelled)
    )
}

fn request(args: &StandbyArgs) -> Result<StandbyRequest, StandbyError> {
    // Another standby of the VM may have been here, and may be the VM now.
    let own = |dir: &PathBuf| dir.join(format!("{}-{}-{}", args.vm, args.group, args.seat));
    let disks_dir = args.disks.as_ref().map(own);
    if let Some(dir) = &disks_dir {
        fs::create_dir_all(dir).map_err(|error| StandbyError::Disks(dir.clone(), error))?;
    }
    let console = args
        .consoles
        .as_ref()
        .map(|dir| dir.join(format!("{}.console", args.vm)));
    Ok(StandbyRequest {
        receive: ReceiveRequest {
            listen: args.listen.clone(),
            tls: tls_dir::for_endpoint(&args.listen, args.tls_dir.as_deref()),
            name: Some(args.vm.to_string()),
            nets: Default::default(),
            disks: Default::default(),
            disks_dir,
            vsock: None,
            serial: console.map_or(SerialSpec::Null, SerialSpec::Socket),
        },
        link: Default::default(),
    })
}

/// Tells whoever started this process where it listens.
fn say_where(endpoint: &Endpoint) -> io::Result<()> {
    let mut output = io::stdout();
    writeln!(output, "{endpoint}")?;
    output.flush()
}

/// A signal ends the standby, and is for the VM once there is one.
fn serve_signals(common: &Common, options: &Options) -> Result<(), StandbyError> {
    let common = common.clone();
    let told = move |time| match common.controller.get() {
        Some(vm) => signals::tell(vm, time),
        None => common.give_up(),
    };
    let signals = Blocked::block().map_err(StandbyError::Prepare)?;
    signals.serve(told, options.seccomp).map_err(StandbyError::Prepare)
}

/// Has this be a standby to the coordinator; the threads for that are confined.
fn take_seat(args: &StandbyArgs, common: &Common, confine: bool) -> Result<(Notices, SharedView), StandbyError> {
    let tls = tls_dir::for_endpoint(&args.coordinator, args.tls_dir.as_deref());
    let options = SeatOptions {
        who: Identity {
            group: args.group,
            seat: args.seat,
        },
        host: Host(args.host.clone()),
        coordinator: args.coordinator.clone(),
        security: security(tls.as_deref(), args.insecure)?,
    };
    let seat = Seat::default();
    let notices = seat.notices();
    let (common, remote) = (common.clone(), Remote(common.work.clone()));
    let (taken, is_taken) = channel();
    spawn("seat-start", move || {
        if confine {
            seccomp::confine_or_abort(ThreadKind::Migration);
        }
        // Whoever waits for it is there until it comes.
        let _ = taken.send(seat.stand_by(remote, &options, move |ending| common.ended(ending)));
    })?;
    let gone = |_| StandbyError::Prepare(io::ErrorKind::BrokenPipe.into());
    Ok((notices, is_taken.recv().map_err(gone)??))
}

fn spawn(name: &str, run: impl FnOnce() + Send + 'static) -> Result<(), StandbyError> {
    let thread = thread::Builder::new().name(name.to_owned()).spawn(run);
    thread.map(drop).map_err(StandbyError::Prepare)
}

/// Passes on what the standby tells, until it tells nothing more.
fn pass_on(from: &Receiver<protection::StandbyNotice>, to: &Notices) {
    for notice in from {
        to.tell_of_standby(match notice {
            protection::StandbyNotice::Seeded => StandbyNotice::Seeded,
            protection::StandbyNotice::Holds(epoch) => StandbyNotice::Holds(epoch),
            protection::StandbyNotice::PrimaryLost(reason) => StandbyNotice::PrimaryLost(reason),
        });
    }
}

/// Does what the coordinator says, until the standby is the VM, or not wanted any more. Whoever asks and is gone is not
/// answered.
fn serve(
    mut standby: Standby,
    asked: &Receiver<Work>,
    notices: &Notices,
    args: &StandbyArgs,
) -> Result<Option<Vmm>, StandbyError> {
    for work in asked {
        match work {
            Work::Permanent(epoch, answer) => {
                let _ = answer.send(standby.permanent(epoch).map_err(VmError::from));
            }
            Work::Promote(cut, answer) => {
                return match promote(standby, cut, notices, args) {
                    Ok((vmm, member)) => {
                        let _ = answer.send(Ok(member));
                        Ok(Some(vmm))
                    }
                    Err(error) => {
                        let _ = answer.send(Err(error.to_string().into()));
                        Err(error)
                    }
                };
            }
            Work::End => break,
        }
    }
    Ok(None)
}

fn promote(standby: Standby, cut: u64, notices: &Notices, args: &StandbyArgs) -> Result<(Vmm, Member), StandbyError> {
    let mut vmm = standby.promote(cut)?;
    let (told, tells) = channel();
    let protection = vmm.protect(told)?;
    let notices = notices.clone();
    spawn("member", move || member::pass_on(&tells, &notices))?;
    let member = Member::new(
        protection,
        args.insecure,
        args.tls_dir.clone().or_else(|| Some(tls_dir::of_user())),
    );
    Ok((vmm, member))
}

/// Runs the VM that this has become, with an API under its name.
fn run_promoted(
    vmm: Vmm,
    common: &Common,
    view: SharedView,
    args: &StandbyArgs,
    options: &Options,
    logger: &Logger,
) -> Result<Exit, StandbyError> {
    common.controller.get_or_init(|| vmm.controller());
    common.membership.begin(view);
    tracing::warn!(name = %args.vm, "this is the VM now");
    let server = open_api(&vmm, common, args, options, logger);
    let exit = vmm.run();
    if let Some(server) = server {
        server.stop();
    }
    Ok(exit?)
}

/// The API of the VM, which runs without one rather than not at all.
fn open_api(vmm: &Vmm, common: &Common, args: &StandbyArgs, options: &Options, logger: &Logger) -> Option<Server> {
    let listener = match RuntimeDir::locate().listen(&args.vm) {
        Ok(listener) => listener,
        Err(error) => {
            tracing::error!(%error, "the VM has no API");
            return None;
        }
    };
    let membership = common.membership.clone();
    let instance = Instance::of_built(args.vm.to_string(), vmm.into(), options, logger.clone())
        .map(|instance| Arc::new(instance.with_membership(membership)));
    let server = instance
        .map_err(run::RunError::from)
        .and_then(|instance| run::start_server(listener, instance, options));
    server
        .inspect_err(|error| tracing::error!(%error, "the VM has no API"))
        .ok()
}
