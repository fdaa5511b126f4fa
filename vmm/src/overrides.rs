//! What is different about a VM where it goes on: other taps, another place for the console. A descriptor of one process
//! means nothing in another.

use std::collections::BTreeMap;
use std::path::Path;

use cutover_snapshot::spec::{TapSpec, VmSpec};

use crate::Error;
use crate::snapshot::NetOverride;

/// Has the network interfaces of `spec` be as `nets` says, by their ids.
///
/// # Errors
/// There is no interface of an id.
pub fn apply_nets(spec: &mut VmSpec, nets: &BTreeMap<String, NetOverride>) -> Result<(), Error> {
    let ids = spec.nets.iter().enumerate().map(|(index, net)| net.id_at(index));
    check_ids("network interface", nets.keys(), ids.collect())?;
    for (index, net) in spec.nets.iter_mut().enumerate() {
        if matches!(net.tap, TapSpec::Fd(_)) {
            net.tap = TapSpec::Create;
        }
        let Some(NetOverride { tap, mac }) = nets.get(&net.id_at(index)) else {
            continue;
        };
        if let Some(tap) = tap {
            net.tap = TapSpec::Name(tap.clone());
        }
        net.mac = mac.or(net.mac);
    }
    Ok(())
}

/// Has the socket device of `spec` be at `uds`, if that is given.
///
/// # Errors
/// There is no such device.
pub fn apply_vsock(spec: &mut VmSpec, uds: Option<&Path>) -> Result<(), Error> {
    match (&mut spec.vsock, uds) {
        (Some(vsock), Some(uds)) => vsock.uds = uds.to_owned(),
        (None, Some(uds)) => return Err(Error::NoVsock(uds.to_owned())),
        (_, None) => {}
    }
    Ok(())
}

/// Refuses ids of disks that `spec` does not have.
///
/// # Errors
/// There is no disk of an id.
pub fn check_disk_ids<'a>(spec: &VmSpec, given: impl IntoIterator<Item = &'a String>) -> Result<(), Error> {
    let ids = spec.disks.iter().enumerate().map(|(index, disk)| disk.id_at(index));
    check_ids("disk", given, ids.collect())
}

/// Refuses ids of which the VM has no device.
fn check_ids<'a>(
    kind: &'static str,
    given: impl IntoIterator<Item = &'a String>,
    known: Vec<String>,
) -> Result<(), Error> {
    match given.into_iter().find(|id| !known.contains(id)) {
        Some(id) => Err(Error::NoSuchDevice {
            kind,
            id: id.clone(),
            known,
        }),
        None => Ok(()),
    }
}
