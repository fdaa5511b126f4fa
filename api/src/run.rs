//! `cutover run`: one VM, from its description to its end; with an API beside it if asked for. A VM that is restored
//! from a snapshot runs in the same way.

use std::error::Error;
use std::io;
use std::sync::Arc;

use cutover_devices::console::restore_terminal;
use cutover_devices::listener::{ListenError, Listener};
use cutover_devices::mmds::SIZE_LIMIT;
use cutover_vmm::events::TooManySubscribers;
use cutover_vmm::{Exit, Options, Vmm, host};

use crate::cli::{MonitorArgs, RunArgs};
use crate::config::{self, ConfigError};
use crate::exit::{ExitStatus, report};
use crate::log::{self, Logger};
use crate::plan::Plan;
use crate::runtime_dir::{CLIENTS_WAITING_MAX, NameError, RuntimeDir, RuntimeDirError};
use crate::server::instance::Instance;
use crate::server::{self, BODY_MAX, Server};
use crate::signals::{self, Blocked};
use crate::vmm::DEFAULT_ID;

/// Why a VM could not be run to its end.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RunError {
    #[error(transparent)]
    Vmm(#[from] cutover_vmm::Error),
    #[error("cannot prepare for signals")]
    Signals(#[source] io::Error),
    #[error("a VM with an API needs a name: give --name NAME, or say with --api-sock PATH where to listen")]
    NoName,
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Name(#[from] NameError),
    #[error(transparent)]
    RuntimeDir(#[from] RuntimeDirError),
    #[error(transparent)]
    Listen(#[from] ListenError),
    #[error(transparent)]
    Events(#[from] TooManySubscribers),
    #[error("cannot serve the API")]
    Server(#[source] io::Error),
}

impl RunError {
    /// How the process ends.
    pub(crate) fn status(&self) -> ExitStatus {
        match self {
            Self::NoName | Self::Name(_) | Self::Config(_) => ExitStatus::Usage,
            _ => ExitStatus::Failure,
        }
    }
}

/// Runs the VM that `args` describe, and tells how it ended.
pub fn run(args: &RunArgs) -> ExitStatus {
    run_plan(|| config::vm_spec(args).map(Plan::Boot), &args.monitor).map_or_else(|failed| failed, ExitStatus::from)
}

/// Runs the VM of `plan` in this process, and tells how it ended. A plan that cannot be made is wrong usage.
///
/// # Errors
/// It could not be run to its end, of which the user has been told.
pub fn run_plan<E: Error>(plan: impl FnOnce() -> Result<Plan, E>, args: &MonitorArgs) -> Result<Exit, ExitStatus> {
    with_log(args, |logger| {
        let plan = plan().map_err(|error| told(&error, ExitStatus::Usage))?;
        let exit = run_to_end(&plan, args, logger).map_err(|error| told(&error, error.status()))?;
        tracing::info!(name = plan.name(), ?exit, "the VM has ended");
        Ok(exit)
    })
}

/// Does `work` with the log that `args` ask for, and a terminal that survives panics.
///
/// # Errors
/// There can be no such log, of which the user has been told; or those of `work`.
pub fn with_log(
    args: &MonitorArgs,
    work: impl FnOnce(&Logger) -> Result<Exit, ExitStatus>,
) -> Result<Exit, ExitStatus> {
    let logger = log::start(&args.log).map_err(|error| told(&error, ExitStatus::Usage))?;
    restore_terminal_on_panic();
    let exit = work(&logger);
    logger.tell_untold();
    exit
}

/// `status`, after the user has been told of the error behind it.
pub fn told(error: &dyn Error, status: ExitStatus) -> ExitStatus {
    report(error);
    status
}

fn run_to_end(plan: &Plan, args: &MonitorArgs, logger: &Logger) -> Result<Exit, RunError> {
    let listener = listen(plan.name(), args)?;
    let options = Options {
        seccomp: !args.no_seccomp,
        managed: listener.is_some(),
        dirty_log: args.dirty_log.into(),
        metadata: config::metadata(args.metadata.as_deref(), SIZE_LIMIT)?,
        ..Options::default()
    };
    warn_of_emulation();
    let signals = Blocked::block().map_err(RunError::Signals)?;
    let vmm = plan.build(&options)?;
    let vm = vmm.controller();
    let told = move |time| signals::tell(&vm, time);
    signals.serve(told, options.seccomp).map_err(RunError::Signals)?;
    let server = listener.map(|listener| serve(listener, &vmm, &options, logger));
    let server = server.transpose()?;
    let spec = vmm.spec();
    tracing::info!(name = spec.name, cpus = spec.cpus, memory = %spec.memory.size, "the VM runs");
    let exit = vmm.run();
    if let Some(server) = server {
        server.stop();
    }
    Ok(exit?)
}

/// Listens for clients of the API, if there is to be one, of a VM called `name`.
///
/// # Errors
/// The name is missing or taken, or the socket cannot be had.
pub(crate) fn listen(name: Option<&str>, args: &MonitorArgs) -> Result<Option<Listener>, RunError> {
    match (&args.api_sock, args.api) {
        (Some(path), _) => Ok(Some(Listener::bind(path, CLIENTS_WAITING_MAX)?)),
        (None, true) => {
            let name = name.ok_or(RunError::NoName)?.parse()?;
            Ok(Some(RuntimeDir::locate().listen(&name)?))
        }
        (None, false) => Ok(None),
    }
}

fn serve(listener: Listener, vmm: &Vmm, options: &Options, logger: &Logger) -> Result<Server, RunError> {
    let id = id(vmm.spec().name.as_deref());
    let instance = Instance::of_built(id, vmm.into(), options, logger.clone())?;
    start_server(listener, Arc::new(instance), options)
}

/// What a VM called `name` is called by its API.
pub(crate) fn id(name: Option<&str>) -> String {
    name.unwrap_or(DEFAULT_ID).to_owned()
}

/// Serves `instance` to the clients of `listener`.
///
/// # Errors
/// The operating system refused what that takes.
pub(crate) fn start_server(listener: Listener, instance: Arc<Instance>, options: &Options) -> Result<Server, RunError> {
    let options = server::Options {
        seccomp: options.seccomp,
        body_max: BODY_MAX,
    };
    Server::start(Some(listener), instance, options).map_err(RunError::Server)
}

/// Warns where guests are likely to fail for want of hardware.
pub(crate) fn warn_of_emulation() {
    if matches!(host::cpu_extension(), Ok(None)) {
        tracing::warn!(
            "this processor shows neither vmx nor svm: KVM emulates each instruction here, and a stock Linux kernel \
             does not get through its boot; see `cutover check`"
        );
    }
}

/// A panic may end the process without running destructors, and its message is unreadable in raw mode.
pub(crate) fn restore_terminal_on_panic() {
    let tell = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        restore_terminal();
        tell(info);
    }));
}
