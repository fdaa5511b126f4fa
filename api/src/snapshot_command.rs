//! `cutover snapshot`: what there is to do with snapshots that are on disk, without a VM.

use std::fmt::Write;
use std::io;
use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use cutover_snapshot::Error;
use cutover_snapshot::chain::Chain;
use cutover_snapshot::prune::{Pruned as Compaction, Selection, prune as compact};
use cutover_snapshot::merge::merge as flatten;
use cutover_snapshot::image::{Layout, Progress};
use cutover_snapshot::manifest::{Base, ImageEntry, Manifest};
use cutover_snapshot::store::{Snapshot, Store};
use cutover_snapshot::verify::{Verified, verify};
use indicatif::{HumanBytes, ProgressBar, ProgressStyle};
use serde_json::{Value, json};

use crate::exit::{ExitStatus, after_printing, report, with_causes};
use crate::text::escaped;

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
    /// Tell what a snapshot is and what it is built on, without reading its pages
    #[command(after_help = INFO_HELP)]
    Info {
        /// Directory of the snapshot
        snapshot: PathBuf,
    },
    /// Read a snapshot and all it is built on, and verify every checksum
    #[command(after_help = CHECK_HELP)]
    Check {
        /// Directory of the snapshot
        snapshot: PathBuf,
    },
    /// Write a snapshot that is complete in itself from one that is built on others
    #[command(after_help = FLATTEN_HELP)]
    Flatten {
        /// Directory of the snapshot, which stays as it is
        snapshot: PathBuf,
        /// Directory of the new snapshot, which is created
        new: PathBuf,
        /// Compress pages with zstd at this level, 1 (fast) to 19; without it the new snapshot can be mapped as it is
        #[arg(long, value_name = "LEVEL", value_parser = clap::value_parser!(i32).range(1..=19))]
        compress: Option<i32>,
    },
    /// Delete snapshots that no other is built on, and what interrupted writers left
    #[command(after_help = COMPACT_HELP)]
    Compact {
        /// Directory of the snapshots
        store: PathBuf,
        /// Delete this snapshot; refused if another is built on it that is not deleted too
        #[arg(long, value_name = "NAME", conflicts_with = "keep")]
        delete: Vec<String>,
        /// Delete all snapshots but this one and those it is built on
        #[arg(long, value_name = "NAME")]
        keep: Vec<String>,
        /// Only tell what would be deleted
        #[arg(long)]
        dry_run: bool,
    },
}

/// Examples in the help of `cutover snapshot`.
pub const SNAPSHOT_HELP: &str = "\
Examples:
  What is in a snapshot, and what is it built on?
    cutover snapshot info snapshots/monday

  Is all of it as it was written?
    cutover snapshot check snapshots/monday

  Make it independent of the others, and delete these:
    cutover snapshot flatten snapshots/monday snapshots/whole
    cutover snapshot compact snapshots --keep whole

Exit codes:
  0  done; for check: every checksum is right
  1  it could not be done; for check: something is damaged
  2  the command line is wrong";

const INFO_HELP: &str = "\
Examples:
  cutover snapshot info snapshots/monday
  cutover snapshot info snapshots/monday --json | jq '.[0].manifest.spec'";

const CHECK_HELP: &str = "\
Examples:
  cutover snapshot check snapshots/monday
  cutover snapshot check snapshots/monday --json | jq -r '.damage[]'";

const FLATTEN_HELP: &str = "\
Examples:
  cutover snapshot flatten snapshots/monday snapshots/whole
  cutover snapshot flatten snapshots/monday archive/monday --compress 9";

const COMPACT_HELP: &str = "\
Examples:
  Remove only what interrupted writers left:
    cutover snapshot compact snapshots

  Delete two snapshots, if no others are built on them:
    cutover snapshot compact snapshots --delete monday --delete tuesday

  What would go if only one and what it is built on stayed?
    cutover snapshot compact snapshots --keep friday --dry-run";

/// What a command prints, and how it ends.
struct Answer {
    text: String,
    json: Value,
    status: ExitStatus,
}

/// Does what `args` say.
pub fn run(args: &SnapshotArgs) -> ExitStatus {
    let answer = match execute(&args.command) {
        Ok(answer) => answer,
        Err(error) => {
            report(&error);
            return ExitStatus::Failure;
        }
    };
    let text = if args.json {
        format!("{:#}\n", answer.json)
    } else {
        answer.text
    };
    match after_printing(text.as_bytes(), &mut io::stdout()) {
        ExitStatus::Success => answer.status,
        failure => failure,
    }
}

