//! Snapshots in a bucket: read as from a directory, also when endpoints are lost; nothing wrong is ever taken for right.

use std::collections::BTreeMap;
use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use axum::http::StatusCode;
use cutover_bucket::{Fault, Objects, Server, nobody, variables};
use cutover_snapshot::Error;
use cutover_snapshot::archive::write_archive;
use cutover_snapshot::chain::Chain;
use cutover_snapshot::image::{Layout, Progress, Reader};
use cutover_snapshot::manifest::Base;
use cutover_snapshot::remote::{Access, Uploaded, upload_chain, upload_merged};
use cutover_snapshot::store::list_all;
use cutover_snapshot::verify::verify;
use proptest::prelude::*;
use tempfile::TempDir;

use crate::faulty_files::FaultyFiles;
use crate::sample::{
    Reference, base_content, child_content, draft, noise, put_image, read_all, read_chain, shape, store, write_base,
    write_child,
};

/// How to reach these servers, each of which is asked once.
fn access(servers: &[&Server]) -> Access {
    let variables = variables().map(|(name, value)| (name.to_owned(), value.to_owned()));
    Access {
        endpoints: servers.iter().map(|server| server.url().to_owned()).collect(),
        rounds: 1,
        ..Access::new(variables.into())
    }
}

/// A local store with `base` and `child`.
fn sample() -> TempDir {
    let dir = tempfile::tempdir().expect("a directory");
    let files = Arc::new(FaultyFiles::sound());
    let base = write_base(dir.path(), files.clone()).expect("written");
    write_child(dir.path(), &base, files).expect("written");
    dir
}

fn local(dir: &TempDir, name: &str) -> Chain {
    Chain::open(&dir.path().join(name)).expect("a chain")
}

fn upload(chain: &Chain, to: &str, access: &Access) -> Result<Uploaded, Error> {
    upload_chain(chain, Path::new(to), access, &mut |_| ())
}

/// Writes a snapshot called `large`, whose disk has `stored` pages that are not zero and a fifth more; returns what that
/// reads as.
fn large(dir: &TempDir, stored: u64) -> Reference {
    let pages = stored + stored / 5;
    let content: BTreeMap<u64, Vec<u8>> = (0..stored).map(|number| (number, noise(number + 1))).collect();
    let mut writer = store(dir.path()).create("large", draft(1, None)).expect("begun");
    let shape = shape(pages, Base::Zero, Layout::Flat);
    let written = content.iter().map(|(number, bytes)| (*number, &bytes[..]));
    put_image(&mut writer, "disk-data", shape, written).expect("written");
    writer.commit().expect("committed");
    Reference { pages, content }
}

/// Objects of the sample's chain, as they are after it was uploaded.
fn uploaded() -> Objects {
    let objects = Objects::default();
    let server = Server::start(&objects);
    upload(
        &local(&sample(), "child"),
        "s3://bucket/store/child",
        &access(&[&server]),
    )
    .expect("uploaded");
    objects
}

fn child(access: &Access) -> Result<Chain, Error> {
    Chain::open_through(Path::new("s3://bucket/store/child"), access)
}

