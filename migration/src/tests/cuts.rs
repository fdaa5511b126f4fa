//! Links that break, and bytes that change, at every place there is.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use proptest::prelude::*;

use super::made_up::{Bytes, Host, Source};
use super::proxy::{Action, Ended, Fault, Transcript, Trouble, Way, migrate_over, migrate_watched, observed_in};
use crate::error::Error;
use crate::options::{Compression, Options, PostCopy};
use crate::status::{Phase, Status};
use crate::vm::Outcome;

fn options(streams: u8) -> Options {
    Options {
        streams,
        compression: Compression::Never,
        downtime: Duration::from_secs(60),
        ..Options::default()
    }
}

/// Migrates over a link on which `fault` happens, and checks that it leaves one VM that runs: or none, if the source
/// does not know what became of what it handed over, and says so.
fn survives(mut source: Source, options: &Options, fault: Fault) {
    let host = Host::new(&source.world);
    let built = host.built.clone();
    let Ended {
        at_source,
        at_destination,
        ..
    } = migrate_over(&mut source, host, options, Some(fault));
    let runs_there = at_destination.is_ok();
    assert_eq!(
        built.load(Ordering::SeqCst),
        0,
        "{fault:?}: left behind at the destination"
    );
    if let Ok(there) = &at_destination {
        assert!(
            there.contents().expect("all came") == source.contents(),
            "{fault:?}: contents differ"
        );
    }
    let running = source.world.running();
    match (&source.outcome, source.resumed) {
        (Some(Outcome::RunsThere), false) => assert!(runs_there && at_source.is_ok(), "{fault:?}"),
        (Some(Outcome::Unknown { .. }), false) => assert_eq!(running, u32::from(runs_there), "{fault:?}"),
        (None, true) => assert!(!runs_there && at_source.is_err(), "{fault:?}: {at_source:?}"),
        other => panic!("{fault:?}: {other:?}"),
    }
    if source.outcome.is_none() {
        assert_eq!(running, 1, "{fault:?}");
    }
}

fn clean_run(pages: u64, streams: u8) -> Vec<Transcript> {
    let mut source = Source::new(vec![Bytes::filled(pages)], None);
    let host = Host::new(&source.world);
    let ended = migrate_over(&mut source, host, &options(streams), None);
    ended.at_source.expect("nothing is in the way");
    ended.transcripts
}

/// Where messages and batches begin.
fn boundaries(bytes: &[u8]) -> Vec<usize> {
    let begins = |at: &usize| [&b"CoMg"[..], b"CoPg"].contains(&&bytes[*at..*at + 4]);
    (0..bytes.len().saturating_sub(4)).filter(begins).collect()
}

#[test]
fn a_link_cut_at_any_message_leaves_one_vm() {
    const PAGES: u64 = 9;
    for streams in [1, 2] {
        for (connection, transcript) in clean_run(PAGES, streams).iter().enumerate() {
            let ways = [
                (Way::ToDestination, &transcript.to_destination),
                (Way::ToSource, &transcript.to_source),
            ];
            for (way, bytes) in ways {
                // With one more stream, whoever is gone before it came is waited for, which takes its time.
                let offsets: &[usize] = if streams == 1 { &[0, 1, 23, 25, 41] } else { &[0] };
                let around = boundaries(bytes)
                    .into_iter()
                    .flat_map(|at| offsets.iter().map(move |offset| at + offset));
                // Who cannot attach a stream is waited for, which takes its time: once is enough.
                let first = if connection == 0 { 0 } else { 25 };
                for at in around
                    .filter(|&at| first <= at && at < bytes.len())
                    .chain(bytes.len().checked_sub(1))
                {
                    let fault = Fault {
                        connection,
                        way,
                        at,
                        action: Action::Cut,
                    };
                    survives(Source::new(vec![Bytes::filled(PAGES)], None), &options(streams), fault);
                }
            }
        }
    }
}

#[test]
fn a_link_cut_at_any_byte_of_an_answer_leaves_one_vm() {
    const PAGES: u64 = 2;
    let answers = clean_run(PAGES, 1)[0].to_source.len();
    for at in 0..answers {
        let fault = Fault {
            connection: 0,
            way: Way::ToSource,
            at,
            action: Action::Cut,
        };
        survives(Source::new(vec![Bytes::filled(PAGES)], None), &options(1), fault);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]

    #[test]
    fn whatever_happens_to_a_byte_contents_are_right_or_it_goes_on_at_the_source(
        streams in 1..4u8,
        connection in 0..4usize,
        to_destination in prop::bool::weighted(0.7),
        at in 0..600_000usize,
        near_the_beginning in any::<bool>(),
        bits in prop::option::of(1..=255u8),
    ) {
        let fault = Fault {
            connection: connection % usize::from(streams),
            way: if to_destination { Way::ToDestination } else { Way::ToSource },
            at: if near_the_beginning || !to_destination { at % 3000 } else { at },
            action: bits.map_or(Action::Cut, Action::Flip),
        };
        survives(Source::new(vec![Bytes::filled(300)], Some(40)), &options(streams), fault);
    }
}