fn execute(command: &SnapshotCommand) -> Result<Answer, Error> {
    match command {
        SnapshotCommand::Info { snapshot } => info(snapshot),
        SnapshotCommand::Check { snapshot } => Ok(check(snapshot)),
        SnapshotCommand::Flatten {
            snapshot,
            new,
            compress,
        } => flatten_to(snapshot, new, *compress),
        SnapshotCommand::Compact {
            store,
            delete,
            keep,
            dry_run,
        } => {
            let selection = match (delete.as_slice(), keep.as_slice()) {
                ([], []) => Selection::Leftovers,
                ([], keep) => Selection::KeepOnly(keep.to_vec()),
                (delete, _) => Selection::Delete(delete.to_vec()),
            };
            let compaction = compact(&Store::open(store)?, &selection, *dry_run)?;
            Ok(compacted(&compaction, *dry_run))
        }
    }
}

fn done(text: String, json: Value) -> Answer {
    Answer {
        text,
        json,
        status: ExitStatus::Success,
    }
}

fn info(path: &Path) -> Result<Answer, Error> {
    let chain = Chain::open(path)?;
    let texts = chain.snapshots().iter().map(describe);
    let json = chain.snapshots().iter().map(|snapshot| {
        json!({
            "path": snapshot.path,
            "checksum": snapshot.sealed.checksum,
            "manifest": snapshot.sealed.manifest,
        })
    });
    Ok(done(texts.collect::<Vec<_>>().join("is built on\n"), json.collect()))
}

/// A snapshot in words. What its manifest says comes from a file, and must not steer the terminal.
fn describe(snapshot: &Snapshot) -> String {
    let Manifest {
        id,
        created,
        monitor,
        spec,
        cpu,
        state,
        images,
        ..
    } = &snapshot.sealed.manifest;
    let state_bytes = HumanBytes(snapshot.sealed.manifest.state_bytes());
    let mut text = format!("{}\n", snapshot.path.display());
    let mut line = |name: &str, value: &str| {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "  {name:<12} {}", escaped(value));
    };
    line("id", &id.to_string());
    line("created", &created.to_string());
    line("written by", monitor);
    if let Some(name) = &spec.name {
        line("name", name);
    }
    line(
        "machine",
        &format!(
            "{}, {} of memory, {}, {}",
            counted(spec.cpus.into(), "vCPU"),
            spec.memory.size,
            counted(spec.disks.len(), "disk"),
            counted(spec.nets.len(), "network interface")
        ),
    );
    line("CPU", &cpu.vendor);
    line("state", &format!("{}, {state_bytes}", counted(state.len(), "section")));
    for image in images {
        line(&image.name, &describe_image(image));
    }
    text
}

fn describe_image(image: &ImageEntry) -> String {
    let size = HumanBytes(image.pages * u64::from(image.page_bytes));
    let stored = image.stored_pages + image.zero_pages;
    let others = match image.base {
        Base::Zero => "the others are zero",
        Base::Parent => "the others are the parent's",
    };
    let file = HumanBytes(image.file_bytes());
    format!(
        "{size}: {stored} of {} pages in a file of {file}, {others}",
        image.pages
    )
}

fn check(path: &Path) -> Answer {
    let (snapshots, verified) = match Chain::open(path) {
        Ok(chain) => (
            chain.snapshots().len(),
            with_bar("verifying", |progress| verify(&chain, progress)),
        ),
        Err(error) => {
            let damage = vec![error];
            (
                0,
                Verified {
                    damage,
                    ..Verified::default()
                },
            )
        }
    };
    let Verified { chunks, bytes, damage } = verified;
    let damage: Vec<String> = damage
        .iter()
        .map(|error| escaped(&with_causes(error)).into_owned())
        .collect();
    let (text, status) = if damage.is_empty() {
        let text = format!(
            "{}: sound: {}, {} read and verified\n",
            path.display(),
            counted(snapshots, "snapshot"),
            HumanBytes(bytes)
        );
        (text, ExitStatus::Success)
    } else {
        (damage.join("\n") + "\n", ExitStatus::Failure)
    };
    let json = json!({
        "sound": damage.is_empty(),
        "snapshots": snapshots,
        "chunks": chunks,
        "bytes": bytes,
        "damage": damage,
    });
    Answer { text, json, status }
}

