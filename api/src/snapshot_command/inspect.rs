//! `cutover snapshot inspect`: what a snapshot is, from its manifest.

use std::fmt::Write;
use std::path::PathBuf;

use clap::Args;
use cutover_snapshot::Error;
use cutover_snapshot::chain::Chain;
use cutover_snapshot::manifest::{Base, ImageEntry, Manifest};
use cutover_snapshot::store::Snapshot;
use indicatif::HumanBytes;
use serde_json::json;

use super::access::AccessArgs;
use super::{Answer, counted};
use crate::text::escaped;

/// Arguments of `cutover snapshot inspect`.
#[derive(Debug, Args)]
pub struct InspectArgs {
    /// The snapshot
    snapshot: PathBuf,

    #[command(flatten)]
    access: AccessArgs,
}

/// Shown with `cutover snapshot inspect --help`.
pub const HELP: &str = "\
Examples:
  cutover snapshot inspect snapshots/monday
  cutover snapshot inspect snapshots/monday --json | jq '.[0].manifest.spec'";

/// Describes the snapshot and all it is built on.
pub fn run(args: &InspectArgs) -> Result<Answer, Error> {
    let chain = Chain::open_through(&args.snapshot, &args.access.access())?;
    let texts = chain.snapshots().iter().map(describe);
    let json = chain.snapshots().iter().map(|snapshot| {
        json!({
            "path": snapshot.path,
            "checksum": snapshot.sealed.checksum,
            "manifest": snapshot.sealed.manifest,
        })
    });
    Ok(Answer::done(
        texts.collect::<Vec<_>>().join("is built on\n"),
        json.collect(),
    ))
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
