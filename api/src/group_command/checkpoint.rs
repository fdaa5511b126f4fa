//! `cutover group checkpoint`, `cutover group checkpoints`: a group's state in files, and what there is of that.

// Documentation here is help text, in which brackets mean a default.
#![allow(rustdoc::broken_intra_doc_links)]

use std::io;
use std::path::{self, Path, PathBuf};

use clap::Args;
use cutover_cluster::checkpoint::Manifest;
use jiff::Timestamp;

use super::client::name;
use crate::client::{Screen, Side, Table, Vm, Work, WorkError, bytes, milliseconds};
use crate::exit::{ExitStatus, as_json, report};
use crate::server::groups::types::{CheckpointRequestV1, CheckpointV1};
use crate::server::v1::types::{COMPRESSION_MAX, ProgressV1};
use crate::snapshot_command::progress;
use crate::text::escaped;

/// Arguments of `cutover group checkpoint`.
#[derive(Debug, Args)]
pub struct CheckpointArgs {
    /// Name of the group
    #[arg(value_name = "GROUP", value_parser = name)]
    group: String,

    /// Directory of checkpoints, which exists: on storage that the hosts of all members and of the coordinator share
    #[arg(long, value_name = "DIR")]
    store: PathBuf,

    /// What the checkpoint is to be called [default: the time]
    #[arg(long, value_name = "NAME")]
    name: Option<String>,

    /// Save all, also if there is a checkpoint that this one could be built on
    #[arg(long)]
    full: bool,

    /// Compress with zstd at this level, 1 (fast) to 19
    #[arg(long, value_name = "LEVEL", value_parser = clap::value_parser!(i32).range(1..=i64::from(COMPRESSION_MAX)))]
    compress: Option<i32>,
}

/// Arguments of `cutover group checkpoints`.
#[derive(Debug, Args)]
pub struct CheckpointsArgs {
    /// Directory of the group in that of checkpoints
    #[arg(value_name = "DIR/GROUP")]
    dir: PathBuf,
}

/// Shown with `cutover group checkpoint --help`.
pub const HELP: &str = "\
One cut of all members is kept in files, from which the group can be started elsewhere, also if nothing
of it runs any more. The guests go on running; they stand still hardly longer than for any checkpoint.
What has changed since the last one in the same place is saved, if there is one, else all. If anything
of the group fails meanwhile there is no such checkpoint, and the group goes on as it does then.

Each member writes to DIR/GROUP/vms/VM on its own host. The directory should be on storage that does
not go down with one of them. Ctrl-C gives the checkpoint up.

Examples:
  cutover group checkpoint shop --store /mnt/checkpoints
  cutover group checkpoint shop --store /mnt/checkpoints --name before-update --full --compress 3

  Which are there, and how long did guests stand still?
    cutover group checkpoints /mnt/checkpoints/shop
    cutover group checkpoint shop --store /mnt/checkpoints --json | jq '.members[].pause_ns'

Exit codes:
  0  all of it is permanent
  1  there is none: refused, failed or given up
  2  the command line is wrong";

/// Shown with `cutover group checkpoints --help`.
pub const LIST_HELP: &str = "\
Those that are whole, the oldest first. `cutover group restore` starts the group from one of them.

Examples:
  cutover group checkpoints /mnt/checkpoints/shop
  cutover group checkpoints /mnt/checkpoints/shop --json | jq -r '.[].name'";

