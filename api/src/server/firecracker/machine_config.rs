//! `/machine-config`: vCPUs and memory.

use std::sync::Arc;

use axum::extract::State;
use axum::response::Response;
use cutover_snapshot::size::ByteSize;
use cutover_snapshot::spec::{CPUS_MAX, MEMORY_MAX, MEMORY_MIN, MemorySpec, SpecError, VmSpec};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::rejection::Rejection;
use super::setup::Change;
use crate::server::http::{Changed, Json, Outcome, Refused, json};
use crate::server::instance::Instance;

/// Guest memory when nothing is said about it, in MiB: Firecracker's value.
const DEFAULT_MEMORY_MIB: u64 = 128;

/// Body of `PUT /machine-config`, and answer of `GET`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct MachineConfiguration {
    /// Number of vCPUs.
    #[schema(minimum = 1, maximum = 32)]
    pub vcpu_count: u8,
    /// Size of the guest's memory in MiB.
    #[schema(minimum = 32, maximum = 4_194_304)]
    pub mem_size_mib: u64,
    /// Show the guest two threads per core: not supported, every vCPU is a core.
    #[serde(default)]
    pub smt: bool,
    /// CPU template: only `None`, which is to say none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<NoTemplate>)]
    pub cpu_template: Option<String>,
    /// Track what the guest writes to its memory, for incremental snapshots.
    #[serde(default)]
    pub track_dirty_pages: bool,
    /// Pages that back the guest's memory.
    #[serde(default)]
    pub huge_pages: HugePages,
}

/// Body of `PATCH /machine-config`: what is not given stays as it is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct MachineConfigurationPatch {
    /// Number of vCPUs.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1, maximum = 32)]
    pub vcpu_count: Option<u8>,
    /// Size of the guest's memory in MiB.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 32, maximum = 4_194_304)]
    pub mem_size_mib: Option<u64>,
    /// Show the guest two threads per core: not supported, every vCPU is a core.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub smt: Option<bool>,
    /// CPU template: only `None`, which is to say none.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<NoTemplate>)]
    pub cpu_template: Option<String>,
    /// Track what the guest writes to its memory, for incremental snapshots.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub track_dirty_pages: Option<bool>,
    /// Pages that back the guest's memory.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub huge_pages: Option<HugePages>,
}

/// The one CPU template there is: none.
#[derive(ToSchema)]
pub enum NoTemplate {
    /// No template.
    None,
}

/// Pages that back the guest's memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub enum HugePages {
    /// Those that the host finds best.
    #[default]
    None,
    /// The same: where the host has transparent huge pages, guest memory always may use them.
    Transparent,
    /// Reserved pages of 2 MiB.
    #[serde(rename = "2M")]
    Reserved,
}

impl Default for MachineConfiguration {
    fn default() -> Self {
        Self {
            vcpu_count: 1,
            mem_size_mib: DEFAULT_MEMORY_MIB,
            smt: false,
            cpu_template: None,
            track_dirty_pages: false,
            huge_pages: HugePages::None,
        }
    }
}

impl MachineConfiguration {
    /// This configuration with the fields that `patch` gives.
    ///
    /// # Errors
    /// It gives none.
    pub fn patched(&self, patch: MachineConfigurationPatch) -> Result<Self, Rejection> {
        if patch == MachineConfigurationPatch::default() {
            return Err(Rejection::EmptyPatch);
        }
        Ok(Self {
            vcpu_count: patch.vcpu_count.unwrap_or(self.vcpu_count),
            mem_size_mib: patch.mem_size_mib.unwrap_or(self.mem_size_mib),
            smt: patch.smt.unwrap_or(self.smt),
            cpu_template: patch.cpu_template.or_else(|| self.cpu_template.clone()),
            track_dirty_pages: patch.track_dirty_pages.unwrap_or(self.track_dirty_pages),
            huge_pages: patch.huge_pages.unwrap_or(self.huge_pages),
        })
    }

    /// Whether a VM can be like that.
    ///
    /// # Errors
    /// Something is out of range or not supported.
    pub fn check(&self) -> Result<(), Rejection> {
        if self.smt {
            return Err(Rejection::Unsupported("smt, threads of one core: every vCPU is a core"));
        }
        if self.cpu_template.as_deref().is_some_and(|template| template != "None") {
            return Err(Rejection::Unsupported("cpu_template other than None"));
        }
        if !(1..=CPUS_MAX).contains(&self.vcpu_count) {
            return Err(SpecError::Cpus(self.vcpu_count).into());
        }
        // Compared in MiB, because a wrong number can be too big for bytes.
        let range = MEMORY_MIN.bytes() >> 20..=MEMORY_MAX.bytes() >> 20;
        if !range.contains(&self.mem_size_mib) {
            return Err(Rejection::MemorySize(self.mem_size_mib));
        }
        if self.huge_pages == HugePages::Reserved && !self.mem_size_mib.is_multiple_of(2) {
            return Err(SpecError::MemoryPages {
                size: ByteSize::from_mib(self.mem_size_mib),
                page: ByteSize::from_mib(2),
            }
            .into());
        }
        Ok(())
    }

