//! Times of a coordinator: all interleavings without time are looked at in the model, whole lives in the simulation.

use std::time::Duration;

use super::*;
use crate::id::{Generation, Host, Incarnation, MemberId};
use crate::member::{self, Member};
use crate::message::{Envelope, SeatHello, Stage, Standing, ToSeat};
use crate::spec::{Interval, MemberSpec, Timing};

const MS: Nanos = 1_000_000;
const GROUP: GroupId = GroupId(uuid::Uuid::nil());
const SEAT: Seat = Seat {
    member: MemberId(0),
    incarnation: Incarnation::FIRST,
};

fn engine() -> Engine {
    let host = Host("a".to_owned());
    let spec = GroupSpec {
        name: "g".to_owned(),
        members: vec![MemberSpec {
            name: "vm".to_owned(),
            host: host.clone(),
            restore: None,
        }],
        backups: Vec::new(),
        interval: Interval::default(),
        timing: Timing::default(),
    };
    let (mut engine, _) = Engine::create(GROUP, spec, 0).expect("a group");
    let body = SeatHello {
        seat: SEAT,
        host,
        macs: Vec::new(),
        standing: Standing {
            stage: Stage::Open,
            cut: 0,
            permanent: 0,
        },
    };
    let hello = Envelope {
        group: GROUP,
        generation: Generation(0),
        body,
    };
    engine.on(Input::Event(Event::Hello(hello)), 0);
    engine
}

fn has_failed(actions: &[Action]) -> bool {
    actions
        .iter()
        .any(|action| matches!(action, Action::Report(Report::Failed { seat: SEAT, .. })))
}

#[test]
fn who_is_silent_for_as_long_as_suspicion_takes_has_failed() {
    let mut engine = engine();
    let mut now = 0;
    while now < 240 * MS {
        now = engine.wakes_at();
        assert!(now >= 250 * MS || !has_failed(&engine.on(Input::Tick, now)), "at {now}");
    }
    let now = now.max(250 * MS);
    assert!(has_failed(&engine.on(Input::Tick, now)));
}

#[test]
fn a_coordinator_that_was_asleep_takes_nobody_for_silent_meanwhile() {
    let mut engine = engine();
    engine.on(Input::Tick, engine.wakes_at());
    assert!(!has_failed(&engine.on(Input::Tick, 10_000 * MS)));
}

fn say(member: &mut Member, generation: u64, body: ToSeat, now: Nanos) -> Vec<member::Do> {
    let generation = Generation(generation);
    let envelope = Envelope {
        group: GROUP,
        generation,
        body,
    };
    member.on(member::Input::Said(envelope), now)
}

#[test]
fn a_member_hears_no_lower_generation_and_goes_back_once_in_each() {
    let mut member = Member::joining(crate::id::Identity {
        group: GROUP,
        seat: SEAT,
    });
    let back = |cut| vec![member::Do::Call(member::Call::RollBack(cut))];
    assert_eq!(say(&mut member, 2, ToSeat::RollBack(7), 0), back(7));
    assert_eq!(say(&mut member, 2, ToSeat::RollBack(7), 0), []);
    assert_eq!(say(&mut member, 1, ToSeat::Unprotect(9), 0), []);
    assert_eq!(member.standing().stage, Stage::GoingBack);
}

#[test]
fn a_member_on_its_own_runs_without_a_lease() {
    let mut member = Member::joining(crate::id::Identity {
        group: GROUP,
        seat: SEAT,
    });
    let late = crate::lease::nanos(Duration::from_secs(1000));
    member.on(member::Input::Tick(MemberStatus::default()), late);
    assert!(member.runs());
    assert_eq!(member.stops_at(), None);
}
