//! VMs and standbys of the simulation: a guest that is no more than what it sent and heard, behind a gate that holds its
//! frames as a real one does, and images that are checked as they are made.

use std::collections::{BTreeMap, VecDeque};

use super::check::Violation;
use crate::checkpoint::CheckpointId;
use crate::id::{Epoch, MemberId};

/// All that a guest is: what it sent, and what it heard of others. Frames have numbers that are used once ever, so that
/// what is sent again after a rollback is something else.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Guest {
    /// Frames it sent to members, in order.
    pub sent: Vec<u64>,
    /// Frames it sent out of the group, in order.
    pub outputs: Vec<u64>,
    /// Frames it heard: of whom, which of his, its number.
    pub heard: BTreeMap<(MemberId, usize), u64>,
}

/// A frame that a guest sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Frame {
    /// The member it is for; nobody if it leaves the group.
    pub to: Option<MemberId>,
    /// Which of its sender's it is.
    pub place: usize,
    /// Its number.
    pub number: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Gate {
    Open,
    Held,
    Blocked,
}

/// A member's VM.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Vm {
    /// Its guest.
    pub guest: Guest,
    /// Whether its vCPUs run.
    pub runs: bool,
    gate: Gate,
    /// Frames that are held, with the epoch they belong to.
    held: VecDeque<(Epoch, Frame)>,
    epoch: Epoch,
    /// What it goes back to.
    shadow: Option<(Epoch, Guest)>,
    /// Cuts that are taken and not permanent.
    cuts: BTreeMap<Epoch, Guest>,
    /// The cut that the standby was sent last, which the next builds on.
    base: Epoch,
    /// The checkpoint for which it makes a snapshot, and the cut that is to be of.
    pub snapshot: Option<(CheckpointId, Option<Epoch>)>,
    /// What waits to be received.
    tap: Vec<(MemberId, Frame)>,
    /// Whether that is of a future that there will not be.
    stale_tap: bool,
}

/// An epoch on its way to a standby.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Shipment {
    /// Which.
    pub epoch: Epoch,
    /// The one that it is the difference to.
    pub base: Epoch,
    /// What the guest was at its end.
    pub guest: Guest,
}

impl Vm {
    /// A VM that runs on its own.
    pub fn new() -> Self {
        Self::of(Guest::default(), true)
    }

    fn of(guest: Guest, runs: bool) -> Self {
        Self {
            guest,
            runs,
            gate: Gate::Open,
            held: VecDeque::new(),
            epoch: 0,
            shadow: None,
            cuts: BTreeMap::new(),
            base: 0,
            snapshot: None,
            tap: Vec::new(),
            stale_tap: false,
        }
    }

    /// The guest sends a frame. What leaves at once?
    pub fn send(&mut self, to: Option<MemberId>, number: u64) -> Option<Frame> {
        let log = match to {
            Some(_) => &mut self.guest.sent,
            None => &mut self.guest.outputs,
        };
        let place = log.len();
        log.push(number);
        let frame = Frame { to, place, number };
        let leaves = match self.gate {
            Gate::Open => true,
            Gate::Held => to.is_some(),
            Gate::Blocked => false,
        };
        if !leaves {
            self.held.push_back((self.epoch, frame));
        }
        leaves.then_some(frame)
    }

    /// A frame comes; while the guest does not run, it waits.
    pub fn receive(&mut self, from: MemberId, frame: Frame) {
        if self.runs {
            self.guest.heard.insert((from, frame.place), frame.number);
        } else {
            self.tap.push((from, frame));
        }
    }

    /// `first` is the number of the first cut that may follow.
    pub fn seed(&mut self, first: Epoch) -> Shipment {
        let before_first = first - 1;
        self.base = before_first;
        self.epoch = first;
        self.cuts.clear();
        Shipment {
            epoch: before_first,
            base: 0,
            guest: self.guest.clone(),
        }
    }

    pub fn block(&mut self) {
        self.gate = Gate::Blocked;
    }

    pub fn take(&mut self, epoch: Epoch) {
        self.cuts.insert(epoch, self.guest.clone());
        self.epoch = epoch + 1;
    }

