//! `cutover run`: one VM, from its description to its end; with an API beside it if asked for.

use std::io;
use std::sync::Arc;

use cutover_devices::console::restore_terminal;
use cutover_devices::listener::{ListenError, Listener};
use cutover_snapshot::spec::VmSpec;
use cutover_vmm::events::TooManySubscribers;
use cutover_vmm::{Exit, Options, Vmm, host};

use crate::cli::RunArgs;
use crate::config;
use crate::exit::{ExitStatus, report};
use crate::log::{self, Logger};
use crate::runtime_dir::{CLIENTS_WAITING_MAX, NameError, RuntimeDir, RuntimeDirError};
use crate::server::instance::{Instance, sender};
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
    let logger = match log::start(&args.log) {
        Ok(logger) => logger,
        Err(error) => {
            report(&error);
            return ExitStatus::Usage;
        }
    };
    restore_terminal_on_panic();
    let status = match config::vm_spec(args) {
        Ok(spec) => run_vm(&spec, args, &logger),
        Err(error) => {
            report(&error);
            ExitStatus::Usage
        }
    };
    logger.tell_untold();
    status
}

fn run_vm(spec: &VmSpec, args: &RunArgs, logger: &Logger) -> ExitStatus {
    match run_to_end(spec, args, logger) {
        Ok(exit) => {
            tracing::info!(name = spec.name, ?exit, "the VM has ended");
            exit.into()
        }
        Err(error) => {
            report(&error);
            error.status()
        }
    }
}

fn run_to_end(spec: &VmSpec, args: &RunArgs, logger: &Logger) -> Result<Exit, RunError> {
    let listener = listen(spec, args)?;
    let options = Options {
        seccomp: !args.no_seccomp,
        managed: listener.is_some(),
        ..Options::default()
    };
    warn_of_emulation();
    let signals = Blocked::block().map_err(RunError::Signals)?;
    let vmm = Vmm::build(spec, &options)?;
    let vm = vmm.controller();
    let told = move |time| signals::tell(&vm, time);
    signals.serve(told, &options).map_err(RunError::Signals)?;
    let server = listener.map(|listener| serve(listener, spec, &vmm, &options, logger));
    let server = server.transpose()?;
    tracing::info!(name = spec.name, cpus = spec.cpus, memory = %spec.memory.size, "the VM runs");
    let exit = vmm.run();
    if let Some(server) = server {
        server.stop();
    }
    Ok(exit?)
}

/// Listens for clients of the API, if there is to be one.
fn listen(spec: &VmSpec, args: &RunArgs) -> Result<Option<Listener>, RunError> {
    match (&args.api_sock, args.api) {
        (Some(path), _) => Ok(Some(Listener::bind(path, CLIENTS_WAITING_MAX)?)),
        (None, true) => {
            let name = spec.name.as_ref().ok_or(RunError::NoName)?;
            Ok(Some(RuntimeDir::locate().listen(&name.parse()?)?))
        }
        (None, false) => Ok(None),
    }
}

fn serve(listener: Listener, spec: &VmSpec, vmm: &Vmm, options: &Options, logger: &Logger) -> Result<Server, RunError> {
    let id = spec.name.clone().unwrap_or_else(|| DEFAULT_ID.to_owned());
    let vm = sender(vmm.controller());
    let instance = Instance::of_built(id, spec, vm, options.events.clone(), logger.clone())?;
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
