//! `cutover snapshot restore`: a VM from a snapshot, in this process, as `cutover run` runs one from a description.

// Documentation here is help text, in which brackets mean that something can be left out.
#![allow(rustdoc::broken_intra_doc_links)]

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;

use clap::{Args, ValueEnum};
use cutover_snapshot::spec::MacAddr;
use cutover_vmm::snapshot::{ClockPolicy, NetOverride, RestoreRequest, Source, Trust};
use serde_json::json;

use super::access::AccessArgs;
use crate::cli::MonitorArgs;
use crate::exit::{ExitStatus, after_printing};
use crate::options::{self, Twice, unique};
use crate::plan::Plan;
use crate::run::run_plan;
use crate::server::v1::types::ExitV1;

/// Arguments of `cutover snapshot restore`.
#[derive(Debug, Args)]
pub struct RestoreArgs {
    /// Directory of the snapshot, a file it was exported to, or either of them in a bucket (s3://BUCKET/PATH)
    ///
    /// Buckets are reached as --endpoint and the environment say: AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL and the like.
    #[arg(value_name = "SNAPSHOT")]
    snapshot: PathBuf,

    #[command(flatten)]
    access: AccessArgs,

    /// Another tap device for a network interface
    #[arg(long = "net", value_name = "ID=TAP", value_parser = options::tap_of, help_heading = "Devices")]
    taps: Vec<(String, String)>,

    /// Another MAC address for a network interface; the guest's driver learns of it when it next looks
    #[arg(long = "mac", value_name = "ID=MAC", value_parser = mac, help_heading = "Devices")]
    macs: Vec<(String, MacAddr)>,

    /// Another file for a disk: the one to create if the disk is part of the snapshot, otherwise the one to use
    #[arg(long = "disk", value_name = "ID=FILE", value_parser = options::file_of, help_heading = "Devices")]
    disks: Vec<(String, PathBuf)>,

    /// Another Unix socket for the vsock device: uds=PATH
    #[arg(long = "vsock", value_name = "VSOCK", value_parser = options::vsock_uds, help_heading = "Devices")]
    vsock: Option<PathBuf>,

    /// Directory in which to create files, as ID.img, for the disks that are part of the snapshot
    #[arg(long = "disks", value_name = "DIR", help_heading = "Devices")]
    disks_dir: Option<PathBuf>,

    /// Replace files that are already where disks of the snapshot are to be
    #[arg(long, help_heading = "Devices")]
    replace_disks: bool,

    /// Verify all of the snapshot before the guest runs; without it, each part is verified before the guest gets it
    #[arg(long, conflicts_with = "trusted", help_heading = "Restore")]
    verify: bool,

    /// Map the snapshot's memory without verifying it, where it is one flat file: VMs of it share what they do not change
    #[arg(long, help_heading = "Restore")]
    trusted: bool,

    /// What has become of the time since the snapshot for the guest
    #[arg(long, value_name = "POLICY", default_value = "corrected", help_heading = "Restore")]
    clock: Clock,

    /// Note what the guest changes, so that an incremental snapshot can be built on this one
    #[arg(long, help_heading = "Restore")]
    track: bool,

    /// Leave the guest paused until `cutover vm resume`
    #[arg(long, help_heading = "Restore")]
    paused: bool,

    /// How this process behaves.
    #[command(flatten)]
    monitor: MonitorArgs,
}

/// What has become of the time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Clock {
    /// It has passed: the guest's wall clock is right
    Corrected,
    /// It has not: the guest's clocks go on where they stopped
    Stopped,
}

/// Shown with `cutover snapshot restore --help`.
pub const HELP: &str = "\
The guest runs at once, while its memory and disks are read from the snapshot and what that is
built on. For each disk that is part of the snapshot a file is created. The console, the signals and
the exit codes are those of `cutover run`; with --json the last line says how the guest ended.

Examples:
  A VM that is gone, as it was, with its disks in a directory:
    cutover snapshot restore snapshots/monday --name web --api --disks web-disks

  A second VM beside the first, with its own tap, address and disks:
    cutover snapshot restore snapshots/monday --name copy --api --disks copy-disks \\
        --net net0=tap1 --mac net0=02:00:00:00:00:02

  Verified from the first to the last byte beforehand:
    cutover snapshot restore snapshots/monday --verify

  From a bucket that two servers have: when one is lost, the other one is asked
    cutover snapshot restore s3://backups/web/monday --endpoint https://a.example,https://b.example \\
        --disks web-disks

  Ten VMs that share memory, from a snapshot that is trusted:
    cutover snapshot merge snapshots/monday snapshots/whole
    for n in $(seq 10); do
        cutover snapshot restore snapshots/whole --trusted --name vm$n --api --serial null &
    done

Exit codes:
  0  the guest shut itself down, or has moved to another monitor
  1  the snapshot cannot be restored, or the monitor failed
  2  the command line is wrong
  3  the guest asked for a reboot
  4  the guest panicked
  5  the VM was ended by force (console escape, second signal)";

