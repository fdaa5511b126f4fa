//! What can be asked about migrations.

use std::collections::BTreeMap;
use std::path::PathBuf;

use cutover_migration::options::Options;
use cutover_migration::transport::Endpoint;
use cutover_snapshot::spec::SerialSpec;

use crate::snapshot::NetOverride;

/// A VM to be moved to another monitor. That a link is not protected (`tcp://`) is for whoever asks to allow.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MigrateRequest {
    /// Where that listens.
    pub to: Endpoint,
    /// Directory with this host's [certificate](cutover_migration::transport::tls). Endpoints with TLS need it.
    pub tls: Option<PathBuf>,
    /// How it is to be done.
    pub options: Options,
    /// What becomes of the disks.
    pub disks: MigratedDisks,
}

/// What becomes of a VM's disks when it moves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum MigratedDisks {
    /// Both hosts have them (shared storage, or one host); they are used on one side at a time.
    #[default]
    Shared,
    /// Those that can be written are copied while the VM runs.
    Moved,
}

/// A VM to be taken over from another monitor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReceiveRequest {
    /// Where to listen for it.
    pub listen: Endpoint,
    /// Directory with this host's [certificate](cutover_migration::transport::tls). Endpoints with TLS need it.
    pub tls: Option<PathBuf>,
    /// Another name for the VM.
    pub name: Option<String>,
    /// Other taps, by the id of the network interface. Its address stays: the guest runs on, and so do its connections.
    pub nets: BTreeMap<String, NetOverride>,
    /// Other files, by the id of the disk: where it is on this host, or, of one that moves, where it is to be.
    pub disks: BTreeMap<String, PathBuf>,
    /// Where files are created for disks that move and are not in `disks`: as `ID.img`.
    pub disks_dir: Option<PathBuf>,
    /// Another Unix socket for the vsock device.
    pub vsock: Option<PathBuf>,
    /// Where the guest's console goes.
    pub serial: SerialSpec,
}
