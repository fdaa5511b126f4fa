//! `cutover run`: one VM, from its description to its end; with an API beside it if asked for. A VM that is restored
//! from a snapshot runs in the same way.

use std::error::Error;
use std::io;
use std::sync::Arc;

use cutover_devices::console::restore_terminal;
use cutover_devices::listener::{ListenError, Listener};
use cutover_vmm::events::TooManySubscribers;
use cutover_vmm::{Exit, Options, Vmm, host};

use crate::cli::{MonitorArgs, RunArgs};
use crate::config;
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
enum RunError {
    #[error(transparent)]
    Vmm(#[from] cutover_vmm::Error),
    #[error("cannot prepare for signals")]
    Signals(#[source] io::Error),
    #[error("a VM with an API needs a name: give --name NAME, or say with --api-sock PATH where to listen")]
    NoName,
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
    fn status(&self) -> ExitStatus {
        match self {
            Self::NoName | Self::Name(_) => ExitStatus::Usage,
            _ => ExitStatus::Failure,
        }
    }
}

/// Runs the VM that `args` describe, and tells how it ended.
pub fn run(args: &RunArgs) -> ExitStatus {
    run_plan(|| config::vm_spec(args).map(Plan::Boot), &args.monitor)
}

/// Runs the VM of `plan` in this process, and tells how it ended. A plan that cannot be made is wrong usage.
pub fn run_plan<E: Error>(plan: impl FnOnce() -> Result<Plan, E>, args: &MonitorArgs) -> ExitStatus {
    let logger = match log::start(&args.log) {
        Ok(logger) => logger,
        Err(error) => {
            report(&error);
            return ExitStatus::Usage;
        }
    };
    restore_terminal_on_panic();
    let status = match plan() {
        Ok(plan) => run_vm(&plan, args, &logger),
        Err(error) => {
            report(&error);
            ExitStatus::Usage
        }
    };
    logger.tell_untold();
    status
}

fn run_vm(plan: &Plan, args: &MonitorArgs, logger: &Logger) -> ExitStatus {
    match run_to_end(plan, args, logger) {
        Ok(exit) => {
            tracing::info!(name = plan.name(), ?exit, "the VM has ended");
            exit.into()
        }
        Err(error) => {
            report(&error);
            error.status()
        }
    }
}

fn run_to_end(plan: &Plan, args: &MonitorArgs, logger: &Logger) -> Result<Exit, RunError> {
    let listener = listen(plan, args)?;
    let options = Options {
        seccomp: !args.no_seccomp,
        managed: listener.is_some(),
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

/// Listens for clients of the API, if there is to be one.
fn listen(plan: &Plan, args: &MonitorArgs) -> Result<Option<Listener>, RunError> {
    match (&args.api_sock, args.api) {
        (Some(path), _) => Ok(Some(Listener::bind(path, CLIENTS_WAITING_MAX)?)),
        (None, true) => {
            let name = plan.name().ok_or(RunError::NoName)?;
            Ok(Some(RuntimeDir::locate().listen(&name.parse()?)?))
        }
        (None, false) => Ok(None),
    }
}

fn serve(listener: Listener, vmm: &Vmm, options: &Options, logger: &Logger) -> Result<Server, RunError> {
    let id = vmm.spec().name.clone().unwrap_or_else(|| DEFAULT_ID.to_owned());
    let instance = Instance::of_built(id, vmm.into(), options.events.clone(), logger.clone())?;
    let options = server::Options {
        seccomp: options.seccomp,
        body_max: BODY_MAX,
    };
    Server::start(Some(listener), Arc::new(instance), options).map_err(RunError::Server)
}

/// Warns where guests are likely to fail for want of hardware.
pub(crate) fn warn_of_emulation() {
    if host::cpu_extension().is_none() {
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
