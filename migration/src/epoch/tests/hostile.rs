//! Primaries that say what they may not, or the right thing at the wrong time.

use serde_bytes::ByteBuf;

use super::super::message::{Header, ToPrimary, ToStandby};
use super::super::{PROTECT, PrimaryLink};
use super::*;
use crate::batch::{self, Batch, Encoding, Kind, Record};
use crate::handshake::{self, Wanted};
use crate::link::SourceLink;
use crate::transport;
use crate::wire;
use std::io::{IoSlice, Write};
use std::time::Duration;

const PAGES: [u64; 1] = [4];

/// Something that a primary says.
#[derive(Clone)]
enum Said {
    Message(ToStandby),
    Batch(batch::Header, Vec<u8>),
}

/// Has a standby hear `said`, and returns why it has no primary any more, its image, and the standby.
fn hears(said: &[Said]) -> (String, Vec<Vec<u8>>, Standby<Twin>) {
    let directory = tempfile::tempdir().expect("a directory");
    let to = Endpoint::Unix(directory.path().join("standby"));
    let security = Security::default();
    let listener = Listener::bind(&to, &security).expect("a socket");
    let status = Status::default();
    let waiting = Waiting {
        listener: &listener,
        status: &status,
        on_thread: Arc::new(|| ()),
    };
    let (notices, told) = channel();
    let standby = thread::scope(|scope| {
        let accepting =
            scope.spawn(|| Standby::accept(&waiting, &mut Host::default(), &options(), notices).expect("a standby"));
        let connection = transport::connect(&to, &security).expect("it listens");
        let mut link = SourceLink::new(connection);
        handshake::hello(&mut link, PROTECT).expect("it speaks the same");
        let wanted = Wanted {
            streams: 1,
            ..Wanted::default()
        };
        handshake::reserve(&mut link, &reservation(&PAGES), wanted).expect("it is built");
        let mut link = PrimaryLink::new(link.into_connection());
        for said in said {
            let taken = match said {
                Said::Message(message) => link.send(message).is_ok(),
                Said::Batch(header, rest) => {
                    let bytes = [&header.to_wire()[..], rest].concat();
                    link.connection().write_all(&bytes).is_ok()
                }
            };
            // It may have heard enough before the end.
            if !taken {
                break;
            }
        }
        // Whatever it answers, until it has enough.
        while link.receive("an answer", Duration::from_secs(5)).is_ok() {}
        accepting.join().expect("no panic")
    });
    let reason = told.iter().find_map(|notice| match notice {
        Notice::PrimaryLost(reason) => Some(reason),
        Notice::Seeded | Notice::Holds(_) => None,
    });
    let images = standby.vm().contents();
    (reason.expect("it has enough"), images, standby)
}

fn epoch(number: u64, generation: u64) -> Said {
    let state = state(number);
    Said::Message(ToStandby::Epoch(Header {
        number,
        generation,
        sections: state.entries,
        state: ByteBuf::from(state.bytes),
    }))
}

fn pages(round: u32, sequence: u64, first: u64, encoding: Encoding, payload: &[u8]) -> Said {
    let mut batch = Batch::default();
    batch.records.push(Record {
        first,
        pages: 1,
        encoding,
        bytes: payload.len().try_into().expect("few"),
    });
    let mut rest = Vec::new();
    batch.records_to_wire(&mut rest);
    rest.extend(payload);
    let header = batch::Header {
        kind: Kind::Pages,
        image: 0,
        records: 1,
        round,
        payload: payload.len().try_into().expect("few"),
        sequence,
        checksum: batch::checksum(&[IoSlice::new(&rest)]),
    };
    Said::Batch(header, rest)
}

fn end(round: u32, sequence: u64) -> Said {
    let header = batch::Header {
        kind: Kind::RoundEnd,
        image: 0,
        records: 0,
        round,
        payload: 0,
        sequence,
        checksum: batch::checksum(&[]),
    };
    Said::Batch(header, Vec::new())
}

/// Seeded, with epoch 1 and its one page, of ones.
fn opening() -> Vec<Said> {
    vec![
        Said::Message(ToStandby::Seeded),
        epoch(1, 7),
        pages(1, 0, 2, Encoding::Raw, &[1; PAGE_BYTES]),
        end(1, 1),
    ]
}

