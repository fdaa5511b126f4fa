//! What a protected guest sends, on all its network interfaces at once: held back until a checkpoint is permanent.

use std::sync::Arc;

use cutover_devices::CheckpointSoon;
use cutover_devices::virtio::net::{Held, MacTable, Net};
use cutover_snapshot::spec::MacAddr;

use super::{DeviceManager, lock};

impl DeviceManager {
    /// The guest's own addresses, in the order of its interfaces.
    pub fn macs(&self) -> Vec<MacAddr> {
        self.nets.iter().map(|net| lock(&net.device).mac()).collect()
    }

    /// Holds what the guest sends in `epoch` to others than the members of `group`; see [`Net::hold`].
    pub fn hold_output(&self, group: &Arc<MacTable>, epoch: u64, soon: &CheckpointSoon) {
        self.each_net(|net| net.hold(group.clone(), epoch, soon.clone()));
    }

    /// Lets no frame leave any more; when this returns, none does.
    pub fn block_output(&self) {
        self.each_net(Net::block);
    }

    /// Lets frames to members leave again.
    pub fn unblock_output(&self) {
        self.each_net(Net::unblock);
    }

    /// What the guest, which is paused, sends from here on belongs to epoch `next`.
    pub fn cut_output(&self, next: u64) {
        self.each_net(|net| net.cut(next));
    }

    /// Lets what was sent up to the end of `epoch` leave: it is permanent.
    pub fn release_output(&self, epoch: u64) {
        self.each_net(|net| net.release(epoch));
    }

    /// Lets everything leave, and holds nothing any more.
    pub fn open_output(&self) {
        self.each_net(Net::open_gate);
    }

    /// Drops what was not [released](Self::release_output), as the guest, which is paused, goes back to before it was
    /// sent; returns what it was. The rest leaves now.
    pub fn discard_output(&self) -> Held {
        self.sum_of_nets(Net::discard)
    }

    /// What is held.
    pub fn held_output(&self) -> Held {
        self.sum_of_nets(|net| net.held())
    }

    /// Drops what waits to be received; returns how many frames it was.
    pub fn drop_input(&self) -> usize {
        self.nets.iter().map(|net| lock(&net.device).drop_received()).sum()
    }

    fn each_net(&self, act: impl Fn(&mut Net)) {
        self.nets.iter().for_each(|net| act(&mut lock(&net.device)));
    }

    fn sum_of_nets(&self, part: impl Fn(&mut Net) -> Held) -> Held {
        let mut sum = Held::default();
        self.nets.iter().for_each(|net| sum += part(&mut lock(&net.device)));
        sum
    }
}
