//! The register protocol, with the entropy device behind it.

use virtio_bindings::virtio_ring::VIRTIO_RING_F_INDIRECT_DESC;

use super::*;
use crate::guest_event::GuestEvent;
use crate::virtio::testing::{DATA, Guest, HIGH_START, LOW_SIZE, Piece, QUEUE_SIZE, entropy};

const VERSION_1: u64 = 1 << VIRTIO_F_VERSION_1;

/// A guest at FEATURES_OK with its queue set up.
fn ready_guest() -> Guest {
    let mut guest = Guest::with(entropy());
    assert_eq!(guest.negotiate(VERSION_1), FEATURES_OK);
    guest.set_queues_up();
    guest
}

fn device_failures(guest: &Guest) -> Vec<String> {
    let reason = |event| match event {
        GuestEvent::DeviceFailed { device, reason } if device == "virtio-test" => reason,
        other => panic!("unexpected {other:?}"),
    };
    guest.events.take().into_iter().map(reason).collect()
}

#[test]
fn the_window_identifies_a_modern_virtio_device() {
    let mut guest = Guest::with(entropy());
    let registers = [
        VIRTIO_MMIO_MAGIC_VALUE,
        VIRTIO_MMIO_VERSION,
        VIRTIO_MMIO_DEVICE_ID,
        VIRTIO_MMIO_QUEUE_NUM_MAX,
        VIRTIO_MMIO_QUEUE_READY,
        VIRTIO_MMIO_CONFIG_GENERATION,
    ];
    assert_eq!(
        registers.map(|register| guest.read_register(register)),
        [0x7472_6976, 2, 4, 64, 0, 0]
    );
}

#[test]
fn features_are_read_in_halves_and_there_are_only_two() {
    let mut guest = Guest::with(entropy());
    let mut offered = [0; 3];
    for (select, half) in (0..).zip(&mut offered) {
        guest.write_register(VIRTIO_MMIO_DEVICE_FEATURES_SEL, select);
        *half = guest.read_register(VIRTIO_MMIO_DEVICE_FEATURES);
    }
    assert_eq!(offered, [1 << 28 | 1 << 29, 1, 0]);
}

#[test]
fn a_shared_memory_region_has_the_length_of_one_that_does_not_exist() {
    let mut guest = Guest::with(entropy());
    assert_eq!(guest.read_register(VIRTIO_MMIO_SHM_LEN_LOW), u32::MAX);
    assert_eq!(guest.read_register(VIRTIO_MMIO_SHM_LEN_HIGH), u32::MAX);
}

#[test]
fn only_aligned_words_reach_registers() {
    let mut guest = Guest::with(entropy());
    let mut data = [0xaa; 2];
    guest.transport.read(0, &mut data);
    assert_eq!(data, [0, 0]);
    let mut data = [0xaa; 4];
    guest.transport.read(2, &mut data);
    assert_eq!(data, [0; 4]);
    guest.transport.write(VIRTIO_MMIO_STATUS.into(), &[1]);
    guest.transport.write(u64::MAX, &[1; 4]);
    assert_eq!(guest.status(), 0);
}

#[test]
fn configuration_space_past_its_end_reads_as_zero() {
    let mut guest = Guest::with(entropy());
    for offset in [0x100, 0x101, 0xfff, u64::from(u32::MAX), u64::MAX] {
        let mut data = [0xaa; 8];
        guest.transport.read(offset, &mut data);
        assert_eq!(data, [0; 8]);
    }
}

#[test]
fn a_driver_cannot_skip_a_rung_of_the_status_ladder() {
    let mut guest = Guest::with(entropy());
    for refused in [2, 3, 4, 8, 15] {
        guest.write_register(VIRTIO_MMIO_STATUS, refused);
        assert_eq!(guest.status(), 0);
    }
    for (accepted, refused) in [(ACKNOWLEDGED, FEATURES_OK), (DRIVER, DRIVER_OK), (DRIVER, ACKNOWLEDGED)] {
        guest.write_register(VIRTIO_MMIO_STATUS, accepted);
        guest.write_register(VIRTIO_MMIO_STATUS, refused);
        assert_eq!(guest.status(), accepted);
    }
}

#[test]
fn features_without_version_1_are_refused() {
    let mut guest = Guest::with(entropy());
    assert_eq!(guest.negotiate(1 << VIRTIO_RING_F_EVENT_IDX), DRIVER);
}