#[test]
fn a_link_that_stands_still_for_some_seconds_is_survived() {
    for (way, at) in [(Way::ToDestination, 100_000), (Way::ToSource, 150)] {
        let mut source = Source::new(vec![Bytes::filled(100)], Some(40));
        let fault = Fault {
            connection: 0,
            way,
            at,
            action: Action::Stall(Duration::from_secs(3)),
        };
        let host = Host::new(&source.world);
        let ended = migrate_over(&mut source, host, &options(1), Some(fault));
        ended.at_source.expect("it went on");
        let there = ended.at_destination.expect("it went on");
        assert!(there.contents().expect("all came") == source.contents());
    }
}

#[test]
fn a_byte_that_changed_is_noticed_wherever_it_is_and_named() {
    let sent = &clean_run(9, 1)[0].to_destination;
    let boundaries = boundaries(sent);
    let of_messages = |&&at: &&usize| sent[at..].starts_with(b"CoMg");
    let [round, state] = [2, 4].map(|nth| *boundaries.iter().filter(of_messages).nth(nth).expect("a message"));
    let first_batch = boundaries[boundaries.iter().position(|&at| at == round).expect("Round") + 1];
    for (at, what) in [
        (round + 7, "the header of a message"),
        (state + 30, "a message"),
        (first_batch + 13, "the header of a batch of pages"),
        (first_batch + 41, "batch 0 of pages, of round 1"),
        (first_batch + 5000, "batch 0 of pages, of round 1"),
    ] {
        let mut source = Source::new(vec![Bytes::filled(9)], None);
        let fault = Fault {
            connection: 0,
            way: Way::ToDestination,
            at,
            action: Action::Flip(0x10),
        };
        let host = Host::new(&source.world);
        let ended = migrate_over(&mut source, host, &options(1), Some(fault));
        let noticed = ended.at_destination.expect_err("it was noticed");
        assert!(
            matches!(&noticed, Error::Damaged { what: found, .. } if found.starts_with(what)),
            "{what}: {noticed}"
        );
        let told = ended.at_source.expect_err("it was told");
        assert!(
            matches!(&told, Error::Aborted(reason) if reason.contains(what)),
            "{told}"
        );
        assert!(source.resumed);
    }
}

#[test]
fn a_link_cut_after_the_switch_to_post_copy_is_a_loss_that_both_sides_know_of() {
    let post_copy = Options {
        downtime: Duration::ZERO,
        post_copy: PostCopy::Always,
        ..options(1)
    };
    let mut source = Source::new(vec![Bytes::filled(500)], Some(400));
    let host = Host::new(&source.world);
    let link = Trouble::default();
    let cut = Arc::clone(&link.cut);
    let here = observed_in(Phase::PostCopy, move || cut.store(true, Ordering::SeqCst));
    let ended = migrate_watched(&mut source, host, &post_copy, link, [&here, &Status::default()]);
    let lost_here = ended.at_source.expect_err("the link was cut");
    assert!(matches!(lost_here, Error::Lost(_)), "{lost_here}");
    assert!(matches!(source.outcome, Some(Outcome::Lost { .. })));
    let there = ended.at_destination.expect("it was cut after that");
    there.contents().expect_err("not all came");
    assert_eq!(source.world.running(), 1);
}

#[test]
fn a_link_cut_before_the_last_word_of_post_copy_leaves_the_source_in_doubt_of_a_vm_that_runs() {
    /// Bytes of Complete.
    const COMPLETE: usize = crate::wire::HEADER_BYTES + 1;
    let post_copy = Options {
        downtime: Duration::ZERO,
        post_copy: PostCopy::Always,
        ..options(1)
    };
    let run = |fault| {
        let mut source = Source::new(vec![Bytes::filled(500)], Some(400));
        let host = Host::new(&source.world);
        let ended = migrate_over(&mut source, host, &post_copy, fault);
        (source, ended)
    };
    let said = run(None).1.transcripts[0].to_source.len();
    let (source, ended) = run(Some(Fault {
        connection: 0,
        way: Way::ToSource,
        at: said - COMPLETE,
        action: Action::Cut,
    }));
    let in_doubt = ended.at_source.expect_err("the link was cut");
    assert!(matches!(in_doubt, Error::OutcomeUnknown(_)), "{in_doubt}");
    assert!(matches!(source.outcome, Some(Outcome::Unknown { .. })));
    let there = ended.at_destination.expect("it has everything");
    assert!(there.contents().expect("all came") == source.contents());
    assert_eq!(source.world.running(), 1);
}
