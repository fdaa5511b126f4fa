//! The commands on a store of two snapshots.

use std::fs;

use clap::Parser;
use cutover_snapshot::Error;
use cutover_snapshot::image::{Layout, Shape};
use cutover_snapshot::manifest::{Base, CpuNeeds, MemoryRegion, Parent};
use cutover_snapshot::store::Store;
use cutover_snapshot::writer::Draft;
use serde_json::json;
use tempfile::TempDir;

use super::{Answer, SnapshotArgs, SnapshotCommand, execute};
use crate::cli::{Cli, Command};
use crate::exit::ExitStatus;

/// A store with `base` and `child`, each with one page of its own in eight.
fn sample() -> TempDir {
    let dir = tempfile::tempdir().expect("a directory");
    let store = Store::open(dir.path()).expect("a store");
    let bytes = 8 * 4096;
    let mut parent: Option<Parent> = None;
    for (name, page) in [("base", 1), ("child", 2)] {
        let base = if parent.is_some() { Base::Parent } else { Base::Zero };
        let draft = Draft {
            created: "2026-11-21T12:00:00Z".parse().expect("a time"),
            parent,
            spec: serde_json::from_value(json!({
                "name": "web\u{1b}[2J", "cpus": 2, "memory": { "size": bytes }, "boot": { "kernel": "k" },
            }))
            .expect("a specification"),
            memory: vec![MemoryRegion { start: 0, bytes }],
            cpu: CpuNeeds::default(),
        };
        let mut writer = store.create(name, draft).expect("begun");
        let shape = Shape {
            page_bytes: 4096,
            pages: 8,
            base,
            layout: Layout::Packed,
        };
        let mut image = writer.image("memory", shape).expect("begun");
        image.put(page, &[7; 4096]).expect("written");
        writer.complete(image).expect("completed");
        parent = Some(Parent::from(&writer.commit().expect("committed")));
    }
    dir
}

/// Runs a command line in which `@` stands for the store.
fn cutover(dir: &TempDir, line: &str) -> Result<Answer, Error> {
    let line = line.replace('@', &dir.path().display().to_string());
    match Cli::try_parse_from(line.split(' ')).expect("valid").command {
        Command::Snapshot(SnapshotArgs {
            command: SnapshotCommand::OnDisk(command),
            ..
        }) => execute(&command),
        other => panic!("not about snapshots on disk: {other:?}"),
    }
}

#[test]
fn inspect_tells_what_a_snapshot_is_and_what_it_is_built_on() {
    let dir = sample();
    let answer = cutover(&dir, "cutover snapshot inspect @/child").expect("sound");
    assert_eq!(answer.json.as_array().map(Vec::len), Some(2));
    assert_eq!(answer.json[0]["manifest"]["parent"]["name"], "base");
    assert_eq!(answer.json[1]["manifest"]["spec"]["cpus"], 2);
    assert_eq!(
        answer.json[1]["checksum"],
        answer.json[0]["manifest"]["parent"]["checksum"]
    );
    for words in [
        "2026-11-21T12:00:00Z",
        "2 vCPUs, 32K of memory, 0 disks",
        "1 of 8 pages",
        "the others are the parent's\nis built on\n",
        "the others are zero",
        "web\\u{1b}[2J",
    ] {
        assert!(answer.text.contains(words), "{words}: {}", answer.text);
    }
}

#[test]
fn verify_succeeds_on_what_is_sound_and_names_what_is_not() {
    let dir = sample();
    let answer = cutover(&dir, "cutover snapshot verify @/child").expect("an answer");
    assert_eq!(answer.status, ExitStatus::Success);
    assert_eq!(
        (&answer.json["sound"], &answer.json["snapshots"], &answer.json["chunks"]),
        (&json!(true), &json!(2), &json!(2))
    );

    let path = dir.path().join("base/memory.pages");
    let mut bytes = fs::read(&path).expect("readable");
    bytes[99] ^= 1;
    fs::write(&path, bytes).expect("writable");
    let answer = cutover(&dir, "cutover snapshot verify @/child").expect("an answer");
    assert_eq!(answer.status, ExitStatus::Failure);
    let expected = "base/memory.pages: damaged at byte 0: a page does not have its checksum";
    assert!(answer.text.contains(expected), "{}", answer.text);
    assert_eq!(answer.json["damage"].as_array().map(Vec::len), Some(1));

    fs::remove_dir_all(dir.path().join("base")).expect("removed");
    let answer = cutover(&dir, "cutover snapshot verify @/child").expect("an answer");
    assert_eq!(answer.json["sound"], false);
    assert!(answer.text.contains("once called 'base'"), "{}", answer.text);
}

