//! `cutover snapshot prune`: what is no longer needed goes.

use std::fmt::Write;
use std::path::PathBuf;

use clap::Args;
use cutover_snapshot::Error;
use cutover_snapshot::prune::{Needed, Pruned, Selection, prune};
use cutover_snapshot::store::Store;
use serde_json::json;

use super::Answer;
use crate::text::escaped;

/// Arguments of `cutover snapshot prune`.
#[derive(Debug, Args)]
pub struct PruneArgs {
    /// Directory of the snapshots
    store: PathBuf,

    /// Delete this snapshot; refused if another is built on it that is not deleted too
    #[arg(long, value_name = "NAME", conflicts_with_all = ["keep", "keep_last"])]
    delete: Vec<String>,

    /// Delete all snapshots but this one and those it is built on
    #[arg(long, value_name = "NAME")]
    keep: Vec<String>,

    /// Delete all snapshots but the newest N and those they are built on
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    keep_last: Option<u32>,

    /// Only tell what would be deleted
    #[arg(long)]
    dry_run: bool,
}

/// Shown with `cutover snapshot prune --help`.
pub const HELP: &str = "\
Without options, only what interrupted writers left is removed. A snapshot that stays only because another is built on it
is named with that one: `cutover snapshot merge` makes the other one complete, and then it can go.

Examples:
  Keep the newest three, and what they are built on:
    cutover snapshot prune snapshots --keep-last 3

  Delete two snapshots, if no others are built on them:
    cutover snapshot prune snapshots --delete monday --delete tuesday

  What would go if only one and what it is built on stayed?
    cutover snapshot prune snapshots --keep friday --dry-run";

/// Deletes what was asked for.
pub fn run(args: &PruneArgs) -> Result<Answer, Error> {
    let selection = match (args.delete.as_slice(), args.keep.as_slice(), args.keep_last) {
        ([], [], None) => Selection::Leftovers,
        ([], keep, last) => Selection::Keep {
            names: keep.to_vec(),
            last: last.map_or(0, |last| last as usize),
        },
        (delete, _, _) => Selection::Delete(delete.to_vec()),
    };
    let pruned = prune(&Store::open(&args.store)?, &selection, args.dry_run)?;
    Ok(answer(&pruned, args.dry_run))
}

fn answer(pruned: &Pruned, dry_run: bool) -> Answer {
    let Pruned {
        snapshots,
        leftovers,
        needed,
    } = pruned;
    let verb = if dry_run { "would be deleted" } else { "deleted" };
    let mut text = String::new();
    for name in snapshots.iter().chain(leftovers) {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{} {verb}", escaped(name));
    }
    if snapshots.is_empty() && leftovers.is_empty() {
        text.push_str("nothing to delete\n");
    }
    for Needed { name, by } in needed {
        let _ = writeln!(text, "{} stays, because {} is built on it", escaped(name), escaped(by));
    }
    if !needed.is_empty() {
        text.push_str("`cutover snapshot merge` makes a snapshot complete: then what it was built on can go\n");
    }
    let needed: Vec<_> = needed
        .iter()
        .map(|Needed { name, by }| json!({ "name": name, "by": by }))
        .collect();
    let json = json!({
        "dry_run": dry_run,
        "snapshots": snapshots,
        "leftovers": leftovers,
        "needed": needed,
    });
    Answer::done(text, json)
}
