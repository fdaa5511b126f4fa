//! What is repeated for long, by `cargo xtask soak`.

use cutover_tests::{Disk, Exit, Guest, Network};
use serde_json::json;

/// Boots in a row.
const BOOTS: u32 = 100;
/// Pauses in a row.
const PAUSES: u32 = 200;

#[test]
fn a_guest_boots_and_powers_off_a_hundred_times_in_a_row() {
    let (disk, network) = (Disk::blank(1 << 20), Network::new());
    let guest = Guest::micro().disk(&disk).net(&network).arguments(["--rng"]);
    for boot in 1..=BOOTS {
        // Alternately with one and two vCPUs.
        let cpus = 1 + boot % 2;
        let vm = guest.clone().cpus(cpus).boot();
        assert_eq!(vm.check("nproc"), format!("{cpus}\n"), "boot {boot}");
        vm.check("dd if=/dev/vda of=/dev/vda count=1 conv=fsync");
        vm.power_off();
        assert_eq!(vm.wait(), Exit::Shutdown, "boot {boot}");
    }
}

#[test]
fn two_hundred_pauses_and_resumes_in_a_row_lose_nothing() {
    let disk = Disk::blank(1 << 20);
    let managed = Guest::micro().cpus(2).boot_managed(|api| {
        api.put(
            "/drives/data",
            &json!({ "drive_id": "data", "path_on_host": disk.path(), "is_root_device": false, "is_read_only": false }),
        );
    });
    // Whatever is written is read again and compared, until told to stop.
    managed.vm.check(
        "dd if=/dev/urandom of=/tmp/data bs=64k count=16
         (while ! test -e /tmp/stop; do
             dd if=/tmp/data of=/dev/vda bs=64k oflag=direct && dd if=/dev/vda bs=64k iflag=direct | cmp - /tmp/data ||
                 touch /tmp/wrong
             echo >> /tmp/rounds
         done; touch /tmp/stopped) > /dev/null 2>&1 &",
    );
    for _ in 0..PAUSES {
        managed.pause();
        managed.resume();
    }
    managed
        .vm
        .check("touch /tmp/stop; while ! test -e /tmp/stopped; do sleep 1; done; test -s /tmp/rounds");
    assert_eq!(managed.vm.run("test -e /tmp/wrong").exit_code, 1, "something was lost");
    managed.vm.power_off();
    assert_eq!(managed.vm.wait(), Exit::Shutdown);
}
