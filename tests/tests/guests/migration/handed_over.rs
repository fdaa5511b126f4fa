//! Monitors that die, and links that end, once a guest is handed over: whoever is left knows what became of it, or says
//! that he does not, and two of it never run.

use cutover_tests::{Api, Exit, Link, ManagedVm, Message, Receiver, cli};
use serde_json::{Value, json};

use super::storage::guest_with_disk;

/// Has the guest of `managed` leave over `link`, waits until that falls silent, and for the answer when `meanwhile` is over.
#[track_caller]
fn leave(managed: &ManagedVm, link: &Link, options: &Value, meanwhile: impl FnOnce()) -> String {
    let mut moving = managed.begin_to_migrate(link.address(), options);
    link.wait_for_fault();
    meanwhile();
    let answer = moving.answer();
    assert_eq!(answer.status, 504, "{answer:?}");
    answer.json()["fault_message"].to_string()
}

/// Kills the monitor behind `managed`, so that the other one learns of it over `link`.
fn kill(managed: &ManagedVm, link: &Link) {
    managed.vm.kill();
    managed.vm.wait();
    link.heal();
}

/// `cutover vm OPERATION` of the VM behind `api`.
fn vm(operation: &str, api: &Api) -> cli::Finished {
    cli::cutover(["vm".as_ref(), operation.as_ref(), api.socket().as_os_str()])
}

/// Has back what was handed over, and checks that it goes on as it was then.
#[track_caller]
fn reclaim(managed: &ManagedVm) {
    assert_eq!(managed.api.get("/v1/info")["state"], "handed_over");
    for operation in ["reclaim", "resume"] {
        let finished = vm(operation, &managed.api);
        assert_eq!(finished.exit, Exit::Shutdown, "{operation}: {finished:?}");
    }
    managed.check_goes_on();
    managed.vm.check_chunks(1);
}

const IN_DOUBT: &str = "whether it runs at the destination is not known";

#[test]
fn a_guest_of_which_no_answer_came_waits_until_somebody_has_looked_and_two_never_have_its_disk() {
    let (managed, _disk) = guest_with_disk();
    managed.vm.write_chunk(0);

    // The destination was never told to run it.
    let receiver = Receiver::start();
    let link = Link::keeping(receiver.address(), Message::Handoff);
    let fault = leave(&managed, &link, &json!({}), || kill(&receiver.managed, &link));
    assert!(fault.contains(IN_DOUBT), "{fault}");
    assert_eq!(receiver.managed.vm.console().text(), "", "the guest has run there");
    let refused = vm("resume", &managed.api);
    assert!(refused.stderr.contains("may run there"), "{refused:?}");
    reclaim(&managed);

    // It runs there, and nothing more is heard of that.
    let receiver = Receiver::start();
    let link = Link::keeping(receiver.address(), Message::Running);
    let fault = leave(&managed, &link, &json!({}), || ());
    assert!(fault.contains(IN_DOUBT), "{fault}");
    receiver.managed.check_goes_on();
    let refused = vm("reclaim", &managed.api);
    assert!(refused.stderr.contains("in use"), "{refused:?}");
    assert_eq!(managed.api.get("/v1/info")["state"], "handed_over");
    // It is gone, before it has written to the disk.
    kill(&receiver.managed, &link);
    reclaim(&managed);
    managed.move_to(Receiver::start(), &json!({}));
}

#[test]
fn a_guest_goes_on_at_its_destination_when_the_source_dies_once_it_is_handed_over() {
    let (mut managed, _disk) = guest_with_disk();
    managed.vm.write_chunk(0);
    for message in [Message::Handoff, Message::Running] {
        let receiver = Receiver::start();
        let link = Link::keeping(receiver.address(), message);
        let _moving = managed.begin_to_migrate(link.address(), &json!({}));
        link.wait_for_fault();
        kill(&managed, &link);
        managed = receiver.managed;
        managed.check_goes_on();
        managed.vm.check_chunks(1);
    }
}

#[test]
fn whoever_is_left_while_memory_follows_a_guest_says_that_it_is_lost() {
    // Less than it takes to send what is left.
    let post_copy = json!({ "post_copy": "now", "downtime_ms": 1 });
    let (managed, _disk) = guest_with_disk();
    managed.vm.write_chunk(0);
    let receiver = Receiver::start();
    let link = Link::silent_after(receiver.address(), Message::Running);
    let fault = leave(&managed, &link, &post_copy, || kill(&receiver.managed, &link));
    assert!(fault.contains("lost: it ran at the destination before all"), "{fault}");
    // As it was when it left; nobody else has it, and it has not written to its disk since.
    reclaim(&managed);

    let receiver = Receiver::start();
    let link = Link::silent_after(receiver.address(), Message::Running);
    let _moving = managed.begin_to_migrate(link.address(), &post_copy);
    link.wait_for_fault();
    kill(&managed, &link);
    assert_eq!(receiver.managed.vm.wait(), Exit::Error);
    let log = receiver.managed.vm.log();
    assert!(
        log.contains("the VM is lost: ") && log.contains("of its memory"),
        "{log}"
    );
}
