//! Monitors that are killed while they make a snapshot, and what is left.

use std::time::Duration;

use cutover_tests::Shelf;

#[test]
fn a_monitor_killed_while_it_makes_a_snapshot_leaves_the_older_ones_whole() {
    // From the beginning of the preparation to the end of the copying.
    for delay in [5, 60, 250] {
        Shelf::new().check_kill(Duration::from_millis(delay));
    }
}
