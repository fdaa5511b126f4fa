//! The entropy device.

use cutover_tests::Guest;

#[test]
fn the_guest_has_a_source_of_entropy_that_does_not_repeat_itself() {
    let vm = Guest::micro().arguments(["--rng"]).boot();
    assert_eq!(vm.check("cat /sys/class/misc/hw_random/rng_current"), "virtio_rng.0\n");
    let sums = vm.check("for i in 1 2 3 4; do head -c 4096 /dev/hwrng | tee /tmp/$i | wc -c; done; sha256sum /tmp/?");
    let lines: Vec<&str> = sums.lines().collect();
    assert_eq!(lines[..4], ["4096"; 4]);
    for (index, sum) in lines[4..].iter().enumerate() {
        assert!(
            !lines[4 + index + 1..].iter().any(|other| other[..64] == sum[..64]),
            "{sums}"
        );
    }
    // Random bytes do not compress; constant ones do.
    let compressed: usize = vm.check("cat /tmp/? | gzip | wc -c").trim().parse().unwrap();
    assert!(compressed > 4 * 4096, "16 KiB of randomness fit in {compressed} bytes");
}
