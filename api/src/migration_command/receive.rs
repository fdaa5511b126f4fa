//! `cutover receive`: waits for a VM that another monitor sends, and from then on is its monitor, as `cutover run` is of
//! one that it has booted.
//!
//! ```text
//!  main thread   Vmm::receive: listen ─ reserve ─ memory ─ state ─ run ─► Vmm::run (state driver)
//!  api             tells how far it is, cancels ─┘                         ▲ answers
//!  signals         cancel, if there is no VM yet ┘  else power button, force ┘
//! ```

// Documentation here is help text, in which brackets mean that something can be left out.
#![allow(rustdoc::broken_intra_doc_links)]

use std::io;
use std::mem;
use std::path::PathBuf;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Arc, OnceLock};
use std::thread;

use clap::Args;
use cutover_devices::console::keep_signals;
use cutover_devices::mmds::SIZE_LIMIT;
use cutover_migration::status::Phase;
use cutover_migration::transport::Endpoint;
use cutover_snapshot::spec::VmSpec;
use cutover_vmm::migration::{MigrationStatus, ReceiveRequest};
use cutover_vmm::snapshot::NetOverride;
use cutover_vmm::{Controller, Exit, Options, Vmm};
use serde_json::json;

use super::bar::MigrationBar;
use super::{UsageError, check_endpoint};
use crate::cli::MonitorArgs;
use crate::client::LOOK_EVERY;
use crate::config;
use crate::exit::{ExitStatus, after_printing, with_causes};
use crate::log::Logger;
use crate::options;
use crate::run::{self, RunError, told};
use crate::server::Server;
use crate::server::instance::Instance;
use crate::server::v1::types::ExitV1;
use crate::signals::{self, Blocked, Time};
use crate::tls_dir;

/// Arguments of `cutover receive`.
#[derive(Debug, Args)]
pub struct ReceiveArgs {
    /// Where to wait for the VM: tls://host:port, unix:PATH on this host, or tcp://host:port with --insecure
    #[arg(long, value_name = "ENDPOINT")]
    listen: Endpoint,

    /// Another tap device for a network interface
    #[arg(long = "tap", visible_alias = "net", value_name = "ID=TAP", value_parser = options::tap_of, help_heading = "Devices")]
    taps: Vec<(String, String)>,

    /// Another file for a disk: where it is on this host, or, of a disk that moves with the VM, where it is to be
    #[arg(long = "disk", value_name = "ID=FILE", value_parser = options::file_of, help_heading = "Devices")]
    disks: Vec<(String, PathBuf)>,

    /// Another Unix socket for the vsock device: uds=PATH
    #[arg(long = "vsock", value_name = "VSOCK", value_parser = options::vsock_uds, help_heading = "Devices")]
    vsock: Option<PathBuf>,

    /// Directory in which to create files, as ID.img, for disks that move with the VM
    #[arg(long = "disks", value_name = "DIR", help_heading = "Devices")]
    disks_dir: Option<PathBuf>,

    /// Directory of this host's certificate, as `cutover tls init` makes it [default: that of the user]
    #[arg(long, value_name = "DIR", help_heading = "Link")]
    tls_dir: Option<PathBuf>,

    /// Allow tcp://, where anyone who can connect can put a VM here
    #[arg(long, help_heading = "Link")]
    insecure: bool,

    /// Print a last line of JSON that tells how the VM ended
    #[arg(long, help_heading = "Monitor")]
    json: bool,

    /// How this process behaves.
    #[command(flatten)]
    monitor: MonitorArgs,
}

/// Shown with `cutover receive --help`.
pub const HELP: &str = "\
One VM is waited for, and this process is its monitor from then on: its console, the signals and the
exit codes are those of `cutover run`. This host has to have what the VM needs: memory, processor
features, files of its disks, taps; otherwise the VM is refused with all reasons at once, and goes on
where it is, and this command fails. Up to the moment the VM is handed over, Ctrl-C (or SIGTERM)
cancels, and nothing is left behind.

With --api, GET /v1/migration tells how far it is. The VM keeps its name unless --name gives another.

Examples:
  A VM from any host that has a certificate of ours (see `cutover tls init`):
    cutover receive --listen tls://[::]:7000 --name web --api

  Its disk is elsewhere here, and its network on another tap:
    cutover receive --listen tls://[::]:7000 --disk disk0=/srv/web.img --tap net0=tap7

  A VM that brings its disks along (`cutover migrate --disks move`):
    cutover receive --listen tls://[::]:7000 --disks /srv/web

  From another monitor on this host, without copying memory:
    cutover receive --listen unix:/run/web.migrate --name web2 --api --serial socket=/run/web2.console

