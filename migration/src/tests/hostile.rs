//! Peers that speak something else, or the right thing at the wrong time.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;

use proptest::prelude::*;
use serde_bytes::ByteBuf;
use uuid::Uuid;

use super::made_up::{Bytes, Host, Source};
use crate::batch::{self, Batch, Encoding, HEADER_BYTES, Header, Kind, PAYLOAD_BYTES_MAX, RECORDS_MAX, Record};
use crate::destination::{Waiting, receive};
use crate::error::Error;
use crate::message::{Message, SavedState, ToDestination, ToSource, VERSION, VERSION_OLDEST};
use crate::status::Status;
use crate::transport::{Endpoint, Listener, Security};
use crate::vm::SourceVm;
use crate::wire;

/// Has a destination hear `said`, and returns why it does not run the VM, and what it answered.
fn destination_hears(said: &[u8]) -> (Error, Vec<u8>) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let listener = Listener::bind(&Endpoint::Unix(path.clone()), &Security::default()).unwrap();
    let source = Source::new(vec![Bytes::new(4)], None);
    let mut host = Host::new(&source.world);
    let built = host.built.clone();
    let status = Status::default();
    let waiting = Waiting {
        listener: &listener,
        status: &status,
        on_thread: Arc::new(|| ()),
    };
    let outcome = thread::scope(|scope| {
        let destination = scope.spawn(|| receive(&waiting, &mut host));
        let mut peer = UnixStream::connect(&path).unwrap();
        // It may have heard enough before the end.
        peer.write_all(said).ok();
        peer.shutdown(std::net::Shutdown::Write).ok();
        let mut answer = Vec::new();
        peer.read_to_end(&mut answer).ok();
        // Who does not even say Hello is not what it waits for.
        status.cancel();
        (destination.join().unwrap().expect_err("it is no VM"), answer)
    });
    assert_eq!(built.load(Ordering::SeqCst), 0, "left behind");
    assert_eq!(source.world.running(), 1);
    outcome
}

fn bytes(messages: &[ToDestination]) -> Vec<u8> {
    messages
        .iter()
        .flat_map(|message| wire::encode(message).unwrap())
        .collect()
}

fn hello() -> ToDestination {
    ToDestination::Hello {
        oldest: VERSION_OLDEST,
        newest: VERSION,
        features: 0,
    }
}

fn reserve() -> ToDestination {
    let source = Source::new(vec![Bytes::new(4)], None);
    ToDestination::Reserve {
        reservation: serde_json::to_string(&source.reservation()).unwrap(),
        streams: 1,
        pull: false,
        handed: Vec::new(),
    }
}

fn round(number: u32, last: bool) -> ToDestination {
    ToDestination::Round { number, last }
}

fn round_end(round: u32, sequence: u64) -> Vec<u8> {
    header(Kind::RoundEnd, round, sequence).to_wire().to_vec()
}

fn header(kind: Kind, round: u32, sequence: u64) -> Header {
    Header {
        kind,
        image: 0,
        records: 0,
        round,
        payload: 0,
        sequence,
        checksum: batch::checksum(&[]),
    }
}

#[test]
fn a_message_at_the_wrong_time_is_refused_in_every_state_with_what_was_expected() {
    let handoff = || ToDestination::Handoff { generation: 7 };
    let before_state = [bytes(&[hello(), reserve(), round(1, true)]), round_end(1, 0)].concat();
    let cases: [(&str, Vec<u8>); 5] = [
        ("Reserve", bytes(&[hello(), handoff()])),
        ("the next Round", bytes(&[hello(), reserve(), handoff()])),
        ("the next Round", bytes(&[hello(), reserve(), round(2, false)])),
        ("State", [before_state, bytes(&[handoff()])].concat()),
        ("Reserve", bytes(&[hello(), hello()])),
    ];
    for (expected, said) in cases {
        let (error, _) = destination_hears(&said);
        let found = matches!(&error, Error::Unexpected { expected: awaited, .. } if *awaited == expected);
        assert!(found, "where {expected} was expected: {error}");
    }
}

