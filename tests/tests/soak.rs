//! What is repeated for long, by `cargo xtask soak`.

use cutover_tests::{Disk, Exit, Guest, Network};

/// Boots in a row.
const BOOTS: u32 = 100;

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
