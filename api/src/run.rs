//! `cutover run`: one VM, from its description to its end.

use std::io;

use cutover_devices::console::restore_terminal;
use cutover_snapshot::spec::VmSpec;
use cutover_vmm::{Exit, Options, Vmm, host};

use crate::cli::RunArgs;
use crate::config;
use crate::exit::{ExitStatus, report};
use crate::log;
use crate::signals::{self, Blocked};

/// Why a VM could not be run to its end.
#[derive(Debug, thiserror::Error)]
enum RunError {
    #[error(transparent)]
    Vmm(#[from] cutover_vmm::Error),
    #[error("cannot prepare for signals")]
    Signals(#[source] io::Error),
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
        Ok(spec) => run_vm(&spec, args),
        Err(error) => {
            report(&error);
            ExitStatus::Usage
        }
    };
    logger.tell_untold();
    status
}

fn run_vm(spec: &VmSpec, args: &RunArgs) -> ExitStatus {
    let options = Options {
        seccomp: !args.no_seccomp,
        ..Options::default()
    };
    match run_to_end(spec, &options) {
        Ok(exit) => {
            tracing::info!(name = spec.name, ?exit, "the VM has ended");
            exit.into()
        }
        Err(error) => {
            report(&error);
            ExitStatus::Failure
        }
    }
}

fn run_to_end(spec: &VmSpec, options: &Options) -> Result<Exit, RunError> {
    warn_of_emulation();
    let signals = Blocked::block().map_err(RunError::Signals)?;
    let vmm = Vmm::build(spec, options)?;
    let vm = vmm.controller();
    let told = move |time| signals::tell(&vm, time);
    signals.serve(told, options).map_err(RunError::Signals)?;
    tracing::info!(name = spec.name, cpus = spec.cpus, memory = %spec.memory.size, "the VM runs");
    Ok(vmm.run()?)
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