/// The message of an error and of its causes.
fn told(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

/// What is found wrong with the uploaded chain, after checking that what can be read is right.
fn complaints(access: &Access) -> Vec<String> {
    let found = match child(access) {
        Err(error) => vec![error],
        Ok(chain) => {
            let found = verify(&chain, &mut |_| ()).damage;
            match read_chain(&chain) {
                Ok(content) => assert!(content == child_content(), "wrong content"),
                Err(error) => assert!(!found.is_empty(), "not verified, but refused: {error}"),
            }
            found
        }
    };
    found.iter().map(|error| told(error)).collect()
}

#[test]
fn an_uploaded_chain_reads_as_the_chain_and_each_snapshot_is_uploaded_once() {
    let dir = sample();
    let objects = Objects::default();
    let server = Server::start(&objects);
    let access = access(&[&server]);
    let done = upload(&local(&dir, "base"), "s3://bucket/store/base", &access).expect("uploaded");
    assert_eq!((done.snapshots, done.present), (1, 0));
    let done = upload(&local(&dir, "child"), "s3://bucket/store/newest", &access).expect("uploaded");
    assert_eq!((done.snapshots, done.present), (1, 1));
    assert_eq!(done.path, PathBuf::from("s3://bucket/store/newest"));
    let again = upload(&local(&dir, "child"), "s3://bucket/store/newest", &access).expect("nothing to do");
    assert_eq!((again.snapshots, again.bytes), (0, 0));

    let newest = Chain::open_through(&done.path, &access).expect("a chain");
    assert_eq!(newest.snapshots().len(), 2);
    assert_eq!(read_chain(&newest).expect("readable"), child_content());
    assert_eq!(verify(&newest, &mut |_| ()).damage.len(), 0);
    assert!(
        newest.image("disk-root").expect("there").flat_file().is_none(),
        "there is no local file"
    );

    for fault in [Fault::None, Fault::ListsAll] {
        server.fail(fault);
        let listed = list_all(Path::new("s3://bucket/store"), &access).expect("a store");
        let names: Vec<_> = listed.iter().map(|listed| &listed.name[..]).collect();
        assert_eq!(names, ["base", "newest"], "{fault:?}");
        assert!(
            list_all(Path::new("s3://bucket/"), &access)
                .expect("a store")
                .is_empty()
        );
    }
}

#[test]
fn manifests_are_uploaded_after_what_they_describe_and_parents_first() {
    let objects = Objects::default();
    let server = Server::start(&objects);
    let mut steps = Vec::new();
    let dir = sample();
    let chain = local(&dir, "child");
    let to = Path::new("s3://bucket/child");
    upload_chain(&chain, to, &access(&[&server]), &mut |step| steps.push(step)).expect("uploaded");
    let written = server.written();
    let manifests: Vec<_> = (1..)
        .zip(&written)
        .filter(|(_, key)| key.ends_with("manifest.json"))
        .collect();
    assert_eq!(
        manifests,
        [
            (4, &"base/manifest.json".to_owned()),
            (8, &"child/manifest.json".to_owned())
        ]
    );
    let files = chain
        .snapshots()
        .iter()
        .flat_map(|snapshot| snapshot.sealed.manifest.files());
    // Everything is read twice: to be verified, and to be uploaded.
    let total = 2 * files.map(|(_, bytes)| bytes).sum::<u64>();
    assert!(steps.is_sorted_by_key(|step| step.done));
    assert_eq!(steps.last(), Some(&Progress { done: total, total }));
}

#[test]
fn a_chain_is_uploaded_as_one_snapshot() {
    let dir = sample();
    let objects = Objects::default();
    let server = Server::start(&objects);
    let access = access(&[&server]);
    let to = Path::new("s3://bucket/whole");
    for layout in [Layout::Packed, Layout::Compressed { level: 1 }] {
        upload_merged(&local(&dir, "child"), to, &access, layout, &mut |_| ()).expect("uploaded");
        let chain = Chain::open_through(to, &access).expect("a chain");
        assert_eq!(chain.snapshots().len(), 1);
        assert_eq!(read_chain(&chain).expect("readable"), child_content());
        assert_eq!(verify(&chain, &mut |_| ()).damage.len(), 0);
        let refused = upload_merged(&chain, to, &access, layout, &mut |_| ());
        assert!(matches!(refused, Err(Error::Exists(_))));
        objects.lock().expect("not poisoned").clear();
    }
}

#[test]
fn a_single_file_in_a_bucket_is_read_where_it_is() {
    let dir = sample();
    let file = dir.path().join("child.tar");
    let chain = local(&dir, "child");
    write_archive(&chain, &FaultyFiles::sound(), &file, Layout::Packed, &mut |_| ()).expect("written");
    let objects = Objects::default();
    let content = fs::read(file).expect("readable");
    objects
        .lock()
        .expect("not poisoned")
        .insert("files/child.tar".to_owned(), content);
    let server = Server::start(&objects);
    let chain = Chain::open_through(Path::new("s3://bucket/files/child.tar"), &access(&[&server])).expect("a chain");
    assert_eq!(read_chain(&chain).expect("readable"), child_content());
}

#[test]
fn several_threads_read_at_a_time() {
    let dir = tempfile::tempdir().expect("a directory");
    let reference = large(&dir, 1000);
    let server = Server::start(&Objects::default());
    let access = access(&[&server]);
    upload(&local(&dir, "large"), "s3://bucket/large", &access).expect("uploaded");
    let chain = Chain::open_through(Path::new("s3://bucket/large"), &access).expect("a chain");
    let image = chain.image("disk-data").expect("an image");
    assert!(image.useful_readers() > 1);
    server.fail(Fault::WaitsForTwo);
    // What they read is far apart; the first request is answered only when there is a second.
    let threads = [0, 600].map(|page| {
        let image = image.clone();
        thread::spawn(move || {
            let mut reader = image.reader().expect("a reader");
            let found = reader.at(page).expect("readable").expect("a page");
            found.bytes.expect("stored")[..4096].to_vec()
        })
    });
    let pages = threads.map(|thread| thread.join().expect("no panic"));
    assert!(pages == [0, 600].map(|page| reference.content[&page].clone()));
}

#[test]
fn many_small_chunks_take_few_requests() {
    let dir = tempfile::tempdir().expect("a directory");
    let mut writer = store(dir.path()).create("large", draft(1, None)).expect("begun");
    let pages: Vec<_> = (0..1000).step_by(2).map(|number| (number, noise(number + 1))).collect();
    let content = pages.iter().map(|(number, bytes)| (*number, &bytes[..]));
    put_image(&mut writer, "disk-data", shape(1000, Base::Zero, Layout::Flat), content).expect("written");
    writer.commit().expect("committed");
    let server = Server::start(&Objects::default());
    let access = access(&[&server]);
    upload(&local(&dir, "large"), "s3://bucket/large", &access).expect("uploaded");
    let chain = Chain::open_through(Path::new("s3://bucket/large"), &access).expect("a chain");
    server.take_requests();
    let verified = verify(&chain, &mut |_| ());
    assert_eq!((verified.damage.len(), verified.chunks), (0, 500));
    let requests = server.take_requests();
    assert!(requests < 20, "{requests} requests for 4 MB");
}

/// Checks the first page of each block of 64 of `pages` against what they read as.
#[track_caller]
fn check_blocks(reader: &mut Reader, reference: &Reference, pages: Range<u64>) {
    for page in pages.step_by(64) {
        let found = reader.at(page).expect("readable").expect("a page");
        assert!(
            found.bytes.expect("stored")[..4096] == reference.content[&page],
            "page {page}"
        );
    }
}

#[test]
fn who_reads_alone_and_in_order_has_several_requests_under_way() {
    let dir = tempfile::tempdir().expect("a directory");
    let reference = large(&dir, 2000);
    let server = Server::start(&Objects::default());
    let access = access(&[&server]);
    upload(&local(&dir, "large"), "s3://bucket/large", &access).expect("uploaded");
    let chain = Chain::open_through(Path::new("s3://bucket/large"), &access).expect("a chain");
    let image = chain.image("disk-data").expect("an image");
    let mut reader = image.reader().expect("a reader");
    reader.at(0).expect("readable");
    // The next request is answered only when there is a second.
    server.fail(Fault::WaitsForTwo);
    check_blocks(&mut reader, &reference, 64..2000);
    server.fail(Fault::None);
    assert_eq!(verify(&chain, &mut |_| ()).damage.len(), 0);
}

#[test]
fn what_failed_when_it_was_asked_for_ahead_is_asked_for_again_when_it_is_wanted() {
    let dir = tempfile::tempdir().expect("a directory");
    let reference = large(&dir, 2000);
    let server = Server::start(&Objects::default());
    let access = access(&[&server]);
    upload(&local(&dir, "large"), "s3://bucket/large", &access).expect("uploaded");
    let chain = Chain::open_through(Path::new("s3://bucket/large"), &access).expect("a chain");
    let image = chain.image("disk-data").expect("an image");
    let mut reader = image.reader().expect("a reader");
    reader.at(0).expect("readable");
    server.fail(Fault::Says(StatusCode::FORBIDDEN));
    reader.at(256).expect_err("forbidden, and so is what follows");
    server.fail(Fault::None);
    check_blocks(&mut reader, &reference, 256..2000);
}

#[test]
fn large_objects_are_uploaded_in_parallel_parts() {
    let dir = tempfile::tempdir().expect("a directory");
    let reference = large(&dir, 5000);
    let server = Server::start(&Objects::default());
    let access = access(&[&server]);
    let chain = local(&dir, "large");
    server.fail(Fault::WaitsForTwo);
    upload(&chain, "s3://bucket/large", &access).expect("uploaded");
    let merged = Path::new("s3://bucket/merged");
    upload_merged(&chain, merged, &access, Layout::Packed, &mut |_| ()).expect("uploaded");
    for path in [Path::new("s3://bucket/large"), merged] {
        let image = Chain::open_through(path, &access).expect("a chain").image("disk-data");
        assert!(
            read_all(&image.expect("an image")).expect("readable") == reference,
            "{}",
            path.display()
        );
    }
}

#[test]
fn an_endpoint_lost_at_any_request_is_replaced_by_another() {
    let objects = uploaded();
    for request in 0.. {
        let (first, second) = (Server::start(&objects), Server::start(&objects));
        first.fail(Fault::Dies(request));
        assert_eq!(
            complaints(&access(&[&first, &second])),
            [""; 0],
            "lost at request {request}"
        );
        if second.take_requests() == 0 {
            assert!(request > 10, "only {request} requests");
            break;
        }
    }
}

#[test]
fn an_endpoint_that_is_gone_answers_nonsense_or_hangs_is_replaced_by_another() {
    let objects = uploaded();
    for fault in [
        Fault::Hangs,
        Fault::Says(StatusCode::INTERNAL_SERVER_ERROR),
        Fault::Says(StatusCode::FORBIDDEN),
        Fault::Says(StatusCode::NOT_FOUND),
        Fault::Says(StatusCode::OK),
    ] {
        let (first, second) = (Server::start(&objects), Server::start(&objects));
        let mut access = access(&[&first, &second]);
        access.request_limit = Duration::from_secs(2);
        let chain = child(&access).expect("both answer");
        first.fail(fault);
        assert_eq!(read_chain(&chain).expect("readable"), child_content(), "{fault:?}");
        assert!(second.take_requests() > 0, "{fault:?}");
    }
    let (mut first, second) = (Server::start(&objects), Server::start(&objects));
    let chain = child(&access(&[&first, &second])).expect("both answer");
    first.kill();
    assert_eq!(read_chain(&chain).expect("readable"), child_content());
}

#[test]
fn without_an_endpoint_that_answers_the_reasons_are_told() {
    let objects = uploaded();
    let server = Server::start(&objects);
    let mut access = access(&[&server]);
    access.endpoints.push(nobody());
    access.request_limit = Duration::from_secs(1);
    access.rounds = 2;
    let chain = child(&access).expect("one answers");
    server.fail(Fault::Hangs);
    let error = told(&chain.state().expect_err("nobody answers"));
    for expected in [
        "s3://bucket/store/child/state.bin: cannot read it: ",
        &format!("{}: no answer within 1s", access.endpoints[0]),
        &format!("; {}: ", access.endpoints[1]),
    ] {
        assert!(error.contains(expected), "{error}");
    }
    access.endpoints.pop();
    server.fail(Fault::None);
    let chain = child(&access).expect("it answers");
    server.fail(Fault::Says(StatusCode::FORBIDDEN));
    server.take_requests();
    chain.state().expect_err("forbidden");
    assert_eq!(server.take_requests(), 1, "what is forbidden is not asked again");
}

#[test]
fn what_is_missing_is_named() {
    let objects = uploaded();
    let server = Server::start(&objects);
    let access = access(&[&server]);
    let without = |key: &str| {
        let object = objects.lock().expect("not poisoned").remove(key).expect("there");
        let error = child(&access).map(|_| ()).expect_err("missing");
        objects.lock().expect("not poisoned").insert(key.to_owned(), object);
        error
    };
    assert!(matches!(without("store/child/manifest.json"), Error::Absent(_)));
    let error = without("store/base/manifest.json");
    assert!(
        error
            .to_string()
            .contains("once called 'base', is not in s3://bucket/store"),
        "{error}"
    );
    for file in ["store/child/state.bin", "store/base/memory.pages"] {
        let error = without(file);
        assert_eq!(error.to_string(), format!("s3://bucket/{file}: is missing"));
    }
    assert_eq!(complaints(&access), [""; 0]);
}

#[test]
fn an_object_that_is_shorter_is_noticed_when_the_chain_is_opened_or_read() {
    let objects = uploaded();
    let server = Server::start(&objects);
    let access = access(&[&server]);
    let chain = child(&access).expect("whole");
    objects
        .lock()
        .expect("not poisoned")
        .get_mut("store/base/disk-root.pages")
        .expect("there")
        .truncate(5000);
    let error = told(&chain.image("disk-root").map(|_| ()).expect_err("cut short"));
    assert!(error.contains("s3://bucket/store/base/disk-root.pages: "), "{error}");
    let error = child(&access).expect_err("cut short");
    assert!(
        error
            .to_string()
            .contains("disk-root.pages: has 5000 bytes, but its manifest says"),
        "{error}"
    );
}

#[test]
fn damage_is_told_with_the_object_and_the_offset() {
    let objects = uploaded();
    let server = Server::start(&objects);
    objects
        .lock()
        .expect("not poisoned")
        .get_mut("store/base/disk-root.pages")
        .expect("there")[4099] ^= 1;
    let expected = "s3://bucket/store/base/disk-root.pages: damaged at byte 4096: a page does not have its checksum";
    assert_eq!(complaints(&access(&[&server])), [expected]);
}

#[test]
fn what_is_damaged_or_taken_is_not_uploaded() {
    let dir = sample();
    let objects = Objects::default();
    let server = Server::start(&objects);
    let access = access(&[&server]);
    upload(&local(&dir, "base"), "s3://bucket/child", &access).expect("uploaded");
    let refused = upload(&local(&dir, "child"), "s3://bucket/child", &access);
    assert!(matches!(refused, Err(Error::Exists(path)) if path == Path::new("s3://bucket/child")));

    let path = dir.path().join("base/memory.pages");
    let mut bytes = fs::read(&path).expect("readable");
    bytes[3] ^= 1;
    fs::write(&path, bytes).expect("writable");
    let before = server.written().len();
    let refused = upload(&local(&dir, "child"), "s3://bucket/other", &access);
    assert!(matches!(refused, Err(Error::Damaged { .. })));
    assert_eq!(server.written().len(), before);
    for wrong in ["s3://bucket", "s3://bucket/.x", "s3://bucket/a b", "elsewhere"] {
        upload(&local(&dir, "child"), wrong, &access).expect_err(wrong);
    }
}

#[test]
fn an_upload_that_fails_leaves_no_snapshot_and_can_be_repeated() {
    let dir = sample();
    let objects = Objects::default();
    let server = Server::start(&objects);
    let access = access(&[&server]);
    for refused in ["base/state.bin", "child/memory.pages", "child/manifest.json"] {
        server.fail(Fault::RefusesToWrite(refused));
        let error = told(&upload(&local(&dir, "child"), "s3://bucket/store/child", &access).expect_err(refused));
        assert!(error.contains(refused) && error.contains("read only"), "{error}");
        assert!(matches!(child(&access), Err(Error::Absent(_))));
    }
    server.fail(Fault::None);
    upload(&local(&dir, "child"), "s3://bucket/store/child", &access).expect("uploaded");
    assert_eq!(complaints(&access), [""; 0]);
    let base = Chain::open_through(Path::new("s3://bucket/store/base"), &access).expect("a chain");
    assert_eq!(read_chain(&base).expect("readable"), base_content());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn objects_changed_or_cut_at_random_never_give_a_wrong_page(
        number in 0..8_usize,
        position in any::<prop::sample::Index>(),
        flip in prop::option::of(1..=255_u8),
    ) {
        let objects = uploaded();
        {
            let mut objects = objects.lock().expect("not poisoned");
            let (_, content) = objects.iter_mut().nth(number).expect("eight objects");
            let position = position.index(content.len());
            match flip {
                Some(flip) => content[position] ^= flip,
                None => content.truncate(position),
            }
        }
        let server = Server::start(&objects);
        let found = complaints(&access(&[&server]));
        // Only blanks of a manifest, and what is cut behind its end, can be wrong without being noticed.
        let key = objects.lock().expect("not poisoned").keys().nth(number).cloned().expect("eight objects");
        prop_assert!(!found.is_empty() || key.ends_with("manifest.json"), "{} is not noticed", key);
        for complaint in found {
            let snapshot = key.rsplit_once('/').expect("in a snapshot").0;
            prop_assert!(complaint.contains(&format!("s3://bucket/{snapshot}")), "{}: {}", key, complaint);
        }
    }
}