#[test]
fn a_merged_snapshot_needs_no_other() {
    for options in ["", " --compress 3"] {
        let dir = sample();
        let line = format!("cutover snapshot merge @/child @/whole{options}");
        let answer = cutover(&dir, &line).expect("merged");
        assert_eq!(answer.json["snapshots"], 2);
        assert!(matches!(cutover(&dir, &line), Err(Error::Exists(_))));
        let kept = cutover(&dir, "cutover snapshot prune @ --keep whole").expect("pruned");
        assert_eq!(kept.json["snapshots"], json!(["child", "base"]));
        let answer = cutover(&dir, "cutover snapshot verify @/whole").expect("an answer");
        assert_eq!(answer.json["sound"], true);
        let answer = cutover(&dir, "cutover snapshot inspect @/whole").expect("sound");
        assert_eq!(answer.json[0]["manifest"]["images"][0]["stored_pages"], 2);
    }
}

#[test]
fn prune_deletes_what_is_named_unless_it_is_needed() {
    let dir = sample();
    fs::create_dir(dir.path().join(".partial-x")).expect("created");
    let refused = cutover(&dir, "cutover snapshot prune @ --delete base");
    assert!(matches!(refused, Err(Error::Needed { .. })));
    let told = cutover(&dir, "cutover snapshot prune @ --delete child --dry-run").expect("told");
    assert_eq!(told.text, "child would be deleted\n.partial-x would be deleted\n");
    let done = cutover(&dir, "cutover snapshot prune @ --delete child --delete base").expect("deleted");
    assert_eq!(done.text, "child deleted\nbase deleted\n.partial-x deleted\n");
    let done = cutover(&dir, "cutover snapshot prune @").expect("nothing there");
    assert_eq!(done.text, "nothing to delete\n");
}

#[test]
fn what_contradicts_itself_is_a_usage_error() {
    for line in [
        "cutover snapshot prune s --delete a --keep b",
        "cutover snapshot merge a b --compress 20",
        "cutover snapshot prune s --delete a --keep-last 1",
        "cutover snapshot prune s --keep-last 0",
        "cutover snapshot merge",
        "cutover snapshot export a",
        "cutover snapshot",
    ] {
        assert_eq!(Cli::try_parse_from(line.split(' ')).expect_err(line).exit_code(), 2);
    }
}

#[test]
fn a_snapshot_merged_in_place_lets_those_below_it_go() {
    let dir = sample();
    let refused = cutover(&dir, "cutover snapshot merge @/base");
    assert!(matches!(refused, Err(Error::Replaced { by, .. }) if by == "child"));
    let stays = cutover(&dir, "cutover snapshot prune @ --keep-last 1").expect("pruned");
    let expected = "nothing to delete\nbase stays, because child is built on it\n`cutover snapshot merge` makes";
    assert!(stays.text.starts_with(expected), "{}", stays.text);
    assert_eq!(stays.json["needed"], json!([{ "name": "base", "by": "child" }]));
    let merged = cutover(&dir, "cutover snapshot merge @/child").expect("merged");
    assert_eq!(merged.json["path"], json!(dir.path().join("child")));
    let gone = cutover(&dir, "cutover snapshot prune @ --keep-last 1").expect("pruned");
    assert_eq!(gone.text, "base deleted\n");
    let answer = cutover(&dir, "cutover snapshot verify @/child").expect("an answer");
    assert_eq!(answer.json["sound"], true);
}

