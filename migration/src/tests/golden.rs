//! Peers of the versions that this release speaks: migrations that were recorded when a version was the newest, and what
//! is made of them now.
//!
//! ```text
//!  golden/version_1_source          all that a source said      ─► our destination runs the VM, with its contents
//!  golden/version_1_destination     all that a destination said ─► our source hands its VM over, and has said
//!                                                                  what a destination of that version runs
//! ```
//! Recordings are never made anew once a release speaks their version: a release that cannot follow one of its version, or
//! of the one before, breaks its word (see [`message`](crate::message)). With a new version comes a recording of it, by
//! `UPDATE_GOLDEN=1 cargo test -p cutover-migration what_is_recorded_now`.

use std::fs;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use super::made_up::{Bytes, Host, Ran, Source};
use super::proxy::{Transcript, migrate_over};
use crate::destination::{Waiting, receive};
use crate::message::{ToDestination, VERSION, VERSION_OLDEST};
use crate::options::{Compression, Options};
use crate::source::{Request, migrate};
use crate::status::Status;
use crate::transport::{Endpoint, Listener, Security};
use crate::vm::{Outcome, SourceVm};
use crate::wire;

/// A migration as it was said.
struct Golden {
    version: u16,
    source: &'static [u8],
    destination: &'static [u8],
}

/// One for each version that is spoken.
const GOLDEN: [Golden; 1] = [Golden {
    version: 1,
    source: include_bytes!("golden/version_1_source"),
    destination: include_bytes!("golden/version_1_destination"),
}];

/// The VM that moves in all recordings: some pages of each kind there is, one of which changes a little, and a disk.
fn vm() -> Source {
    let mut vm = Source::new(vec![Bytes::filled(20), Bytes::filled(5)], None);
    vm.last_written = Some(4);
    vm
}

/// One stream, and compression: each page is sent as it is shortest.
fn options() -> Options {
    Options {
        compression: Compression::Always,
        downtime: Duration::from_secs(60),
        ..Options::default()
    }
}

/// A Unix socket in a directory of its own.
fn endpoint() -> (tempfile::TempDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    (directory, path)
}

/// Has our destination hear all that a source said, and returns the VM that it runs, and what it said to that.
fn destination_follows(said: &[u8], host: &mut Host) -> (Ran, Vec<u8>) {
    let (_directory, path) = endpoint();
    let listener = Listener::bind(&Endpoint::Unix(path.clone()), &Security::default()).unwrap();
    let status = Status::default();
    let waiting = Waiting {
        listener: &listener,
        status: &status,
        on_thread: Arc::new(|| ()),
    };
    thread::scope(|scope| {
        let destination = scope.spawn(|| receive(&waiting, host));
        let mut source = UnixStream::connect(&path).unwrap();
        source.write_all(said).unwrap();
        let mut answers = Vec::new();
        source.read_to_end(&mut answers).unwrap();
        (destination.join().unwrap().expect("it follows"), answers)
    })
}

/// Has our source move `vm` to somebody who answers what a destination said, and returns all that it said.
fn source_follows(answers: &[u8], vm: &mut Source) -> Vec<u8> {
    let (_directory, path) = endpoint();
    let listener = UnixListener::bind(&path).unwrap();
    thread::scope(|scope| {
        let destination = scope.spawn(move || {
            let (mut link, _) = listener.accept().unwrap();
            // Whoever answers before he is asked is understood all the same.
            link.write_all(answers).unwrap();
            let mut said = Vec::new();
            link.read_to_end(&mut said).unwrap();
            link.shutdown(Shutdown::Both).ok();
            said
        });
        let request = Request {
            to: &Endpoint::Unix(path),
            security: &Security::default(),
            options: &options(),
            status: &Status::default(),
            on_thread: Arc::new(|| ()),
        };
        migrate(vm, &request).expect("it follows");
        destination.join().unwrap()
    })
}

/// Checks that both of our sides follow what was said in a migration of `version`.
fn check(version: u16, source: &[u8], destination: &[u8]) {
    let mut ours = vm();
    let mut host = Host::new(&ours.world);
    // That of the recording runs elsewhere.
    ours.stop().unwrap();
    let (there, _) = destination_follows(source, &mut host);
    assert!(
        there.contents().expect("all came") == ours.contents(),
        "version {version}"
    );
    drop(there);

    let mut ours = vm();
    let said = source_follows(destination, &mut ours);
    assert_eq!(ours.outcome, Some(Outcome::RunsThere), "version {version}");
    // As a destination of that version hears it, which knows of no newer one.
    let hello = wire::encode(&ToDestination::Hello {
        oldest: version,
        newest: version,
        features: 0,
    });
    let ours_hello = wire::encode(&ToDestination::Hello {
        oldest: VERSION_OLDEST,
        newest: VERSION,
        features: 0,
    });
    let rest = said.strip_prefix(&ours_hello.unwrap()[..]).expect("Hello comes first");
    let heard = [hello.unwrap(), rest.to_vec()].concat();
    let mut host = Host::new(&ours.world);
    let (there, _) = destination_follows(&heard, &mut host);
    assert!(
        there.contents().expect("all came") == ours.contents(),
        "version {version}"
    );
}

/// A migration as it is said now.
fn record() -> Transcript {
    let mut source = vm();
    let host = Host::new(&source.world);
    let ended = migrate_over(&mut source, host, &options(), None);
    ended.at_source.expect("nothing is in the way");
    let [transcript] = <[Transcript; 1]>::try_from(ended.transcripts).expect("one stream");
    transcript
}

#[test]
fn peers_of_all_versions_that_are_spoken_are_understood() {
    let versions: Vec<u16> = GOLDEN.iter().map(|golden| golden.version).collect();
    let spoken: Vec<u16> = (VERSION_OLDEST..=VERSION).collect();
    assert_eq!(versions, spoken, "there is a recording of each");
    for Golden {
        version,
        source,
        destination,
    } in GOLDEN
    {
        check(version, source, destination);
    }
}

#[test]
fn what_is_recorded_now_is_understood() {
    let Transcript {
        to_destination,
        to_source,
    } = record();
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        let path = |side| {
            format!(
                "{}/src/tests/golden/version_{VERSION}_{side}",
                env!("CARGO_MANIFEST_DIR")
            )
        };
        fs::write(path("source"), &to_destination).unwrap();
        fs::write(path("destination"), &to_source).unwrap();
    }
    check(VERSION, &to_destination, &to_source);
}