#[test]
fn what_may_not_come_ends_the_link_and_touches_nothing() {
    let message = |message: ToStandby| vec![Said::Message(message)];
    let cases: Vec<(&str, Vec<Said>)> = vec![
        ("Round where Epoch", message(ToStandby::Round)),
        ("Seeded where Epoch", message(ToStandby::Seeded)),
        ("its number is 1, after 1", vec![epoch(1, 7)]),
        ("its number is 0, after 1", vec![epoch(0, 7)]),
        ("generation 6, where 7", vec![epoch(2, 6)]),
        ("generation 8, where 7", vec![epoch(2, 8)]),
        (
            "round 1 in round 2",
            vec![epoch(2, 7), pages(1, 2, 0, Encoding::Zero, &[])],
        ),
        (
            "number 0 where 2",
            vec![epoch(2, 7), pages(2, 0, 0, Encoding::Zero, &[])],
        ),
        ("pages 4..5", vec![epoch(2, 7), pages(2, 2, 4, Encoding::Zero, &[])]),
        (
            "not a delta",
            vec![epoch(2, 7), pages(2, 2, 0, Encoding::Delta, &[0xff; 30])],
        ),
        ("Lz4", vec![epoch(2, 7), pages(2, 2, 0, Encoding::Lz4, &[0xff; 30])]),
        (
            "not a pattern",
            vec![epoch(2, 7), pages(2, 2, 0, Encoding::Pattern, &[0xff; 30])],
        ),
        ("a good epoch, then nonsense", vec![epoch(2, 7), end(2, 2), end(2, 3)]),
    ];
    for (what, said) in cases {
        let (reason, image, mut standby) = hears(&[opening(), said].concat());
        if !what.starts_with("a good") {
            assert!(reason.contains(what), "{what}: {reason}");
        }
        assert!(image == [vec![0; 4 * PAGE_BYTES]], "{what}: the image was touched");
        // What it held before is as good as it was.
        standby.permanent(1).unwrap();
        let twin = standby.promote(1).unwrap();
        assert!(
            twin.contents()[0][2 * PAGE_BYTES..3 * PAGE_BYTES] == [1; PAGE_BYTES],
            "{what}"
        );
    }
}

#[test]
fn an_epoch_before_all_was_sent_once_is_refused() {
    let (reason, ..) = hears(&[epoch(1, 7)]);
    assert!(reason.contains("Epoch where Round or Seeded"), "{reason}");
}

#[test]
fn an_epoch_larger_than_the_vm_is_refused() {
    let mut said = opening();
    said.push(epoch(2, 7));
    // The state counts too, up to its own limit: this is beyond both.
    let page = pages(2, 0, 0, Encoding::Raw, &[7; PAGE_BYTES]);
    let Said::Batch(header, rest) = page else {
        unreachable!()
    };
    for sequence in 2..20_000 {
        said.push(Said::Batch(batch::Header { sequence, ..header }, rest.clone()));
    }
    let (reason, ..) = hears(&said);
    assert!(reason.contains("as many as the whole VM"), "{reason}");
}

#[test]
fn a_state_that_is_not_what_was_sent_is_refused() {
    let Said::Message(ToStandby::Epoch(mut header)) = epoch(2, 7) else {
        unreachable!()
    };
    header.state[0] ^= 1;
    let damaged = Said::Message(ToStandby::Epoch(header));
    let (reason, ..) = hears(&[opening(), vec![damaged]].concat());
    assert!(reason.contains("state of an epoch"), "{reason}");
}

/// What is said, byte for byte: what other releases speak must not change.
#[test]
fn epochs_are_spoken_as_they_always_were() {
    let header = Header {
        number: 300,
        generation: 7,
        sections: Vec::new(),
        state: ByteBuf::from(*b"state"),
    };
    let reason = || "no".to_owned();
    let said = [
        ToStandby::Round,
        ToStandby::Seeded,
        ToStandby::Epoch(header),
        ToStandby::RolledBack { cut: 299 },
        ToStandby::Alive,
        ToStandby::Abort { reason: reason() },
    ]
    .map(|message| wire::encode(&message).unwrap());
    let answered = [
        ToPrimary::RoundApplied,
        ToPrimary::Seeded,
        ToPrimary::Holds {
            number: 300,
            room: true,
        },
        ToPrimary::RolledBack { cut: 299 },
        ToPrimary::Alive { room: false },
        ToPrimary::Abort { reason: reason() },
    ]
    .map(|message| wire::encode(&message).unwrap());
    for (name, bytes) in [("said", said.concat()), ("answered", answered.concat())] {
        let path = format!("{}/src/epoch/tests/golden/version_1_{name}", env!("CARGO_MANIFEST_DIR"));
        if std::env::var_os("UPDATE_GOLDEN").is_some() {
            std::fs::write(&path, &bytes).unwrap();
        }
        assert!(
            std::fs::read(&path).unwrap() == bytes,
            "{path}: version 1 was something else"
        );
    }
}
