//! `cutover migrate`: has a running VM go on under another monitor, asked for over the VM's API.

use std::io;
use std::num::NonZeroU64;
use std::path::{self, PathBuf};
use std::time::Duration;

use clap::{Args, ValueEnum};
use cutover_migration::options::{BANDWIDTH_MIN, STREAMS_MAX};
use cutover_migration::transport::Endpoint;
use cutover_snapshot::size::ByteSize;
use hyper::StatusCode;

use super::bar::MigrationBar;
use super::{UsageError, check_endpoint};
use crate::client::{ClientError, VmRef, Work, WorkError, bytes, milliseconds, one, time, timeout};
use crate::exit::{ExitStatus, after_printing, as_json, report};
use crate::runtime_dir::RuntimeDir;
use crate::server::v1::types::{
    DOWNTIME_MAX_MS, MigrationCompressionV1, MigrationDisksV1, MigrationReportV1, MigrationStatusV1, MigrationV1,
    PageCountsV1, PostCopyV1, STREAMS_DEFAULT,
};
use crate::tls_dir;

const MIGRATION: Work<'_> = Work {
    what: "migration",
    path: "/v1/migration",
    current: "/v1/migration",
    look: "`cutover vm events` tells what becomes of it",
};

/// Arguments of `cutover migrate`.
#[derive(Debug, Args)]
pub struct MigrateArgs {
    /// Name of the VM, or path of its API socket (with a '/')
    #[arg(value_name = "VM")]
    vm: VmRef,

    /// Where `cutover receive` listens: tls://host:port, unix:PATH on this host, or tcp://host:port with --insecure
    #[arg(long, value_name = "ENDPOINT")]
    to: Endpoint,

    /// How long the guest may stand still: it is stopped when that is expected to be enough
    #[arg(long, value_name = "TIME", value_parser = downtime, default_value = "30ms", help_heading = "Goals")]
    downtime: Duration,

    /// Most bytes sent in each second while the guest runs, with a unit: 500M; the last pages are sent without a limit
    #[arg(long, value_name = "SIZE", value_parser = bandwidth, help_heading = "Goals")]
    bandwidth: Option<NonZeroU64>,

    /// Connections that memory is sent on
    #[arg(
        long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=i64::from(STREAMS_MAX)),
        default_value_t = STREAMS_DEFAULT, help_heading = "Means"
    )]
    streams: u8,

    /// Whether the guest may run at the destination before all of its memory is there; if either side or the link is
    /// lost then, so is the VM
    #[arg(long, value_name = "WHEN", default_value = "never", help_heading = "Means")]
    post_copy: PostCopy,

    /// Do not slow the guest down, however fast it writes
    #[arg(long, help_heading = "Means")]
    no_throttle: bool,

    /// Whether memory is compressed
    #[arg(long, value_name = "WHEN", default_value = "auto", help_heading = "Means")]
    compression: Compression,

    /// What becomes of the disks
    #[arg(long, value_name = "HOW", default_value = "shared", help_heading = "Devices")]
    disks: Disks,

    /// Directory of this host's certificate, as `cutover tls init` makes it [default: that of the user]
    #[arg(long, value_name = "DIR", help_heading = "Link")]
    tls_dir: Option<PathBuf>,

    /// Allow tcp://, where anyone on the way can read and change what is sent
    #[arg(long, help_heading = "Link")]
    insecure: bool,

    /// Print the result as JSON
    #[arg(long)]
    json: bool,
}

/// Whether the guest may run at the destination before all of its memory is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum PostCopy {
    /// It may not
    Never,
    /// It may if nothing else has an end
    Allow,
    /// It does, after all of its memory was sent once
    Now,
}

/// Whether memory is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Compression {
    /// Where that is faster on this link
    Auto,
    /// It is not, but for pages of zeroes
    Never,
    /// Also where it is slower
    Always,
}

/// What becomes of the disks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Disks {
    /// Both hosts see the same files
    Shared,
    /// They move with the VM
    Move,
}

/// Shown with `cutover migrate --help`.
pub const HELP: &str = "\
The guest goes on running while its memory is sent, and stands still for a moment at the end; then it
runs at the destination, where `cutover receive` waits for it, with its addresses and its open
connections, and the VM here is over. Ctrl-C cancels that, and the guest runs on here; Ctrl-C once
more leaves it to the VM. The VM has to listen: `cutover run --name NAME --api`.

