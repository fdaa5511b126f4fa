//! What is handed over by descriptor to a monitor on the same host: memory that is a file, which then need not move, and
//! taps, which only one process can open.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use cutover_devices::GuestMemory;
use cutover_migration::transport::Endpoint;
use cutover_migration::vm::Descriptors;
use cutover_snapshot::spec::{MemorySpec, TapSpec, VmSpec};

use crate::machine::Machine;
use crate::{Error, memory};

/// What the descriptor of memory is called.
const MEMORY: &str = "memory";

/// What the descriptor of a tap is called, by the id of its interface.
fn tap(id: &str) -> String {
    format!("tap-{id}")
}

/// What of `machine` can be handed over to a monitor at `to`. Memory cannot if another process `fills` it.
///
/// # Errors
/// There are no descriptors left.
pub fn descriptors(machine: &Machine, to: &Endpoint, fills: bool) -> Result<Descriptors, Error> {
    let mut handed = Descriptors::new();
    if !to.is_on_this_host() {
        return Ok(handed);
    }
    let file = memory::file_of(machine.memory()).map_err(Error::os("duplicate the descriptor of guest memory"))?;
    if let Some(file) = file.filter(|_| !fills) {
        handed.insert(MEMORY.to_owned(), file.into());
    }
    for (id, descriptor) in machine.devices.share_taps()? {
        handed.insert(tap(&id), descriptor);
    }
    Ok(handed)
}

/// Whether memory is among `handed`, and does not move.
pub fn has_memory(handed: &Descriptors) -> bool {
    handed.contains_key(MEMORY)
}

/// The same descriptors once more.
///
/// # Errors
/// There are none left.
pub fn duplicate(handed: &Descriptors) -> io::Result<Descriptors> {
    let copies = handed.iter().map(|(name, fd)| Ok((name.clone(), fd.try_clone()?)));
    copies.collect()
}

/// The memory of `spec`: that which was handed over, or new.
///
/// # Errors
/// As [`memory::map`] and [`memory::map_handed`].
pub fn map_memory(spec: &MemorySpec, handed: &mut Descriptors) -> Result<GuestMemory, Error> {
    match handed.remove(MEMORY) {
        Some(file) => memory::map_handed(spec, &File::from(file)),
        None => memory::map(spec),
    }
}

/// The VM of `spec` with those taps that are among `handed`, which has to stay open until they are used.
pub fn with_taps(spec: &VmSpec, handed: &BTreeMap<String, OwnedFd>) -> VmSpec {
    let mut spec = spec.clone();
    for (index, net) in spec.nets.iter_mut().enumerate() {
        if let Some(descriptor) = handed.get(&tap(&net.id_at(index))) {
            net.tap = TapSpec::Fd(descriptor.as_raw_fd());
        }
    }
    spec
}
