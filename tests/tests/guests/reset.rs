//! A driver may let go of its device at any moment and take it again.

use cutover_tests::{Disk, Guest, Network};

#[test]
fn a_disk_whose_driver_is_unbound_under_load_works_when_it_is_bound_again() {
    for io in ["threads", "io-uring"] {
        let disk = Disk::blank(1 << 30);
        let vm = Guest::micro().cpus(2).disk_with(&disk, &format!("io={io}")).boot();
        let device = vm.check("basename $(readlink -f /sys/block/vda/device)");
        let device = device.trim();
        for _ in 0..3 {
            // Once the writer has written something it goes on until its disk is taken away.
            vm.check(&format!(
                "dd if=/dev/urandom of=/dev/vda bs=64k oflag=direct 2> /tmp/writer &
                 until [ $(awk '{{ print $7 }}' /sys/block/vda/stat) -gt 0 ]; do :; done
                 cd /sys/bus/virtio/drivers/virtio_blk && echo {device} > unbind; wait; echo {device} > bind"
            ));
            let writer = vm.check("cat /tmp/writer");
            assert!(writer.contains("error writing '/dev/vda'"), "{writer}");
        }
        vm.check("head -c 4m /dev/urandom > /tmp/data && dd if=/tmp/data of=/dev/vda bs=1M conv=fsync");
        assert_eq!(
            vm.check("sha256sum < /tmp/data"),
            format!("{}  -\n", disk.sha256(4 << 20))
        );
    }
}

#[test]
fn an_interface_whose_driver_is_unbound_under_load_works_when_it_is_bound_again() {
    let network = Network::new();
    let vm = Guest::micro().cpus(2).net(&network).boot();
    let device = vm.check("basename $(readlink -f /sys/class/net/eth0/device)");
    let device = device.trim();
    for _ in 0..3 {
        vm.check(&network.guest_setup());
        vm.check(&format!("ping -c 3 -i 0.05 {}", network.host()));
        vm.check(&format!(
            "ping -i 0.002 -s 1400 {} > /dev/null 2>&1 &
             until [ $(cat /sys/class/net/eth0/statistics/tx_packets) -gt 50 ]; do :; done
             cd /sys/bus/virtio/drivers/virtio_net && echo {device} > unbind && echo {device} > bind
             bound=$?; kill $!; exit $bound",
            network.host()
        ));
    }
    vm.check(&network.guest_setup());
    vm.check(&format!("ping -c 3 -i 0.05 {}", network.host()));
}
