//! Replication without faults.

use std::time::Duration;

use super::*;
use crate::tests::proxy::{Action, Fault, Proxy, Trouble, Way};

fn pair() -> Pair {
    let mut pair = Pair::new(Guest::new(&PAGES, 4711), Host::default(), &options());
    pair.seed().expect("nothing is in the way");
    pair
}

#[test]
fn the_image_changes_only_when_an_epoch_is_permanent_and_is_then_that_of_the_cut() {
    let mut pair = pair();
    assert!(pair.image() == pair.guest.at(0), "seeded");
    for epoch in 1..=20 {
        pair.ship(epoch).unwrap();
        assert!(pair.image() == pair.guest.at(epoch - 1), "before {epoch} is permanent");
        pair.standby().permanent(epoch).unwrap();
        assert!(pair.image() == pair.guest.at(epoch), "at {epoch}");
    }
    let twin = pair.standby.unwrap().promote(20).unwrap();
    assert_eq!(twin.restored, Some(20));
    assert!(twin.contents() == pair.guest.at(20));
    let told: Vec<_> = pair.notices.try_iter().take(21).collect();
    assert_eq!(told[0], Notice::Seeded);
    assert!(told[1..].iter().cloned().eq((1..=20).map(Notice::Holds)));
}

#[test]
fn what_was_never_permanent_by_itself_is_applied_with_what_is() {
    let mut pair = pair();
    for epoch in 1..=4 {
        pair.ship(epoch).unwrap();
    }
    assert!(pair.image() == pair.guest.at(0));
    pair.standby().permanent(3).unwrap();
    assert!(pair.image() == pair.guest.at(3));
    pair.standby().permanent(3).unwrap();
    pair.standby().permanent(2).unwrap_err();
    pair.standby().permanent(5).unwrap_err();
    let twin = pair.standby.unwrap().promote(3).unwrap();
    assert_eq!(twin.restored, Some(3), "4 is dropped");
    assert!(twin.contents() == pair.guest.at(3));
}

#[test]
fn after_a_rollback_other_epochs_take_the_place_of_those_that_have_not_been() {
    let options = Options {
        compression: Compression::Always,
        ..options()
    };
    let mut pair = Pair::new(Guest::new(&PAGES, 4711), Host::default(), &options);
    pair.seed().unwrap();
    for epoch in 1..=3 {
        pair.ship(epoch).unwrap();
    }
    pair.standby().permanent(1).unwrap();
    pair.replica().roll_back(1).unwrap();
    let forgotten = pair.guest.at(3).to_vec();
    pair.guest.roll_back(1);
    // What was sent and dropped is sent again.
    pair.guest.images[1].clone_from(&forgotten[1]);
    pair.guest.dirty[1] = PageBits::full(PAGES[1]);
    for epoch in 2..=3 {
        pair.ship(epoch).unwrap();
        pair.standby().permanent(epoch).unwrap();
        assert!(pair.image() == pair.guest.at(epoch));
    }
    assert!(pair.guest.at(3) != forgotten, "it took another way");
    pair.replica().roll_back(2).expect_err("that is permanent");
}

#[test]
fn every_encoding_of_pages_arrives() {
    for compression in [Compression::Auto, Compression::Always] {
        let options = Options {
            compression,
            ..Options::default()
        };
        let mut pair = Pair::new(Guest::new(&PAGES, 99), Host::default(), &options);
        pair.seed().unwrap();
        for epoch in 1..=5 {
            pair.ship(epoch).unwrap();
            pair.standby().permanent(epoch).unwrap();
            assert!(pair.image() == pair.guest.at(epoch), "{compression:?}");
        }
    }
}

#[test]
fn pages_that_were_written_and_have_not_changed_are_not_sent_and_others_as_their_difference() {
    let mut pair = pair();
    pair.guest.dirty[0] = PageBits::full(PAGES[0]);
    pair.guest.images[0][8] ^= 1;
    let epoch = pair.guest.epoch(1);
    let sent = pair.replica().ship(epoch).unwrap();
    assert_eq!((sent.pages.delta, sent.pages.unchanged), (1, PAGES[0] - 1));
    assert!(sent.wire_bytes < 200, "{sent:?}");
    pair.standby().permanent(1).unwrap();
    assert!(pair.image() == pair.guest.at(1));
}

