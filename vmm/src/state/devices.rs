//! The state of the devices: a section for each virtio device, named by its kind and id, and one for the serial port.
//!
//! The keyboard controller, the power control port and pvpanic remember nothing.

use cutover_devices::serial::SerialState;
use cutover_devices::virtio::mmio::TransportState;
use cutover_snapshot::section::{SectionWriter, State};
use cutover_snapshot::spec::VmSpec;

use crate::Error;

const SERIAL: &str = "serial";

/// The state of all devices, as it is saved. Not to be trusted when it is read back: the devices check it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DevicesState {
    /// The serial port.
    pub serial: SerialState,
    /// Virtio devices with the names of their sections, in the order of [`sections`].
    pub virtio: Vec<(String, TransportState)>,
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
        Ok(())
    }

    /// Reads it back for the devices of `spec`.
    ///
    /// # Errors
    /// A section is missing or unreadable.
    pub fn read(spec: &VmSpec, from: &State) -> Result<Self, Error> {
        let disks = spec.disks.iter().enumerate().map(|(index, disk)| disk.id_at(index));
        let nets = spec.nets.iter().enumerate().map(|(index, net)| net.id_at(index));
        let virtio = sections(disks, nets, spec.rng.is_some()).map(|name| {
            let state = from.read(&name)?;
            Ok((name, state))
        });
        Ok(Self {
            serial: from.read(SERIAL)?,
            virtio: virtio.collect::<Result<_, Error>>()?,
        })
    }
}

/// Names of the virtio devices' sections, in the order in which the guest finds the devices.
pub fn sections(
    disks: impl Iterator<Item = String>,
    nets: impl Iterator<Item = String>,
    rng: bool,
) -> impl Iterator<Item = String> {
    let disks = disks.map(|id| format!("disk/{id}"));
    let nets = nets.map(|id| format!("net/{id}"));
    disks.chain(nets).chain(rng.then(|| "rng".to_owned()))
}
