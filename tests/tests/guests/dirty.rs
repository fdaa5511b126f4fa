//! What a guest changes in its memory is noticed while somebody asks.

use cutover_tests::{Guest, ManagedVm};

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
