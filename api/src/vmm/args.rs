//! The options of `cutover vmm`: those of Firecracker's program, so that what starts that can start this.

use std::path::PathBuf;

use clap::Args;
use tracing::level_filters::LevelFilter;

use crate::cli::DirtyLogChoice;
use crate::log::LogUpdate;
use crate::runtime_dir::VmName;
use crate::server::BODY_MAX;
use crate::server::firecracker::logger::LogLevel;
use crate::server::firecracker::metrics::MetricsConfiguration;

/// Id of a VM that has been given none: Firecracker's.
pub(crate) const DEFAULT_ID: &str = "anonymous-instance";

/// Arguments of `cutover vmm`.
#[derive(Debug, Args)]
pub struct VmmArgs {
    /// Unix socket to serve the API on [default: ID.sock in the runtime directory]
    #[arg(long, value_name = "PATH", help_heading = "API")]
    pub api_sock: Option<PathBuf>,

    /// Name of the VM
    #[arg(long, value_name = "ID", default_value = DEFAULT_ID, help_heading = "API")]
    pub id: VmName,

    /// Serve no API; the configuration file describes the VM
    #[arg(long, requires = "config_file", help_heading = "API")]
    pub no_api: bool,

    /// Most bytes of a request's body
    #[arg(long, value_name = "BYTES", default_value_t = BODY_MAX, help_heading = "API")]
    pub http_api_max_payload_size: usize,

    /// Configure the VM from a JSON file in Firecracker's form, and start it
    #[arg(long, value_name = "FILE", help_heading = "VM")]
    pub config_file: Option<PathBuf>,

    /// What the metadata service tells at first: a JSON file, as the body of PUT /mmds
    #[arg(long, value_name = "FILE", help_heading = "VM")]
    pub metadata: Option<PathBuf>,

    /// Most bytes of the metadata [default: that of a request's body]
    #[arg(long, value_name = "BYTES", help_heading = "VM")]
    pub mmds_size_limit: Option<usize>,

    /// Append the log to FILE, which may be a named pipe, instead of writing it to the standard error
    #[arg(long, value_name = "FILE", help_heading = "Log")]
    pub log_path: Option<PathBuf>,

    /// Least severity of what is logged: Off, Error, Warning, Info, Debug or Trace [default: Warning]
    #[arg(long, value_name = "LEVEL", value_parser = level, help_heading = "Log")]
    pub level: Option<LogLevel>,

    /// Log nothing but what this part of the monitor says, such as virtio
    #[arg(long, value_name = "PART", help_heading = "Log")]
    pub module: Option<String>,

    /// Show the level in the log (it always is)
    #[arg(long, help_heading = "Log")]
    pub show_level: bool,

    /// Show file and line of the source in the log
    #[arg(long, help_heading = "Log")]
    pub show_log_origin: bool,

    /// Append metrics in Firecracker's form to FILE, which may be a named pipe
    #[arg(long, value_name = "FILE", help_heading = "Log")]
    pub metrics_path: Option<String>,

    /// How it is noticed which pages the guest writes, as in `cutover run`
    #[arg(long, value_name = "LOG", default_value = "bitmap", help_heading = "Monitor")]
    pub dirty_log: DirtyLogChoice,

    /// Do not confine the monitor's threads to the system calls they need (for debugging)
    #[arg(long, help_heading = "Monitor")]
    pub no_seccomp: bool,

    /// Times of the process that started this one.
    #[command(flatten)]
    pub times: StartTimes,

    /// What Firecracker has and this has not.
    #[command(flatten)]
    pub unsupported: Unsupported,
}

/// What a jailer tells Firecracker for its metrics: taken, because it asks for nothing.
#[derive(Debug, Default, Args)]
pub struct StartTimes {
    /// Wall clock at the start, in microseconds.
    #[arg(long, hide = true, value_name = "TIME")]
    pub start_time_us: Option<u64>,
    /// CPU time at the start, in microseconds.
    #[arg(long, hide = true, value_name = "TIME")]
    pub start_time_cpu_us: Option<u64>,
    /// CPU time of the parent, in microseconds.
    #[arg(long, hide = true, value_name = "TIME")]
    pub parent_cpu_time_us: Option<u64>,
}

/// Options of Firecracker that are known, to be refused with the reason.
#[derive(Debug, Default, Args)]
pub struct Unsupported {
    /// A device of Firecracker's.
    #[arg(long, hide = true)]
    pub boot_timer: bool,
    /// Devices are virtio-mmio.
    #[arg(long, hide = true)]
    pub enable_pci: bool,
    /// The filters are built in.
    #[arg(long, hide = true, value_name = "FILE")]
    pub seccomp_filter: Option<PathBuf>,
    /// Snapshots have a format of their own.
    #[arg(long, hide = true)]
    pub snapshot_version: bool,
    /// Snapshots have a format of their own.
    #[arg(long, hide = true, value_name = "FILE")]
    pub describe_snapshot: Option<PathBuf>,
}

