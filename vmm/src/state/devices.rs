//! The state of the devices: a section for each virtio device, named by its kind and id, one for the serial port, and one
//! for each network interface with the addresses that the guest was seen to use there, and one for the metadata, if there are
//! any.
//!
//! The keyboard controller, the power control port and pvpanic remember nothing.

use cutover_devices::mmds::MetadataState;
use cutover_devices::serial::SerialState;
use cutover_devices::virtio::mmio::TransportState;
use cutover_devices::virtio::net::AddressesState;
use cutover_snapshot::section::{SectionWriter, State};
use cutover_snapshot::spec::VmSpec;

use crate::Error;

const SERIAL: &str = "serial";
const METADATA: &str = "metadata";

/// The state of all devices, as it is saved. Not to be trusted when it is read back: the devices check it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DevicesState {
    /// The serial port.
    pub serial: SerialState,
    /// Virtio devices with the names of their sections, in the order of [`sections`].
    pub virtio: Vec<(String, TransportState)>,
    /// Addresses of the guest behind the network interfaces, with the names of their sections, in order.
    pub addresses: Vec<(String, AddressesState)>,
    /// What the metadata service tells. Goes where the VM goes, but not into snapshots, of which others are made.
    pub metadata: Option<MetadataState>,
}

impl DevicesState {
    /// Adds its sections.
    ///
    /// # Errors
    /// They have no encoding.
    pub fn write(&self, to: &mut impl SectionWriter) -> Result<(), Error> {
        to.section(SERIAL, &self.serial)?;
        for (name, state) in &self.virtio {
            to.section(name, state)?;
        }
        for (name, addresses) in &self.addresses {
            to.section(name, addresses)?;
        }
        if let Some(metadata) = &self.metadata {
            to.section(METADATA, metadata)?;
        }
        Ok(())
    }

    /// Reads it back for the devices of `spec`.
    ///
    /// # Errors
    /// A section is missing or unreadable.
    pub fn read(spec: &VmSpec, from: &State) -> Result<Self, Error> {
        let disks = spec.disks.iter().enumerate().map(|(index, disk)| disk.id_at(index));
        let nets = || spec.nets.iter().enumerate().map(|(index, net)| net.id_at(index));
        let virtio = sections(disks, nets(), SingleDevices::of(spec)).map(|name| {
            let state = from.read(&name)?;
            Ok((name, state))
        });
        let has = |name: &str| from.names().any(|section| section == name);
        let addresses = nets().map(|id| {
            let name = addresses_section(&id);
            // State from before there was such a section knows of none.
            let addresses = if has(&name) {
                from.read(&name)?
            } else {
                AddressesState::default()
            };
            Ok((name, addresses))
        });
        Ok(Self {
            serial: from.read(SERIAL)?,
            virtio: virtio.collect::<Result<_, Error>>()?,
            addresses: addresses.collect::<Result<_, Error>>()?,
            metadata: has(METADATA).then(|| from.read(METADATA)).transpose()?,
        })
    }
}

/// Which devices there are of those of which a VM has one or none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SingleDevices {
    /// The entropy device.
    pub rng: bool,
    /// The socket device.
    pub vsock: bool,
    /// The balloon.
    pub balloon: bool,
}

impl SingleDevices {
    /// Those of `spec`.
    pub fn of(spec: &VmSpec) -> Self {
        Self {
            rng: spec.rng.is_some(),
            vsock: spec.vsock.is_some(),
            balloon: spec.balloon.is_some(),
        }
    }
}

/// Name of the section with the addresses of the guest behind network interface `id`.
pub fn addresses_section(id: &str) -> String {
    format!("addresses/{id}")
}

/// Names of the virtio devices' sections, in the order in which the guest finds the devices.
pub fn sections(
    disks: impl Iterator<Item = String>,
    nets: impl Iterator<Item = String>,
    single: SingleDevices,
) -> impl Iterator<Item = String> {
    let disks = disks.map(|id| format!("disk/{id}"));
    let nets = nets.map(|id| format!("net/{id}"));
    let single = [
        ("rng", single.rng),
        ("vsock", single.vsock),
        ("balloon", single.balloon),
    ]
    .into_iter()
    .filter(|&(_, is_there)| is_there);
    let single = single.map(|(name, _)| name.to_owned());
    disks.chain(nets).chain(single)
}
