//! `cutover snapshot create`: a snapshot of a running VM, asked for over the VM's API.

// Documentation here is help text, in which brackets mean that something can be left out.
#![allow(rustdoc::broken_intra_doc_links)]

use std::io;
use std::path::{self, Path, PathBuf};

use clap::Args;

use super::progress;
use crate::client::{VmRef, Work, WorkError, bytes, milliseconds, one, time};
use crate::exit::{ExitStatus, after_printing, as_json, report};
use crate::runtime_dir::RuntimeDir;
use crate::server::v1::types::{
    COMPRESSION_MAX, ProgressV1, SnapshotDisksV1, SnapshotKindV1, SnapshotMethodV1, SnapshotReportV1, SnapshotV1,
};
use crate::text::escaped;

const SNAPSHOT: Work<'_> = Work {
    what: "snapshot",
    path: "/v1/snapshots",
    current: "/v1/snapshots/current",
    look: "`cutover vm events` tells what becomes of it",
};

/// Arguments of `cutover snapshot create`.
#[derive(Debug, Args)]
pub struct CreateArgs {
    /// Name of the VM, or path of its API socket (with a '/')
    #[arg(value_name = "VM")]
    vm: VmRef,

    /// Directory of snapshots, which exists
    #[arg(long, value_name = "DIR")]
    store: PathBuf,

    /// What the snapshot is to be called there
    #[arg(long, value_name = "NAME")]
    name: String,

    /// Save all of memory and disks (the default)
    #[arg(long, conflicts_with = "incremental")]
    full: bool,

    /// Save what has changed since the last snapshot of this VM, which has to be in the same directory
    #[arg(long)]
    incremental: bool,

    /// Leave the disks where they are, and only note their paths: they have to be as they were at a restore
    #[arg(long)]
    reference_disks: bool,

    /// Compress pages with zstd at this level, 1 (fast) to 19; without it the snapshot can be mapped as it is
    #[arg(long, value_name = "LEVEL", value_parser = clap::value_parser!(i32).range(1..=i64::from(COMPRESSION_MAX)))]
    compress: Option<i32>,
}

/// Shown with `cutover snapshot create --help`.
pub const HELP: &str = "\
The guest goes on running, but for a moment that does not depend on the size of its memory. The
command returns when the snapshot is permanent. Ctrl-C cancels the snapshot; Ctrl-C once more leaves
it to the VM. The VM has to listen: `cutover run --name NAME --api`.

Examples:
  Everything, then every hour what has changed:
    cutover snapshot create web --store snapshots --name monday
    cutover snapshot create web --store snapshots --name monday-1 --incremental

  Small files, of a VM whose disks are kept elsewhere:
    cutover snapshot create web --store snapshots --name small --reference-disks --compress 3

  How long did the guest stand still?
    cutover snapshot create web --store snapshots --name now --json | jq .pause_ns

Exit codes:
  0  the snapshot is permanent
  1  there is none: refused, failed or cancelled
  2  the command line is wrong";