    pub fn validate(&mut self, epoch: Epoch) -> Result<(Shipment, Vec<Frame>), Violation> {
        let guest = self.cuts.get(&epoch).cloned();
        let guest = guest.ok_or_else(|| Violation(format!("cut {epoch} is validated, and was not taken")))?;
        let base = std::mem::replace(&mut self.base, epoch);
        Ok((Shipment { epoch, base, guest }, self.unblock()))
    }

    pub fn invalidate(&mut self, epoch: Epoch) -> Vec<Frame> {
        self.cuts.remove(&epoch);
        self.unblock()
    }

    fn unblock(&mut self) -> Vec<Frame> {
        self.gate = Gate::Held;
        self.leave(|_, frame| frame.to.is_some())
    }

    pub fn permanent(&mut self, epoch: Epoch) -> Result<Vec<Frame>, Violation> {
        let guest = self.cuts.get(&epoch).cloned();
        let guest = guest.ok_or_else(|| Violation(format!("cut {epoch} is permanent, and was not taken")))?;
        self.cuts.retain(|cut, _| *cut > epoch);
        self.shadow = Some((epoch, guest));
        let is_blocked = self.gate == Gate::Blocked;
        Ok(self.leave(|of, frame| of <= epoch && !(is_blocked && frame.to.is_some())))
    }

    pub fn roll_back(&mut self, cut: Epoch) -> Result<(), Violation> {
        match &self.shadow {
            Some((at, guest)) if *at == cut => self.guest = guest.clone(),
            other => {
                let at = other.as_ref().map(|(at, _)| *at);
                return Err(Violation(format!("a VM is to go back to cut {cut}, and has {at:?}")));
            }
        }
        self.runs = false;
        self.held.clear();
        self.cuts.clear();
        self.stale_tap = true;
        self.snapshot = None;
        Ok(())
    }

    pub fn resume(&mut self) {
        self.runs = true;
        let waiting = std::mem::take(&mut self.tap);
        if !std::mem::take(&mut self.stale_tap) {
            for (from, frame) in waiting {
                self.receive(from, frame);
            }
        }
    }

    pub fn unprotect(&mut self) -> Vec<Frame> {
        self.gate = Gate::Open;
        self.shadow = None;
        self.cuts.clear();
        self.leave(|_, _| true)
    }

    fn leave(&mut self, leaves: impl Fn(Epoch, &Frame) -> bool) -> Vec<Frame> {
        let (leaving, held) = self.held.drain(..).partition(|(of, frame)| leaves(*of, frame));
        self.held = held;
        VecDeque::into_iter(leaving).map(|(_, frame)| frame).collect()
    }
}

/// A standby's image.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Image {
    /// What it is, and as of which cut.
    applied: Option<(Epoch, Guest)>,
    /// Epochs it holds.
    held: BTreeMap<Epoch, Guest>,
}

impl Image {
    /// An epoch has come. Whether that is what makes it whole.
    pub fn hold(&mut self, shipment: Shipment) -> Result<bool, Violation> {
        let Shipment { epoch, base, guest } = shipment;
        if base == 0 {
            self.applied = Some((epoch, guest));
            return Ok(true);
        }
        let last = self.held.keys().last().copied();
        let last = last.or(self.applied.as_ref().map(|(at, _)| *at));
        if last != Some(base) {
            return Err(Violation(format!(
                "epoch {epoch} builds on {base}, and the standby has {last:?}"
            )));
        }
        self.held.insert(epoch, guest);
        Ok(false)
    }

    pub fn permanent(&mut self, epoch: Epoch) {
        let rest = self.held.split_off(&(epoch + 1));
        if let Some(last) = std::mem::replace(&mut self.held, rest).pop_last() {
            self.applied = Some(last);
        }
    }

    /// What the image is at `cut`, if it can be that.
    pub fn at(&self, cut: Epoch) -> Option<&Guest> {
        match &self.applied {
            Some((at, guest)) if *at == cut => Some(guest),
            _ => self.held.get(&cut),
        }
    }

    pub fn promote(&self, cut: Epoch) -> Result<Vm, Violation> {
        let guest = self
            .at(cut)
            .ok_or_else(|| Violation(format!("a standby has no cut {cut} to be promoted at")))?;
        let mut vm = Vm::of(guest.clone(), false);
        vm.gate = Gate::Held;
        vm.stale_tap = true;
        Ok(vm)
    }
}
