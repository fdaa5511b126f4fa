//! Processes of the simulation: a member or a standby with its calls, which take time, and its link.

use std::collections::VecDeque;

use super::vm::{Image, Vm};
use crate::id::{Generation, Host, Seat};
use crate::lease::Nanos;
use crate::message::{SeatHello, Standing};
use crate::{member, standby};

/// A process on a host.
#[derive(Debug)]
pub(super) struct Process {
    pub host: u16,
    pub seat: Seat,
    pub lives: bool,
    /// The number of its link to the coordinator, if it has one: what was said over another is lost.
    pub link: Option<u64>,
    /// Its clock: how much it is ahead, and by how many millionths it is faster.
    clock: (Nanos, u64),
    pub role: Role,
    /// Whether its next cut fails.
    pub fails_cut: bool,
}

/// What a process is.
#[derive(Debug)]
pub(super) enum Role {
    Member {
        machine: Box<member::Member>,
        vm: Box<Vm>,
        calls: VecDeque<member::Do>,
        /// The process that it replicates to.
        standby: Option<usize>,
    },
    Standby {
        machine: Box<standby::Standby>,
        image: Image,
        calls: VecDeque<standby::Call>,
    },
    /// A VM that is of no group any more.
    Free(Box<Vm>),
}

impl Process {
    pub fn new(host: u16, seat: Seat, role: Role, rng: &mut fastrand::Rng) -> Self {
        Self {
            host,
            seat,
            lives: true,
            link: None,
            clock: (rng.u64(0..1 << 40), rng.u64(0..1000)),
            role,
            fails_cut: false,
        }
    }

    /// What its clock shows at `now`.
    pub fn clock(&self, now: Nanos) -> Nanos {
        let (ahead, faster) = self.clock;
        ahead + now + now / 1_000_000 * faster
    }

    /// How long until its clock shows `at`.
    pub fn until(&self, at: Nanos, now: Nanos) -> Nanos {
        // A little too late rather than again and again.
        at.saturating_sub(self.clock(now)) + 1000
    }

    /// Its VM, if it has one.
    pub fn vm(&self) -> Option<&Vm> {
        match &self.role {
            Role::Member { vm, .. } | Role::Free(vm) if self.lives => Some(vm),
            _ => None,
        }
    }

    pub fn vm_mut(&mut self) -> Option<&mut Vm> {
        match &mut self.role {
            Role::Member { vm, .. } | Role::Free(vm) if self.lives => Some(vm),
            _ => None,
        }
    }

    /// What it says of itself, and in which generation.
    pub fn hello(&self) -> Option<(Generation, SeatHello)> {
        let (generation, standing): (Generation, Standing) = match &self.role {
            Role::Member { machine, .. } => (machine.generation(), machine.standing()),
            Role::Standby { machine, .. } => (machine.generation(), machine.standing()),
            Role::Free(_) => return None,
        };
        let hello = SeatHello {
            seat: self.seat,
            host: Host(format!("host{}", self.host)),
            macs: Vec::new(),
            standing,
        };
        Some((generation, hello))
    }
}