/// Why there is no checkpoint.
#[derive(Debug, thiserror::Error)]
enum CheckpointError {
    #[error("cannot name the directory {}", .0.display())]
    Store(PathBuf, #[source] io::Error),
    #[error("{}: only paths that are text can be sent to a coordinator", .0.display())]
    NotText(PathBuf),
    #[error(transparent)]
    Work(#[from] WorkError),
}

/// Has a checkpoint be stored, and tells what came of it.
pub fn run(args: &CheckpointArgs, coordinator: &Vm, json: bool) -> ExitStatus {
    match store(args, coordinator) {
        Ok(stored) if json => print(&as_json(&stored), json),
        Ok(stored) => print(&in_words(&args.store, &stored), json),
        Err(error) => {
            report(&error);
            ExitStatus::Failure
        }
    }
}

/// Shows the checkpoints in a directory.
pub fn list(args: &CheckpointsArgs, json: bool) -> ExitStatus {
    match Manifest::list(&args.dir) {
        Ok(found) => {
            let found: Vec<_> = found.into_iter().map(CheckpointV1::from).collect();
            print(&if json { as_json(&found) } else { table(&found) }, json)
        }
        Err(error) => {
            report(&error);
            ExitStatus::Failure
        }
    }
}

fn print(text: &str, json: bool) -> ExitStatus {
    match Screen::new(json).text(text) {
        Ok(()) => ExitStatus::Success,
        // A reader that has seen enough is no failure.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => ExitStatus::Success,
        Err(error) => {
            report(&error);
            ExitStatus::Failure
        }
    }
}

fn store(args: &CheckpointArgs, coordinator: &Vm) -> Result<CheckpointV1, CheckpointError> {
    let body = body(args)?;
    let at = format!("/v1/groups/{}/checkpoints", args.group);
    let work = Work {
        what: "checkpoint",
        path: &at,
        current: &format!("{at}/current"),
        look: "`cutover group checkpoints` shows what becomes of it",
    };
    let bar = progress::bar("saving");
    let show = |progress: ProgressV1| {
        bar.set_length(progress.total_bytes);
        bar.set_position(progress.done_bytes);
    };
    let stored = work.ask(coordinator, &body, (!bar.is_hidden()).then_some(show));
    bar.finish_and_clear();
    Ok(stored?)
}

/// What to ask of the coordinator, which may run in another directory.
fn body(args: &CheckpointArgs) -> Result<CheckpointRequestV1, CheckpointError> {
    let store = path::absolute(&args.store).map_err(|error| CheckpointError::Store(args.store.clone(), error))?;
    let now = || Timestamp::now().strftime("%Y%m%dT%H%M%SZ").to_string();
    Ok(CheckpointRequestV1 {
        store: store
            .into_os_string()
            .into_string()
            .map_err(|path| CheckpointError::NotText(path.into()))?,
        name: args.name.clone().unwrap_or_else(now),
        full: args.full,
        compress: args.compress,
    })
}

/// A checkpoint as people read it.
fn in_words(store: &Path, stored: &CheckpointV1) -> String {
    let pause = stored.members.iter().map(|member| member.pause_ns).max().unwrap_or(0);
    let size: u64 = stored.members.iter().map(|member| member.file_bytes).sum();
    format!(
        "{}: checkpoint {} of {} members at cut {}, in files of {}; guests stood still for up to {}\n",
        escaped(&store.join(&stored.group).display().to_string()),
        escaped(&stored.name),
        stored.members.len(),
        stored.cut,
        bytes(size),
        milliseconds(pause),
    )
}

fn table(found: &[CheckpointV1]) -> String {
    let mut table = Table::new(&[
        ("CHECKPOINT", Side::Left),
        ("CREATED", Side::Left),
        ("CUT", Side::Right),
        ("MEMBERS", Side::Left),
        ("BUILT ON", Side::Left),
        ("SIZE", Side::Right),
    ]);
    for checkpoint in found {
        let size: u64 = checkpoint.members.iter().map(|member| member.file_bytes).sum();
        let names: Vec<_> = checkpoint.members.iter().map(|member| member.vm.as_str()).collect();
        let created = i64::try_from(checkpoint.created_unix_s).ok();
        let created = created.and_then(|created| Timestamp::from_second(created).ok());
        let has_parent = checkpoint.members.iter().any(|member| member.parent.is_some());
        table.row([
            (&checkpoint.name).into(),
            created
                .map_or_else(|| "-".to_owned(), |created| created.to_string())
                .into(),
            checkpoint.cut.into(),
            names.join(", ").into(),
            if has_parent { "others" } else { "-" }.into(),
            bytes(size).into(),
        ]);
    }
    table.render()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::server::groups::types::CheckpointMemberV1;

    fn stored() -> CheckpointV1 {
        CheckpointV1 {
            group: "shop".to_owned(),
            name: "monday".to_owned(),
            created_unix_s: 86_400,
            cut: 7,
            generation: 2,
            members: vec![CheckpointMemberV1 {
                vm: "web".to_owned(),
                snapshot: "monday.0a1b2c3d".to_owned(),
                id: "00000000-0000-0000-0000-000000000000".to_owned(),
                parent: None,
                file_bytes: 32 << 20,
                pause_ns: 2_345_678,
            }],
        }
    }

    #[test]
    fn a_checkpoint_is_told_in_words_and_in_a_table() {
        assert_eq!(
            in_words(Path::new("/c"), &stored()),
            "/c/shop: checkpoint monday of 1 members at cut 7, in files of 32 MiB; guests stood still for up to 2.35 ms\n"
        );
        let text = table(&[stored()]);
        let row = anstream::adapter::strip_str(&text).to_string();
        let row = row.lines().nth(1).expect("a row");
        let words: Vec<_> = row.split_whitespace().collect();
        assert_eq!(words, ["monday", "1970-01-02T00:00:00Z", "7", "web", "-", "32", "MiB"]);
    }
}
