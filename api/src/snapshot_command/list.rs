//! `cutover snapshot list`: the snapshots of a directory as the trees they make.
//!
//! ```text
//!  NAME         CREATED               KIND         STORED     BUILT ON
//!  base         2026-11-20T12:00:00Z  full         1.20 GiB
//!  └─ monday    2026-11-21T12:00:00Z  incremental  34.10 MiB  base
//! ```

use std::collections::HashSet;
use std::fmt::Write;
use std::path::PathBuf;

use clap::Args;
use cutover_snapshot::Error;
use cutover_snapshot::store::{Listed, Snapshot, list_all};
use indicatif::HumanBytes;
use serde_json::{Value, json};

use super::Answer;
use super::access::AccessArgs;
use crate::exit::{ExitStatus, with_causes};
use crate::text::escaped;

/// Arguments of `cutover snapshot list`.
#[derive(Debug, Args)]
pub struct ListArgs {
    /// Directory of the snapshots, or s3://BUCKET/PATH
    store: PathBuf,

    #[command(flatten)]
    access: AccessArgs,
}

/// Shown with `cutover snapshot list --help`.
pub const HELP: &str = "\
Examples:
  cutover snapshot list snapshots
  cutover snapshot list s3://backups/web --endpoint https://s3.example.org
  cutover snapshot list snapshots --json | jq -r '.[] | select(.kind == \"full\").name'";

/// A snapshot in the tree.
struct Row<'a> {
    snapshot: &'a Snapshot,
    /// Number of snapshots above it in the tree.
    depth: usize,
    /// Whether what it is built on is there.
    has_parent: bool,
}

/// Lists the snapshots.
pub fn run(args: &ListArgs) -> Result<Answer, Error> {
    let (sound, broken): (Vec<_>, Vec<_>) = list_all(&args.store, &args.access.access())?
        .into_iter()
        .partition(|listed| listed.snapshot.is_ok());
    let snapshots: Vec<Snapshot> = sound.into_iter().filter_map(|listed| listed.snapshot.ok()).collect();
    let rows = tree(&snapshots);
    let mut text = table(&rows);
    let mut json: Vec<Value> = rows.iter().map(row_json).collect();
    for Listed { name, snapshot } in &broken {
        if let Err(error) = snapshot {
            let error = escaped(&with_causes(error)).into_owned();
            // Writing to a String cannot fail.
            let _ = writeln!(text, "{name}  cannot be read: {error}");
            json.push(json!({ "name": name, "error": error }));
        }
    }
    if text.is_empty() {
        text.push_str("no snapshots\n");
    }
    let status = if broken.is_empty() {
        ExitStatus::Success
    } else {
        ExitStatus::Failure
    };
    Ok(Answer {
        text,
        json: json.into(),
        status,
    })
}

/// The snapshots (oldest first), each followed by those that are built on it.
fn tree(snapshots: &[Snapshot]) -> Vec<Row<'_>> {
    let ids: HashSet<_> = snapshots.iter().map(Snapshot::id).collect();
    let parent = |snapshot: &Snapshot| snapshot.sealed.manifest.parent.as_ref().map(|parent| parent.id);
    let has_parent = |snapshot: &Snapshot| parent(snapshot).is_some_and(|parent| ids.contains(&parent));
    let (children, roots): (Vec<_>, Vec<_>) = snapshots.iter().partition(|snapshot| has_parent(snapshot));
    let mut rows = Vec::with_capacity(snapshots.len());
    let mut seen = HashSet::new();
    // Parents that go round in a circle have no root: their snapshots come last, as if they were roots.
    for root in roots.into_iter().chain(children.iter().copied()) {
        let mut next = vec![(root, 0)];
        while let Some((snapshot, depth)) = next.pop() {
            if !seen.insert(&snapshot.path) {
                continue;
            }
            rows.push(Row {
                snapshot,
                depth,
                has_parent: has_parent(snapshot),
            });
            let own = children
                .iter()
                .rev()
                .filter(|child| parent(child) == Some(snapshot.id()));
            next.extend(own.map(|child| (*child, depth + 1)));
        }
    }
    rows
}

fn kind(snapshot: &Snapshot) -> &'static str {
    match snapshot.sealed.manifest.parent {
        None => "full",
        Some(_) => "incremental",
    }
}

fn row_json(row: &Row<'_>) -> Value {
    let manifest = &row.snapshot.sealed.manifest;
    json!({
        "name": row.snapshot.name,
        "path": row.snapshot.path,
        "id": manifest.id,
        "created": manifest.created,
        "kind": kind(row.snapshot),
        "stored_bytes": manifest.stored_bytes(),
        "parent": manifest.parent,
        "has_parent": row.has_parent,
        "vm": manifest.spec.name,
    })
}

fn table(rows: &[Row<'_>]) -> String {
    let cells = rows.iter().map(|row| {
        let manifest = &row.snapshot.sealed.manifest;
        let branch = match row.depth {
            0 => String::new(),
            depth => format!("{}└─ ", "   ".repeat(depth - 1)),
        };
        let parent = match &manifest.parent {
            None => String::new(),
            Some(parent) if row.has_parent => parent.name.clone(),
            Some(parent) => format!("{} (missing)", parent.name),
        };
        [
            branch + &row.snapshot.name,
            // Parts of seconds help nobody here.
            manifest.created.strftime("%Y-%m-%dT%H:%M:%SZ").to_string(),
            kind(row.snapshot).to_owned(),
            HumanBytes(manifest.stored_bytes()).to_string(),
            parent,
        ]
    });
    let head = ["NAME", "CREATED", "KIND", "STORED", "BUILT ON"].map(str::to_owned);
    let lines: Vec<[String; 5]> = match rows {
        [] => return String::new(),
        _ => [head].into_iter().chain(cells).collect(),
    };
    let width = |column: usize| lines.iter().map(|line| line[column].chars().count()).max().unwrap_or(0);
    let widths = [0, 1, 2, 3].map(width);
    let mut text = String::new();
    for [name, created, kind, stored, parent] in &lines {
        let line = format!(
            "{name:<0$}  {created:<1$}  {kind:<2$}  {stored:<3$}  {parent}",
            widths[0], widths[1], widths[2], widths[3]
        );
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{}", line.trim_end());
    }
    text
}
