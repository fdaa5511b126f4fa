//! Devices that go on in another transport, and what else a file may have in place of their state.

use cutover_snapshot::spec::RngSpec;
use proptest::prelude::*;
use virtio_bindings::virtio_config::{VIRTIO_CONFIG_S_NEEDS_RESET, VIRTIO_F_VERSION_1};
use virtio_bindings::virtio_mmio::*;

use super::*;
use crate::guest_event::GuestEvent;
use crate::virtio::rng::Rng;
use crate::virtio::testing::{DATA, Guest, LOW_SIZE, Piece, QUEUE_SIZE, TWO_OPERATIONS, entropy};

const EVENT_INDEX: u64 = 1 << VIRTIO_RING_F_EVENT_IDX;

/// The state of the device of `guest`, after stopping it.
fn saved(guest: &mut Guest) -> TransportState {
    guest.transport.pause();
    guest.transport.save()
}

/// Why a new entropy device refuses `state`.
fn refusal(guest: &mut Guest, state: &TransportState) -> String {
    guest.replace(entropy(), state).unwrap_err().to_string()
}

fn interrupts(guest: &Guest) -> u64 {
    guest.transport.interrupt().read().unwrap_or(0)
}

/// Has the device interrupt when it gives back more than `count` chains, if it goes by the event index.
fn want_interrupt_after(guest: &Guest, count: u16) {
    let used_event = guest.available_ring(0) + 4 + 2 * u64::from(QUEUE_SIZE);
    guest.write(used_event, &count.to_le_bytes());
}

#[test]
fn a_ring_saved_half_way_is_served_on_by_the_new_device() {
    for features in [0, EVENT_INDEX] {
        let limited = Rng::new(&RngSpec {
            rate_limiter: TWO_OPERATIONS,
        });
        let mut guest = Guest::started(limited.unwrap(), features);
        let heads: Vec<_> = (0..5).map(|_| guest.offer(0, &[Piece::In(DATA, 8)])).collect();
        guest.kick(0);
        assert_eq!([guest.take_used(0), guest.take_used(0)], [(heads[0], 8), (heads[1], 8)]);
        let state = saved(&mut guest);
        assert_eq!(
            state.positions,
            [Position {
                next_available: 2,
                next_used: 2
            }]
        );
        guest.replace(entropy(), &state).unwrap();
        assert_eq!(guest.transport.save(), state.following());
        let late = guest.offer(0, &[Piece::In(DATA, 8)]);
        assert_eq!(guest.try_take_used(0), None, "it is still paused");
        want_interrupt_after(&guest, 2);
        guest.transport.resume();
        for head in heads[2..].iter().chain([&late]) {
            assert_eq!(guest.take_used(0), (*head, 8));
        }
        want_interrupt_after(&guest, 6);
        assert_eq!(guest.request(0, &[Piece::In(DATA, 16)]), 16);
    }
}

#[test]
fn a_driver_that_has_not_got_far_goes_on_from_there() {
    for rung in [0, ACKNOWLEDGED, DRIVER, FEATURES_OK] {
        let mut guest = Guest::with(entropy());
        for (status, register) in [
            (ACKNOWLEDGED, (VIRTIO_MMIO_DEVICE_FEATURES_SEL, 1)),
            (DRIVER, (VIRTIO_MMIO_QUEUE_SEL, 7)),
        ] {
            if rung >= status {
                guest.write_register(VIRTIO_MMIO_STATUS, status);
                guest.write_register(register.0, register.1);
            }
        }
        if rung == FEATURES_OK {
            guest.negotiate(1 << VIRTIO_F_VERSION_1);
            guest.set_queues_up();
        }
        let state = saved(&mut guest);
        guest.replace(entropy(), &state).unwrap();
        assert_eq!(guest.transport.save(), state.following());
        assert_eq!(guest.status(), rung);
        if rung == FEATURES_OK {
            guest.transport.resume();
            guest.write_register(VIRTIO_MMIO_STATUS, DRIVER_OK);
            assert_eq!(guest.request(0, &[Piece::In(DATA, 8)]), 8);
        }
    }
}

