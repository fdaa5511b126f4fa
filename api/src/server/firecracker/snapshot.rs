//! `/snapshot/create` and `/snapshot/load`: the bodies are checked, then refused; snapshots are to come.

use std::sync::Arc;

use axum::extract::State;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::rejection::Rejection;
use super::setup::Needs;
use crate::server::http::{Changed, Json, Outcome};
use crate::server::instance::Instance;

const NOT_YET: Rejection = Rejection::Unsupported("snapshots, in this version");

/// Body of `PUT /snapshot/create`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SnapshotCreate {
    /// All of the memory, or what has changed since the last snapshot.
    #[serde(default)]
    pub snapshot_type: SnapshotType,
    /// File for the state of devices and vCPUs.
    pub snapshot_path: String,
    /// File for the memory.
    pub mem_file_path: String,
}

/// How much of the memory a snapshot has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub enum SnapshotType {
    /// All of it.
    #[default]
    Full,
    /// What has changed since the last snapshot.
    Diff,
}

/// Body of `PUT /snapshot/load`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SnapshotLoad {
    /// File with the state of devices and vCPUs.
    pub snapshot_path: String,
    /// File with the memory; the older form of `mem_backend`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mem_file_path: Option<String>,
    /// Where the memory is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mem_backend: Option<MemoryBackend>,
    /// Older name of `track_dirty_pages`.
    #[serde(default)]
    pub enable_diff_snapshots: bool,
    /// Track what the guest writes to its memory, for incremental snapshots.
    #[serde(default)]
    pub track_dirty_pages: bool,
    /// Have the VM run at once.
    #[serde(default)]
    pub resume_vm: bool,
    /// Other tap devices.
    #[serde(default)]
    #[schema(max_items = 16)]
    pub network_overrides: Vec<NetworkOverride>,
    /// Another socket: not supported, there is no vsock device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(ignore)]
    pub vsock_override: Option<VsockOverride>,
    /// Have the guest's clock go on from the present time.
    #[serde(default)]
    pub clock_realtime: bool,
    /// Pages that back the guest's memory.
    #[serde(default)]
    pub huge_pages: LoadHugePages,
}

/// Where the memory of a snapshot is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct MemoryBackend {
    /// What kind of place.
    pub backend_type: MemoryBackendType,
    /// The file, or the socket of the process that serves the memory.
    pub backend_path: String,
}

/// What kind of place the memory of a snapshot is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub enum MemoryBackendType {
    /// A file.
    File,
    /// Another process, which handles page faults.
    Uffd,
}

/// Another tap device for a network interface.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NetworkOverride {
    /// Which interface.
    pub iface_id: String,
    /// Name of the tap device.
    pub host_dev_name: String,
}

/// Another socket for the vsock device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct VsockOverride {
    /// The socket.
    pub uds_path: String,
}

/// Pages that back the memory of a restored guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub enum LoadHugePages {
    /// As when the snapshot was made.
    #[default]
    Snapshot,
    /// Those that the host finds best.
    None,
    /// Transparent huge pages where the host has them.
    Transparent,
    /// Reserved pages of 2 MiB.
    #[serde(rename = "2M")]
    Reserved,
}

impl SnapshotLoad {
    /// Whether it says what can be loaded.
    ///
    /// # Errors
    /// It says not exactly once where the memory is, or asks for what is not supported.
    pub fn check(&self) -> Result<(), Rejection> {
        if self.mem_backend.is_some() == self.mem_file_path.is_some() {
            return Err(Rejection::MemoryBackend);
        }
        if self.vsock_override.is_some() {
            return Err(Rejection::Unsupported("vsock_override, as there is no vsock device"));
        }
        Ok(())
    }
}

/// Makes a snapshot of the paused VM. Not supported yet: always refused.
#[utoipa::path(
    put, path = "/snapshot/create", operation_id = "createSnapshot", tag = "firecracker",
    request_body = SnapshotCreate, responses(Changed)
)]
pub async fn create(State(instance): State<Arc<Instance>>, Json(_): Json<SnapshotCreate>) -> Outcome {
    instance.check(Needs::Started)?;
    Err(NOT_YET.into())
}

/// Starts a VM from a snapshot. Not supported yet: always refused.
#[utoipa::path(
    put, path = "/snapshot/load", operation_id = "loadSnapshot", tag = "firecracker",
    request_body = SnapshotLoad, responses(Changed)
)]
pub async fn load(State(instance): State<Arc<Instance>>, Json(body): Json<SnapshotLoad>) -> Outcome {
    body.check()?;
    instance.check(Needs::NotStarted("snapshot"))?;
    Err(NOT_YET.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_snapshot_to_create_is_full_unless_it_says_otherwise() {
        let json = r#"{"snapshot_path":"state","mem_file_path":"memory"}"#;
        let create: SnapshotCreate = serde_json::from_str(json).expect("valid");
        assert_eq!(create.snapshot_type, SnapshotType::Full);
        assert!(serde_json::from_str::<SnapshotCreate>(r#"{"snapshot_path":"state"}"#).is_err());
    }

    #[test]
    fn a_snapshot_to_load_has_its_memory_in_exactly_one_place() {
        let file = r#""mem_file_path":"memory""#;
        let backend = r#""mem_backend":{"backend_type":"File","backend_path":"memory"}"#;
        for (fields, valid) in [
            (String::new(), false),
            (format!(",{file}"), true),
            (format!(",{backend}"), true),
            (format!(",{file},{backend}"), false),
        ] {
            let json = format!(r#"{{"snapshot_path":"state"{fields}}}"#);
            let load: SnapshotLoad = serde_json::from_str(&json).expect("Firecracker's form");
            assert_eq!(load.check().is_ok(), valid, "{json}");
        }
    }
}
