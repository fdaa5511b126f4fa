//! Links that fail and monitors that die while a guest moves: it goes on in one place, and never in two.

use std::thread::sleep;
use std::time::Duration;

use cutover_tests::{Exit, Fault, Guest, Link, ManagedVm, Receiver, Toward};
use serde_json::json;

/// A moment of a migration: after so many bytes in one direction.
struct Moment {
    toward: Toward,
    byte: u64,
    /// Whether the destination has heard of the guest by then. If not, it waits for another.
    known: bool,
}

const MOMENTS: [Moment; 3] = [
    // Nothing was said yet.
    Moment {
        toward: Toward::Destination,
        byte: 0,
        known: false,
    },
    // The source has said who it is.
    Moment {
        toward: Toward::Source,
        byte: 0,
        known: true,
    },
    // Memory is being sent.
    Moment {
        toward: Toward::Destination,
        byte: 6 << 20,
        known: true,
    },
];

impl Moment {
    /// The way to `receiver`, with `fault` at this moment.
    fn link(&self, receiver: &Receiver, fault: Fault) -> Link {
        Link::failing(receiver.address(), self.toward, self.byte, fault)
    }

    /// Checks that nothing is left of the migration at `receiver`.
    #[track_caller]
    fn check(&self, receiver: &Receiver) {
        if self.known {
            receiver.check_given_up();
        } else {
            assert!(receiver.managed.vm.monitor().is_running());
        }
    }
}

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
    for byte in [1 << 20, 6 << 20] {
        let receiver = Receiver::start();
        let link = Link::failing(receiver.address(), Toward::Destination, byte, Fault::Flip);
        let reason = fail(&managed, &link, || ());
        assert!(reason.contains("damaged"), "byte {byte}: {reason}");
        managed.check_goes_on();
        receiver.check_given_up();
    }
    for moment in &MOMENTS[..2] {
        let receiver = Receiver::start();
        let link = moment.link(&receiver, Fault::Flip);
        fail(&managed, &link, || ());
        managed.check_goes_on();
        moment.check(&receiver);
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
    for moment in MOMENTS {
        let receiver = Receiver::start();
        fail(&managed, &moment.link(&receiver, Fault::Silence), || ());
        managed.check_goes_on();
        moment.check(&receiver);
    }
}

#[test]
fn a_destination_that_dies_leaves_the_guest_where_it_is_whenever_that_happens() {
    let managed = guest();
    for moment in MOMENTS {
        let receiver = Receiver::start();
        let link = moment.link(&receiver, Fault::Silence);
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
    for moment in MOMENTS {
        let (managed, receiver) = (guest(), Receiver::start());
        let link = moment.link(&receiver, Fault::Silence);
        let _moving = managed.begin_to_migrate(link.address(), &json!({ "compression": "never" }));
        link.wait_for_fault();
        managed.vm.kill();
        managed.vm.wait();
        link.heal();
        moment.check(&receiver);
    }
}