#[test]
fn an_interrupt_the_driver_has_not_acknowledged_is_raised_again() {
    let mut guest = Guest::started(entropy(), 0);
    guest.request(0, &[Piece::In(DATA, 8)]);
    let state = saved(&mut guest);
    guest.replace(entropy(), &state).unwrap();
    assert_eq!(interrupts(&guest), 0, "the interrupt controllers may not be there yet");
    guest.transport.resume();
    assert_eq!(interrupts(&guest), 1);
    guest.write_register(VIRTIO_MMIO_INTERRUPT_ACK, VIRTIO_MMIO_INT_VRING);
    let state = saved(&mut guest);
    guest.replace(entropy(), &state).unwrap();
    guest.transport.resume();
    assert_eq!(interrupts(&guest), 0);
}

#[test]
fn a_device_that_one_side_gave_up_stays_so_until_it_is_reset() {
    let mut guest = Guest::started(entropy(), 0);
    guest.offer_head(0, u16::MAX);
    guest.kick(0);
    guest.wait_for_failure();
    let state = saved(&mut guest);
    guest.replace(entropy(), &state).unwrap();
    guest.transport.resume();
    assert_eq!(guest.status(), DRIVER_OK | VIRTIO_CONFIG_S_NEEDS_RESET);
    assert_eq!(guest.events.take(), [], "it has been told of before");
    guest.start(0);
    guest.write_register(VIRTIO_MMIO_STATUS, DRIVER_OK | VIRTIO_CONFIG_S_FAILED);
    let state = saved(&mut guest);
    guest.replace(entropy(), &state).unwrap();
    guest.transport.resume();
    assert_eq!(guest.status(), DRIVER_OK | VIRTIO_CONFIG_S_FAILED);
    guest.start(0);
    assert_eq!(guest.request(0, &[Piece::In(DATA, 8)]), 8);
}

#[test]
fn a_driver_is_told_if_the_configuration_differs_from_what_it_was() {
    let mut guest = Guest::started(entropy(), 0);
    let mut state = saved(&mut guest);
    for (config, status) in [(Vec::new(), 0), (vec![1], VIRTIO_MMIO_INT_CONFIG)] {
        state.config = config;
        guest.replace(entropy(), &state).unwrap();
        guest.transport.resume();
        assert_eq!(guest.read_register(VIRTIO_MMIO_INTERRUPT_STATUS), status);
        let generation = guest.read_register(VIRTIO_MMIO_CONFIG_GENERATION);
        assert_ne!(
            generation, state.config_generation,
            "half of a field may have been read before"
        );
    }
}

#[test]
fn what_cannot_be_the_state_of_a_device_is_refused_by_its_name() {
    let mut guest = Guest::started(entropy(), EVENT_INDEX);
    let good = saved(&mut guest);
    type Change = fn(&mut TransportState);
    let cases: [(&str, Change); 15] = [
        ("no device status 0x2", |state| state.status = 2),
        ("no device status 0x4f", |state| {
            state.status |= VIRTIO_CONFIG_S_NEEDS_RESET
        }),
        ("no interrupt status 0x4", |state| state.interrupt_status = 4),
        ("uses the features 0x100000001", |state| {
            state.accepted_features = 1 << 32 | 1
        }),
        ("uses the features 0x0", |state| state.accepted_features = 0),
        ("it has 0 queues instead of 1", |state| state.queues.clear()),
        ("it has 2 queues instead of 1", |state| {
            state.queues.push(state.queues[0].clone())
        }),
        ("0 of its queues are in service instead of 1", |state| {
            state.positions.clear()
        }),
        ("2 of its queues are in service instead of 1", |state| {
            state.positions.push(state.positions[0]);
        }),
        ("1 of its queues are in service instead of 0", |state| {
            state.needs_reset = true
        }),
        ("queue 0: the driver did not make it ready", |state| {
            state.queues[0].ready = false
        }),
        ("queue 0: its size 65552 is above 64", |state| {
            state.queues[0].size = 0x10010
        }),
        ("queue 0: invalid queue size", |state| state.queues[0].size = 128),
        ("queue 0: its rings are not in guest memory", |state| {
            state.queues[0].used_ring = LOW_SIZE as u64 - 4;
        }),
        ("queue 0: its rings are not in guest memory", |state| {
            state.queues[0].descriptor_table = u64::MAX - 15;
        }),
    ];
    for (expected, change) in cases {
        let mut state = good.clone();
        change(&mut state);
        let refused = refusal(&mut guest, &state);
        assert!(
            refused.to_lowercase().contains(expected),
            "'{refused}' lacks '{expected}'"
        );
        assert!(refused.contains("virtio-test"), "{refused}");
    }
    guest.replace(entropy(), &good).unwrap();
    guest.transport.resume();
    assert_eq!(guest.request(0, &[Piece::In(DATA, 8)]), 8);
}