fn flatten_to(from: &Path, to: &Path, compress: Option<i32>) -> Result<Answer, Error> {
    let chain = Chain::open(from)?;
    let name = to.file_name().and_then(|name| name.to_str());
    let name = name.ok_or_else(|| Error::Name(to.display().to_string()))?;
    let store = match to.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => Store::open(dir)?,
        _ => Store::open(Path::new("."))?,
    };
    let layout = compress.map_or(Layout::Flat, |level| Layout::Compressed { level });
    let written = with_bar("flattening", |progress| flatten(&chain, &store, name, layout, progress))?;
    let text = format!(
        "{}: written from {}\n",
        written.path.display(),
        counted(chain.snapshots().len(), "snapshot")
    );
    let json = json!({
        "path": written.path,
        "id": written.id(),
        "snapshots": chain.snapshots().len(),
    });
    Ok(done(text, json))
}

fn compacted(compaction: &Compaction, dry_run: bool) -> Answer {
    let Compaction { snapshots, leftovers } = compaction;
    let verb = if dry_run { "would be deleted" } else { "deleted" };
    let mut text = String::new();
    for name in snapshots.iter().chain(leftovers) {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{} {verb}", escaped(name));
    }
    if snapshots.is_empty() && leftovers.is_empty() {
        text.push_str("nothing to delete\n");
    }
    let json = json!({
        "dry_run": dry_run,
        "snapshots": snapshots,
        "leftovers": leftovers,
    });
    done(text, json)
}

/// A number of things, as people write it.
fn counted(number: usize, thing: &str) -> String {
    match number {
        1 => format!("1 {thing}"),
        _ => format!("{number} {thing}s"),
    }
}

/// Runs something long under a progress bar, which is shown only on a terminal.
fn with_bar<T>(what: &'static str, work: impl FnOnce(&mut dyn FnMut(Progress)) -> T) -> T {
    let bar = ProgressBar::no_length().with_message(what);
    let style = ProgressStyle::with_template("{msg} {wide_bar} {bytes}/{total_bytes} {eta}");
    bar.set_style(style.expect("a valid template"));
    let result = work(&mut |Progress { done, total }| {
        bar.set_length(total);
        bar.set_position(done);
    });
    bar.finish_and_clear();
    result
}

#[cfg(test)]
mod tests {
    use std::fs;

    use clap::Parser;
    use cutover_snapshot::image::Shape;
    use cutover_snapshot::manifest::{CpuNeeds, MemoryRegion, Parent};
    use cutover_snapshot::writer::Draft;
    use tempfile::TempDir;

    use super::*;
    use crate::cli::{Cli, Command};

    /// A store with `base` and `child`, each with one page of its own in eight.
    fn sample() -> TempDir {
        let dir = tempfile::tempdir().expect("a directory");
        let store = Store::open(dir.path()).expect("a store");
        let bytes = 8 * 4096;
        let mut parent: Option<Parent> = None;
        for (name, page) in [("base", 1), ("child", 2)] {
            let base = if parent.is_some() { Base::Parent } else { Base::Zero };
            let draft = Draft {
                created: "2026-11-21T12:00:00Z".parse().expect("a time"),
                parent,
                spec: serde_json::from_value(json!({
                    "name": "web\u{1b}[2J", "cpus": 2, "memory": { "size": bytes }, "boot": { "kernel": "k" },
                }))
                .expect("a specification"),
                memory: vec![MemoryRegion { start: 0, bytes }],
                cpu: CpuNeeds::default(),
            };
            let mut writer = store.create(name, draft).expect("begun");
            let shape = Shape {
                page_bytes: 4096,
                pages: 8,
                base,
                layout: Layout::Packed,
            };
            let mut image = writer.image("memory", shape).expect("begun");
            image.put(page, &[7; 4096]).expect("written");
            writer.complete(image).expect("completed");
            parent = Some(Parent::from(&writer.commit().expect("committed")));
        }
        dir
    }

    /// Runs a command line in which `@` stands for the store.
    fn cutover(dir: &TempDir, line: &str) -> Result<Answer, Error> {
        let line = line.replace('@', &dir.path().display().to_string());
        match Cli::try_parse_from(line.split(' ')).expect("valid").command {
            Command::Snapshot(args) => execute(&args.command),
            other => panic!("not about snapshots: {other:?}"),
        }
    }