/// Why the arguments make no sense.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
enum UsageError {
    #[error(transparent)]
    Twice(#[from] Twice),
    #[error("--paused: nobody could resume the VM: give --api or --api-sock PATH")]
    PausedForGood,
}

/// Runs the VM that `args` describe, and tells how it ended.
pub fn run(args: &RestoreArgs, json: bool) -> ExitStatus {
    let exit = match run_plan(|| request(args).map(Plan::Restore), &args.monitor) {
        Ok(exit) => exit,
        Err(status) => return status,
    };
    if json {
        let end = json!({ "snapshot": args.snapshot.display().to_string(), "exit": ExitV1::from(exit) });
        // How the guest ended tells more than whether anybody reads this.
        after_printing(format!("{end}\n").as_bytes(), &mut io::stdout());
    }
    exit.into()
}

fn request(args: &RestoreArgs) -> Result<RestoreRequest, UsageError> {
    if args.paused && !args.monitor.api && args.monitor.api_sock.is_none() {
        return Err(UsageError::PausedForGood);
    }
    let mut nets: BTreeMap<String, NetOverride> = BTreeMap::new();
    for (id, tap) in unique("--net", &args.taps)? {
        nets.entry(id).or_default().tap = Some(tap);
    }
    for (id, mac) in unique("--mac", &args.macs)? {
        nets.entry(id).or_default().mac = Some(mac);
    }
    Ok(RestoreRequest {
        source: Source::Snapshot(args.snapshot.clone()),
        endpoints: args.access.endpoints(),
        trust: match (args.verify, args.trusted) {
            (true, _) => Trust::VerifyFirst,
            (_, true) => Trust::Trusted,
            (false, false) => Trust::VerifyOnRead,
        },
        clock: match args.clock {
            Clock::Corrected => ClockPolicy::Corrected,
            Clock::Stopped => ClockPolicy::Stopped,
        },
        name: args.monitor.name.clone(),
        nets,
        disks: unique("--disk", &args.disks)?,
        disks_dir: args.disks_dir.clone(),
        vsock: args.vsock.clone(),
        replace_disks: args.replace_disks,
        serial: args.monitor.serial.clone().unwrap_or_default(),
        hugepages: None,
        track: args.track,
        paused: args.paused,
    })
}

fn mac(text: &str) -> Result<(String, MacAddr), String> {
    let (id, mac) = options::pair(text)?;
    let mac = mac.parse().map_err(|error| format!("{error}"))?;
    Ok((id, mac))
}

#[cfg(test)]
mod tests {
    use clap::Parser;
    use cutover_snapshot::spec::SerialSpec;

    use super::*;
    use crate::cli::{Cli, Command};
    use crate::snapshot_command::SnapshotCommand;

    fn parse(line: &str) -> Result<RestoreArgs, clap::Error> {
        let line = format!("cutover snapshot restore {line}");
        match Cli::try_parse_from(line.split(' '))?.command {
            Command::Snapshot(args) => match args.command {
                SnapshotCommand::Restore(args) => Ok(*args),
                other => panic!("not restore: {other:?}"),
            },
            other => panic!("not about snapshots: {other:?}"),
        }
    }

    #[test]
    fn a_path_is_enough_and_the_console_is_this_terminal() {
        let request = request(&parse("s/monday").expect("valid")).expect("valid");
        let expected = RestoreRequest {
            source: Source::Snapshot("s/monday".into()),
            endpoints: Vec::new(),
            trust: Trust::VerifyOnRead,
            clock: ClockPolicy::Corrected,
            name: None,
            nets: BTreeMap::new(),
            disks: BTreeMap::new(),
            disks_dir: None,
            vsock: None,
            replace_disks: false,
            serial: SerialSpec::Stdio,
            hugepages: None,
            track: false,
            paused: false,
        };
        assert_eq!(request, expected);
    }

    #[test]
    fn every_option_is_read_and_tap_and_address_of_an_interface_belong_together() {
        let args = parse(
            "s --net a=t1 --mac a=02:00:00:00:00:09 --net b=t2 --disk root=/r=1.img --disks d --vsock uds=v --replace-disks --trusted --clock stopped \
             --track --paused --name web --api --serial null --endpoint http://a:1,https://b --endpoint http://c",
        )
        .expect("valid");
        let request = request(&args).expect("valid");
        let a = NetOverride {
            tap: Some("t1".to_owned()),
            mac: Some(MacAddr([2, 0, 0, 0, 0, 9])),
        };
        assert_eq!(request.nets["a"], a);
        assert_eq!(request.nets["b"].tap.as_deref(), Some("t2"));
        assert_eq!(request.endpoints, ["http://a:1", "https://b", "http://c"]);
        assert_eq!(request.disks["root"], PathBuf::from("/r=1.img"));
        assert_eq!((request.trust, request.clock), (Trust::Trusted, ClockPolicy::Stopped));
        assert_eq!(request.vsock, Some("v".into()));
        assert!(request.track && request.paused && request.replace_disks && request.disks_dir == Some("d".into()));
        assert_eq!(
            (request.name.as_deref(), request.serial),
            (Some("web"), SerialSpec::Null)
        );
        let verified = super::request(&parse("s --verify").expect("valid")).expect("valid");
        assert_eq!(verified.trust, Trust::VerifyFirst);
    }

    #[test]
    fn what_contradicts_itself_is_wrong_usage() {
        for line in [
            "s --verify --trusted",
            "s --net tap0",
            "s --net =t",
            "s --mac a=b",
            "s --clock later",
            "a b",
            "",
        ] {
            assert_eq!(parse(line).expect_err(line).exit_code(), 2, "{line}");
        }
        let twice = request(&parse("s --net a=t1 --net a=t2").expect("well-formed"));
        let id = "a".to_owned();
        assert_eq!(twice, Err(Twice { option: "--net", id }.into()));
        let paused = request(&parse("s --paused").expect("well-formed"));
        assert_eq!(paused, Err(UsageError::PausedForGood));
    }
}
