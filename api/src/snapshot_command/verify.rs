//! `cutover snapshot verify`: whether a snapshot and all it is built on are as they were written.

use std::path::PathBuf;

use clap::Args;
use cutover_snapshot::chain::Chain;
use cutover_snapshot::verify::{Verified, verify};
use indicatif::HumanBytes;
use serde_json::json;

use super::access::AccessArgs;
use super::progress::with_bar;
use super::{Answer, counted};
use crate::exit::{ExitStatus, with_causes};
use crate::text::escaped;

/// Arguments of `cutover snapshot verify`.
#[derive(Debug, Args)]
pub struct VerifyArgs {
    /// The snapshot
    snapshot: PathBuf,

    #[command(flatten)]
    access: AccessArgs,
}

/// Shown with `cutover snapshot verify --help`.
pub const HELP: &str = "\
Each damaged place is printed with its file and offset.

Examples:
  cutover snapshot verify snapshots/monday
  cutover snapshot verify s3://backups/web/monday
  cutover snapshot verify snapshots/monday --json | jq -r '.damage[]'";

/// Reads and verifies everything.
pub fn run(args: &VerifyArgs) -> Answer {
    let (snapshots, verified) = match Chain::open_through(&args.snapshot, &args.access.access()) {
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
            args.snapshot.display(),
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