    /// The guest's memory.
    pub fn memory(&self) -> MemorySpec {
        MemorySpec {
            size: ByteSize::from_mib(self.mem_size_mib),
            shared: false,
            hugepages: self.huge_pages == HugePages::Reserved,
        }
    }
}

impl From<&VmSpec> for MachineConfiguration {
    fn from(spec: &VmSpec) -> Self {
        Self {
            vcpu_count: spec.cpus,
            mem_size_mib: spec.memory.size.bytes() >> 20,
            huge_pages: if spec.memory.hugepages {
                HugePages::Reserved
            } else {
                HugePages::None
            },
            ..Self::default()
        }
    }
}

/// The vCPUs and memory that are configured, or the default.
#[utoipa::path(
    get, path = "/machine-config", operation_id = "getMachineConfiguration", tag = "firecracker",
    responses((status = 200, body = MachineConfiguration), Refused)
)]
pub async fn get(State(instance): State<Arc<Instance>>) -> Response {
    json(&instance.configuration().machine)
}

/// Sets vCPUs and memory; what is not given gets its default. Before the start only.
#[utoipa::path(
    put, path = "/machine-config", operation_id = "putMachineConfiguration", tag = "firecracker",
    request_body = MachineConfiguration, responses(Changed)
)]
pub async fn put(State(instance): State<Arc<Instance>>, Json(body): Json<MachineConfiguration>) -> Outcome {
    instance.configure(Change::Machine(body))
}

/// Changes vCPUs and memory; what is not given stays. Before the start only.
#[utoipa::path(
    patch, path = "/machine-config", operation_id = "patchMachineConfiguration", tag = "firecracker",
    request_body = MachineConfigurationPatch, responses(Changed)
)]
pub async fn patch(State(instance): State<Arc<Instance>>, Json(body): Json<MachineConfigurationPatch>) -> Outcome {
    instance.configure(Change::MachinePatch(body))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(json: &str) -> MachineConfiguration {
        serde_json::from_str(json).expect("Firecracker's form")
    }

    #[test]
    fn two_numbers_are_enough_and_the_rest_gets_firecrackers_defaults() {
        let machine = read(r#"{"vcpu_count":2,"mem_size_mib":1024}"#);
        assert!(machine.check().is_ok());
        assert_eq!(
            (machine.vcpu_count, machine.memory().size),
            (2, ByteSize::from_mib(1024))
        );
        let json = serde_json::to_string(&machine).expect("JSON");
        assert_eq!(
            json,
            r#"{"vcpu_count":2,"mem_size_mib":1024,"smt":false,"track_dirty_pages":false,"huge_pages":"None"}"#
        );
    }

    #[test]
    fn every_field_of_firecracker_is_read() {
        let machine = read(
            r#"{"vcpu_count":1,"mem_size_mib":64,"smt":false,"cpu_template":"None","track_dirty_pages":true,
                "huge_pages":"2M"}"#,
        );
        assert!(machine.check().is_ok());
        assert!(machine.memory().hugepages && machine.track_dirty_pages);
    }

    #[test]
    fn what_no_vm_can_have_is_refused_with_the_reason() {
        for (json, reason) in [
            (r#"{"vcpu_count":0,"mem_size_mib":64}"#, "cpus: 0 is out of range"),
            (r#"{"vcpu_count":33,"mem_size_mib":64}"#, "cpus: 33 is out of range"),
            (
                r#"{"vcpu_count":1,"mem_size_mib":31}"#,
                "mem_size_mib: 31 is out of range",
            ),
            (
                r#"{"vcpu_count":1,"mem_size_mib":18446744073709551615}"#,
                "mem_size_mib: 18446744073709551615 is out of range",
            ),
            (
                r#"{"vcpu_count":1,"mem_size_mib":65,"huge_pages":"2M"}"#,
                "not a multiple of the page size",
            ),
            (
                r#"{"vcpu_count":2,"mem_size_mib":64,"smt":true}"#,
                "smt, threads of one core",
            ),
            (
                r#"{"vcpu_count":1,"mem_size_mib":64,"cpu_template":"T2"}"#,
                "cpu_template other than None",
            ),
        ] {
            let error = read(json).check().expect_err(json).to_string();
            assert!(error.contains(reason), "{error}");
        }
    }

    #[test]
    fn a_patch_changes_what_it_gives_and_only_that() {
        let machine = read(r#"{"vcpu_count":2,"mem_size_mib":64,"track_dirty_pages":true}"#);
        let patch: MachineConfigurationPatch = serde_json::from_str(r#"{"vcpu_count":4}"#).expect("valid");
        let patched = machine.patched(patch).expect("something to change");
        assert_eq!(
            (patched.vcpu_count, patched.mem_size_mib, patched.track_dirty_pages),
            (4, 64, true)
        );
        let nothing = machine.patched(MachineConfigurationPatch::default());
        assert!(matches!(nothing, Err(Rejection::EmptyPatch)));
    }
}
