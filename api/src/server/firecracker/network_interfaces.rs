//! `/network-interfaces/{iface_id}`: network interfaces, and their limits while the VM runs.

use std::sync::Arc;

use axum::extract::State;
use cutover_snapshot::spec::{MTU_MIN, MacAddr, NetSpec, SpecError, TapSpec};
use cutover_vmm::NetUpdate;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::drives::same_id;
use super::rate_limiter::{RateLimiter, limiter, limits};
use super::rejection::Rejection;
use super::setup::{Change, check_id};
use crate::server::http::{Changed, Id, Json, Outcome};
use crate::server::instance::Instance;

/// Body of `PUT /network-interfaces/{iface_id}`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NetworkInterface {
    /// The id, as in the path.
    #[schema(pattern = "^[A-Za-z0-9_]{1,64}$")]
    pub iface_id: String,
    /// Tap device of the host. Opened at the start; one that does not exist is made.
    #[schema(pattern = "^[A-Za-z0-9_.-]{1,15}$")]
    pub host_dev_name: String,
    /// The guest's MAC address; one is made up if not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>,
        pattern = "^(?!00:00:00:00:00:00$)[0-9A-Fa-f][02468ACEace](:[0-9A-Fa-f]{2}){5}$")]
    pub guest_mac: Option<MacAddr>,
    /// MTU that the guest is told.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 68, maximum = 65535)]
    pub mtu: Option<u16>,
    /// Limits of what the guest receives.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rx_rate_limiter: Option<RateLimiter>,
    /// Limits of what the guest sends.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tx_rate_limiter: Option<RateLimiter>,
}

/// Body of `PATCH /network-interfaces/{iface_id}`; a bucket that is not given stays as it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NetworkInterfacePatch {
    /// The id, as in the path.
    #[schema(pattern = "^[A-Za-z0-9_]{1,64}$")]
    pub iface_id: String,
    /// Limits of what the guest receives.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rx_rate_limiter: Option<RateLimiter>,
    /// Limits of what the guest sends.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tx_rate_limiter: Option<RateLimiter>,
}

impl NetworkInterface {
    /// Whether there can be such an interface.
    ///
    /// # Errors
    /// Something is malformed or out of range.
    pub fn check(&self) -> Result<(), Rejection> {
        check_id("net", &self.iface_id)?;
        match self.mtu {
            Some(mtu) if mtu < MTU_MIN => Err(SpecError::Mtu(mtu).into()),
            _ => Ok(()),
        }
    }

    /// The interface of the spec.
    pub fn spec(&self) -> NetSpec {
        NetSpec {
            id: Some(self.iface_id.clone()),
            tap: TapSpec::Name(self.host_dev_name.clone()),
            mac: self.guest_mac,
            mtu: self.mtu,
            host_ip: None,
            rx_rate_limiter: limits(self.rx_rate_limiter),
            tx_rate_limiter: limits(self.tx_rate_limiter),
        }
    }

    /// The body that describes the `index`-th interface of a VM; a tap without a name has none here either.
    pub fn of(net: &NetSpec, index: usize) -> Self {
        Self {
            iface_id: net.id_at(index),
            host_dev_name: match &net.tap {
                TapSpec::Name(name) => name.clone(),
                TapSpec::Create | TapSpec::Fd(_) => String::new(),
            },
            guest_mac: net.mac,
            mtu: net.mtu,
            rx_rate_limiter: limiter(net.rx_rate_limiter),
            tx_rate_limiter: limiter(net.tx_rate_limiter),
        }
    }

    /// Takes over what a PATCH has changed.
    pub fn apply(&mut self, patch: &NetworkInterfacePatch) {
        let updated = |before, change: Option<RateLimiter>| match change {
            Some(change) => limiter(limits(before).updated(change.into())),
            None => before,
        };
        self.rx_rate_limiter = updated(self.rx_rate_limiter, patch.rx_rate_limiter);
        self.tx_rate_limiter = updated(self.tx_rate_limiter, patch.tx_rate_limiter);
    }
}

impl NetworkInterfacePatch {
    /// What is to be changed about the interface.
    ///
    /// # Errors
    /// Nothing is.
    pub fn update(&self) -> Result<NetUpdate, Rejection> {
        if self.rx_rate_limiter.is_none() && self.tx_rate_limiter.is_none() {
            return Err(Rejection::EmptyPatch);
        }
        Ok(NetUpdate {
            rx_rate_limiter: self.rx_rate_limiter.map(Into::into),
            tx_rate_limiter: self.tx_rate_limiter.map(Into::into),
        })
    }
}