#[test]
fn features_that_were_not_offered_are_refused() {
    let mut guest = Guest::with(entropy());
    assert_eq!(guest.negotiate(VERSION_1 | 1 << 5), DRIVER);
    assert_eq!(guest.negotiate(VERSION_1), FEATURES_OK);
}

#[test]
fn features_are_settled_once_they_are_ok() {
    let mut guest = ready_guest();
    guest.write_register(VIRTIO_MMIO_DRIVER_FEATURES_SEL, 0);
    guest.write_register(VIRTIO_MMIO_DRIVER_FEATURES, 1 << VIRTIO_RING_F_EVENT_IDX);
    assert_eq!(guest.transport.accepted_features, VERSION_1);
}

#[test]
fn a_queue_that_is_ready_is_not_changed_any_more() {
    let mut guest = ready_guest();
    let before = guest.transport.queues.clone();
    guest.write_register(VIRTIO_MMIO_QUEUE_DESC_LOW, 0x8000);
    guest.write_register(VIRTIO_MMIO_QUEUE_NUM, 4);
    assert_eq!(guest.transport.queues, before);
}

#[test]
fn registers_of_a_queue_that_does_not_exist_do_nothing() {
    let mut guest = ready_guest();
    let before = guest.transport.queues.clone();
    guest.write_register(VIRTIO_MMIO_QUEUE_SEL, 1);
    guest.write_register(VIRTIO_MMIO_QUEUE_READY, 1);
    assert_eq!(guest.read_register(VIRTIO_MMIO_QUEUE_NUM_MAX), 0);
    assert_eq!(guest.read_register(VIRTIO_MMIO_QUEUE_READY), 0);
    assert_eq!(guest.transport.queues, before);
    guest.kick(7);
}

#[test]
fn a_badly_set_up_queue_makes_the_device_need_a_reset_which_helps() {
    let low_size = u32::try_from(LOW_SIZE).unwrap();
    let mistakes: [(&[(u32, u32)], &str); 8] = [
        (&[(VIRTIO_MMIO_QUEUE_READY, 0)], "did not make it ready"),
        (&[(VIRTIO_MMIO_QUEUE_NUM, 0)], "invalid queue size"),
        (&[(VIRTIO_MMIO_QUEUE_NUM, 12)], "invalid queue size"),
        (&[(VIRTIO_MMIO_QUEUE_NUM, 128)], "invalid queue size"),
        (&[(VIRTIO_MMIO_QUEUE_NUM, 0x10010)], "its size 65552 is above 64"),
        (&[(VIRTIO_MMIO_QUEUE_DESC_LOW, 0x1008)], "alignment"),
        (&[(VIRTIO_MMIO_QUEUE_USED_LOW, low_size - 4)], "not in guest memory"),
        (
            &[
                (VIRTIO_MMIO_QUEUE_AVAIL_LOW, u32::MAX - 1),
                (VIRTIO_MMIO_QUEUE_AVAIL_HIGH, u32::MAX),
            ],
            "not in guest memory",
        ),
    ];
    let mut guest = ready_guest();
    for (writes, expected) in mistakes {
        guest.negotiate(VERSION_1);
        guest.set_queues_up();
        guest.write_register(VIRTIO_MMIO_QUEUE_READY, 0);
        for &(register, value) in writes {
            guest.write_register(register, value);
        }
        if writes[0].0 != VIRTIO_MMIO_QUEUE_READY {
            guest.write_register(VIRTIO_MMIO_QUEUE_READY, 1);
        }
        guest.write_register(VIRTIO_MMIO_STATUS, DRIVER_OK);
        assert!(guest.needs_reset(), "{expected}");
        assert_eq!(
            guest.read_register(VIRTIO_MMIO_INTERRUPT_STATUS),
            VIRTIO_MMIO_INT_CONFIG
        );
        let failures = device_failures(&guest);
        assert!(
            failures.len() == 1 && failures[0].contains(expected),
            "{failures:?} lack '{expected}'"
        );
    }
    guest.start(0);
    assert_eq!(guest.request(0, &[Piece::In(DATA, 8)]), 8);
}