#[test]
fn an_older_copy_of_a_disk_becomes_what_the_disk_is() {
    let older = vec![0xee; usize::try_from(PAGES[1]).unwrap() * PAGE_BYTES];
    let host = Host {
        older: Some(older),
        ..Host::default()
    };
    let mut guest = Guest::new(&PAGES, 5);
    // As a source does that knows where a disk is empty.
    guest.images[1][..8 * PAGE_BYTES].fill(0);
    guest.dirty[1].remove_range(0..8);
    let mut pair = Pair::new(guest, host, &options());
    pair.seed().unwrap();
    pair.ship(1).unwrap();
    pair.standby().permanent(1).unwrap();
    assert!(pair.image() == pair.guest.at(1));
}

#[test]
fn a_standby_without_room_is_waited_for_until_epochs_are_permanent() {
    let options = Options {
        held_bytes_max: 1,
        ..options()
    };
    let mut pair = Pair::new(Guest::new(&PAGES, 6), Host::default(), &options);
    pair.seed().unwrap();
    pair.ship(1).unwrap();
    pair.guest.run();
    let epoch = pair.guest.epoch(2);
    let replica = pair.replica.as_ref().unwrap();
    thread::scope(|scope| {
        let shipping = scope.spawn(|| replica.ship(epoch));
        assert_eq!(pair.notices.recv().unwrap(), Notice::Seeded);
        assert_eq!(pair.notices.recv().unwrap(), Notice::Holds(1));
        let standby = pair.standby.as_mut().unwrap();
        standby.permanent(1).unwrap();
        assert_eq!(pair.notices.recv().unwrap(), Notice::Holds(2));
        shipping.join().unwrap().unwrap();
    });
    assert!(pair.image() == pair.guest.at(1));
}

#[test]
fn a_link_on_which_nothing_else_is_said_is_kept_alive() {
    let options = Options {
        silence: Duration::from_millis(300),
        alive_every: Duration::from_millis(20),
        ..options()
    };
    let mut pair = Pair::new(Guest::new(&PAGES, 6), Host::default(), &options);
    pair.seed().unwrap();
    assert_eq!(pair.notices.recv().unwrap(), Notice::Seeded);
    let nothing = pair.notices.recv_timeout(3 * options.silence);
    assert!(nothing.is_err(), "{nothing:?}");
    assert!(pair.lost.try_recv().is_err());
    pair.ship(1).unwrap();
}

#[test]
fn a_peer_that_falls_silent_is_noticed_by_the_other() {
    let directory = tempfile::tempdir().unwrap();
    let [near, far] = ["near", "far"].map(|name| directory.path().join(name));
    let fault = Fault {
        connection: 0,
        way: Way::ToDestination,
        at: 1_500_000,
        action: Action::Stall(Duration::from_secs(4)),
    };
    let trouble = Trouble {
        fault: Some(fault),
        ..Trouble::default()
    };
    let proxy = Proxy::start(&near, &far, trouble);
    let options = Options {
        silence: Duration::from_millis(500),
        ..options()
    };
    let mut pair = connect(&near, &far, Guest::new(&[600], 6), Host::default(), &options);
    let mut ended = pair.seed();
    for epoch in 1.. {
        if ended.is_err() {
            break;
        }
        ended = pair.ship(epoch);
    }
    assert!(pair.lost.recv().unwrap().contains("silent"));
    let lost = pair
        .notices
        .iter()
        .find(|notice| matches!(notice, Notice::PrimaryLost(_)));
    assert!(format!("{lost:?}").contains("silent"), "{lost:?}");
    assert!(matches!(pair.replica().seeded(), Err(Error::StandbyLost)));
    drop(pair);
    proxy.end();
}