    #[test]
    fn info_tells_what_a_snapshot_is_and_what_it_is_built_on() {
        let dir = sample();
        let answer = cutover(&dir, "cutover snapshot info @/child").expect("sound");
        assert_eq!(answer.json.as_array().map(Vec::len), Some(2));
        assert_eq!(answer.json[0]["manifest"]["parent"]["name"], "base");
        assert_eq!(answer.json[1]["manifest"]["spec"]["cpus"], 2);
        assert_eq!(
            answer.json[1]["checksum"],
            answer.json[0]["manifest"]["parent"]["checksum"]
        );
        for words in [
            "2026-11-21T12:00:00Z",
            "2 vCPUs, 32K of memory, 0 disks",
            "1 of 8 pages",
            "the others are the parent's\nis built on\n",
            "the others are zero",
            "web\\u{1b}[2J",
        ] {
            assert!(answer.text.contains(words), "{words}: {}", answer.text);
        }
    }

    #[test]
    fn check_succeeds_on_what_is_sound_and_names_what_is_not() {
        let dir = sample();
        let answer = cutover(&dir, "cutover snapshot check @/child").expect("an answer");
        assert_eq!(answer.status, ExitStatus::Success);
        assert_eq!(
            (&answer.json["sound"], &answer.json["snapshots"], &answer.json["chunks"]),
            (&json!(true), &json!(2), &json!(2))
        );

        let path = dir.path().join("base/memory.pages");
        let mut bytes = fs::read(&path).expect("readable");
        bytes[99] ^= 1;
        fs::write(&path, bytes).expect("writable");
        let answer = cutover(&dir, "cutover snapshot check @/child").expect("an answer");
        assert_eq!(answer.status, ExitStatus::Failure);
        let expected = "base/memory.pages: damaged at byte 0: a chunk of pages does not have its checksum";
        assert!(answer.text.contains(expected), "{}", answer.text);
        assert_eq!(answer.json["damage"].as_array().map(Vec::len), Some(1));

        fs::remove_dir_all(dir.path().join("base")).expect("removed");
        let answer = cutover(&dir, "cutover snapshot check @/child").expect("an answer");
        assert_eq!(answer.json["sound"], false);
        assert!(answer.text.contains("once called 'base'"), "{}", answer.text);
    }

    #[test]
    fn a_flattened_snapshot_needs_no_other() {
        for options in ["", " --compress 3"] {
            let dir = sample();
            let line = format!("cutover snapshot flatten @/child @/whole{options}");
            let answer = cutover(&dir, &line).expect("flattened");
            assert_eq!(answer.json["snapshots"], 2);
            assert!(matches!(cutover(&dir, &line), Err(Error::Exists(_))));
            let kept = cutover(&dir, "cutover snapshot compact @ --keep whole").expect("compacted");
            assert_eq!(kept.json["snapshots"], json!(["child", "base"]));
            let answer = cutover(&dir, "cutover snapshot check @/whole").expect("an answer");
            assert_eq!(answer.json["sound"], true);
            let answer = cutover(&dir, "cutover snapshot info @/whole").expect("sound");
            assert_eq!(answer.json[0]["manifest"]["images"][0]["stored_pages"], 2);
        }
    }

    #[test]
    fn compact_deletes_what_is_named_unless_it_is_needed() {
        let dir = sample();
        fs::create_dir(dir.path().join(".partial-x")).expect("created");
        let refused = cutover(&dir, "cutover snapshot compact @ --delete base");
        assert!(matches!(refused, Err(Error::Needed { .. })));
        let told = cutover(&dir, "cutover snapshot compact @ --delete child --dry-run").expect("told");
        assert_eq!(told.text, "child would be deleted\n.partial-x would be deleted\n");
        let done = cutover(&dir, "cutover snapshot compact @ --delete child --delete base").expect("deleted");
        assert_eq!(done.text, "child deleted\nbase deleted\n.partial-x deleted\n");
        let done = cutover(&dir, "cutover snapshot compact @").expect("nothing there");
        assert_eq!(done.text, "nothing to delete\n");
    }

    #[test]
    fn what_contradicts_itself_is_a_usage_error() {
        for line in [
            "cutover snapshot compact s --delete a --keep b",
            "cutover snapshot flatten a b --compress 20",
            "cutover snapshot flatten a",
            "cutover snapshot",
        ] {
            assert_eq!(Cli::try_parse_from(line.split(' ')).expect_err(line).exit_code(), 2);
        }
    }
}