#[test]
fn an_interrupt_stays_pending_until_it_is_acknowledged() {
    let mut guest = Guest::started(entropy(), 0);
    guest.request(0, &[Piece::In(DATA, 8)]);
    assert_eq!(guest.read_register(VIRTIO_MMIO_INTERRUPT_STATUS), VIRTIO_MMIO_INT_VRING);
    guest.write_register(VIRTIO_MMIO_INTERRUPT_ACK, VIRTIO_MMIO_INT_CONFIG);
    assert_eq!(guest.read_register(VIRTIO_MMIO_INTERRUPT_STATUS), VIRTIO_MMIO_INT_VRING);
    guest.write_register(VIRTIO_MMIO_INTERRUPT_ACK, VIRTIO_MMIO_INT_VRING);
    assert_eq!(guest.read_register(VIRTIO_MMIO_INTERRUPT_STATUS), 0);
}

#[test]
fn a_reset_takes_everything_back_to_the_beginning() {
    let mut guest = Guest::started(entropy(), 0);
    guest.request(0, &[Piece::In(DATA, 8)]);
    guest.write_register(VIRTIO_MMIO_STATUS, 0);
    assert_eq!(guest.status(), 0);
    assert_eq!(guest.read_register(VIRTIO_MMIO_INTERRUPT_STATUS), 0);
    assert_eq!(guest.read_register(VIRTIO_MMIO_QUEUE_READY), 0);
    guest.offer(0, &[Piece::In(DATA, 8)]);
    guest.kick(0);
    guest.start(0);
    assert_eq!(guest.request(0, &[Piece::In(DATA, 8)]), 8);
    assert_eq!(device_failures(&guest), [""; 0]);
}

#[test]
fn a_device_its_driver_gave_up_serves_nobody_until_it_is_reset() {
    let mut guest = Guest::started(entropy(), 0);
    guest.write_register(VIRTIO_MMIO_STATUS, DRIVER_OK | VIRTIO_CONFIG_S_FAILED);
    guest.write_register(VIRTIO_MMIO_STATUS, DRIVER_OK);
    assert_eq!(guest.status(), DRIVER_OK | VIRTIO_CONFIG_S_FAILED);
    assert!(matches!(guest.transport.service, Service::Idle));
    guest.start(0);
    assert_eq!(guest.request(0, &[Piece::In(DATA, 8)]), 8);
}

#[test]
fn what_is_offered_while_paused_is_served_after_resume() {
    let mut guest = Guest::started(entropy(), 0);
    guest.request(0, &[Piece::In(DATA, 8)]);
    guest.transport.pause();
    guest.transport.pause();
    let head = guest.offer(0, &[Piece::In(DATA, 16)]);
    guest.kick(0);
    assert_eq!(guest.try_take_used(0), None);
    guest.transport.resume();
    assert_eq!(guest.take_used(0), (head, 16));
    guest.transport.resume();
    assert_eq!(guest.request(0, &[Piece::In(DATA, 8)]), 8);
}

#[test]
fn a_device_that_gave_up_serves_nobody_after_a_pause() {
    let mut guest = Guest::started(entropy(), 0);
    guest.offer_head(0, QUEUE_SIZE);
    guest.kick(0);
    guest.wait_for_failure();
    guest.transport.pause();
    guest.transport.resume();
    assert!(guest.needs_reset());
    assert!(matches!(guest.transport.service, Service::Idle));
    guest.start(0);
    assert_eq!(guest.request(0, &[Piece::In(DATA, 8)]), 8);
}

#[test]
fn a_paused_device_can_be_reset() {
    let mut guest = Guest::started(entropy(), 0);
    guest.transport.pause();
    guest.write_register(VIRTIO_MMIO_STATUS, 0);
    guest.transport.resume();
    assert_eq!(guest.status(), 0);
    guest.start(0);
    assert_eq!(guest.request(0, &[Piece::In(DATA, 8)]), 8);
}

#[test]
fn random_bytes_fill_the_writable_buffers_and_mark_their_pages() {
    let mut guest = Guest::started(entropy(), 0);
    guest.clean();
    assert_eq!(
        guest.request(
            0,
            &[
                Piece::Out(DATA, 8),
                Piece::In(DATA + 0x2000, 100),
                Piece::In(HIGH_START, 28)
            ]
        ),
        128
    );
    assert_ne!(guest.read(DATA + 0x2000, 100), [0; 100]);
    assert_ne!(guest.read(HIGH_START, 28), [0; 28]);
    assert_eq!(guest.read(DATA + 0x2000 + 100, 100), [0; 100]);
    assert!(guest.is_dirty(DATA + 0x2000) && guest.is_dirty(HIGH_START) && !guest.is_dirty(DATA));
}