#[test]
fn a_position_the_driver_never_reached_makes_the_device_give_up_as_the_guest_itself_could() {
    let mut guest = Guest::started(entropy(), 0);
    let mut state = saved(&mut guest);
    state.positions[0].next_available = 1000;
    guest.replace(entropy(), &state).unwrap();
    guest.transport.resume();
    guest.wait_for_failure();
    // It fails first and tells then.
    guest.on_loop(|| ());
    assert!(matches!(&guest.events.take()[..], [GuestEvent::DeviceFailed { .. }]));
    guest.start(0);
    assert_eq!(guest.request(0, &[Piece::In(DATA, 8)]), 8);
}

impl TransportState {
    /// The same state in the transport that follows.
    fn following(&self) -> Self {
        Self {
            config_generation: self.config_generation.wrapping_add(1),
            ..self.clone()
        }
    }
}

/// Mostly what a driver could have set up, here and there something else.
fn any_state() -> impl Strategy<Value = TransportState> {
    let status = prop_oneof![8 => Just(DRIVER_OK), 2 => 0..=0xff_u32, 1 => any::<u32>()];
    let features = prop_oneof![4 => Just(1 << VIRTIO_F_VERSION_1), 4 => Just(1 << VIRTIO_F_VERSION_1 | EVENT_INDEX), 1 => any::<u64>()];
    let address = || prop_oneof![8 => (0..0x40_u64).prop_map(|page| page << 12), 1 => any::<u64>()];
    let size = prop_oneof![8 => Just(16_u32), 1 => any::<u32>()];
    let queue = (size, prop::bool::weighted(0.9), address(), address(), address()).prop_map(
        |(size, ready, descriptor_table, available_ring, used_ring)| QueueRegisters {
            size,
            ready,
            descriptor_table,
            available_ring,
            used_ring,
        },
    );
    let position = any::<(u16, u16)>().prop_map(|(next_available, next_used)| Position {
        next_available,
        next_used,
    });
    let count = || prop_oneof![9 => Just(1_usize), 1 => 0..3_usize];
    let queues = count().prop_flat_map(move |count| prop::collection::vec(queue.clone(), count));
    let positions = count().prop_flat_map(move |count| prop::collection::vec(position.clone(), count));
    let rest = (
        any::<[u32; 4]>(),
        prop::bool::weighted(0.1),
        prop_oneof![9 => 0..4_u32, 1 => any::<u32>()],
    );
    (status, features, queues, positions, rest, any::<Vec<u8>>()).prop_map(
        |(status, accepted_features, queues, positions, (words, needs_reset, interrupt_status), config)| {
            TransportState {
                status,
                needs_reset,
                interrupt_status,
                accepted_features,
                device_features_select: words[0],
                driver_features_select: words[1],
                queue_select: words[2],
                queues,
                positions,
                config,
                config_generation: words[3],
            }
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// It is refused, or it is a state like any that a guest can bring about: the device copes, and a reset helps.
    #[test]
    fn whatever_a_file_says_a_device_neither_panics_nor_leaves_guest_memory(
        state in any_state(),
        garbage in prop::collection::vec(any::<u8>(), 0x1000),
    ) {
        let mut guest = Guest::with(entropy());
        for page in 0..0x40_u64 {
            guest.write(page << 12, &garbage);
        }
        if guest.replace(entropy(), &state).is_ok() {
            guest.transport.resume();
            guest.transport.pause();
            drop(guest.transport.save());
            guest.transport.resume();
        }
        guest.assert_fences_hold();
        guest.start(0);
        prop_assert_eq!(guest.request(0, &[Piece::In(DATA, 8)]), 8);
    }
}
