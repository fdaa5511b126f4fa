//! What guests do in the simulation: they send frames to each other and out of the group, and hear what comes.

use super::process::Role;
use super::vm::{Frame, Shipment};
use super::world::{Happening, World};
use super::{MS, Violation};
use crate::id::{Epoch, MemberId};
use crate::lease::Nanos;
use crate::vm::{Notice, StandbyNotice};
use crate::{member, standby};

/// How long a frame takes at most, which is less than any message of the coordinator.
const FRAME_MAX: Nanos = MS / 20;

impl World {
    /// A guest sends something, to a member or out of the group.
    pub(super) fn work(&mut self, process: usize) {
        let to = match self.rng.u16(0..=self.options.members) {
            0 => None,
            other => Some(MemberId(other - 1)),
        };
        let seat = self.processes[process].seat;
        self.frames += 1;
        let number = self.frames;
        let Some(vm) = self.processes[process].vm_mut() else {
            return;
        };
        if vm.runs
            && to != Some(seat.member)
            && let Some(frame) = vm.send(to, number)
        {
            self.leave(process, vec![frame]);
        }
        let next = self.rng.u64(MS..20 * MS);
        self.after(next, Happening::Work { process });
    }

    /// Frames leave a VM: to members, or to where they are never taken back from.
    pub(super) fn leave(&mut self, process: usize, frames: Vec<Frame>) {
        let from = self.processes[process].seat.member;
        for frame in frames {
            if frame.to.is_some() {
                let takes = self.rng.u64(MS / 100..FRAME_MAX);
                self.after(takes, Happening::Arrives { from, frame });
            } else {
                self.released.entry(from).or_default().insert(frame.number);
                self.outcome.outputs += 1;
            }
        }
    }

    /// A frame arrives at whoever announced itself as the member last.
    pub(super) fn arrives(&mut self, from: MemberId, frame: Frame) {
        let process = frame.to.and_then(|member| self.route.get(&member)).copied();
        if let Some(vm) = process.and_then(|process| self.processes[process].vm_mut()) {
            vm.receive(from, frame);
        }
    }

    /// An epoch leaves a member for its standby.
    pub(super) fn ship(&mut self, process: usize, shipment: Shipment) {
        let Role::Member {
            standby: Some(standby), ..
        } = self.processes[process].role
        else {
            return;
        };
        let takes = self.rng.u64(MS..20 * MS);
        let arrives = self.in_order((process, standby), takes);
        let happening = Happening::Shipped {
            from: process,
            to: standby,
            shipment,
        };
        self.at(arrives, happening);
    }

    /// It arrives there.
    pub(super) fn shipped(&mut self, from: usize, to: usize, shipment: Shipment) -> Result<(), Violation> {
        let epoch = shipment.epoch;
        let is_linked = matches!(self.processes[from].role, Role::Member { standby: Some(at), .. } if at == to);
        let (sender_lives, receiver) = (self.processes[from].lives, &mut self.processes[to]);
        if !receiver.lives || !is_linked {
            if sender_lives && is_linked {
                self.after(5 * MS, Happening::StandbyLost { process: from });
            }
            return Ok(());
        }
        let Role::Standby { image, .. } = &mut receiver.role else {
            return Ok(());
        };
        let is_first = image.hold(shipment)?;
        let notice = match is_first {
            true => StandbyNotice::Seeded,
            false => StandbyNotice::Holds(epoch),
        };
        self.standby_input(to, standby::Input::Notice(notice));
        if !is_first {
            let takes = self.rng.u64(MS / 10..MS);
            self.after(takes, Happening::Holds { process: from, epoch });
        }
        Ok(())
    }

    /// A member hears that its standby holds an epoch.
    pub(super) fn holds(&mut self, process: usize, epoch: Epoch) {
        self.member_input(process, member::Input::Notice(Notice::Holds(epoch)));
    }
}
