//! `cutover snapshot`: snapshots of running VMs, VMs of snapshots, and what there is to do with snapshots on disk without
//! a VM.
//!
//! Each command has a module, with its arguments, its help and what it answers.

use std::io;
use std::path::Path;

use clap::{Args, Subcommand};
use cutover_snapshot::Error;
use cutover_snapshot::image::Layout;
use cutover_snapshot::store::Store;
use serde_json::Value;

use crate::exit::{ExitStatus, after_printing, report};

mod access;
mod create;
mod export;
mod inspect;
mod list;
mod merge;
pub(crate) mod progress;
mod prune;
mod restore;
#[cfg(test)]
mod tests;
mod verify;

/// Arguments of `cutover snapshot`.
#[derive(Debug, Args)]
pub struct SnapshotArgs {
    /// What to do.
    #[command(subcommand)]
    command: SnapshotCommand,

    /// Print the result as JSON
    #[arg(long, global = true)]
    json: bool,
}

/// What to do with snapshots.
#[derive(Debug, Subcommand)]
enum SnapshotCommand {
    /// Make a snapshot of a running VM, which goes on running
    #[command(after_help = create::HELP)]
    Create(create::CreateArgs),
    /// Run a VM of a snapshot
    #[command(after_help = restore::HELP)]
    Restore(Box<restore::RestoreArgs>),
    /// What takes no VM.
    #[command(flatten)]
    OnDisk(OnDiskCommand),
}

/// What to do with snapshots on disk.
#[derive(Debug, Subcommand)]
enum OnDiskCommand {
    /// Show the snapshots of a directory, and which is built on which
    #[command(after_help = list::HELP)]
    List(list::ListArgs),
    /// Tell what a snapshot is and what it is built on, without reading its pages
    #[command(after_help = inspect::HELP)]
    Inspect(inspect::InspectArgs),
    /// Read a snapshot and all it is built on, and verify every checksum
    #[command(after_help = verify::HELP)]
    Verify(verify::VerifyArgs),
    /// Make a snapshot complete in itself that is built on others
    #[command(after_help = merge::HELP)]
    Merge(merge::MergeArgs),
    /// Delete snapshots that no other is built on, and what interrupted writers left
    #[command(after_help = prune::HELP)]
    Prune(prune::PruneArgs),
    /// Write a snapshot, with all it is built on, to a single file or a bucket
    #[command(after_help = export::HELP)]
    Export(export::ExportArgs),
}

/// Examples in the help of `cutover snapshot`.
pub const SNAPSHOT_HELP: &str = "\
A snapshot is a directory, in a directory with those it is built on; or a file that one was exported to; or either of
them in a bucket, s3://BUCKET/PATH.

Examples:
  Save a running VM, and run it again:
    cutover snapshot create web --store snapshots --name monday
    cutover snapshot restore snapshots/monday --name web --api

  What is there, and what is in it?
    cutover snapshot list snapshots
    cutover snapshot inspect snapshots/monday

  Is all of it as it was written?
    cutover snapshot verify snapshots/monday

  Make it independent of the others, and delete these:
    cutover snapshot merge snapshots/monday
    cutover snapshot prune snapshots --keep monday

  Take it elsewhere:
    cutover snapshot export snapshots/monday monday.tar
    cutover snapshot export snapshots/monday s3://backups/web/monday

Exit codes:
  0  done; for verify: every checksum is right
  1  it could not be done; for verify: something is damaged; for list: a manifest cannot be read
  2  the command line is wrong
  restore ends as `cutover run` does.";

/// What a command prints, and how it ends.
struct Answer {
    text: String,
    json: Value,
    status: ExitStatus,
}

impl Answer {
    /// The answer of a command that did what it should.
    fn done(text: String, json: Value) -> Self {
        Self {
            text,
            json,
            status: ExitStatus::Success,
        }
    }
}

/// Does what `args` say.
pub fn run(args: &SnapshotArgs) -> ExitStatus {
    match &args.command {
        SnapshotCommand::Create(create) => create::run(create, args.json),
        SnapshotCommand::Restore(restore) => restore::run(restore, args.json),
        SnapshotCommand::OnDisk(command) => run_on_disk(command, args.json),
    }
}

fn run_on_disk(command: &OnDiskCommand, json: bool) -> ExitStatus {
    let answer = match execute(command) {
        Ok(answer) => answer,
        Err(error) => {
            report(&error);
            return ExitStatus::Failure;
        }
    };
    let text = if json {
        format!("{:#}\n", answer.json)
    } else {
        answer.text
    };
    match after_printing(text.as_bytes(), &mut io::stdout()) {
        ExitStatus::Success => answer.status,
        failure => failure,
    }
}

fn execute(command: &OnDiskCommand) -> Result<Answer, Error> {
    match command {
        OnDiskCommand::List(args) => list::run(args),
        OnDiskCommand::Inspect(args) => inspect::run(args),
        OnDiskCommand::Verify(args) => Ok(verify::run(args)),
        OnDiskCommand::Merge(args) => merge::run(args),
        OnDiskCommand::Prune(args) => prune::run(args),
        OnDiskCommand::Export(args) => export::run(args),
    }
}

/// How the images of a new snapshot are to be stored.
#[derive(Clone, Copy, Debug, Args)]
struct Compression {
    /// Compress pages with zstd at this level, 1 (fast) to 19
    #[arg(long, value_name = "LEVEL", value_parser = clap::value_parser!(i32).range(1..=19))]
    compress: Option<i32>,
}

impl Compression {
    /// Whether it was asked for.
    fn is_given(self) -> bool {
        self.compress.is_some()
    }

    /// The layout that was asked for, or `otherwise`.
    fn or(self, otherwise: Layout) -> Layout {
        self.compress.map_or(otherwise, |level| Layout::Compressed { level })
    }
}

/// The store and the name in it of the snapshot at `path`.
fn in_store(path: &Path) -> Result<(Store, &str), Error> {
    let name = path.file_name().and_then(|name| name.to_str());
    let name = name.ok_or_else(|| Error::Name(path.display().to_string()))?;
    let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty());
    Ok((Store::open(dir.unwrap_or(Path::new(".")))?, name))
}

/// A number of things, as people write it.
fn counted(number: usize, thing: &str) -> String {
    match number {
        1 => format!("1 {thing}"),
        _ => format!("{number} {thing}s"),
    }
}
