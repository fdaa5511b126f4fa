//! Links that fail and monitors that die while a guest moves: it goes on in one place, and never in two.

use std::thread::sleep;
use std::time::Duration;

use cutover_tests::{Exit, Fault, Guest, Link, ManagedVm, Receiver, Toward};
use serde_json::json;

/// Moments of a migration, in bytes that the source has sent: nothing yet, in the middle of the first message, while
/// memory is on its way.
const MOMENTS: [u64; 3] = [0, 20, 6 << 20];

fn guest() -> ManagedVm {
    let managed = Guest::micro().boot_managed(|_| {});
    managed.vm.start_page_writer(16, Some(2_000));
    managed
}

/// Moves `managed` over `link`, does `meanwhile` when the link's fault has happened, and returns why it did not move.
fn fail(managed: &ManagedVm, link: &Link, meanwhile: impl FnOnce()) -> String {
    let mut moving = managed.begin_to_migrate(link.address(), &json!({ "compression": "never" }));
    link.wait_for_fault();
    meanwhile();
    moving.answer().fault()
}

#[test]
fn what_was_damaged_on_the_way_is_noticed_and_the_guest_goes_on_where_it_is() {
    let managed = guest();
    for (toward, byte) in [
        (Toward::Destination, 20),
        (Toward::Destination, 1 << 20),
        (Toward::Destination, 6 << 20),
        (Toward::Source, 20),
    ] {
        let receiver = Receiver::start();
        let link = Link::failing(receiver.address(), toward, byte, Fault::Flip);
        let reason = fail(&managed, &link, || ());
        if byte > 1 << 10 {
            assert!(reason.contains("damaged"), "byte {byte}: {reason}");
        }
        managed.check_goes_on();
        assert_eq!(receiver.managed.vm.wait(), Exit::Error, "byte {byte}");
    }
    // Nothing of all that is in the way of the next.
    managed.move_to(Receiver::start(), &json!({}));
}

#[test]
fn a_link_that_is_cut_for_three_seconds_only_delays_the_guest() {
    let (managed, receiver) = (guest(), Receiver::start());
    let link = Link::failing(receiver.address(), Toward::Destination, 6 << 20, Fault::Silence);
    let mut moving = managed.begin_to_migrate(link.address(), &json!({ "compression": "never" }));
    link.wait_for_fault();
    sleep(Duration::from_secs(3));
    link.heal();
    moving.answer().success();
    assert_eq!(managed.vm.wait(), Exit::Shutdown);
    receiver.managed.check_goes_on();
}

#[test]
fn a_link_that_is_cut_for_good_leaves_the_guest_where_it_is_whenever_that_happens() {
    let managed = guest();
    for byte in MOMENTS {
        let receiver = Receiver::start();
        let link = Link::failing(receiver.address(), Toward::Destination, byte, Fault::Silence);
        fail(&managed, &link, || ());
        managed.check_goes_on();
        assert_eq!(receiver.managed.vm.wait(), Exit::Error, "after {byte} bytes");
    }
}

#[test]
fn a_destination_that_dies_leaves_the_guest_where_it_is_whenever_that_happens() {
    let managed = guest();
    for byte in MOMENTS {
        let receiver = Receiver::start();
        let link = Link::failing(receiver.address(), Toward::Destination, byte, Fault::Silence);
        fail(&managed, &link, || {
            receiver.managed.vm.kill();
            receiver.managed.vm.wait();
            link.heal();
        });
        managed.check_goes_on();
    }
    managed.move_to(Receiver::start(), &json!({}));
}

#[test]
fn a_source_that_dies_before_it_hands_its_guest_over_takes_it_along() {
    for byte in MOMENTS {
        let (managed, receiver) = (guest(), Receiver::start());
        let link = Link::failing(receiver.address(), Toward::Destination, byte, Fault::Silence);
        let _moving = managed.begin_to_migrate(link.address(), &json!({ "compression": "never" }));
        link.wait_for_fault();
        managed.vm.kill();
        managed.vm.wait();
        link.heal();
        assert_eq!(receiver.managed.vm.wait(), Exit::Error, "after {byte} bytes");
        assert_eq!(receiver.managed.vm.console().text(), "", "after {byte} bytes");
    }
}