Exit codes:
  0  the guest shut itself down, or has moved on
  1  no VM arrived, or the monitor failed
  2  the command line is wrong
  3  the guest asked for a reboot
  4  the guest panicked
  5  the VM was ended by force (console escape, second signal)";

/// Waits for a VM, runs it, and tells how it ended.
pub fn run(args: &ReceiveArgs) -> ExitStatus {
    let received = run::with_log(&args.monitor, |logger| {
        let request = request(args).map_err(|error| told(&error, ExitStatus::Usage))?;
        receive(&request, &args.monitor, logger).map_err(|error| told(&error, error.status()))
    });
    let exit = match received {
        Ok(exit) => exit,
        Err(status) => return status,
    };
    if args.json {
        let end = json!({ "listen": args.listen.to_string(), "exit": ExitV1::from(exit) });
        // How the guest ended tells more than whether anybody reads this.
        after_printing(format!("{end}\n").as_bytes(), &mut io::stdout());
    }
    exit.into()
}

fn request(args: &ReceiveArgs) -> Result<ReceiveRequest, UsageError> {
    check_endpoint(&args.listen, args.insecure)?;
    let net = |tap| NetOverride {
        tap: Some(tap),
        mac: None,
    };
    Ok(ReceiveRequest {
        listen: args.listen.clone(),
        tls: tls_dir::for_endpoint(&args.listen, args.tls_dir.as_deref()),
        name: args.monitor.name.clone(),
        nets: options::unique("--tap", &args.taps)?
            .into_iter()
            .map(|(id, tap)| (id, net(tap)))
            .collect(),
        disks: options::unique("--disk", &args.disks)?,
        disks_dir: args.disks_dir.clone(),
        vsock: args.vsock.clone(),
        serial: args.monitor.serial.clone().unwrap_or_default(),
    })
}

fn receive(request: &ReceiveRequest, args: &MonitorArgs, logger: &Logger) -> Result<Exit, RunError> {
    let options = Options {
        seccomp: !args.no_seccomp,
        managed: args.api || args.api_sock.is_some(),
        dirty_log: args.dirty_log.into(),
        metadata: config::metadata(args.metadata.as_deref(), SIZE_LIMIT)?,
        ..Options::default()
    };
    run::warn_of_emulation();
    // From the reservation on the terminal is the console's, but its keys are not the guest's before that is here.
    let status = Arc::new(MigrationStatus::observed(Box::new(|progress| {
        if progress.phase == Phase::PreCopy {
            keys_are_signals(true);
        }
    })));
    let controller = serve_signals(status.clone(), &options)?;
    let mut front = Front {
        args,
        logger,
        options: &options,
        status: &status,
        open: None,
    };
    if request.name.is_some() || args.api_sock.is_some() {
        front.open(request.name.as_deref())?;
    }
    // A VM that is to be called as it was can only be listened for once that is known.
    let mut admit = |spec: &VmSpec| front.open(spec.name.as_deref()).map_err(|error| with_causes(&error));
    let arrived = arrive(request, &options, &status, &mut admit);
    let exit = arrived.and_then(|vmm| {
        keys_are_signals(false);
        controller.get_or_init(|| vmm.controller());
        front.arrived(&vmm);
        tracing::info!(name = vmm.spec().name, "the VM has arrived, and runs");
        Ok(vmm.run()?)
    });
    if let Some((_, server)) = front.open {
        server.stop();
    }
    exit
}

/// Whether Ctrl-C on the console's terminal is a signal to this process, or a key for the guest.
fn keys_are_signals(are: bool) {
    if let Err(error) = keep_signals(are) {
        tracing::warn!(%error, "cannot change the terminal's settings");
    }
}

/// The API of a VM that is yet to come, if it is to have one.
struct Front<'a> {
    args: &'a MonitorArgs,
    logger: &'a Logger,
    options: &'a Options,
    status: &'a Arc<MigrationStatus>,
    open: Option<(Arc<Instance>, Server)>,
}

impl Front<'_> {
    /// Serves the API of a VM called `name`, unless that is done already.
    fn open(&mut self, name: Option<&str>) -> Result<(), RunError> {
        if self.open.is_some() {
            return Ok(());
        }
        let Some(listener) = run::listen(name, self.args)? else {
            return Ok(());
        };
        let instance = Instance::of_arriving(run::id(name), self.status.clone(), self.options, self.logger.clone())?;
        let instance = Arc::new(instance);
        let server = run::start_server(listener, instance.clone(), self.options)?;
        self.open = Some((instance, server));
        Ok(())
    }

    /// The VM is there.
    fn arrived(&self, vmm: &Vmm) {
        if let Some((instance, _)) = &self.open
            && let Err(error) = instance.finish_start(Ok(vmm.into()))
        {
            tracing::error!(%error, "the API does not know the VM");
        }
    }
}

