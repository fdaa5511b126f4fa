//! What leaves a gate, and when: by hand, and against a model of what output commit asks for.

mod cost;

use std::collections::VecDeque;
use std::sync::atomic::{AtomicUsize, Ordering};

use cutover_snapshot::spec::MacAddr;
use proptest::prelude::*;
use rustix::io::read;
use rustix::net::sockopt::set_socket_send_buffer_size;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::GuestMemory;
use crate::virtio::net::HEADER_LEN;

const MEMBER: [u8; 6] = [2, 0, 0, 0, 0, 1];
const STRANGER: [u8; 6] = [2, 0, 0, 0, 0, 2];
const BROADCAST: [u8; 6] = [0xff; 6];
/// Few enough that what is sent in a test reaches it.
const LIMIT: usize = 96 << 10;
/// Room on the cable for a few frames.
const CABLE_BYTES: usize = 16 << 10;
/// What a frame has at least: header, addresses, type, and the test's number.
const LEN_MIN: usize = HEADER_LEN + 14 + 4;
const LEN_MAX: usize = 6000;

/// A gate with the other end of its cable, and a guest that sends.
struct Fixture {
    gate: Gate,
    cable: OwnedFd,
    memory: Arc<GuestMemory>,
    asked: Arc<AtomicUsize>,
}

impl Fixture {
    fn new() -> Self {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let (ours, cable) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
        set_socket_send_buffer_size(&ours, CABLE_BYTES).unwrap();
        let mut gate = Gate::new(ours, "socket", Arc::default()).unwrap();
        gate.limit = LIMIT;
        let asked = Arc::<AtomicUsize>::default();
        let counter = asked.clone();
        gate.ask(Arc::new(move || {
            counter.fetch_add(1, Ordering::Relaxed);
        }));
        Self {
            gate,
            cable,
            memory: Arc::new(GuestMemory::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap()),
            asked,
        }
    }

    /// One in epoch `epoch` of a group of [`MEMBER`].
    fn held(epoch: u64) -> Self {
        let mut fixture = Self::new();
        fixture.take(hold(epoch));
        fixture
    }

    fn send(&mut self, frame: &[u8]) -> Passage {
        self.memory.write_slice(frame, GuestAddress(0)).unwrap();
        let mut buffers = GuestBuffers::new(self.memory.clone());
        // In two pieces, as drivers do.
        buffers.push(GuestAddress(0), HEADER_LEN).unwrap();
        buffers
            .push(GuestAddress(HEADER_LEN as u64), frame.len() - HEADER_LEN)
            .unwrap();
        self.gate.pass(&buffers)
    }

    fn take(&mut self, step: Step) {
        self.gate.take(step);
        self.turn();
    }

    /// What the event loop does when the gate's event has come.
    fn turn(&mut self) {
        while self.gate.work.read().is_ok() {
            self.gate.flush();
        }
    }

    fn receive(&self) -> Option<Vec<u8>> {
        let mut data = vec![0; 0x2_0000];
        let len = read(&self.cable, &mut data).ok()?;
        data.truncate(len);
        Some(data)
    }

    fn receive_all(&self) -> Vec<Vec<u8>> {
        std::iter::from_fn(|| self.receive()).collect()
    }
}

fn hold(epoch: u64) -> Step {
    Step::Hold {
        group: Arc::new(MacTable::from_iter([MacAddr(MEMBER), MacAddr(BROADCAST)])),
        epoch,
    }
}

fn frame(number: u32, to: [u8; 6], len: usize) -> Vec<u8> {
    let mut frame = vec![0; HEADER_LEN];
    frame.extend(to);
    frame.extend([2, 0, 0, 0, 0, 9, 8, 0]);
    frame.extend(number.to_le_bytes());
    frame.extend((frame.len()..len).map(|at| at.to_le_bytes()[0]));
    frame
}

fn short(number: u32, to: [u8; 6]) -> Vec<u8> {
    frame(number, to, 60)
}

#[test]
fn a_frame_to_the_outside_leaves_when_its_epoch_is_released_and_one_to_a_member_at_once() {
    let mut fixture = Fixture::held(5);
    for (number, to) in [(0, STRANGER), (1, MEMBER), (2, BROADCAST)] {
        assert_eq!(fixture.send(&short(number, to)), Passage::Taken);
    }
    assert_eq!(fixture.receive_all(), [short(1, MEMBER)]);
    assert_eq!(fixture.gate.held().frames, 2);
    fixture.take(Step::Cut(6));
    fixture.send(&short(3, STRANGER));
    fixture.take(Step::Release(4));
    assert_eq!(fixture.receive_all(), Vec::<Vec<u8>>::new());
    fixture.take(Step::Release(5));
    assert_eq!(fixture.receive_all(), [short(0, STRANGER), short(2, BROADCAST)]);
    assert_eq!(fixture.gate.held().frames, 1);
}