/// Why there is no snapshot.
#[derive(Debug, thiserror::Error)]
enum CreateError {
    #[error("cannot name the directory {}", .0.display())]
    Store(PathBuf, #[source] io::Error),
    #[error("{}: only paths that are text can be sent to a VM", .0.display())]
    NotText(PathBuf),
    #[error("{}: a snapshot is made in a directory; then `cutover snapshot export` takes it elsewhere", .0.display())]
    Elsewhere(PathBuf),
    #[error(transparent)]
    Work(#[from] WorkError),
}

/// Has the VM make the snapshot, and tells what came of it.
pub fn run(args: &CreateArgs, json: bool) -> ExitStatus {
    let created = match create(args) {
        Ok(created) => created,
        Err(error) => {
            report(&error);
            return ExitStatus::Failure;
        }
    };
    let text = if json { as_json(&created) } else { in_words(&created) };
    after_printing(text.as_bytes(), &mut io::stdout())
}

fn create(args: &CreateArgs) -> Result<SnapshotReportV1, CreateError> {
    let body = body(args)?;
    let vm = one(&args.vm, &RuntimeDir::locate());
    let bar = progress::bar("saving");
    let show = |progress: ProgressV1| {
        bar.set_length(progress.total_bytes);
        bar.set_position(progress.done_bytes);
    };
    let created = SNAPSHOT.ask(&vm, &body, (!bar.is_hidden()).then_some(show));
    bar.finish_and_clear();
    Ok(created?)
}

/// What to ask of the VM, which may run in another directory.
fn body(args: &CreateArgs) -> Result<SnapshotV1, CreateError> {
    if is_url(&args.store) {
        return Err(CreateError::Elsewhere(args.store.clone()));
    }
    let store = path::absolute(&args.store).map_err(|error| CreateError::Store(args.store.clone(), error))?;
    Ok(SnapshotV1 {
        store: store
            .into_os_string()
            .into_string()
            .map_err(|path| CreateError::NotText(path.into()))?,
        name: args.name.clone(),
        kind: if args.incremental {
            SnapshotKindV1::Incremental
        } else {
            SnapshotKindV1::Full
        },
        disks: if args.reference_disks {
            SnapshotDisksV1::Referenced
        } else {
            SnapshotDisksV1::Copied
        },
        compress: args.compress,
    })
}

/// Whether `store` is meant for something that is not on this host.
fn is_url(store: &Path) -> bool {
    store.to_str().is_some_and(|store| store.contains("://"))
}

/// The report as people read it. The path comes from the VM, and must not steer the terminal.
fn in_words(report: &SnapshotReportV1) -> String {
    let built_on = match &report.parent {
        Some(parent) => format!(", built on {parent}"),
        None => String::new(),
    };
    let mut text = format!(
        "{}: {} of memory and {} of disks in files of {}{}\n",
        escaped(&Path::new(&report.path).display().to_string()),
        bytes(report.memory_bytes),
        bytes(report.disk_bytes),
        bytes(report.file_bytes),
        escaped(&built_on),
    );
    text.push_str(&format!(
        "made in {}, for {} of which the guest stood still\n",
        time(report.total_ns),
        milliseconds(report.pause_ns)
    ));
    if let (SnapshotMethodV1::Paused, Some(reason)) = (report.method, &report.method_reason) {
        text.push_str(&format!(
            "it could not be copied behind the running guest: {}\n",
            escaped(reason)
        ));
    }
    text
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::cli::{Cli, Command};
    use crate::snapshot_command::SnapshotCommand;

    fn parse(line: &str) -> Result<CreateArgs, clap::Error> {
        let line = format!("cutover snapshot create {line}");
        match Cli::try_parse_from(line.split(' '))?.command {
            Command::Snapshot(args) => match args.command {
                SnapshotCommand::Create(args) => Ok(args),
                other => panic!("not create: {other:?}"),
            },
            other => panic!("not about snapshots: {other:?}"),
        }
    }

    #[test]
    fn a_snapshot_is_full_with_its_disks_and_its_directory_is_named_from_the_root() {
        let body = body(&parse("web --store s --name n").expect("valid")).expect("text");
        let here = std::env::current_dir().expect("a directory");
        assert_eq!(body.store, here.join("s").display().to_string());
        assert_eq!(
            (body.kind, body.disks, body.compress),
            (SnapshotKindV1::Full, SnapshotDisksV1::Copied, None)
        );
    }

    #[test]
    fn every_option_is_sent() {
        let args = parse("./api --store /s --name n --incremental --reference-disks --compress 19").expect("valid");
        let sent = SnapshotV1 {
            store: "/s".to_owned(),
            name: "n".to_owned(),
            kind: SnapshotKindV1::Incremental,
            disks: SnapshotDisksV1::Referenced,
            compress: Some(19),
        };
        assert_eq!(body(&args).expect("text"), sent);
    }

    #[test]
    fn a_bucket_is_no_place_to_make_a_snapshot_in() {
        let error = body(&parse("web --store s3://bucket/s --name n").expect("well-formed")).expect_err("no directory");
        assert!(error.to_string().contains("`cutover snapshot export`"), "{error}");
    }

    #[test]
    fn what_contradicts_itself_or_is_missing_is_wrong_usage() {
        for line in [
            "web --store s",
            "web --name n",
            "--store s --name n",
            "web --store s --name n --full --incremental",
            "web --store s --name n --compress 20",
        ] {
            assert_eq!(parse(line).expect_err(line).exit_code(), 2, "{line}");
        }
    }

    #[test]
    fn a_report_says_how_much_was_saved_and_for_how_long_the_guest_stood_still() {
        let mut report = SnapshotReportV1 {
            path: "s/a\u{1b}[2J".to_owned(),
            id: None,
            parent: Some("base".to_owned()),
            kind: SnapshotKindV1::Incremental,
            method: SnapshotMethodV1::CopyOnWrite,
            method_reason: None,
            pause_ns: 2_345_678,
            total_ns: 1_500_000_000,
            memory_bytes: 64 << 20,
            disk_bytes: 0,
            file_bytes: 32 << 20,
        };
        assert_eq!(
            in_words(&report),
            "s/a\\u{1b}[2J: 64 MiB of memory and 0 B of disks in files of 32 MiB, built on base\n\
             made in 1.50s, for 2.35 ms of which the guest stood still\n"
        );
        report.method = SnapshotMethodV1::Paused;
        report.method_reason = Some("no userfaultfd".to_owned());
        let text = in_words(&report);
        assert!(
            text.ends_with("it could not be copied behind the running guest: no userfaultfd\n"),
            "{text}"
        );
    }
}