Up to the moment it is handed over, whatever fails, it runs on here. If the link is lost in just that
moment, this VM stands still until somebody has looked where it is: `cutover vm destroy`
here if it runs there, `cutover vm reclaim` if it certainly does not.

Examples:
  On host2, and then on host1, each with a certificate (see `cutover tls init --help`):
    cutover receive --listen tls://[::]:7000 --name web --api
    cutover migrate web --to tls://host2:7000

  Not more than 100 MiB/s, disks and all, and no more than 10 ms of standstill:
    cutover migrate web --to tls://host2:7000 --bandwidth 100M --disks move --downtime 10ms

  A guest that writes faster than the link carries, whatever it takes:
    cutover migrate web --to tls://host2:7000 --post-copy allow

  To a new version of the monitor on this host:
    cutover receive --listen unix:/run/web.migrate --name web2 --api &
    cutover migrate web --to unix:/run/web.migrate

  How long did the guest stand still?
    cutover migrate web --to tls://host2:7000 --json | jq .downtime.total_ns

Exit codes:
  0  the VM runs at the destination
  1  it does not: refused, failed or cancelled; it goes on here
  2  the command line is wrong
  7  it was handed over, and is lost or not known to run there; it stands still here";

/// Why the VM does not run at the destination, as far as one can tell.
#[derive(Debug, thiserror::Error)]
enum MigrateError {
    #[error(transparent)]
    Usage(#[from] UsageError),
    #[error("cannot name {}", .0.display())]
    Path(PathBuf, #[source] io::Error),
    #[error("{}: only paths that are text can be sent to a VM", .0.display())]
    NotText(PathBuf),
    #[error(transparent)]
    Work(#[from] WorkError),
}

impl MigrateError {
    fn status(&self) -> ExitStatus {
        match self {
            Self::Usage(_) => ExitStatus::Usage,
            Self::Work(WorkError::Vm {
                source: ClientError::Refused { status, .. },
                ..
            }) if *status == StatusCode::GATEWAY_TIMEOUT => ExitStatus::HandedOver,
            _ => ExitStatus::Failure,
        }
    }
}

/// Has the VM move, and tells how that went.
pub fn run(args: &MigrateArgs) -> ExitStatus {
    let moved = match migrate(args) {
        Ok(moved) => moved,
        Err(error) => {
            report(&error);
            return error.status();
        }
    };
    let text = if args.json {
        as_json(&moved)
    } else {
        in_words(&args.to, &moved)
    };
    after_printing(text.as_bytes(), &mut io::stdout())
}

fn migrate(args: &MigrateArgs) -> Result<MigrationReportV1, MigrateError> {
    let body = body(args)?;
    let vm = one(&args.vm, &RuntimeDir::locate());
    let mut bar = MigrationBar::new();
    let is_hidden = bar.is_hidden();
    let show = |status: MigrationStatusV1| {
        if let Some(progress) = status.under_way {
            bar.show(&progress);
        }
    };
    let moved = MIGRATION.ask(&vm, &body, (!is_hidden).then_some(show));
    bar.clear();
    Ok(moved?)
}

/// What to ask of the VM, which may run in another directory.
fn body(args: &MigrateArgs) -> Result<MigrationV1, MigrateError> {
    check_endpoint(&args.to, args.insecure)?;
    let to = match &args.to {
        Endpoint::Unix(path) => format!("unix:{}", absolute(path.clone())?),
        network => network.to_string(),
    };
    Ok(MigrationV1 {
        to,
        downtime_ms: u64::try_from(args.downtime.as_millis()).unwrap_or(u64::MAX),
        bandwidth: args.bandwidth.map(NonZeroU64::get),
        streams: args.streams,
        post_copy: match args.post_copy {
            PostCopy::Never => PostCopyV1::Never,
            PostCopy::Allow => PostCopyV1::Allow,
            PostCopy::Now => PostCopyV1::Now,
        },
        compression: match args.compression {
            Compression::Auto => MigrationCompressionV1::Auto,
            Compression::Never => MigrationCompressionV1::Never,
            Compression::Always => MigrationCompressionV1::Always,
        },
        throttle: !args.no_throttle,
        disks: match args.disks {
            Disks::Shared => MigrationDisksV1::Shared,
            Disks::Move => MigrationDisksV1::Move,
        },
        insecure: args.insecure,
        tls_dir: tls_dir::for_endpoint(&args.to, args.tls_dir.as_deref())
            .map(absolute)
            .transpose()?,
    })
}

fn absolute(path: PathBuf) -> Result<String, MigrateError> {
    let absolute = path::absolute(&path).map_err(|error| MigrateError::Path(path, error))?;
    let text = absolute.into_os_string().into_string();
    text.map_err(|path| MigrateError::NotText(path.into()))
}

fn downtime(text: &str) -> Result<Duration, String> {
    let time = timeout(text)?;
    if (1..=u128::from(DOWNTIME_MAX_MS)).contains(&time.as_millis()) {
        Ok(time)
    } else {
        Err("it is a millisecond at least, and a minute at most".to_owned())
    }
}

fn bandwidth(text: &str) -> Result<NonZeroU64, String> {
    let size: ByteSize = text.parse().map_err(|error| format!("{error}"))?;
    let least = ByteSize::from_bytes(BANDWIDTH_MIN);
    let enough = NonZeroU64::new(size.bytes()).filter(|_| size >= least);
    enough.ok_or_else(|| format!("it is at least {least}: leave it out for no limit"))
}

/// The report as people read it.
fn in_words(to: &Endpoint, report: &MigrationReportV1) -> String {
    let MigrationReportV1 { downtime, pages, .. } = report;
    let mut text = format!(
        "it runs at {to}, moved in {}: {} were sent in {}\n\
         the guest stood still for {}: stopping {}, last pages {}, state {}, handing over {}\n",
        time(report.total_ns),
        bytes(report.wire_bytes),
        rounds(report.rounds.len()),
        milliseconds(downtime.total_ns),
        milliseconds(downtime.stop_ns),
        milliseconds(downtime.pages_ns),
        milliseconds(downtime.state_ns),
        milliseconds(downtime.handoff_ns),
    );
    text.push_str(&format!("pages: {}\n", kinds(pages, report.duplicate_pages)));
    if report.throttled_ns > 0 {
        text.push_str(&format!(
            "it was slowed down by up to {}% for {}\n",
            report.throttle_percent_max,
            time(report.throttled_ns)
        ));
    }
    if report.pages_pulled > 0 {
        text.push_str(&format!(
            "there it waited for {} pages, for {} at most\n",
            report.pages_pulled,
            milliseconds(report.pull_ns_max)
        ));
    }
    text
}

fn rounds(count: usize) -> String {
    match count {
        1 => "1 round".to_owned(),
        _ => format!("{count} rounds"),
    }
}

fn kinds(pages: &PageCountsV1, duplicates: u64) -> String {
    let kinds = [
        (pages.raw, "as they are"),
        (pages.compressed, "compressed"),
        (pages.delta, "as changes"),
        (pages.unchanged, "unchanged"),
        (pages.zero, "zero"),
    ];
    let kinds = kinds.into_iter().filter(|(count, _)| *count > 0);
    let kinds: Vec<_> = kinds.map(|(count, kind)| format!("{count} {kind}")).collect();
    let kinds = if kinds.is_empty() {
        String::new()
    } else {
        format!(" ({})", kinds.join(", "))
    };
    format!("{}{kinds}, {duplicates} more than once", pages.total())
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::cli::{Cli, Command};
    use crate::server::v1::types::DowntimeV1;

    fn parse(line: &str) -> Result<MigrateArgs, clap::Error> {
        match Cli::try_parse_from(format!("cutover migrate {line}").split(' '))?.command {
            Command::Migrate(args) => Ok(args),
            other => panic!("not migrate: {other:?}"),
        }
    }

    #[test]
    fn a_vm_and_an_endpoint_are_enough_and_the_rest_is_as_the_api_has_it() {
        let body = body(&parse("web --to unix:/a").expect("valid")).expect("text");
        let default: MigrationV1 = serde_json::from_str(r#"{"to":"unix:/a"}"#).expect("valid");
        assert_eq!(body, default);
        assert_eq!((body.downtime_ms, body.streams, body.throttle), (30, 1, true));
    }

    #[test]
    fn every_option_is_sent() {
        let args = parse(
            "./api --to tls://[::1]:7000 --downtime 2s --bandwidth 500M --streams 16 --post-copy now --no-throttle \
             --compression always --disks move --tls-dir /tls --insecure --json",
        )
        .expect("valid");
        let sent = MigrationV1 {
            to: "tls://[::1]:7000".to_owned(),
            downtime_ms: 2000,
            bandwidth: Some(500 << 20),
            streams: 16,
            post_copy: PostCopyV1::Now,
            compression: MigrationCompressionV1::Always,
            throttle: false,
            disks: MigrationDisksV1::Move,
            insecure: true,
            tls_dir: Some("/tls".to_owned()),
        };
        assert_eq!(body(&args).expect("text"), sent);
        assert!(args.json);
    }

    #[test]
    fn paths_are_sent_from_the_root_for_the_vm_may_run_in_another_directory() {
        let args = parse("web --to unix:here.sock --post-copy allow").expect("valid");
        let body = body(&args).expect("text");
        let here = std::env::current_dir().expect("a directory");
        assert_eq!(body.to, format!("unix:{}", here.join("here.sock").display()));
        let tls = super::body(&parse("web --to tls://h:1 --tls-dir tls").expect("valid")).expect("text");
        assert_eq!(tls.tls_dir, Some(here.join("tls").display().to_string()));
    }

    #[test]
    fn what_makes_no_sense_is_wrong_usage() {
        for line in [
            "web",
            "--to unix:a",
            "web --to host:7000",
            "web --to unix:a --downtime 0s",
            "web --to unix:a --downtime 61s",
            "web --to unix:a --bandwidth 0",
            "web --to unix:a --bandwidth 63K",
            "web --to unix:a --streams 0",
            "web --to unix:a --streams 17",
            "web --to unix:a --post-copy always",
            "web --to unix:a --disks copied",
        ] {
            assert_eq!(parse(line).expect_err(line).exit_code(), 2, "{line}");
        }
        let plain = body(&parse("web --to tcp://host2:7000").expect("well-formed")).expect_err("nothing is encrypted");
        assert_eq!(plain.status(), ExitStatus::Usage);
        assert!(plain.to_string().contains("--insecure"), "{plain}");
    }

    #[test]
    fn a_vm_that_was_handed_over_and_never_arrived_has_a_code_of_its_own() {
        let error = |status| {
            MigrateError::Work(WorkError::Vm {
                vm: "web".to_owned(),
                source: ClientError::Refused {
                    status,
                    message: String::new(),
                },
            })
        };
        assert_eq!(error(StatusCode::GATEWAY_TIMEOUT).status(), ExitStatus::HandedOver);
        assert_eq!(error(StatusCode::BAD_REQUEST).status(), ExitStatus::Failure);
    }

    #[test]
    fn a_report_says_how_long_the_guest_stood_still_and_what_was_sent() {
        let mut report = MigrationReportV1 {
            downtime: DowntimeV1 {
                total_ns: 10_500_000,
                stop_ns: 1_000_000,
                pages_ns: 2_000_000,
                state_ns: 3_500_000,
                handoff_ns: 4_000_000,
            },
            total_ns: 2_000_000_000,
            wire_bytes: 64 << 20,
            pages: PageCountsV1 {
                zero: 5,
                raw: 90,
                delta: 1,
                ..PageCountsV1::default()
            },
            duplicate_pages: 6,
            ..MigrationReportV1::default()
        };
        let to = "tls://host2:7000".parse().expect("an endpoint");
        assert_eq!(
            in_words(&to, &report),
            "it runs at tls://host2:7000, moved in 2.00s: 64 MiB were sent in 0 rounds\n\
             the guest stood still for 10.50 ms: stopping 1.00 ms, last pages 2.00 ms, state 3.50 ms, handing over \
             4.00 ms\n\
             pages: 96 (90 as they are, 1 as changes, 5 zero), 6 more than once\n"
        );
        report.throttle_percent_max = 40;
        report.throttled_ns = 1_000_000_000;
        report.pages_pulled = 3;
        report.pull_ns_max = 2_000_000;
        let text = in_words(&to, &report);
        assert!(text.contains("\nit was slowed down by up to 40% for 1.00s\n"), "{text}");
        assert!(
            text.ends_with("\nthere it waited for 3 pages, for 2.00 ms at most\n"),
            "{text}"
        );
    }
}
