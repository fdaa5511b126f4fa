//! `cutover vmm`: one VM behind an API, from its configuration to its end.
//!
//! ```text
//!  main thread   bind socket ─ … ─ wait for a VM to build ─ Plan::build ─ Vmm::run (state driver) ─ stop the server
//!  api               └─► serve: configure, start ──────────────┘           ▲    answers
//!  signals                 first: end, if there is no VM yet ──────────────┘    else power button, then force
//! ```

use std::io;
use std::path::Path;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, OnceLock};

use cutover_devices::listener::{ListenError, Listener};
use cutover_vmm::events::TooManySubscribers;
use cutover_vmm::{Controller, Exit, Options, Vmm};

use crate::config::{self, ConfigError};
use crate::exit::{ExitStatus, report};
use crate::log::{self, LogArgs, LogError, Logger};
use crate::run;
use crate::runtime_dir::{CLIENTS_WAITING_MAX, RuntimeDir, RuntimeDirError};
use crate::server::firecracker::config_file::FullConfiguration;
use crate::server::firecracker::rejection::Rejection;
use crate::server::firecracker::setup::Change;
use crate::server::http::Failure;
use crate::server::instance::{Build, Instance};
use crate::server::{self, Server};
use crate::signals::{self, Blocked};

mod args;

pub(crate) use args::DEFAULT_ID;
pub use args::{VMM_HELP, VmmArgs};

