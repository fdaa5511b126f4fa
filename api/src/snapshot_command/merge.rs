//! `cutover snapshot merge`: a complete snapshot from one that is built on others.

use std::path::PathBuf;

use clap::Args;
use cutover_snapshot::Error;
use cutover_snapshot::chain::Chain;
use cutover_snapshot::image::Layout;
use cutover_snapshot::merge::{merge, merge_in_place};
use serde_json::json;

use super::access::AccessArgs;
use super::progress::with_bar;
use super::{Answer, Compression, counted, in_store};

/// Arguments of `cutover snapshot merge`.
#[derive(Debug, Args)]
pub struct MergeArgs {
    /// The snapshot
    snapshot: PathBuf,

    /// Path of the new snapshot; without it, the snapshot itself is replaced, if no other is built on it
    new: Option<PathBuf>,

    #[command(flatten)]
    compression: Compression,

    #[command(flatten)]
    access: AccessArgs,
}

/// Shown with `cutover snapshot merge --help`.
pub const HELP: &str = "\
With NEW everything else stays as it is: what is built on the snapshot goes on being built on it. Without NEW the merged
form takes the place of the snapshot, at once and as a whole; it has a new id, so this is refused while another snapshot
is built on the present form, and the next incremental snapshot of a VM that goes on from the present form has nothing to
be built on: it has to be a full one. A merged snapshot that is not compressed can be mapped as it is.

Examples:
  A copy that is complete in itself:
    cutover snapshot merge snapshots/monday snapshots/whole
    cutover snapshot merge snapshots/monday archive/monday --compress 9

  Make the newest of a chain complete, so that the older ones can go:
    cutover snapshot merge snapshots/friday
    cutover snapshot prune snapshots --keep-last 1

  A snapshot of a directory again, from where it was exported to:
    cutover snapshot merge monday.tar snapshots/monday
    cutover snapshot merge s3://backups/web/monday snapshots/monday";

/// Writes the merged snapshot.
pub fn run(args: &MergeArgs) -> Result<Answer, Error> {
    let chain = Chain::open_through(&args.snapshot, &args.access.access())?;
    let layout = args.compression.or(Layout::Flat);
    let snapshots = chain.snapshots().len();
    let written = match &args.new {
        Some(new) => {
            let (store, name) = in_store(new)?;
            with_bar("merging", |progress| merge(&chain, &store, name, layout, progress))?
        }
        None => {
            let (store, _) = in_store(&chain.newest().path)?;
            with_bar("merging", |progress| merge_in_place(&chain, &store, layout, progress))?
        }
    };
    let text = format!(
        "{}: written from {}\n",
        written.path.display(),
        counted(snapshots, "snapshot")
    );
    let json = json!({
        "path": written.path,
        "id": written.id(),
        "snapshots": snapshots,
    });
    Ok(Answer::done(text, json))
}
