//! Migrations that nothing disturbs, and those that are refused.

use std::sync::atomic::Ordering;
use std::time::Duration;

use super::made_up::{Bytes, Host, Source};
use super::proxy::migrate_over;
use crate::error::Error;
use crate::options::{Compression, Options};
use crate::vm::Outcome;

fn options(streams: u8, compression: Compression) -> Options {
    Options {
        streams,
        compression,
        downtime: Duration::from_secs(60),
        ..Options::default()
    }
}

/// Migrates `source`, and has its contents be at the destination.
fn arrives(mut source: Source, options: &Options) {
    let host = Host::new(&source.world);
    let built = host.built.clone();
    let ended = migrate_over(&mut source, host, options, None);
    let report = ended.at_source.expect("nothing is in the way");
    let there = ended.at_destination.expect("nothing is in the way");
    assert!(there == source.contents(), "contents differ");
    assert_eq!(source.outcome, Some(Outcome::RunsThere));
    assert!(!source.resumed);
    assert_eq!(source.world.running(), 1);
    assert_eq!(built.load(Ordering::SeqCst), 0);
    let pages: u64 = source
        .images
        .iter()
        .map(|image| image.content().len() as u64 / 4096)
        .sum();
    assert!(report.pages.total() >= pages, "{report:?}");
    assert!(report.total_ns >= report.downtime.total_ns);
}

#[test]
fn memory_arrives_as_it_was_when_the_guest_stopped() {
    for compression in [Compression::Auto, Compression::Never, Compression::Always] {
        for streams in [1, 2, 5] {
            arrives(
                Source::new(vec![Bytes::filled(1500)], None),
                &options(streams, compression),
            );
        }
    }
}

#[test]
fn memory_arrives_though_the_guest_writes_all_the_time() {
    for streams in [1, 3] {
        arrives(
            Source::new(vec![Bytes::filled(900)], Some(300)),
            &options(streams, Compression::Always),
        );
    }
}

#[test]
fn disks_move_beside_memory() {
    let images = vec![Bytes::filled(200), Bytes::filled(700), Bytes::filled(3)];
    arrives(Source::new(images, Some(20)), &options(2, Compression::Auto));
}

#[test]
fn a_vm_whose_memory_is_handed_over_moves_without_a_page() {
    arrives(Source::new(vec![], None), &options(1, Compression::Auto));
}

#[test]
fn a_limit_holds_while_the_guest_runs() {
    let limited = Options {
        bandwidth: Some(64 << 20),
        ..options(2, Compression::Never)
    };
    arrives(Source::new(vec![Bytes::filled(2000)], None), &limited);
}

#[test]
fn a_refusal_has_all_reasons_and_the_guest_goes_on() {
    let mut source = Source::new(vec![Bytes::filled(10)], Some(5));
    let mut host = Host::new(&source.world);
    host.refuses = vec!["no memory".to_owned(), "no tap".to_owned()];
    let ended = migrate_over(&mut source, host, &Options::default(), None);
    for error in [ended.at_source.map(|_| ()), ended.at_destination.map(|_| ())] {
        let error = error.expect_err("refused");
        assert!(
            matches!(&error, Error::Refused(reasons) if reasons.len() == 2),
            "{error}"
        );
    }
    assert!(source.resumed);
    assert_eq!(source.world.running(), 1);
}

#[test]
fn a_vm_the_destination_could_not_run_goes_on_at_the_source() {
    let mut source = Source::new(vec![Bytes::filled(10)], None);
    let mut host = Host::new(&source.world);
    host.cannot_run = true;
    let ended = migrate_over(&mut source, host, &Options::default(), None);
    let error = ended.at_source.expect_err("it cannot run");
    assert!(
        matches!(&error, Error::Declined(reason) if reason.contains("run the VM")),
        "{error}"
    );
    assert!(source.resumed);
    assert_eq!(source.world.running(), 1);
}

#[test]
fn a_guest_that_writes_too_fast_is_slowed_down_or_stays() {
    let mut source = Source::new(vec![Bytes::filled(600)], Some(600));
    let impossible = Options {
        downtime: Duration::ZERO,
        rounds: 4,
        ..Options::default()
    };
    let host = Host::new(&source.world);
    let ended = migrate_over(&mut source, host, &impossible, None);
    let error = ended.at_source.expect_err("no downtime at all is not to be had");
    assert!(matches!(error, Error::NoConvergence(_)), "{error}");
    let error = ended.at_destination.expect_err("the source gave up");
    assert!(
        matches!(&error, Error::Aborted(reason) if reason.contains("faster")),
        "{error}"
    );
    assert!(source.resumed);
    assert_eq!(source.world.running(), 1);
}