#[test]
fn a_primary_that_lets_go_leaves_a_standby_that_can_be_promoted() {
    let mut pair = pair();
    pair.ship(1).unwrap();
    pair.ship(2).unwrap();
    drop(pair.replica);
    let lost = pair
        .notices
        .iter()
        .find(|notice| matches!(notice, Notice::PrimaryLost(_)));
    let reason = format!("{lost:?}");
    assert!(reason.contains("needs this standby no more"), "{reason}");
    let twin = pair.standby.unwrap().promote(1).unwrap();
    assert!(twin.contents() == pair.guest.at(1));
    assert_eq!(twin.restored, Some(1));
}

#[test]
fn a_standby_without_a_permanent_epoch_is_not_promoted() {
    let mut pair = pair();
    pair.ship(1).unwrap();
    let error = pair.standby.unwrap().promote(0).err().expect("there is no state");
    assert!(matches!(error, Error::NoSuchCut { cut: 0, .. }), "{error}");
}

#[test]
fn a_promoted_standby_does_not_listen_to_its_primary_any_more() {
    let mut pair = pair();
    pair.ship(1).unwrap();
    let twin = pair.standby.unwrap().promote(1).unwrap();
    pair.guest.run();
    let epoch = pair.guest.epoch(2);
    pair.replica.as_mut().unwrap().ship(epoch).expect_err("nobody takes it");
    assert!(twin.contents() == pair.guest.at(1));
}

#[test]
fn a_host_that_refuses_says_why() {
    let host = Host {
        refuses: vec!["no memory".to_owned(), "no tap".to_owned()],
        ..Host::default()
    };
    let pair = Pair::new(Guest::new(&PAGES, 6), host, &options());
    let refused = pair.replica.err().expect("it is refused");
    assert!(
        matches!(&refused, Error::Refused(reasons) if reasons.len() == 2),
        "{refused}"
    );
    assert!(matches!(pair.standby.err(), Some(Error::Refused(_))));
}

#[test]
fn an_image_that_was_written_in_part_is_not_run_and_says_why() {
    let host = Host::default();
    let broken = host.broken.clone();
    let mut pair = Pair::new(Guest::new(&PAGES, 8), host, &options());
    pair.seed().unwrap();
    for epoch in 1..=3 {
        pair.ship(epoch).unwrap();
    }
    pair.standby().permanent(1).unwrap();
    broken.store(true, Ordering::Relaxed);
    let error = pair.standby().permanent(2).expect_err("its disk is full");
    assert!(
        matches!(&error, Error::Pages { image, .. } if image == "disk-1"),
        "{error}"
    );
    broken.store(false, Ordering::Relaxed);
    let error = pair.standby().permanent(3).expect_err("it has no whole image");
    assert!(error.to_string().contains("in part only"), "{error}");
    let error = pair.standby.unwrap().promote(2).err().expect("it has no whole image");
    assert!(error.to_string().contains("in part only"), "{error}");
}

#[test]
fn whoever_does_not_want_a_standby_any_more_waits_for_it_no_longer() {
    let directory = tempfile::tempdir().unwrap();
    let to = Endpoint::Unix(directory.path().join("deaf"));
    let _deaf = Listener::bind(&to, &Security::default()).unwrap();
    let let_go = Arc::<AtomicBool>::default();
    let link = Link {
        to: &to,
        security: &Security::default(),
        options: options(),
        on_thread: Arc::new(|| ()),
        let_go: let_go.clone(),
        lost: Box::new(|reason| panic!("lost: {reason}")),
    };
    let outcome = thread::scope(|scope| {
        let connecting = scope.spawn(|| Replica::connect(&reservation(&PAGES), link).err());
        let_go.store(true, Ordering::Relaxed);
        connecting.join().unwrap()
    });
    assert!(matches!(outcome, Some(Error::Cancelled)), "{outcome:?}");
}

#[test]
fn a_standby_that_is_lost_is_told_of_also_to_whoever_lets_go_of_it_at_once() {
    for _ in 0..50 {
        let mut pair = Pair::new(Guest::new(&[4], 8), Host::default(), &options());
        pair.seed().unwrap();
        pair.standby = Err(Error::StandbyLost);
        pair.ship(1).expect_err("there is no standby");
        pair.replica = Err(Error::StandbyLost);
        assert!(pair.lost.try_recv().is_ok());
    }
}
