//! What a guest changes in its memory is noticed while somebody asks, by whatever notices it.

use cutover_tests::{Api, Exit, Guest, ManagedVm, Shelf, cli, guest_file, scratch};

const MIB: u64 = 1 << 20;

/// Bytes of the pages that changed since this was last asked.
fn changed(managed: &ManagedVm) -> u64 {
    let rate = managed.api.get("/v1/stats/dirty-rate");
    let number = |key: &str| rate[key].as_u64().unwrap_or_else(|| panic!("{key} in {rate}"));
    let (pages, interval_ns) = (number("pages"), number("interval_ns"));
    let per_second = u128::from(pages) * 1_000_000_000 / u128::from(interval_ns.max(1));
    assert!(
        interval_ns == 0 || u128::from(number("pages_per_second")) == per_second,
        "{rate}"
    );
    assert_eq!(number("bytes_per_second"), number("pages_per_second") * 4096);
    pages * 4096
}

#[test]
fn a_guest_that_writes_shows_it_and_one_that_is_paused_or_idle_does_not() {
    let managed = Guest::micro().boot_managed(|_| {});
    let vm = &managed.vm;
    assert_eq!(changed(&managed), 0, "nobody has asked before");
    changed(&managed);

    vm.check("head -c 32m /dev/urandom > /tmp/a");
    let written = changed(&managed);
    assert!(written >= 32 * MIB, "{written} bytes for 32 MiB written");

    vm.check("cat /tmp/a /tmp/a /tmp/a > /dev/null");
    let read = changed(&managed);
    assert!(read < 16 * MIB, "{read} bytes for 96 MiB read");

    managed.api.patch("/vm", &serde_json::json!({ "state": "Paused" }));
    changed(&managed);
    assert_eq!(changed(&managed), 0, "a paused guest changed memory");
    managed.api.patch("/vm", &serde_json::json!({ "state": "Resumed" }));
    vm.check("sha256sum /tmp/a");
}

#[test]
fn snapshots_by_dirty_rings_that_fill_up_all_the_time_have_every_page() {
    let (shelf, directory) = (Shelf::new(), scratch());
    let api = Api::new(&directory.path().join("api"));
    let vm = Guest::micro()
        .cpus(2)
        .memory("256M")
        .arguments(["--dirty-log", "ring", "--api-sock"])
        .arguments([api.socket()])
        .boot();
    // Eight times as many pages as a ring has entries.
    vm.start_page_writer(64, None);
    for (name, kind) in [("s0", "full"), ("s1", "incremental"), ("s2", "incremental")] {
        let report = shelf.ask(&api, name, kind).success().json();
        assert_eq!(report["method"], "copy_on_write", "{report}");
        vm.check_pages();
    }
    vm.power_off();
    assert_eq!(vm.wait(), Exit::Shutdown);
    for name in ["s0", "s2"] {
        drop(shelf.restore_busy(name));
    }
}

#[test]
fn a_dirty_log_that_this_host_does_not_have_is_refused_with_the_reason() {
    let kernel = guest_file("micro/vmlinuz");
    let refused = cli::cutover([
        "run".as_ref(),
        "--kernel".as_ref(),
        kernel.as_os_str(),
        "--dirty-log".as_ref(),
        "scan".as_ref(),
    ]);
    assert_eq!(refused.exit, Exit::Error, "{refused:?}");
    let reason = "--dirty-log scan cannot be used here: this kernel's userfaultfd does not note writes by itself";
    assert!(refused.stderr.contains(reason), "{}", refused.stderr);
}