impl Unsupported {
    /// The first option given that is not supported, and why.
    pub fn given(&self) -> Option<(&'static str, &'static str)> {
        [
            (self.boot_timer, "--boot-timer", "there is no such device"),
            (
                self.enable_pci,
                "--enable-pci",
                "devices are found through ACPI, on virtio-mmio",
            ),
            (
                self.seccomp_filter.is_some(),
                "--seccomp-filter",
                "the filters are built in",
            ),
            (
                self.snapshot_version,
                "--snapshot-version",
                "snapshots have a format of their own",
            ),
            (
                self.describe_snapshot.is_some(),
                "--describe-snapshot",
                "snapshots have a format of their own",
            ),
        ]
        .into_iter()
        .find_map(|(given, option, reason)| given.then_some((option, reason)))
    }
}

impl VmmArgs {
    /// What the options say about the log.
    pub fn log(&self) -> LogUpdate {
        LogUpdate {
            path: self.log_path.clone(),
            level: self.level.map(LevelFilter::from),
            module: self.module.clone(),
            show_level: self.show_level.then_some(true),
            show_origin: self.show_log_origin.then_some(true),
        }
    }

    /// Most bytes of the metadata.
    pub fn metadata_max(&self) -> usize {
        self.mmds_size_limit.unwrap_or(self.http_api_max_payload_size)
    }

    /// What the options say about metrics.
    pub fn metrics(&self) -> Option<MetricsConfiguration> {
        self.metrics_path.clone().map(|metrics_path| MetricsConfiguration {
            metrics_path,
            emit_id: false,
            properties: None,
        })
    }
}

fn level(name: &str) -> Result<LogLevel, &'static str> {
    LogLevel::named(name).ok_or("it is one of Off, Error, Warning, Info, Debug and Trace")
}

/// What `cutover vmm --help` says after the options.
pub const VMM_HELP: &str = "\
The API is Firecracker's, with Cutover's own under /v1; GET /openapi.json describes it, and so does docs/api.md.
The options are Firecracker's, too: a link called firecracker to this program takes its place (then without `vmm`).

Examples:
  Serve the API, to be told what to boot:
    cutover vmm --api-sock vm.sock

  Boot what a configuration file of Firecracker describes, and serve the API:
    cutover vmm --api-sock vm.sock --config-file vm.json

  The same under a name, for `cutover vm`:
    cutover vmm --id web --config-file vm.json
    cutover vm info web

Exit codes:
  0  the guest shut itself down, asked for a reboot, or has moved to another monitor
  1  the monitor failed
  2  the command line or the configuration file is wrong
  4  the guest panicked
  5  the VM was ended by force (API, console escape, second signal)";

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::cli::{Cli, Command};

    fn parse(line: &str) -> Result<VmmArgs, clap::Error> {
        match Cli::try_parse_from(line.split(' '))?.command {
            Command::Vmm(args) => Ok(*args),
            other => panic!("not a vmm: {other:?}"),
        }
    }

    #[test]
    fn nothing_has_to_be_given() {
        let args = parse("cutover vmm").expect("valid");
        assert_eq!(
            (args.api_sock, args.id.to_string()),
            (None, "anonymous-instance".to_owned())
        );
        assert_eq!(args.http_api_max_payload_size, 51200);
    }

    #[test]
    fn the_arguments_that_sdks_and_a_jailer_pass_are_taken() {
        for line in [
            "cutover vmm --api-sock /tmp/fc.sock --id 551e7604-e35c-42b3-b825-416853441234 --no-seccomp",
            "cutover vmm --id vm --start-time-us 1 --start-time-cpu-us 2 --parent-cpu-time-us 3 --api-sock /run/fc.sock",
            "cutover vmm --api-sock=/tmp/fc.sock --log-path log --level Info --show-level --show-log-origin",
            "cutover vmm --config-file vm.json --no-api --module virtio --metrics-path m",
        ] {
            let args = parse(line).expect(line);
            assert_eq!(args.unsupported.given(), None, "{line}");
        }
    }

    #[test]
    fn levels_are_read_in_any_case_and_others_are_refused_with_the_choice() {
        assert_eq!(
            parse("cutover vmm --level WARN").expect("valid").level,
            Some(LogLevel::Warning)
        );
        let error = parse("cutover vmm --level loud").expect_err("no level").to_string();
        assert!(error.contains("it is one of Off, Error"), "{error}");
    }

    #[test]
    fn without_an_api_there_has_to_be_a_file() {
        let error = parse("cutover vmm --no-api").expect_err("nothing to run").to_string();
        assert!(error.contains("--config-file <FILE>"), "{error}");
    }

    #[test]
    fn what_firecracker_has_and_this_has_not_is_known_by_name() {
        for (option, name) in [
            ("--boot-timer", "--boot-timer"),
            ("--enable-pci", "--enable-pci"),
            ("--seccomp-filter f", "--seccomp-filter"),
            ("--snapshot-version", "--snapshot-version"),
            ("--describe-snapshot f", "--describe-snapshot"),
        ] {
            let args = parse(&format!("cutover vmm {option}")).expect("known");
            assert_eq!(args.unsupported.given().map(|(name, _)| name), Some(name));
        }
    }
}