#[test]
fn nothing_leaves_a_blocked_gate_whatever_is_released() {
    let mut fixture = Fixture::held(1);
    fixture.send(&short(0, STRANGER));
    fixture.take(Step::Cut(2));
    fixture.take(Step::Block);
    fixture.send(&short(1, MEMBER));
    fixture.take(Step::Release(1));
    assert!(fixture.gate.pass_own(&short(2, BROADCAST)).is_err());
    assert_eq!(fixture.receive(), None);
    fixture.take(Step::Unblock);
    assert_eq!(fixture.receive_all(), [short(0, STRANGER), short(1, MEMBER)]);
}

#[test]
fn an_epoch_that_has_not_ended_is_not_released_whoever_says_so() {
    let mut fixture = Fixture::held(7);
    fixture.send(&short(0, STRANGER));
    for epoch in [7, 8, u64::MAX] {
        fixture.take(Step::Release(epoch));
        assert_eq!(fixture.receive(), None);
    }
    fixture.take(Step::Cut(8));
    assert_eq!(fixture.receive(), None, "what was said before does not count");
    fixture.take(Step::Release(7));
    assert_eq!(fixture.receive(), Some(short(0, STRANGER)));
}

#[test]
fn an_opened_gate_sends_all_in_the_order_of_sending_before_what_is_sent_then() {
    let mut fixture = Fixture::held(1);
    fixture.take(Step::Block);
    let frames: Vec<_> = (0..40)
        .map(|number| frame(number, if number % 3 == 0 { MEMBER } else { STRANGER }, 2000))
        .collect();
    frames
        .iter()
        .for_each(|frame| assert_eq!(fixture.send(frame), Passage::Taken));
    fixture.take(Step::Open);
    assert!(fixture.gate.needs_room());
    let last = short(99, STRANGER);
    assert_eq!(fixture.send(&last), Passage::Waits);
    let mut received = Vec::new();
    while fixture.gate.held().frames > 0 {
        received.extend(fixture.receive_all());
        fixture.gate.flush();
    }
    received.extend(fixture.receive_all());
    assert!(received == frames);
    assert_eq!(fixture.send(&last), Passage::Taken);
    assert_eq!(fixture.receive(), Some(last));
}

#[test]
fn an_opened_gate_gives_others_their_turn_and_goes_on_by_itself() {
    let mut fixture = Fixture::held(1);
    let count = u32::from(FRAMES_PER_TURN) + 9;
    (0..count).for_each(|number| assert_eq!(fixture.send(&short(number, STRANGER)), Passage::Taken));
    set_socket_send_buffer_size(&fixture.gate.tap, 1 << 20).unwrap();
    fixture.gate.take(Step::Open);
    fixture.gate.flush();
    assert_eq!((fixture.gate.held().frames, fixture.gate.needs_room()), (9, false));
    assert_eq!(fixture.send(&short(count, STRANGER)), Passage::Waits);
    fixture.turn();
    assert_eq!(fixture.send(&short(count, STRANGER)), Passage::Taken);
    let expected: Vec<_> = (0..=count).map(|number| short(number, STRANGER)).collect();
    assert!(fixture.receive_all() == expected);
}

#[test]
fn what_is_discarded_never_leaves_and_the_next_epoch_has_a_number_again_that_was() {
    let mut fixture = Fixture::held(8);
    fixture.send(&short(0, STRANGER));
    fixture.take(Step::Cut(9));
    fixture.send(&short(1, STRANGER));
    fixture.take(Step::Block);
    fixture.send(&short(2, MEMBER));
    // The group goes back to cut 8.
    fixture.gate.take(Step::Release(8));
    assert_eq!(fixture.gate.discard().frames, 2);
    fixture.take(hold(9));
    assert_eq!(
        fixture.receive_all(),
        [short(0, STRANGER)],
        "it was sent before the cut"
    );
    fixture.send(&short(3, STRANGER));
    fixture.take(Step::Cut(10));
    fixture.take(Step::Release(9));
    assert_eq!(fixture.receive_all(), [short(3, STRANGER)]);
    assert_eq!(fixture.gate.held(), Held::default());
}

