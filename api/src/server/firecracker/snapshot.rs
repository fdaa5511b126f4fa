//! `/snapshot/create` and `/snapshot/load`: Firecracker's snapshots, of a paused VM and in two files, on top of the
//! operations that `/v1/snapshots` and `/v1/restore` use.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::extract::State;
use axum::http::StatusCode;
use cutover_snapshot::spec::SerialSpec;
use cutover_vmm::State as VmState;
use cutover_vmm::snapshot::{
    ClockPolicy, Disks, Kind, NetOverride, RestoreRequest, SnapshotRequest, Source, Target, Trust,
};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::rejection::Rejection;
use super::setup::Needs;
use crate::server::http::{Changed, Json, Outcome};
use crate::server::instance::Instance;

/// Body of `PUT /snapshot/create`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SnapshotCreate {
    /// All of the memory, or what has changed since the last snapshot.
    #[serde(default)]
    pub snapshot_type: SnapshotType,
    /// File for the state of devices and vCPUs. An existing one is replaced.
    pub snapshot_path: String,
    /// File for the memory. An existing one is replaced.
    pub mem_file_path: String,
}

/// How much of the memory a snapshot has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub enum SnapshotType {
    /// All of it.
    #[default]
    Full,
    /// What has changed since the last snapshot, in a file with holes for the rest; all of it in the first snapshot.
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
    /// Another socket for the vsock device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
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

impl From<SnapshotCreate> for SnapshotRequest {
    fn from(create: SnapshotCreate) -> Self {
        Self {
            target: Target::Files {
                state: create.snapshot_path.into(),
                memory: create.mem_file_path.into(),
            },
            kind: match create.snapshot_type {
                SnapshotType::Full => Kind::Full,
                SnapshotType::Diff => Kind::Incremental,
            },
            disks: Disks::Referenced,
            compress: None,
        }
    }
}

impl TryFrom<SnapshotLoad> for RestoreRequest {
    type Error = Rejection;

    fn try_from(load: SnapshotLoad) -> Result<Self, Rejection> {
        let state = load.snapshot_path.into();
        let source = match (load.mem_backend, load.mem_file_path) {
            (Some(_), Some(_)) | (None, None) => return Err(Rejection::MemoryBackend),
            (None, Some(path)) => (MemoryBackendType::File, path),
            (Some(backend), None) => (backend.backend_type, backend.backend_path),
        };
        let source = match source {
            (MemoryBackendType::File, _) if load.huge_pages == LoadHugePages::Reserved => {
                return Err(Rejection::HugePagesOfFile);
            }
            (MemoryBackendType::File, memory) => Source::Files {
                state,
                memory: memory.into(),
            },
            (MemoryBackendType::Uffd, socket) => Source::Served {
                state,
                socket: socket.into(),
            },
        };
        Ok(Self {
            source,
            endpoints: Vec::new(),
            trust: Trust::Trusted,
            clock: match load.clock_realtime {
                true => ClockPolicy::Corrected,
                false => ClockPolicy::Stopped,
            },
            name: None,
            nets: taps(load.network_overrides)?,
            vsock: load.vsock_override.map(|vsock| vsock.uds_path.into()),
            disks: BTreeMap::new(),
            disks_dir: None,
            replace_disks: false,
            serial: SerialSpec::default(),
            hugepages: match load.huge_pages {
                LoadHugePages::Snapshot => None,
                LoadHugePages::None | LoadHugePages::Transparent => Some(false),
                LoadHugePages::Reserved => Some(true),
            },
            track: load.track_dirty_pages || load.enable_diff_snapshots,
            paused: !load.resume_vm,
        })
    }
}

/// Other taps, by the ids of their interfaces.
fn taps(overrides: Vec<NetworkOverride>) -> Result<BTreeMap<String, NetOverride>, Rejection> {
    let mut taps = BTreeMap::new();
    for NetworkOverride {
        iface_id,
        host_dev_name,
    } in overrides
    {
        let tap = NetOverride {
            tap: Some(host_dev_name),
            mac: None,
        };
        if taps.insert(iface_id.clone(), tap).is_some() {
            return Err(Rejection::OverrideTwice(iface_id));
        }
    }
    Ok(taps)
}