#[test]
fn the_end_of_the_link_in_any_state_leaves_nothing() {
    let said = [bytes(&[hello(), reserve(), round(1, true)]), round_end(1, 0)].concat();
    let mut ends = vec![bytes(&[hello()]), bytes(&[hello(), reserve()]), said.clone()];
    ends.push([said, bytes(&[state()])].concat());
    for said in ends {
        let (error, _) = destination_hears(&said);
        assert!(matches!(error, Error::Ended { .. } | Error::Vm { .. }), "{error}");
    }
}

fn state() -> ToDestination {
    let mut source = Source::new(vec![Bytes::new(4)], None);
    let state = source.stop().unwrap().state;
    ToDestination::State(SavedState {
        sections: state.entries,
        bytes: ByteBuf::from(state.bytes),
        missing: None,
    })
}

#[test]
fn another_generation_than_the_reserved_one_is_not_run() {
    let before = [bytes(&[hello(), reserve(), round(1, true)]), round_end(1, 0)].concat();
    let said = [before, bytes(&[state(), ToDestination::Handoff { generation: 8 }])].concat();
    let (error, _) = destination_hears(&said);
    assert!(matches!(error, Error::Unexpected { .. }), "{error}");
}

#[test]
fn versions_without_one_in_common_are_refused_with_both_ranges() {
    let newer = ToDestination::Hello {
        oldest: VERSION + 1,
        newest: VERSION + 5,
        features: u64::MAX,
    };
    let (_, answer) = destination_hears(&bytes(&[newer]));
    let failed = |error: std::io::Error| panic!("{error}");
    let answer: ToSource = wire::decode(&mut answer.as_slice(), 10_000, failed).expect("a reason");
    let reason = answer.abort_reason().expect("it gives up").to_owned();
    assert!(
        reason.contains(&format!("versions {} to {}", VERSION + 1, VERSION + 5)),
        "{reason}"
    );
}

#[test]
fn lengths_are_not_believed_before_they_are_checked() {
    let message_header = |length: u64, magic: &[u8; 4]| {
        let mut header = magic.to_vec();
        header.extend(u32::try_from(length).unwrap().to_le_bytes());
        header.extend([0; 8]);
        let sum = twox_hash::XxHash3_64::oneshot(&header);
        header.extend(sum.to_le_bytes());
        header
    };
    let failed = |error: std::io::Error| panic!("{error}");
    let long = message_header(u64::from(u32::MAX), b"CoMg");
    let error = wire::decode::<ToDestination>(&mut long.as_slice(), 1000, failed).expect_err("too long");
    assert!(
        error.to_string().contains("4294967295 bytes are more than 1000"),
        "{error}"
    );
    let other = message_header(3, b"HTTP");
    let error = wire::decode::<ToDestination>(&mut other.as_slice(), 1000, failed).expect_err("another protocol");
    assert!(matches!(error, Error::NotAPeer(_)), "{error}");
}

