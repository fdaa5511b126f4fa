//! A few hundred seeds of the simulation: `cargo xtask sim` has the rest.

use super::*;

fn options(faults: Faults) -> Options {
    Options {
        members: 3,
        hosts: 3,
        length: 10 * SECOND,
        faults,
        trace: false,
    }
}

fn run_all(seeds: std::ops::Range<u64>, options: &Options) -> Outcome {
    let mut all = Outcome::default();
    for seed in seeds {
        match run(seed, options) {
            Ok(outcome) => {
                all.cuts += outcome.cuts;
                all.recoveries += outcome.recoveries;
                all.unprotected += outcome.unprotected;
                all.lost += outcome.lost;
                all.invalid += outcome.invalid;
                all.outputs += outcome.outputs;
                all.stored += outcome.stored;
            }
            Err((violation, _)) => {
                let Options {
                    members, hosts, faults, ..
                } = options;
                panic!(
                    "{violation}\nsee: cargo xtask sim --seed {seed} --members {members} --hosts {hosts} ({faults:?})"
                );
            }
        }
    }
    all
}

#[test]
fn undisturbed_cuts_become_permanent_and_output_leaves() {
    let all = run_all(0..3, &options(Faults::None));
    assert!(all.cuts > 100, "{all:?}");
    assert!(all.outputs > 100, "{all:?}");
    assert!(all.stored > 10, "{all:?}");
    assert_eq!((all.recoveries, all.lost), (0, 0));
}

#[test]
fn a_seed_is_the_same_run_again() {
    let options = options(Faults::Storm);
    assert_eq!(run(7, &options).ok(), run(7, &options).ok());
}

#[test]
fn any_number_of_single_faults_one_after_the_other_loses_nothing() {
    let all = run_all(0..40, &options(Faults::Successive));
    assert!(all.recoveries > 30, "{all:?}");
    assert_eq!(all.lost, 0);
}

#[test]
fn two_hosts_that_back_each_other_up_survive_the_loss_of_each_in_turn() {
    let two = Options {
        members: 4,
        hosts: 2,
        ..options(Faults::Successive)
    };
    let all = run_all(0..30, &two);
    assert!(all.recoveries > 20, "{all:?}");
    assert_eq!(all.lost, 0);
}

#[test]
fn in_a_storm_of_faults_what_is_left_is_consistent_and_protected_afterwards() {
    let all = run_all(0..200, &options(Faults::Storm));
    assert!(all.recoveries > 50, "{all:?}");
    assert!(all.invalid > 20, "{all:?}");
    assert!(all.stored > 100, "{all:?}");
}
