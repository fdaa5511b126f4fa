//! `cutover snapshot export`: a snapshot with all it is built on, in a single file or a bucket.

use std::path::{Path, PathBuf};

use clap::Args;
use cutover_snapshot::Error;
use cutover_snapshot::archive::write_archive;
use cutover_snapshot::chain::Chain;
use cutover_snapshot::files::HostFiles;
use cutover_snapshot::image::Layout;
use cutover_snapshot::remote::{Access, Uploaded, is_remote, upload_chain, upload_merged};
use indicatif::HumanBytes;
use serde_json::json;

use super::access::AccessArgs;
use super::progress::with_bar;
use super::{Answer, Compression, counted};

/// Arguments of `cutover snapshot export`.
#[derive(Debug, Args)]
pub struct ExportArgs {
    /// The snapshot
    snapshot: PathBuf,

    /// The file, which is created, or s3://BUCKET/PATH/NAME
    to: PathBuf,

    /// To a bucket: upload one complete snapshot instead of each that it is built on; --compress does the same
    #[arg(long)]
    merged: bool,

    #[command(flatten)]
    compression: Compression,

    #[command(flatten)]
    access: AccessArgs,
}

/// Shown with `cutover snapshot export --help`.
pub const HELP: &str = "\
What is exported can be given to every command here and to `cutover snapshot restore`: it is read where it is.

A file is complete in itself. It is a tar archive of a snapshot's directory; unpacked into an empty directory it is a
snapshot again.

To a bucket the snapshot is uploaded with those it is built on, under their names, as far as they are not there yet. All
are verified first. Of each the manifest comes last: what was interrupted is no snapshot, and can be uploaded again.
Region, keys and the like are taken from the environment: AWS_REGION, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY,
AWS_SESSION_TOKEN, AWS_ENDPOINT_URL (several with commas).

Examples:
  cutover snapshot export snapshots/monday monday.tar
  cutover snapshot export snapshots/monday monday.tar --compress 9
  cutover snapshot export snapshots/monday s3://backups/web/monday
  cutover snapshot export snapshots/monday s3://backups/web/whole --merged --endpoint https://s3.example.org
  cutover snapshot verify monday.tar";

/// Writes the file or the objects.
pub fn run(args: &ExportArgs) -> Result<Answer, Error> {
    let access = args.access.access();
    let chain = Chain::open_through(&args.snapshot, &access)?;
    if is_remote(&args.to) {
        return upload(args, &chain, &access);
    }
    let layout = args.compression.or(Layout::Packed);
    with_bar("exporting", |progress| {
        write_archive(&chain, &HostFiles, &args.to, layout, progress)
    })?;
    let bytes = args.to.metadata().map_err(Error::io("examine it", &args.to))?.len();
    Ok(written(&args.to, bytes, chain.snapshots().len()))
}

fn upload(args: &ExportArgs, chain: &Chain, access: &Access) -> Result<Answer, Error> {
    if args.merged || args.compression.is_given() {
        let layout = args.compression.or(Layout::Packed);
        let uploaded = with_bar("uploading", |progress| {
            upload_merged(chain, &args.to, access, layout, progress)
        })?;
        return Ok(written(&uploaded.path, uploaded.bytes, chain.snapshots().len()));
    }
    let Uploaded {
        path,
        snapshots,
        present,
        bytes,
    } = with_bar("uploading", |progress| upload_chain(chain, &args.to, access, progress))?;
    let text = format!(
        "{}: {} uploaded, {}; {present} there before\n",
        path.display(),
        counted(snapshots, "snapshot"),
        HumanBytes(bytes),
    );
    let json = json!({
        "path": path,
        "bytes": bytes,
        "snapshots": snapshots,
        "present": present,
    });
    Ok(Answer::done(text, json))
}

/// What is told of one complete snapshot that was written from several.
fn written(path: &Path, bytes: u64, snapshots: usize) -> Answer {
    let text = format!(
        "{}: {}, written from {}\n",
        path.display(),
        HumanBytes(bytes),
        counted(snapshots, "snapshot")
    );
    let json = json!({
        "path": path,
        "bytes": bytes,
        "snapshots": snapshots,
    });
    Answer::done(text, json)
}