#[test]
fn batches_with_impossible_numbers_are_refused() {
    let mut many = header(Kind::Pages, 1, 0);
    many.records = u16::try_from(RECORDS_MAX + 1).unwrap();
    let mut large = header(Kind::Pages, 1, 0);
    large.payload = u32::try_from(PAYLOAD_BYTES_MAX + 1).unwrap();
    for wrong in [many, large] {
        let error = Header::from_wire(&wrong.to_wire()).expect_err("too much");
        assert!(matches!(error, Error::Invalid { .. }), "{error}");
    }
    let said = |page: u64, round: u32, sequence: u64, image: u8| {
        let mut table = Vec::new();
        let mut batch = Batch::default();
        batch.records.push(Record {
            first: page,
            pages: 1,
            encoding: Encoding::Zero,
            bytes: 0,
        });
        batch.records_to_wire(&mut table);
        let header = Header {
            records: 1,
            image,
            checksum: batch::checksum(&[std::io::IoSlice::new(&table)]),
            ..header(Kind::Pages, round, sequence)
        };
        let opening = bytes(&[hello(), reserve(), self::round(1, false)]);
        [opening, header.to_wire().to_vec(), table].concat()
    };
    for (what, said) in [
        ("which has 4", said(4, 1, 0, 0)),
        ("image", said(u64::MAX, 1, 0, 0)),
        ("round 2 in round 1", said(0, 2, 0, 0)),
        ("number 1 where 0", said(0, 1, 1, 0)),
        ("image 1 of 1", said(0, 1, 0, 1)),
    ] {
        let (error, _) = destination_hears(&said);
        assert!(
            matches!(&error, Error::Invalid { .. }) && error.to_string().contains(what),
            "{what}: {error}"
        );
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn no_bytes_make_a_reader_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let failed = |source| Error::Link { action: "read", source };
        drop(wire::decode::<ToDestination>(&mut bytes.as_slice(), 1 << 20, failed));
        drop(wire::decode::<ToSource>(&mut bytes.as_slice(), 1 << 20, failed));
        if let Some((head, rest)) = bytes.split_first_chunk::<HEADER_BYTES>() {
            drop(Header::from_wire(head));
            // As if the checksum were right, which nobody finds by chance.
            let header = Header { checksum: twox_hash::XxHash3_64::oneshot(rest), ..header(Kind::Pages, 1, 0) };
            for records in 0..=rest.len() / batch::RECORD_BYTES {
                let header = Header {
                    records: u16::try_from(records).unwrap(),
                    payload: u32::try_from(rest.len() - records * batch::RECORD_BYTES).unwrap(),
                    ..header
                };
                if let Ok(records) = batch::records(&header, rest) {
                    prop_assert_eq!(records.map(|(_, bytes)| bytes.len()).sum::<usize>(), header.payload as usize);
                }
            }
        }
    }
}

/// What version 1 says, byte for byte: what other releases speak must not change.
#[test]
fn version_1_is_spoken_as_it_always_was() {
    let session = Uuid::from_bytes(*b"0123456789abcdef");
    let said = bytes(&[
        hello(),
        ToDestination::Attach { session, stream: 1 },
        ToDestination::Reserve {
            reservation: "{}".to_owned(),
            streams: 2,
            pull: true,
            handed: vec!["memory".to_owned()],
        },
        round(300, true),
        ToDestination::State(SavedState {
            sections: Vec::new(),
            bytes: ByteBuf::from(*b"state"),
            missing: Some(ByteBuf::from([5])),
        }),
        ToDestination::Handoff { generation: 7 },
        ToDestination::Abort {
            reason: "no".to_owned(),
        },
        ToDestination::Compare { image: 1, chunk: 9 },
    ]);
    let answered: Vec<u8> = [
        ToSource::Welcome {
            version: 1,
            features: 0,
            session,
        },
        ToSource::Reserved { older: vec![1] },
        ToSource::Refused {
            reasons: vec!["full".to_owned()],
        },
        ToSource::RoundApplied { number: 300 },
        ToSource::Ready,
        ToSource::Running { for_ns: 70_000 },
        ToSource::Want { pages: vec![1, 1000] },
        ToSource::Complete,
        ToSource::Abort {
            reason: "no".to_owned(),
        },
        ToSource::Checksums { checksums: Vec::new() },
        ToSource::Alive,
    ]
    .iter()
    .flat_map(|message| wire::encode(message).unwrap())
    .collect();
    let mut table = Vec::new();
    let mut batch = Batch::default();
    for (first, encoding) in (0..).zip([
        Encoding::Zero,
        Encoding::Raw,
        Encoding::Delta,
        Encoding::Lz4,
        Encoding::Zstd,
    ]) {
        batch.records.push(Record {
            first,
            pages: 1,
            encoding,
            bytes: 3,
        });
    }
    batch.records_to_wire(&mut table);
    let pages = [&header(Kind::Pages, 1, 2).to_wire()[..], &table, &round_end(1, 3)].concat();
    for (name, bytes) in [("said", said), ("answered", answered), ("pages", pages)] {
        let path = format!("{}/src/tests/golden/version_1_{name}", env!("CARGO_MANIFEST_DIR"));
        if std::env::var_os("UPDATE_GOLDEN").is_some() {
            std::fs::write(&path, &bytes).unwrap();
        }
        assert!(
            std::fs::read(&path).unwrap() == bytes,
            "{path}: version 1 was something else"
        );
    }
}
