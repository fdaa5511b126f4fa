//! Migrations that nothing disturbs, and those that are refused.

use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use super::made_up::{Bytes, Host, Source};
use super::proxy::{Trouble, migrate_over, migrate_watched, observed_in};
use crate::destination::{Waiting, receive};
use crate::error::Error;
use crate::options::{Compression, Options, PostCopy};
use crate::report::Report;
use crate::source::{Request, migrate};
use crate::status::{Phase, Status};
use crate::transport::{Endpoint, Listener, Security};
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
fn arrives(source: Source, options: &Options) {
    let host = Host::new(&source.world);
    let pages = pages(&source);
    let report = arrives_at(host, source, options);
    assert!(report.pages.total() >= pages, "{report:?}");
}

fn pages(source: &Source) -> u64 {
    let images = source.images.iter();
    images.map(|image| image.content().len() as u64 / 4096).sum()
}

/// Migrates `source` to `host`, and has its contents be there.
fn arrives_at(host: Host, mut source: Source, options: &Options) -> Report {
    let built = host.built.clone();
    let ended = migrate_over(&mut source, host, options, None);
    let report = ended.at_source.expect("nothing is in the way");
    let there = ended.at_destination.expect("nothing is in the way");
    assert!(
        there.contents().expect("all came") == source.contents(),
        "contents differ"
    );
    assert_eq!(source.outcome, Some(Outcome::RunsThere));
    assert!(!source.resumed);
    assert_eq!(source.world.running(), 1);
    assert_eq!(built.load(Ordering::SeqCst), 0);
    assert!(report.total_ns >= report.downtime.total_ns);
    let parts = &report.downtime;
    assert_eq!(
        parts.stop_ns + parts.pages_ns + parts.state_ns + parts.handoff_ns,
        parts.total_ns,
        "the parts of the downtime make up the whole"
    );
    report
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
fn of_a_disk_that_is_there_in_an_older_version_only_what_differs_is_sent() {
    let source = Source::new(vec![Bytes::filled(100), Bytes::filled(700)], None);
    let mut older = source.images[1].content();
    // Of two chunks of 16 pages; one has become zero meanwhile, and the older copy does not know.
    older[33 * 4096] ^= 1;
    older[163 * 4096..164 * 4096].fill(7);
    let mut host = Host::new(&source.world);
    host.older.insert(1, older);
    let report = arrives_at(host, source, &options(2, Compression::Auto));
    assert_eq!(report.rounds[0].pages.total(), 100 + 2 * 16);
}

#[test]
fn a_disk_that_changes_while_it_is_compared_arrives() {
    let source = Source::new(vec![Bytes::filled(700)], Some(200));
    let mut host = Host::new(&source.world);
    host.older.insert(0, source.images[0].content());
    arrives_at(host, source, &options(1, Compression::Always));
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
    assert!(matches!(&error, Error::Aborted(_)), "{error}");
    assert!(source.resumed);
    assert_eq!(source.world.running(), 1);
}

#[test]
fn memory_follows_a_guest_that_runs_before_all_of_it_is_there() {
    for streams in [1, 3] {
        let post_copy = Options {
            downtime: Duration::ZERO,
            post_copy: PostCopy::Always,
            ..options(streams, Compression::Auto)
        };
        arrives(Source::new(vec![Bytes::filled(3000)], Some(2000)), &post_copy);
    }
}

#[test]
fn pages_the_guest_waits_for_come_before_those_that_are_pushed() {
    let mut source = Source::new(vec![Bytes::filled(4000)], None);
    let memory = Arc::clone(&source.images[0]);
    let here = observed_in(Phase::PreCopy, move || {
        // What is written in the round is missing after it.
        (0..3000).for_each(|page| memory.poke(page, |bytes| bytes[5] ^= 1));
    });
    let host = Host::new(&source.world);
    let slow = Options {
        downtime: Duration::ZERO,
        post_copy: PostCopy::Always,
        bandwidth: Some(40 << 20),
        ..options(1, Compression::Never)
    };
    let ended = migrate_watched(
        &mut source,
        host,
        &slow,
        Trouble::default(),
        [&here, &Status::default()],
    );
    let there = ended.at_destination.expect("nothing is in the way");
    let report = ended.at_source.expect("nothing is in the way");
    assert!(there.contents().expect("all came") == source.contents());
    assert!(report.pages_pulled > 0, "page 3 is waited for when it runs: {report:?}");
}

#[test]
fn descriptors_go_to_a_destination_on_the_same_host() {
    let directory = tempfile::tempdir().unwrap();
    let endpoint = Endpoint::Unix(directory.path().join("socket"));
    let security = Security::default();
    let listener = Listener::bind(&endpoint, &security).unwrap();
    let mut source = Source::new(vec![], None);
    source.handed = vec!["memory".to_owned(), "tap-net0".to_owned()];
    let mut host = Host::new(&source.world);
    let handed = host.handed.clone();
    let (here, there) = (Status::default(), Status::default());
    thread::scope(|scope| {
        let waiting = Waiting {
            listener: &listener,
            status: &there,
            on_thread: Arc::new(|| ()),
        };
        let destination = scope.spawn(move || receive(&waiting, &mut host).map(|_| ()));
        let request = Request {
            to: &endpoint,
            security: &security,
            options: &Options::default(),
            status: &here,
            on_thread: Arc::new(|| ()),
        };
        migrate(&mut source, &request).expect("nothing is in the way");
        destination.join().unwrap().expect("nothing is in the way");
    });
    assert_eq!(*handed.lock().unwrap(), source.handed);
}

/// A status that is cancelled when `phase` begins.
fn cancelled_in(phase: Phase) -> Status {
    let flag = Arc::new(OnceLock::new());
    let own = Arc::clone(&flag);
    let status = observed_in(phase, move || {
        let flag: &Arc<AtomicBool> = own.get().expect("it is set before");
        flag.store(true, Ordering::Relaxed);
    });
    flag.set(status.cancel_flag()).expect("it is set once");
    status
}

#[test]
fn a_migration_can_be_cancelled_in_every_phase_before_the_vm_is_handed_over() {
    for phase in [Phase::Connecting, Phase::Reserving, Phase::PreCopy, Phase::Stopping] {
        for (at_source, streams) in [(true, 1), (true, 3), (false, 1), (false, 3)] {
            let mut source = Source::new(vec![Bytes::filled(600)], Some(200));
            let host = Host::new(&source.world);
            let built = host.built.clone();
            let (cancelled, other) = (cancelled_in(phase), Status::default());
            let both = match at_source {
                true => [&cancelled, &other],
                false => [&other, &cancelled],
            };
            let ended = migrate_watched(
                &mut source,
                host,
                &options(streams, Compression::Auto),
                Trouble::default(),
                both,
            );
            ended.at_source.expect_err("it was cancelled");
            ended.at_destination.expect_err("it was cancelled");
            assert!(source.resumed && source.outcome.is_none(), "{phase}");
            assert_eq!(source.world.running(), 1);
            assert_eq!(built.load(Ordering::SeqCst), 0, "{phase}: left behind");
        }
    }
}

#[test]
fn a_vm_that_is_handed_over_is_not_cancelled_any_more() {
    for phase in [Phase::HandedOver, Phase::PostCopy] {
        let post_copy = Options {
            downtime: Duration::ZERO,
            post_copy: PostCopy::Always,
            ..options(1, Compression::Auto)
        };
        let mut source = Source::new(vec![Bytes::filled(600)], Some(200));
        let host = Host::new(&source.world);
        let statuses = [&cancelled_in(phase), &Status::default()];
        let ended = migrate_watched(&mut source, host, &post_copy, Trouble::default(), statuses);
        ended.at_source.expect("nothing is in the way");
        let there = ended.at_destination.expect("nothing is in the way");
        assert!(there.contents().expect("all came") == source.contents());
    }
}

#[test]
fn a_peer_that_accepts_and_never_answers_is_not_waited_for_for_ever() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let _mute = UnixListener::bind(&path).unwrap();
    let mut source = Source::new(vec![Bytes::new(2)], None);
    let request = Request {
        to: &Endpoint::Unix(path),
        security: &Security::default(),
        options: &Options::default(),
        status: &Status::default(),
        on_thread: Arc::new(|| ()),
    };
    let error = migrate(&mut source, &request).expect_err("nobody answers");
    assert!(matches!(error, Error::Silent { expected: "Welcome" }), "{error}");
    assert!(source.resumed);
}
