//! `/mmds`: what the metadata service tells the guest; `/mmds/config`: whether and how it does.

use std::net::Ipv4Addr;
use std::sync::Arc;

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::Response;
use cutover_snapshot::spec::{MmdsSpec, MmdsVersion, VmSpec, mmds_address};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::ToSchema;

use super::setup::Change;
use crate::server::http::{Changed, Json, Outcome, Refused, json};
use crate::server::instance::Instance;

/// Body of `PUT /mmds/config`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct MmdsConfig {
    /// Who is given metadata.
    #[serde(default)]
    pub version: MmdsVersionName,
    /// Ids of the network interfaces at which the service answers. They are configured already.
    #[schema(min_items = 1)]
    pub network_interfaces: Vec<String>,
    /// Its address there, which is link-local.
    #[serde(default = "mmds_address")]
    #[schema(value_type = String, format = "ipv4", default = "169.254.169.254")]
    pub ipv4_address: Ipv4Addr,
    /// Answer in the form of EC2's service whatever the guest accepts.
    #[serde(default)]
    pub imds_compat: bool,
}

/// Who is given metadata.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub enum MmdsVersionName {
    /// Everybody in the guest.
    #[default]
    V1,
    /// Who asks with a token.
    V2,
}

impl From<&MmdsConfig> for MmdsSpec {
    fn from(config: &MmdsConfig) -> Self {
        Self {
            version: match config.version {
                MmdsVersionName::V1 => MmdsVersion::V1,
                MmdsVersionName::V2 => MmdsVersion::V2,
            },
            nets: config.network_interfaces.clone(),
            address: config.ipv4_address,
            imds_compat: config.imds_compat,
        }
    }
}

impl MmdsConfig {
    /// The body that describes the service of `vm`, if it has one.
    pub fn of(vm: &VmSpec) -> Option<Self> {
        let mmds = vm.mmds.as_ref()?;
        let ids = vm.nets.iter().enumerate().map(|(index, net)| net.id_at(index));
        Some(Self {
            version: match mmds.version {
                MmdsVersion::V1 => MmdsVersionName::V1,
                MmdsVersion::V2 => MmdsVersionName::V2,
            },
            network_interfaces: ids.filter(|id| mmds.is_at(id)).collect(),
            ipv4_address: mmds.address,
            imds_compat: mmds.imds_compat,
        })
    }
}

/// Has the metadata service answer at network interfaces. Before the start only.
#[utoipa::path(
    put, path = "/mmds/config", operation_id = "putMmdsConfig", tag = "firecracker",
    request_body = MmdsConfig, responses(Changed)
)]
pub async fn configure(State(instance): State<Arc<Instance>>, Json(body): Json<MmdsConfig>) -> Outcome {
    instance.configure(Change::Mmds(body))
}

/// Replaces the metadata.
#[utoipa::path(
    put, path = "/mmds", operation_id = "putMmds", tag = "firecracker",
    request_body = Value, responses(Changed)
)]
pub async fn put(State(instance): State<Arc<Instance>>, Json(body): Json<Value>) -> Outcome {
    instance.metadata().put(body)?;
    Ok(StatusCode::NO_CONTENT)
}

/// Changes the metadata by a JSON merge patch (RFC 7396).
#[utoipa::path(
    patch, path = "/mmds", operation_id = "patchMmds", tag = "firecracker",
    request_body = Value, responses(Changed)
)]
pub async fn patch(State(instance): State<Arc<Instance>>, Json(body): Json<Value>) -> Outcome {
    instance.metadata().patch(body)?;
    Ok(StatusCode::NO_CONTENT)
}

/// The metadata; `null` if there are none.
#[utoipa::path(
    get, path = "/mmds", operation_id = "getMmds", tag = "firecracker",
    responses((status = 200, body = Value), Refused)
)]
pub async fn get(State(instance): State<Arc<Instance>>) -> Response {
    json(&instance.metadata().get())
}

#[cfg(test)]
mod tests {
    use cutover_snapshot::spec::NetSpec;

    use super::*;

    #[test]
    fn firecrackers_body_is_a_service_and_has_its_defaults() {
        let least: MmdsConfig = serde_json::from_str(r#"{"network_interfaces":["eth0"]}"#).expect("valid");
        let spec = MmdsSpec {
            version: MmdsVersion::V1,
            nets: vec!["eth0".to_owned()],
            address: mmds_address(),
            imds_compat: false,
        };
        assert_eq!(MmdsSpec::from(&least), spec);
        let full =
            r#"{"version":"V2","network_interfaces":["a","b"],"ipv4_address":"169.254.170.2","imds_compat":true}"#;
        let config: MmdsConfig = serde_json::from_str(full).expect("valid");
        assert_eq!(serde_json::to_string(&config).expect("JSON"), full);
        let spec = MmdsSpec::from(&config);
        assert_eq!((spec.version, spec.imds_compat), (MmdsVersion::V2, true));
        assert_eq!((spec.nets.len(), spec.address.octets()), (2, [169, 254, 170, 2]));
        for wrong in [
            r#"{"version":"V3","network_interfaces":[]}"#,
            "{}",
            r#"{"network_interfaces":[],"x":1}"#,
        ] {
            serde_json::from_str::<MmdsConfig>(wrong).expect_err(wrong);
        }
    }

    #[test]
    fn a_service_at_all_interfaces_is_described_by_their_ids() {
        let mut vm: VmSpec = serde_json::from_str(
            r#"{"cpus":1,"memory":{"size":"64M"},"boot":{"kernel":"k"},"mmds":{},
                "nets":[{"id":"eth0"},{}]}"#,
        )
        .expect("a VM");
        assert_eq!(vm.nets[1], NetSpec::default());
        assert_eq!(
            MmdsConfig::of(&vm).expect("a service").network_interfaces,
            ["eth0", "net1"]
        );
        vm.mmds = None;
        assert_eq!(MmdsConfig::of(&vm), None);
    }
}