/// A signal cancels the reception while there is no VM, and afterwards it is for the VM, which is to be put into the
/// result.
fn serve_signals(status: Arc<MigrationStatus>, options: &Options) -> Result<Arc<OnceLock<Controller>>, RunError> {
    let controller = Arc::<OnceLock<Controller>>::default();
    let vm = controller.clone();
    // One that came too late to cancel anything is not the VM's first.
    let mut time = Time::First;
    let told = move |_| match vm.get() {
        Some(vm) => signals::tell(vm, mem::replace(&mut time, Time::Again)),
        None => status.cancel(),
    };
    let signals = Blocked::block().map_err(RunError::Signals)?;
    signals.serve(told, options.seccomp).map_err(RunError::Signals)?;
    Ok(controller)
}

/// Waits for the VM, under a bar if there is a terminal.
fn arrive(
    request: &ReceiveRequest,
    options: &Options,
    status: &Arc<MigrationStatus>,
    admit: &mut dyn FnMut(&VmSpec) -> Result<(), String>,
) -> Result<Vmm, RunError> {
    let mut bar = MigrationBar::new();
    if bar.is_hidden() {
        return Ok(Vmm::receive(request, options, status, admit)?);
    }
    thread::scope(|scope| {
        let (arrived, is_there) = channel::<()>();
        scope.spawn(move || {
            while let Err(RecvTimeoutError::Timeout) = is_there.recv_timeout(LOOK_EVERY) {
                bar.show(&status.progress().into());
            }
            bar.clear();
        });
        let vmm = Vmm::receive(request, options, status, admit);
        // Only now the bar is gone, and the terminal is the guest's.
        drop(arrived);
        Ok(vmm?)
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use clap::Parser;
    use cutover_snapshot::spec::SerialSpec;

    use super::*;
    use crate::cli::{Cli, Command};

    fn parse(line: &str) -> Result<ReceiveArgs, clap::Error> {
        match Cli::try_parse_from(format!("cutover receive {line}").split(' '))?.command {
            Command::Receive(args) => Ok(*args),
            other => panic!("not receive: {other:?}"),
        }
    }

    #[test]
    fn an_endpoint_is_enough_and_the_console_is_this_terminal() {
        let request = request(&parse("--listen unix:a.sock").expect("valid")).expect("valid");
        let expected = ReceiveRequest {
            listen: Endpoint::Unix("a.sock".into()),
            tls: None,
            name: None,
            nets: BTreeMap::new(),
            disks: BTreeMap::new(),
            disks_dir: None,
            vsock: None,
            serial: SerialSpec::Stdio,
        };
        assert_eq!(request, expected);
    }

    #[test]
    fn every_option_is_read() {
        let args = parse(
            "--listen tls://[::]:7000 --tap a=t1 --net b=t2 --disk root=/r=1.img --disks d --tls-dir /tls --json \
             --name web --api --serial null",
        )
        .expect("valid");
        let request = request(&args).expect("valid");
        assert_eq!(request.nets["a"].tap.as_deref(), Some("t1"));
        assert_eq!(request.nets["b"].tap.as_deref(), Some("t2"));
        assert_eq!(request.disks["root"], PathBuf::from("/r=1.img"));
        assert_eq!(request.disks_dir, Some("d".into()));
        assert_eq!(request.tls, Some("/tls".into()));
        assert_eq!(
            (request.name.as_deref(), request.serial),
            (Some("web"), SerialSpec::Null)
        );
        assert!(args.json && args.monitor.api);
    }

    #[test]
    fn what_makes_no_sense_is_wrong_usage() {
        for line in [
            "",
            "--listen host:1",
            "--listen unix:a --tap t",
            "--listen unix:a --disk =f",
            "x --listen unix:a",
        ] {
            assert_eq!(parse(line).expect_err(line).exit_code(), 2, "{line}");
        }
        let plain = request(&parse("--listen tcp://[::]:7000").expect("well-formed"));
        assert!(matches!(plain, Err(UsageError::Insecure(_))), "{plain:?}");
        let twice = request(&parse("--listen unix:a --tap a=t1 --tap a=t2").expect("well-formed"));
        let id = "a".to_owned();
        assert_eq!(twice, Err(options::Twice { option: "--tap", id }.into()));
    }
}