/// Why a VM could not be run to its end.
#[derive(Debug, thiserror::Error)]
enum VmmError {
    #[error("{option} is not supported: {reason}")]
    Unsupported { option: &'static str, reason: &'static str },
    #[error(transparent)]
    File(#[from] ConfigError),
    #[error("what is configured describes no VM")]
    Configuration(#[source] Failure),
    #[error(transparent)]
    Listen(#[from] ListenError),
    #[error(transparent)]
    RuntimeDir(#[from] RuntimeDirError),
    #[error(transparent)]
    Log(#[from] LogError),
    #[error(transparent)]
    Events(#[from] TooManySubscribers),
    #[error("cannot prepare for signals")]
    Signals(#[source] io::Error),
    #[error("cannot serve the API")]
    Server(#[source] io::Error),
    #[error(transparent)]
    Vmm(#[from] cutover_vmm::Error),
}

impl VmmError {
    fn status(&self) -> ExitStatus {
        match self {
            Self::Unsupported { .. } | Self::File(_) | Self::Configuration(_) | Self::Log(_) => ExitStatus::Usage,
            _ => ExitStatus::Failure,
        }
    }
}

/// What the main thread waits for while there is no VM.
enum Awaited {
    Build(Box<Build>),
    Quit,
}

/// Runs the VM that `args` and the clients of the API describe, and tells how it ended.
pub fn vmm(args: &VmmArgs) -> ExitStatus {
    match serve(args) {
        // A reboot is the one way for a guest of Firecracker to shut down, so those who wait for it expect no failure.
        Ok(Exit::Reboot) => ExitStatus::Success,
        Ok(exit) => exit.into(),
        Err(error) => {
            report(&error);
            error.status()
        }
    }
}

fn serve(args: &VmmArgs) -> Result<Exit, VmmError> {
    if let Some((option, reason)) = args.unsupported.given() {
        return Err(VmmError::Unsupported { option, reason });
    }
    // The socket comes first: clients wait for it.
    let listener = if args.no_api { None } else { Some(listen(args)?) };
    let logger = log::start(&LogArgs::default())?;
    let exit = logger.reconfigure(args.log()).map_err(VmmError::from).and_then(|()| {
        run::restore_terminal_on_panic();
        serve_with(args, listener, &logger)
    });
    logger.tell_untold();
    exit
}

fn serve_with(args: &VmmArgs, listener: Option<Listener>, logger: &Logger) -> Result<Exit, VmmError> {
    let options = Options {
        seccomp: !args.no_seccomp,
        managed: true,
        dirty_log: args.dirty_log.into(),
        metadata: config::metadata(args.metadata.as_deref(), args.metadata_max())?,
        ..Options::default()
    };
    let (await_me, awaited) = channel();
    let controller = Arc::<OnceLock<Controller>>::default();
    let signals = Blocked::block().map_err(VmmError::Signals)?;
    let quit = await_me.clone();
    let instance = Arc::new(Instance::new(
        args.id.to_string(),
        // A main thread that is gone has dropped the request, which is answer enough.
        Box::new(move |build| drop(await_me.send(Awaited::Build(Box::new(build))))),
        &options,
        logger.clone(),
    )?);
    serve_signals(signals, controller.clone(), instance.clone(), quit, &options)?;
    if let Some(metrics) = args.metrics() {
        instance
            .configure(Change::Metrics(metrics))
            .map_err(VmmError::Configuration)?;
    }
    let file = args.config_file.as_deref();
    file.map_or(Ok(()), |path| configure(&instance, path))?;
    let server = (listener.is_some() || instance.has_metrics_file()).then(|| {
        let options = server::Options {
            seccomp: options.seccomp,
            body_max: args.http_api_max_payload_size,
        };
        Server::start(listener, instance.clone(), options).map_err(VmmError::Server)
    });
    let server = server.transpose()?;
    run::warn_of_emulation();
    let exit = match file {
        Some(_) => start(&instance, &controller, &options).map(Some),
        None => Ok(wait_for_start(&awaited, &controller, &options)),
    };
    let told = instance.clone();
    let last = move |stats| told.write_last_metrics(&stats);
    let exit = exit.and_then(|vmm| vmm.map_or(Ok(Exit::Ended), |vmm| Ok(vmm.run_counted(last)?)));
    tracing::info!(id = %args.id, ?exit, "the VM has ended");
    if let Some(server) = server {
        server.stop();
    }
    exit
}

fn listen(args: &VmmArgs) -> Result<Listener, VmmError> {
    Ok(match &args.api_sock {
        Some(path) => Listener::bind(path, CLIENTS_WAITING_MAX)?,
        None => RuntimeDir::locate().listen(&args.id)?,
    })
}

/// The first signal presses the power button of the VM, if there is one; else it ends the process.
fn serve_signals(
    signals: Blocked,
    controller: Arc<OnceLock<Controller>>,
    instance: Arc<Instance>,
    main: Sender<Awaited>,
    options: &Options,
) -> Result<(), VmmError> {
    let told = move |time| match controller.get() {
        Some(vm) => signals::tell(vm, time),
        None => {
            // The main thread may be waiting for one.
            instance.cancel_arrival();
            // If it is gone, the process is about to end as it is.
            let _ = main.send(Awaited::Quit);
        }
    };
    signals.serve(told, options.seccomp).map_err(VmmError::Signals)
}

/// Configures what the file at `path` says.
fn configure(instance: &Instance, path: &Path) -> Result<(), VmmError> {
    let file: FullConfiguration = config::read(path)?;
    let changes = Vec::<Change>::try_from(file).map_err(refused)?;
    for change in changes {
        instance.configure(change).map_err(VmmError::Configuration)?;
    }
    Ok(())
}

fn refused(rejection: Rejection) -> VmmError {
    VmmError::Configuration(rejection.into())
}

/// Builds what is configured, without a client that asks for it.
fn start(instance: &Instance, controller: &OnceLock<Controller>, options: &Options) -> Result<Vmm, VmmError> {
    let spec = instance.begin_start().map_err(VmmError::Configuration)?;
    let vmm = Vmm::build(&spec, options)?;
    controller.get_or_init(|| vmm.controller());
    instance
        .finish_start(Ok((&vmm).into()))
        .map_err(VmmError::Configuration)?;
    Ok(vmm)
}

/// Builds what clients ask for until something can be built; nothing if the process is told to end before.
fn wait_for_start(awaited: &Receiver<Awaited>, controller: &OnceLock<Controller>, options: &Options) -> Option<Vmm> {
    while let Ok(Awaited::Build(build)) = awaited.recv() {
        match build.plan.build(options) {
            Ok(vmm) => {
                controller.get_or_init(|| vmm.controller());
                (build.answer)(Ok((&vmm).into()));
                return Some(vmm);
            }
            Err(error) => (build.answer)(Err(error)),
        }
    }
    None
}