/// Adds a network interface, or replaces the one with this id. Before the start only.
#[utoipa::path(
    put, path = "/network-interfaces/{iface_id}", operation_id = "putGuestNetworkInterfaceByID", tag = "firecracker",
    params(("iface_id" = String, Path, description = "Id of the interface", pattern = "^[A-Za-z0-9_]{1,64}$")),
    request_body = NetworkInterface, responses(Changed)
)]
pub async fn put(State(instance): State<Arc<Instance>>, Id(id): Id, Json(body): Json<NetworkInterface>) -> Outcome {
    same_id(id, &body.iface_id)?;
    instance.configure(Change::NetworkInterface(body))
}

/// Changes the limits of a network interface. After the start only.
#[utoipa::path(
    patch, path = "/network-interfaces/{iface_id}", operation_id = "patchGuestNetworkInterfaceByID",
    tag = "firecracker",
    params(("iface_id" = String, Path, description = "Id of the interface", pattern = "^[A-Za-z0-9_]{1,64}$")),
    request_body = NetworkInterfacePatch, responses(Changed)
)]
pub async fn patch(
    State(instance): State<Arc<Instance>>,
    Id(id): Id,
    Json(body): Json<NetworkInterfacePatch>,
) -> Outcome {
    same_id(id, &body.iface_id)?;
    instance.update_net(body).await
}

#[cfg(test)]
mod tests {
    use super::*;

    const FULL: &str = r#"{"iface_id":"eth0","host_dev_name":"tap0","guest_mac":"AA:FC:00:00:00:01","mtu":9000,
        "rx_rate_limiter":null,"tx_rate_limiter":{"bandwidth":{"size":1000,"refill_time":100}}}"#;

    fn read(json: &str) -> NetworkInterface {
        serde_json::from_str(json).expect("Firecracker's form")
    }

    #[test]
    fn every_field_of_firecracker_becomes_part_of_the_interface() {
        let interface = read(FULL);
        assert_eq!(interface.check(), Ok(()));
        let net = interface.spec();
        assert_eq!((net.id.as_deref(), net.mtu), (Some("eth0"), Some(9000)));
        assert_eq!(net.tap, TapSpec::Name("tap0".to_owned()));
        assert_eq!(net.mac, Some(MacAddr([0xaa, 0xfc, 0, 0, 0, 1])));
        assert_eq!(net.tx_rate_limiter.bandwidth.expect("a limit").size, 1000);
        assert_eq!(NetworkInterface::of(&net, 0).spec(), net);
    }

    #[test]
    fn what_is_no_interface_is_refused_with_the_reason() {
        for (json, reason) in [
            (r#"{"iface_id":"e 0","host_dev_name":"tap0"}"#, "an id has 1 to 64"),
            (
                r#"{"iface_id":"eth0","host_dev_name":"tap0","mtu":67}"#,
                "mtu: 67 is out of range",
            ),
        ] {
            let error = read(json).check().expect_err(json).to_string();
            assert!(error.contains(reason), "{error}");
        }
        for (json, reason) in [
            (r#"{"iface_id":"eth0"}"#, "missing field `host_dev_name`"),
            (
                r#"{"iface_id":"eth0","host_dev_name":"tap0","guest_mac":"01:00:00:00:00:01"}"#,
                "not a unicast MAC address",
            ),
        ] {
            let error = serde_json::from_str::<NetworkInterface>(json)
                .expect_err(json)
                .to_string();
            assert!(error.contains(reason), "{error}");
        }
    }

    #[test]
    fn a_patch_changes_the_buckets_it_gives_and_must_give_one() {
        let mut interface = read(FULL);
        let patch: NetworkInterfacePatch =
            serde_json::from_str(r#"{"iface_id":"eth0","tx_rate_limiter":{"ops":{"size":5,"refill_time":10}}}"#)
                .expect("valid");
        assert_eq!(patch.update().expect("a change").rx_rate_limiter, None);
        interface.apply(&patch);
        let limiter = interface.tx_rate_limiter.expect("a limiter");
        assert_eq!(
            (
                limiter.bandwidth.expect("as before").size,
                limiter.ops.expect("new").size
            ),
            (1000, 5)
        );
        let nothing: NetworkInterfacePatch = serde_json::from_str(r#"{"iface_id":"eth0"}"#).expect("valid");
        assert_eq!(nothing.update().expect_err("no change"), Rejection::EmptyPatch);
    }
}