#[test]
fn a_request_for_much_randomness_gets_64_kib() {
    let mut guest = Guest::started(entropy(), 0);
    assert_eq!(guest.request(0, &[Piece::In(DATA, 0x2_0000)]), 0x1_0000);
}

#[test]
fn an_indirect_table_is_followed() {
    let mut guest = Guest::started(entropy(), 1 << VIRTIO_RING_F_INDIRECT_DESC);
    let pieces: Vec<_> = (0..QUEUE_SIZE)
        .map(|index| Piece::In(DATA + 0x1000 * u64::from(index), 10))
        .collect();
    let head = guest.offer_indirect(0, DATA + 0x4_0000, &pieces);
    guest.kick(0);
    assert_eq!(guest.take_used(0), (head, 160));
}

#[test]
fn the_event_index_says_when_to_interrupt() {
    let mut guest = Guest::started(entropy(), 1 << VIRTIO_RING_F_EVENT_IDX);
    let used_event = guest.available_ring(0) + 4 + 2 * u64::from(QUEUE_SIZE);
    guest.write(used_event, &2_u16.to_le_bytes());
    for _ in 0..2 {
        guest.offer(0, &[Piece::In(DATA, 8)]);
    }
    guest.kick(0);
    // A stopped device has done all it was told of.
    guest.transport.pause();
    guest.transport.resume();
    assert_eq!(guest.read_register(VIRTIO_MMIO_INTERRUPT_STATUS), 0);
    guest.offer(0, &[Piece::In(DATA, 8)]);
    guest.kick(0);
    assert_eq!(
        [guest.take_used(0), guest.take_used(0), guest.take_used(0)],
        [(0, 8), (1, 8), (2, 8)]
    );
    assert_eq!(guest.read_register(VIRTIO_MMIO_INTERRUPT_STATUS), VIRTIO_MMIO_INT_VRING);
}

#[test]
fn a_driver_that_breaks_the_rules_of_the_ring_stops_the_device_with_the_reason() {
    const NEXT: u32 = 1;
    const WRITE: u32 = 2;
    const INDIRECT: u32 = 4;
    let table = DATA + 0x8000;
    let memory_end = LOW_SIZE as u64;
    type Descriptor = (u64, u32, u32, u16);
    let cases: [(&str, &[Descriptor]); 7] = [
        ("no proper end", &[(DATA, 8, WRITE | NEXT, 0)]),
        ("no proper end", &[(DATA, 8, WRITE | NEXT, QUEUE_SIZE)]),
        ("no proper end", &[(table, 17, INDIRECT, 0)]),
        ("no proper end", &[(table, 0, INDIRECT, 0)]),
        ("not all guest memory", &[(memory_end - 4, 8, WRITE, 0)]),
        ("not all guest memory", &[(u64::MAX, 2, WRITE, 0)]),
        (
            "after a device-writable",
            &[(DATA, 8, WRITE | NEXT, 1), (DATA, 8, 0, 0)],
        ),
    ];
    let mut guest = Guest::with(entropy());
    for (expected, descriptors) in cases {
        guest.start(1 << VIRTIO_RING_F_INDIRECT_DESC);
        for (index, &(address, len, flags, next)) in (0..).zip(descriptors) {
            guest.write_descriptor(guest.descriptor_address(0, index), address, len, flags, next);
        }
        guest.offer_head(0, 0);
        guest.kick(0);
        guest.wait_for_failure();
        let failures = device_failures(&guest);
        assert!(
            failures.len() == 1 && failures[0].contains(expected),
            "{failures:?} lack '{expected}'"
        );
        assert_eq!(guest.try_take_used(0), None);
    }
    guest.start(0);
    guest.write(guest.available_ring(0) + 2, &1000_u16.to_le_bytes());
    guest.kick(0);
    guest.wait_for_failure();
    assert!(device_failures(&guest)[0].contains("available ring index"));
    guest.start(0);
    assert_eq!(guest.request(0, &[Piece::In(DATA, 8)]), 8);
}