/// Makes a snapshot of the paused VM, in two files.
#[utoipa::path(
    put, path = "/snapshot/create", operation_id = "createSnapshot", tag = "firecracker",
    request_body = SnapshotCreate, responses(Changed)
)]
pub async fn create(State(instance): State<Arc<Instance>>, Json(body): Json<SnapshotCreate>) -> Outcome {
    instance.check(Needs::Started)?;
    match instance.state().await? {
        // One that has ended says so itself.
        Some(VmState::Paused | VmState::Ended) => {}
        _ => return Err(Rejection::NotPaused.into()),
    }
    instance.snapshot(body.into()).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Makes a VM of a snapshot. Before the start only, and instead of it.
#[utoipa::path(
    put, path = "/snapshot/load", operation_id = "loadSnapshot", tag = "firecracker",
    request_body = SnapshotLoad, responses(Changed)
)]
pub async fn load(State(instance): State<Arc<Instance>>, Json(body): Json<SnapshotLoad>) -> Outcome {
    instance.restore(body.try_into()?).await
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

    fn load(fields: &str) -> Result<RestoreRequest, Rejection> {
        let json = format!(r#"{{"snapshot_path":"state"{fields}}}"#);
        let load: SnapshotLoad = serde_json::from_str(&json).expect("Firecracker's form");
        load.try_into()
    }

    #[test]
    fn a_snapshot_to_create_goes_into_the_two_files() {
        let json = r#"{"snapshot_type":"Diff","snapshot_path":"state","mem_file_path":"memory"}"#;
        let create: SnapshotCreate = serde_json::from_str(json).expect("valid");
        let request = SnapshotRequest {
            target: Target::Files {
                state: "state".into(),
                memory: "memory".into(),
            },
            kind: Kind::Incremental,
            disks: Disks::Referenced,
            compress: None,
        };
        assert_eq!(SnapshotRequest::from(create), request);
    }

    #[test]
    fn a_snapshot_to_load_has_its_memory_in_exactly_one_place() {
        let file = r#","mem_file_path":"memory""#;
        let backend = r#","mem_backend":{"backend_type":"File","backend_path":"memory"}"#;
        let served = r#","mem_backend":{"backend_type":"Uffd","backend_path":"socket"}"#;
        let files = Source::Files {
            state: "state".into(),
            memory: "memory".into(),
        };
        assert_eq!(load(file).expect("valid").source, files);
        assert_eq!(load(backend).expect("valid").source, files);
        let socket = Source::Served {
            state: "state".into(),
            socket: "socket".into(),
        };
        assert_eq!(load(served).expect("valid").source, socket);
        for fields in [String::new(), format!("{file}{backend}")] {
            assert_eq!(load(&fields), Err(Rejection::MemoryBackend));
        }
    }

    #[test]
    fn a_loaded_vm_stays_paused_untracked_and_at_its_time_unless_the_request_says_otherwise() {
        let request = load(r#","mem_file_path":"m""#).expect("valid");
        assert_eq!(
            (request.paused, request.track, request.clock, request.hugepages),
            (true, false, ClockPolicy::Stopped, None)
        );
        for tracked in ["track_dirty_pages", "enable_diff_snapshots"] {
            let fields = format!(
                r#","mem_file_path":"m","{tracked}":true,"resume_vm":true,"clock_realtime":true,"huge_pages":"None",
                   "network_overrides":[{{"iface_id":"eth0","host_dev_name":"t1"}}]"#
            );
            let request = load(&fields).expect("valid");
            assert_eq!(
                (request.paused, request.track, request.clock, request.hugepages),
                (false, true, ClockPolicy::Corrected, Some(false))
            );
            assert_eq!(request.nets["eth0"].tap.as_deref(), Some("t1"));
        }
    }

    #[test]
    fn reserved_pages_take_a_process_that_serves_them() {
        let backend =
            |kind| format!(r#","huge_pages":"2M","mem_backend":{{"backend_type":"{kind}","backend_path":"p"}}"#);
        assert_eq!(load(&backend("File")), Err(Rejection::HugePagesOfFile));
        assert_eq!(load(&backend("Uffd")).expect("valid").hugepages, Some(true));
    }

    #[test]
    fn what_cannot_be_overridden_is_refused() {
        let twice = r#","mem_file_path":"m","network_overrides":[{"iface_id":"e","host_dev_name":"a"},
                       {"iface_id":"e","host_dev_name":"b"}]"#;
        assert_eq!(load(twice), Err(Rejection::OverrideTwice("e".to_owned())));
    }

    #[test]
    fn the_socket_of_the_vsock_device_can_be_another() {
        let request = load(r#","mem_file_path":"m","vsock_override":{"uds_path":"v"}"#).expect("valid");
        assert_eq!(request.vsock, Some("v".into()));
    }
}
