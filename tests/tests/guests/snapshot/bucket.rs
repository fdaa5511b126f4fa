//! Guests restored from a bucket whose endpoints go away while memory is still being filled.

use std::collections::BTreeMap;
use std::time::Duration;

use cutover_bucket::{BUCKET, Fault, Objects, Server, variables};
use cutover_tests::{Exit, ManagedVm, Monitor, Restore, Shelf, cli, scratch};
use tempfile::TempDir;

/// Most bytes that the monitor asks an endpoint for at a time.
const REQUEST_BYTES: usize = 1 << 20;
/// Within this time a restored guest's monitor has asked for half of its memory.
const HELD_WITHIN: Duration = Duration::from_secs(120);

/// A bucket with two endpoints, and a snapshot of a busy guest in it.
struct Exported {
    first: Server,
    second: Server,
    /// Requests that it takes at least to read all of the guest's memory.
    requests: usize,
}

impl Exported {
    /// Exports a chain of two snapshots, made when one and two chunks of the disk were written; nothing of it stays on
    /// the host.
    #[track_caller]
    fn new() -> Self {
        let shelf = Shelf::new();
        let (managed, _disk) = ManagedVm::busy();
        managed.vm.write_chunk(0);
        shelf.full(&managed, "s0");
        managed.vm.write_chunk(1);
        shelf.incremental(&managed, "s1");
        drop(managed);
        let objects = Objects::default();
        let [first, second] = [Server::start(&objects), Server::start(&objects)];
        let mut export = Monitor::command();
        export.args(["snapshot", "export", "--endpoint", first.url()]);
        export.arg(shelf.path("s1")).arg(url()).envs(variables());
        let exported = cli::finish(export);
        assert_eq!(exported.exit, Exit::Shutdown, "{exported:?}");
        let requests = requests_needed(&objects.lock().expect("no server panicked"));
        assert!(
            requests > 20,
            "{requests} requests are too few to lose an endpoint half-way"
        );
        Self {
            first,
            second,
            requests,
        }
    }

    /// A guest of the snapshot, which runs while half of it is still in the bucket: the first endpoint answers no more.
    #[track_caller]
    fn restore_half(&self) -> (ManagedVm, TempDir) {
        self.first.take_requests();
        self.first.fail(Fault::Holds(self.requests / 2));
        let disks = scratch();
        let endpoints = format!("{},{}", self.first.url(), self.second.url());
        let restored = Restore::of(url().as_ref())
            .arguments(["--endpoint", &endpoints, "--disks"])
            .arguments([disks.path()])
            .environment(variables())
            .start();
        assert!(
            self.first.wait_for_held(HELD_WITHIN),
            "the first endpoint is not asked so often"
        );
        assert_eq!(restored.api.get("/")["state"], "Running");
        (restored, disks)
    }
}

/// How often an endpoint has to be asked at least for the memory of the guest: once for each piece of the older
/// snapshot that has content, but for those that the newer one has all pages of.
fn requests_needed(objects: &BTreeMap<String, Vec<u8>>) -> usize {
    let pieces = |name: &str| objects[&format!("busy/{name}/memory.pages")].chunks(REQUEST_BYTES);
    let has_content = |piece: &&[u8]| piece.iter().any(|byte| *byte != 0);
    pieces("s0").filter(has_content).count() - pieces("s1").len()
}

/// Where the snapshot is.
fn url() -> String {
    format!("s3://{BUCKET}/busy/s1")
}

#[test]
fn a_guest_restored_from_a_bucket_goes_on_when_an_endpoint_is_lost_half_way() {
    let mut exported = Exported::new();
    let (restored, _disks) = exported.restore_half();
    exported.first.kill();
    let first = restored.vm.check_pages();
    restored.vm.check_chunks(2);
    let second = restored.vm.check_pages();
    assert!(second.pages > first.pages, "{first} and then {second}");
    let asked = exported.second.take_requests();
    assert!(asked > 0, "the second endpoint was not asked");
    restored.vm.write_chunk(2);
    restored.vm.power_off();
    // A guest that ends in order waits for its disk.
    assert_eq!(restored.vm.wait(), Exit::Shutdown);
}

#[test]
fn a_guest_whose_bucket_has_no_endpoint_left_ends_and_the_reasons_are_told() {
    let mut exported = Exported::new();
    let (restored, _disks) = exported.restore_half();
    exported.second.kill();
    exported.first.kill();
    assert_eq!(restored.vm.wait(), Exit::Error);
    let log = restored.vm.log();
    for told in [
        &format!("s3://{BUCKET}/busy/"),
        exported.first.url(),
        exported.second.url(),
    ] {
        assert!(log.contains(told), "{told} is not in: {log}");
    }
}