#[test]
fn what_is_released_leaves_a_stopped_device_before_the_rest_is_discarded() {
    let mut fixture = Fixture::held(1);
    fixture.send(&short(0, STRANGER));
    fixture.take(Step::Cut(2));
    fixture.send(&short(1, STRANGER));
    fixture.gate.take(Step::Release(1));
    assert_eq!(fixture.receive(), None, "the event loop has not come to it");
    fixture.gate.discard();
    assert_eq!(fixture.receive_all(), [short(0, STRANGER)]);
    assert_eq!(fixture.gate.held(), Held::default());
}

#[test]
fn what_the_monitor_says_overtakes_what_is_held() {
    let mut fixture = Fixture::held(1);
    fixture.send(&short(0, STRANGER));
    fixture.gate.pass_own(&short(1, BROADCAST)).unwrap();
    assert_eq!(fixture.receive_all(), [short(1, BROADCAST)]);
}

#[test]
fn a_full_gate_has_frames_wait_and_asked_for_a_checkpoint_when_it_was_half_full() {
    let mut fixture = Fixture::held(1);
    let mut sent = 0;
    while fixture.send(&frame(sent, STRANGER, 1514)) == Passage::Taken {
        sent += 1;
        let half_full = fixture.gate.held().bytes >= LIMIT / 2;
        assert_eq!(fixture.asked.load(Ordering::Relaxed), usize::from(half_full));
    }
    assert!(fixture.gate.held().bytes <= LIMIT && fixture.gate.held().bytes + 1600 > LIMIT);
    assert_eq!(fixture.send(&frame(sent, MEMBER, 1514)), Passage::Waits);
    fixture.take(Step::Cut(2));
    fixture.take(Step::Release(1));
    for number in 0..sent {
        assert_eq!(fixture.receive(), Some(frame(number, STRANGER, 1514)));
        fixture.gate.flush();
    }
    assert_eq!(fixture.send(&short(sent, MEMBER)), Passage::Taken);
}

#[test]
fn the_longest_frames_come_out_as_they_went_in() {
    let mut fixture = Fixture::held(1);
    fixture.gate.limit = HELD_BYTES_MAX;
    set_socket_send_buffer_size(&fixture.gate.tap, 1 << 20).unwrap();
    let frames: Vec<_> = (0..40)
        .map(|number| {
            frame(
                number,
                STRANGER,
                super::super::FRAME_LEN_MAX - 7 * (number as usize % 3),
            )
        })
        .collect();
    frames
        .iter()
        .for_each(|frame| assert_eq!(fixture.send(frame), Passage::Taken));
    fixture.take(Step::Open);
    for frame in &frames {
        assert!(fixture.receive().as_ref() == Some(frame));
        fixture.gate.flush();
    }
}

/// What happens to a gate.
#[derive(Clone, Debug)]
enum Op {
    Send {
        to: [u8; 6],
        len: usize,
    },
    Hold,
    Block,
    Unblock,
    Cut,
    /// The epoch this many before the current one.
    Release(u64),
    Open,
    Discard,
    /// Frames are taken off the other end, and the gate told of room if it wants to know.
    Receive(usize),
}

fn op() -> impl Strategy<Value = Op> {
    let to = prop_oneof![Just(MEMBER), Just(STRANGER), Just(BROADCAST)];
    prop_oneof![
        40 => (to, LEN_MIN..LEN_MAX).prop_map(|(to, len)| Op::Send { to, len }),
        2 => Just(Op::Hold),
        5 => Just(Op::Block),
        6 => Just(Op::Unblock),
        6 => Just(Op::Cut),
        6 => (0..4_u64).prop_map(Op::Release),
        1 => Just(Op::Open),
        1 => Just(Op::Discard),
        8 => (1..12_usize).prop_map(Op::Receive),
    ]
}

/// What output commit asks for, said as plainly as possible.
#[derive(Default)]
struct Model {
    protected: bool,
    blocked: bool,
    epoch: u64,
    /// Epochs below are permanent.
    uncommitted: u64,
    /// Frames taken that have not left: where to, in which epoch, and the frame.
    held: Vec<([u8; 6], u64, Vec<u8>)>,
    /// Frames that have left and are not received yet.
    on_cable: VecDeque<Vec<u8>>,
    sent: u32,
    half_full: bool,
    asked: usize,
}

impl Model {
    fn may_leave(&self, to: [u8; 6], epoch: u64) -> bool {
        !self.protected || !self.blocked && (to == MEMBER || epoch < self.uncommitted)
    }

