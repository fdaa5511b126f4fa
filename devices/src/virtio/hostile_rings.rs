//! Property: whatever a guest writes into its rings, a device neither panics nor hangs nor touches memory outside the
//! guest's; and after a reset it serves a well-behaved driver.

use std::cell::RefCell;

use cutover_snapshot::spec::{RateLimiterSpec, RngSpec};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use super::rng::Rng;
use super::testing::{DATA, Guest, HIGH_START, LOW_SIZE, Piece, QUEUE_SIZE, entropy, tight_limits};
use crate::bus::BusDevice;

const CASES: u32 = 400;
/// Descriptors of the garbage indirect table at [`DATA`].
const TABLE_SIZE: u16 = 32;

/// A descriptor as it lies in memory.
#[derive(Clone, Debug)]
struct Descriptor {
    address: u64,
    len: u32,
    flags: u16,
    next: u16,
}

/// What a hostile driver writes into one queue.
#[derive(Clone, Debug)]
struct Garbage {
    table: Vec<Descriptor>,
    indirect_table: Vec<Descriptor>,
    heads: Vec<u16>,
    available_index: u16,
    used_event: u16,
    data: Vec<u8>,
}

fn address() -> impl Strategy<Value = u64> {
    let size = LOW_SIZE as u64;
    prop_oneof![
        6 => DATA..size,
        2 => 0x1000..0x4000_u64,
        1 => Just(DATA),
        1 => size - 64..size + 64,
        1 => HIGH_START - 64..HIGH_START + 64,
        1 => any::<u64>(),
        1 => u64::MAX - 64..=u64::MAX,
    ]
}

fn len() -> impl Strategy<Value = u32> {
    prop_oneof![
        4 => 0..64_u32,
        2 => (0..64_u32).prop_map(|index| index * 16),
        2 => (0..16_u32).prop_map(|sectors| sectors * 512),
        1 => 0..0x2_0000_u32,
        1 => any::<u32>(),
    ]
}

fn descriptor() -> impl Strategy<Value = Descriptor> {
    let flags = prop_oneof![8 => 0..8_u16, 1 => any::<u16>()];
    let next = prop_oneof![8 => 0..QUEUE_SIZE + 1, 1 => any::<u16>()];
    (address(), len(), flags, next).prop_map(|(address, len, flags, next)| Descriptor {
        address,
        len,
        flags,
        next,
    })
}

fn garbage() -> impl Strategy<Value = Garbage> {
    let size = usize::from(QUEUE_SIZE);
    (
        prop::collection::vec(descriptor(), size),
        prop::collection::vec(descriptor(), usize::from(TABLE_SIZE)),
        prop::collection::vec(prop_oneof![8 => 0..QUEUE_SIZE, 1 => any::<u16>()], size),
        prop_oneof![8 => 0..=QUEUE_SIZE, 1 => any::<u16>()],
        any::<u16>(),
        prop::collection::vec(prop_oneof![2 => 0..16_u8, 1 => any::<u8>()], 64),
    )
        .prop_map(
            |(table, indirect_table, heads, available_index, used_event, data)| Garbage {
                table,
                indirect_table,
                heads,
                available_index,
                used_event,
                data,
            },
        )
}

fn write_table(guest: &Guest, at: u64, table: &[Descriptor]) {
    for (index, descriptor) in (0..).zip(table) {
        let Descriptor {
            address,
            len,
            flags,
            next,
        } = *descriptor;
        guest.write_descriptor(at + 16 * index, address, len, flags.into(), next);
    }
}

fn write_garbage(guest: &Guest, queue: usize, garbage: &Garbage) {
    let available = guest.available_ring(queue);
    write_table(guest, DATA, &garbage.indirect_table);
    guest.write(DATA + 0x1000, &garbage.data);
    write_table(guest, guest.descriptor_address(queue, 0), &garbage.table);
    for (index, head) in (0..).zip(&garbage.heads) {
        guest.write(available + 4 + 2 * index, &head.to_le_bytes());
    }
    guest.write(
        available + 4 + 2 * u64::from(QUEUE_SIZE),
        &garbage.used_event.to_le_bytes(),
    );
    guest.write(available + 2, &garbage.available_index.to_le_bytes());
}

/// Runs the property on `guest`, whose device has `queues` queues; `serve` makes one good request and checks its answer,
/// and `disturb` is called while the garbage is being served.
pub fn survives_hostile_rings(
    guest: Guest,
    queues: usize,
    device_features: u64,
    disturb: impl Fn(),
    serve: impl Fn(&mut Guest),
) {
    let guest = RefCell::new(guest);
    let features = prop_oneof![
        Just(0),
        Just(1_u64 << VIRTIO_RING_F_INDIRECT_DESC),
        Just(1_u64 << VIRTIO_RING_F_INDIRECT_DESC | 1 << VIRTIO_RING_F_EVENT_IDX),
    ];
    let rings = prop::collection::vec(garbage(), queues);
    TestRunner::new(Config {
        cases: CASES,
        failure_persistence: None,
        ..Config::default()
    })
    .run(&(features, rings), |(features, rings)| {
        let guest = &mut *guest.borrow_mut();
        guest.start(features | device_features);
        for (queue, garbage) in rings.iter().enumerate() {
            write_garbage(guest, queue, garbage);
            guest.kick(queue);
        }
        disturb();
        // Returns when the device is done with all it took.
        guest.transport.pause();
        guest.transport.resume();
        guest.transport.pause();
        guest.assert_fences_hold();
        guest.start(device_features);
        serve(guest);
        guest.events.take();
        Ok(())
    })
    .unwrap();
}

#[test]
fn no_sequence_of_register_accesses_does_harm() {
    let register = prop_oneof![4 => (0..0x44_u64).prop_map(|word| word * 4), 1 => any::<u64>()];
    let value = prop_oneof![
        4 => prop::sample::select(vec![0, 1, 3, 11, 15, 143]),
        2 => 0..0x4000_u32,
        1 => any::<u32>(),
    ];
    let len = prop_oneof![8 => Just(4_usize), 1 => 0..16_usize];
    let accesses = prop::collection::vec((register, value, len), 0..64);
    let guest = RefCell::new(Guest::with(entropy()));
    TestRunner::new(Config {
        cases: CASES,
        failure_persistence: None,
        ..Config::default()
    })
    .run(&accesses, |accesses| {
        let guest = &mut *guest.borrow_mut();
        for (register, value, len) in accesses {
            let mut data = [0; 16];
            guest.transport.read(register, &mut data[..len]);
            data[..4].copy_from_slice(&value.to_le_bytes());
            guest.transport.write(register, &data[..len]);
        }
        guest.assert_fences_hold();
        guest.start(0);
        prop_assert_eq!(guest.request(0, &[Piece::In(DATA, 32)]), 32);
        Ok(())
    })
    .unwrap();
}

#[test]
fn the_entropy_device_survives_them() {
    for rate_limiter in [RateLimiterSpec::default(), tight_limits()] {
        survives_hostile_rings(
            Guest::with(Rng::new(&RngSpec { rate_limiter }).unwrap()),
            1,
            0,
            || {},
            |guest| assert_eq!(guest.request(0, &[Piece::In(DATA, 32)]), 32),
        );
    }
}
