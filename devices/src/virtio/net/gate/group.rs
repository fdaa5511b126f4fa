//! Who is in a group, by the addresses that are on its members' frames.

use std::collections::HashSet;

use cutover_snapshot::spec::MacAddr;

/// The bit of a MAC address's first byte that says that it is everybody's, or that of several (IEEE 802 §8.2).
const MANY: u8 = 1;

/// The MAC addresses of the interfaces of a group's members. What goes to them stays in the group: members go back to a
/// checkpoint together or not at all. Broadcasts and multicasts may reach anybody, so these never do.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MacTable(HashSet<[u8; 6]>);

impl MacTable {
    /// Whether a frame to `destination` stays in the group.
    pub fn has(&self, destination: [u8; 6]) -> bool {
        self.0.contains(&destination)
    }
}

impl FromIterator<MacAddr> for MacTable {
    fn from_iter<T: IntoIterator<Item = MacAddr>>(macs: T) -> Self {
        let unicast = macs.into_iter().filter(|mac| mac.0[0] & MANY == 0);
        Self(unicast.map(|mac| mac.0).collect())
    }
}