    /// As many frames have left as the gate says; which ones is for the model to say.
    fn follow(&mut self, gate: &Gate) -> Result<(), TestCaseError> {
        while self.held.len() > gate.held().frames {
            let next = self.held.iter().position(|&(to, epoch, _)| self.may_leave(to, epoch));
            prop_assert!(next.is_some(), "a frame has left that must not");
            self.on_cable.extend(next.map(|next| self.held.remove(next).2));
        }
        prop_assert_eq!(self.held.len(), gate.held().frames);
        let waits = self.held.iter().any(|&(to, epoch, _)| self.may_leave(to, epoch));
        prop_assert_eq!(waits, gate.needs_room() && waits, "a frame is held that may leave");
        prop_assert!(gate.held().bytes <= LIMIT);
        Ok(())
    }

    fn apply(&mut self, fixture: &mut Fixture, op: &Op, overhead: usize) -> Result<(), TestCaseError> {
        match *op {
            Op::Send { to, len } => return self.send(fixture, to, len, overhead),
            Op::Hold if !self.protected => {
                self.epoch += 1;
                (self.protected, self.blocked, self.uncommitted) = (true, false, self.epoch);
                fixture.take(hold(self.epoch));
            }
            Op::Hold => {
                self.blocked = false;
                fixture.take(hold(self.epoch));
            }
            Op::Block => {
                self.blocked = true;
                fixture.take(Step::Block);
            }
            Op::Unblock => {
                self.blocked = false;
                fixture.take(Step::Unblock);
            }
            Op::Cut if self.protected => {
                self.epoch += 1;
                fixture.take(Step::Cut(self.epoch));
            }
            Op::Cut => fixture.take(Step::Cut(self.epoch + 9)),
            Op::Release(back) => {
                let epoch = self.epoch.saturating_sub(back);
                if self.protected {
                    self.uncommitted = self.uncommitted.max(self.epoch.min(epoch + 1));
                }
                fixture.take(Step::Release(epoch));
            }
            Op::Open => {
                self.protected = false;
                fixture.take(Step::Open);
            }
            Op::Discard => {
                let held = self.held.len();
                self.held
                    .retain(|&(_, epoch, _)| !self.protected || epoch < self.uncommitted);
                prop_assert_eq!(fixture.gate.discard().frames, held - self.held.len());
                fixture.turn();
            }
            Op::Receive(count) => {
                for _ in 0..count {
                    prop_assert_eq!(fixture.receive(), self.on_cable.pop_front());
                }
                if fixture.gate.needs_room() {
                    fixture.gate.flush();
                    fixture.turn();
                }
            }
        }
        self.follow(&fixture.gate)
    }

    fn send(&mut self, fixture: &mut Fixture, to: [u8; 6], len: usize, overhead: usize) -> Result<(), TestCaseError> {
        let frame = frame(self.sent, to, len);
        let has_space = fixture.gate.held().bytes + len + overhead <= LIMIT;
        let must_wait = fixture.gate.needs_room() || self.protected && !has_space;
        let passage = fixture.send(&frame);
        if passage == Passage::Taken {
            prop_assert!(!must_wait);
            self.sent += 1;
            if self.protected {
                self.held.push((to, self.epoch, frame));
            } else {
                self.on_cable.push_back(frame);
            }
        } else {
            prop_assert_eq!(passage, Passage::Waits);
            prop_assert!(must_wait || !self.protected && fixture.gate.needs_room());
        }
        fixture.turn();
        self.follow(&fixture.gate)
    }

    /// A checkpoint is asked for when half of the limit comes to be used up, and not again before it was not.
    fn check_asked(&mut self, fixture: &Fixture) -> Result<(), TestCaseError> {
        let half_full = fixture.gate.held().bytes >= LIMIT / 2;
        self.asked += usize::from(half_full && !self.half_full);
        self.half_full = half_full;
        prop_assert_eq!(fixture.asked.load(Ordering::Relaxed), self.asked);
        Ok(())
    }
}

/// What it takes to keep a frame, besides its bytes.
fn overhead() -> usize {
    let mut fixture = Fixture::held(1);
    fixture.send(&short(0, STRANGER));
    fixture.gate.held().bytes - 60
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, ..ProptestConfig::default() })]

    /// Order is kept, nothing is lost or doubled, nothing of an epoch that is not permanent gets out, and when there is no
    /// space frames wait.
    #[test]
    fn whatever_happens_a_gate_does_what_output_commit_asks_for(ops in prop::collection::vec(op(), 0..200)) {
        let (mut fixture, mut model) = (Fixture::new(), Model::default());
        let overhead = overhead();
        for op in &ops {
            model.apply(&mut fixture, op, overhead)?;
            model.check_asked(&fixture)?;
        }
        model.apply(&mut fixture, &Op::Open, overhead)?;
        while !model.held.is_empty() || !model.on_cable.is_empty() {
            model.apply(&mut fixture, &Op::Receive(1), overhead)?;
        }
        prop_assert_eq!(fixture.receive(), None);
    }
}
