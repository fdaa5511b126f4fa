//! `cutover snapshot export`: a snapshot with all it is built on, in a single file.

use std::path::PathBuf;

use clap::Args;
use cutover_snapshot::Error;
use cutover_snapshot::archive::write_archive;
use cutover_snapshot::chain::Chain;
use cutover_snapshot::files::HostFiles;
use cutover_snapshot::image::Layout;
use indicatif::HumanBytes;
use serde_json::json;

use super::progress::with_bar;
use super::{Answer, Compression, counted};

/// Arguments of `cutover snapshot export`.
#[derive(Debug, Args)]
pub struct ExportArgs {
    /// The snapshot
    snapshot: PathBuf,

    /// The file, which is created
    file: PathBuf,

    #[command(flatten)]
    compression: Compression,
}

/// Shown with `cutover snapshot export --help`.
pub const HELP: &str = "\
The file is complete in itself, and can be given to every command here and to `cutover snapshot restore`: it is read where
it is. It is a tar archive of a snapshot's directory; unpacked into an empty directory it is a snapshot again.

Examples:
  cutover snapshot export snapshots/monday monday.tar
  cutover snapshot export snapshots/monday monday.tar --compress 9
  cutover snapshot verify monday.tar";

/// Writes the file.
pub fn run(args: &ExportArgs) -> Result<Answer, Error> {
    let chain = Chain::open(&args.snapshot)?;
    let layout = args.compression.or(Layout::Packed);
    let snapshots = chain.snapshots().len();
    with_bar("exporting", |progress| {
        write_archive(&chain, &HostFiles, &args.file, layout, progress)
    })?;
    let bytes = args.file.metadata().map_err(Error::io("examine it", &args.file))?.len();
    let text = format!(
        "{}: {}, written from {}\n",
        args.file.display(),
        HumanBytes(bytes),
        counted(snapshots, "snapshot")
    );
    let json = json!({
        "path": args.file,
        "bytes": bytes,
        "snapshots": snapshots,
    });
    Ok(Answer::done(text, json))
}
