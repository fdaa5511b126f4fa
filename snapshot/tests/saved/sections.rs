//! Sections of state: read in their own version and in older ones, refused in newer ones.

use cutover_snapshot::Error;
use cutover_snapshot::chain::Chain;
use cutover_snapshot::error::SectionError;
use cutover_snapshot::section::{Payload, SECTIONS_MAX, Section, SectionWriter, State};
use serde::Serialize;

use crate::sample::{Clock, ClockV1, draft, store};

fn state_of(write: impl FnOnce(&mut cutover_snapshot::writer::SnapshotWriter)) -> State {
    let dir = tempfile::tempdir().expect("a directory");
    let mut writer = store(dir.path()).create("state", draft(1, None)).expect("begun");
    write(&mut writer);
    writer.commit().expect("committed");
    let chain = Chain::open(&dir.path().join("state")).expect("a chain");
    chain.state().expect("sound")
}

#[test]
fn sections_read_back_by_name_whatever_the_order() {
    let clock = |guest_ns| Clock {
        guest_ns,
        stopped: guest_ns == 2,
    };
    let state = state_of(|writer| {
        for number in [2, 0, 1] {
            writer
                .section(&format!("clock/{number}"), &clock(number))
                .expect("encodable");
        }
    });
    assert_eq!(state.names().collect::<Vec<_>>(), ["clock/0", "clock/1", "clock/2"]);
    for number in 0..3 {
        assert_eq!(
            state.read::<Clock>(&format!("clock/{number}")).expect("there"),
            clock(number)
        );
    }
}

#[test]
fn an_older_version_of_a_section_is_read() {
    let state = state_of(|writer| writer.section("clock", &ClockV1 { guest_ns: 7 }).expect("encodable"));
    let expected = Clock {
        guest_ns: 7,
        stopped: false,
    };
    assert_eq!(state.read::<Clock>("clock").expect("older"), expected);
}

#[test]
fn what_is_newer_missing_or_something_else_is_refused_by_name() {
    #[derive(Serialize)]
    struct ClockV3(u64);
    impl Section for ClockV3 {
        const VERSION: u16 = 3;
        fn read(payload: &Payload<'_>) -> Result<Self, SectionError> {
            payload.decode().map(Self)
        }
    }
    let state = state_of(|writer| {
        writer.section("clock/new", &ClockV3(1)).expect("encodable");
        writer.payload(
            "clock/long",
            &Payload {
                version: 1,
                bytes: &[1, 2, 3],
            },
        );
        writer.payload("clock/short", &Payload { version: 2, bytes: &[] });
    });
    let error = |name: &str| state.read::<Clock>(name).expect_err(name);
    assert!(matches!(error("clock/none"), Error::SectionMissing { .. }));
    for (name, expected) in [
        ("clock/new", "has version 3, but this release reads versions 1 to 2"),
        ("clock/long", "goes on for 2 bytes after its end"),
        ("clock/short", "does not hold what it should"),
    ] {
        let error = error(name);
        assert!(
            error.to_string().contains(&format!("state.bin: state '{name}'")),
            "{error}"
        );
        let cause = std::error::Error::source(&error).expect("a cause").to_string();
        assert_eq!(cause, expected);
    }
}

#[test]
fn there_is_a_limit_to_state() {
    let dir = tempfile::tempdir().expect("a directory");
    let mut writer = store(dir.path()).create("state", draft(1, None)).expect("begun");
    for number in 0..=SECTIONS_MAX {
        let payload = Payload { version: 1, bytes: &[] };
        writer.payload(&format!("clock/{number}"), &payload);
    }
    let error = writer.commit().expect_err("too many");
    assert!(error.to_string().contains("1025 entries are too many"), "{error}");
}