#[test]
fn an_exported_file_is_a_snapshot_to_every_command_and_becomes_one_again() {
    let dir = sample();
    let answer = cutover(&dir, "cutover snapshot export @/child @/child.tar --compress 3").expect("exported");
    let bytes = fs::metadata(dir.path().join("child.tar")).expect("there").len();
    assert_eq!(
        (&answer.json["snapshots"], &answer.json["bytes"]),
        (&json!(2), &json!(bytes))
    );
    assert!(matches!(
        cutover(&dir, "cutover snapshot export @/child @/child.tar"),
        Err(Error::Exists(_))
    ));
    let answer = cutover(&dir, "cutover snapshot verify @/child.tar").expect("an answer");
    assert_eq!(
        (&answer.json["sound"], &answer.json["snapshots"]),
        (&json!(true), &json!(1))
    );
    let answer = cutover(&dir, "cutover snapshot inspect @/child.tar").expect("sound");
    assert_eq!(answer.json[0]["manifest"]["images"][0]["stored_pages"], 2);
    cutover(&dir, "cutover snapshot merge @/child.tar @/again").expect("merged");
    let answer = cutover(&dir, "cutover snapshot inspect @/again").expect("sound");
    assert_eq!(answer.json[0]["manifest"]["images"][0]["stored_pages"], 2);
}

#[test]
fn list_shows_what_is_built_on_what() {
    let dir = sample();
    let answer = cutover(&dir, "cutover snapshot list @").expect("a store");
    let lines: Vec<Vec<&str>> = answer
        .text
        .lines()
        .map(|line| line.split_whitespace().collect())
        .collect();
    assert_eq!(lines[0], ["NAME", "CREATED", "KIND", "STORED", "BUILT", "ON"]);
    assert_eq!(lines[1][..3], ["base", "2026-11-21T12:00:00Z", "full"]);
    assert_eq!(lines[2][..4], ["└─", "child", "2026-11-21T12:00:00Z", "incremental"]);
    assert_eq!(lines[2].last(), Some(&"base"));
    assert_eq!(answer.json[1]["parent"]["name"], "base");
    assert_eq!(answer.json[1]["has_parent"], true);

    fs::rename(dir.path().join("base"), dir.path().join("renamed")).expect("renamed");
    let answer = cutover(&dir, "cutover snapshot list @").expect("a store");
    assert_eq!(answer.json[1]["has_parent"], true, "it is found by its id");

    fs::remove_dir_all(dir.path().join("renamed")).expect("removed");
    let answer = cutover(&dir, "cutover snapshot list @").expect("a store");
    assert!(answer.text.ends_with("base (missing)\n"), "{}", answer.text);
    assert_eq!(answer.json[0]["has_parent"], false);

    fs::write(dir.path().join("child/manifest.json"), "{").expect("writable");
    let answer = cutover(&dir, "cutover snapshot list @").expect("a store");
    assert_eq!(answer.status, ExitStatus::Failure);
    assert!(answer.text.contains("child  cannot be read: "), "{}", answer.text);

    fs::remove_dir_all(dir.path().join("child")).expect("removed");
    let answer = cutover(&dir, "cutover snapshot list @").expect("a store");
    assert_eq!((&answer.text[..], &answer.json), ("no snapshots\n", &json!([])));
}

#[test]
fn a_place_in_a_bucket_has_to_name_a_snapshot() {
    let dir = sample();
    for line in [
        "cutover snapshot inspect s3://bucket",
        "cutover snapshot export @/child s3://bucket/.hidden",
        "cutover snapshot export @/child s3://",
        "cutover snapshot list s3://",
    ] {
        let error = cutover(&dir, line).map(|_| ()).expect_err(line);
        assert!(
            matches!(error, Error::Invalid { .. } | Error::Name(_)),
            "{line}: {error}"
        );
    }
    let answer = cutover(&dir, "cutover snapshot verify s3:///x").expect("an answer");
    assert_eq!(answer.status, ExitStatus::Failure);
    assert!(answer.text.contains("s3://BUCKET/PATH"), "{}", answer.text);
}
