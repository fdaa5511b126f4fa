//! Decisions about migrations with made-up measurements, as tables.

use proptest::prelude::*;

use super::*;

/// 30 ms of downtime and 30 rounds, without help.
fn options() -> Options {
    Options {
        downtime: Duration::from_millis(30),
        rounds: 30,
        throttle: false,
        post_copy: PostCopy::Never,
        ..Options::default()
    }
}

/// A link of 40 000 pages/s and a stop phase of 5 ms: 1 000 pages may be left.
const MEASURED: Measured = Measured {
    rounds: 1,
    pages_left: 0,
    dirty_pages_per_second: 20_000,
    sent_pages_per_second: 40_000,
    page_ns: 25_000,
    fixed_ns: 5_000_000,
};

/// What is decided when rounds leave these numbers of pages.
fn decisions(options: Options, measured: Measured, left: &[u64]) -> Vec<Decision> {
    let mut policy = Policy::new(options);
    let rounds = (1..).zip(left);
    let measured = rounds.map(|(rounds, &pages_left)| Measured {
        rounds,
        pages_left,
        ..measured
    });
    measured.map(|measured| policy.decide(&measured)).collect()
}

fn dirty_rate(pages_left: u64) -> Reason {
    Reason::DirtyRate {
        dirty_pages_per_second: 20_000,
        sent_pages_per_second: 40_000,
        expected: Duration::from_nanos(5_000_000 + 25_000 * pages_left),
    }
}

#[test]
fn rounds_go_on_while_they_bring_something_and_end_when_the_goal_is_met() {
    use Decision::{Continue, GiveUp, Stop};
    let table: [(&str, &[u64], &[Decision]); 7] = [
        ("idle", &[0], &[Stop]),
        ("exactly the goal", &[1_000], &[Stop]),
        ("one page more", &[1_001], &[Continue]),
        (
            "each round half of the last",
            &[8_000, 4_000, 2_000, 1_000],
            &[Continue, Continue, Continue, Stop],
        ),
        (
            "a bad round in between",
            &[8_000, 9_000, 4_000, 5_000, 900],
            &[Continue, Continue, Continue, Continue, Stop],
        ),
        (
            "always the same",
            &[8_000, 8_000, 8_000],
            &[Continue, Continue, GiveUp(dirty_rate(8_000))],
        ),
        (
            "too little progress",
            &[8_000, 7_300, 7_250],
            &[Continue, Continue, GiveUp(dirty_rate(7_250))],
        ),
    ];
    for (name, left, expected) in table {
        assert_eq!(decisions(options(), MEASURED, left), expected, "{name}");
    }
}

#[test]
fn the_goal_counts_what_a_stop_costs_without_pages() {
    let slow_stop = Measured {
        fixed_ns: 29_000_000,
        ..MEASURED
    };
    assert_eq!(decisions(options(), slow_stop, &[40]), [Decision::Stop]);
    assert_eq!(decisions(options(), slow_stop, &[41]), [Decision::Continue]);
}

#[test]
fn what_is_hopeless_ends_as_was_asked_for() {
    let hopeless = [8_000; 3];
    let last = |post_copy| {
        let options = Options { post_copy, ..options() };
        decisions(options, MEASURED, &hopeless)[2]
    };
    assert_eq!(last(PostCopy::Never), Decision::GiveUp(dirty_rate(8_000)));
    assert_eq!(last(PostCopy::LastResort), Decision::PostCopy);
}

#[test]
fn a_stop_that_takes_too_long_by_itself_is_said_and_not_worth_slowing_the_guest_down() {
    let options = Options {
        throttle: true,
        ..options()
    };
    let slow_stop = Measured {
        fixed_ns: 30_000_001,
        ..MEASURED
    };
    let reason = Reason::Fixed {
        expected: Duration::from_nanos(30_000_001),
    };
    assert_eq!(decisions(options, slow_stop, &[9; 3])[2], Decision::GiveUp(reason));
    assert_eq!(reason.to_string(), "to stop it takes 30ms even with no page to send");
}

#[test]
fn the_number_of_rounds_is_bounded_also_while_they_bring_something() {
    let options = Options { rounds: 3, ..options() };
    let expected = Duration::from_millis(55);
    let reason = Reason::Rounds { rounds: 3, expected };
    assert_eq!(
        decisions(options, MEASURED, &[8_000, 4_000, 2_000]),
        [Decision::Continue, Decision::Continue, Decision::GiveUp(reason)]
    );
    assert_eq!(reason.to_string(), "after 3 rounds it would still stand still for 55ms");
}

#[test]
fn post_copy_that_was_asked_for_comes_after_the_first_round_unless_none_is_needed() {
    let options = Options {
        post_copy: PostCopy::Always,
        ..options()
    };
    assert_eq!(decisions(options.clone(), MEASURED, &[8_000]), [Decision::PostCopy]);
    assert_eq!(decisions(options, MEASURED, &[500]), [Decision::Stop]);
}

#[test]
fn a_guest_is_slowed_down_in_steps_no_further_than_needed() {
    let options = Options {
        throttle: true,
        ..options()
    };
    let mut policy = Policy::new(options);
    // It dirties 60 000 pages/s when it runs all the time.
    let mut percent = 0;
    let mut steps = Vec::new();
    for rounds in 1..=20 {
        let measured = Measured {
            rounds,
            pages_left: 8_000,
            dirty_pages_per_second: 600 * (100 - u64::from(percent)),
            ..MEASURED
        };
        if let Decision::Throttle(next) = policy.decide(&measured) {
            percent = next;
            steps.push(next);
        }
    }
    // 24 000 pages/s are 40 % of that; what does not help by then is helped by single steps.
    assert_eq!(steps[..7], [10, 20, 30, 40, 50, 60, 61]);
    assert!(steps[7..].iter().zip(62..).all(|(step, expected)| *step == expected));
}

#[test]
fn a_guest_that_stands_almost_still_and_is_still_too_fast_is_a_case_for_the_last_resort() {
    let options = Options {
        throttle: true,
        rounds: u32::MAX,
        ..options()
    };
    let mut policy = Policy::new(options);
    let measured = Measured {
        pages_left: 8_000,
        dirty_pages_per_second: u64::MAX,
        ..MEASURED
    };
    let throttled = (0..100).map(|_| policy.decide(&measured));
    let decisions: Vec<_> = throttled.collect();
    assert!(decisions.contains(&Decision::Throttle(THROTTLE_PERCENT_MAX)));
    assert!(matches!(decisions[99], Decision::GiveUp(Reason::DirtyRate { .. })));
}

#[test]
fn hot_pages_may_take_half_of_what_may_be_left() {
    let policy = Policy::new(options());
    assert_eq!(policy.deferrable_pages(&MEASURED), 500);
    let slow_stop = Measured {
        fixed_ns: 40_000_000,
        ..MEASURED
    };
    assert_eq!(policy.deferrable_pages(&slow_stop), 0);
}

proptest! {
    #[test]
    fn whatever_is_measured_it_ends_in_time_and_never_stops_too_long_unasked(
        left: Vec<u64>, page_ns: u64, fixed_ns: u64, dirty: u64, sent: u64, throttle: bool,
    ) {
        let options = Options { throttle, rounds: 8, ..options() };
        let goal = options.downtime;
        let mut policy = Policy::new(options);
        let mut percent = 0;
        for (rounds, pages_left) in (1..).zip(left) {
            let measured = Measured {
                rounds, pages_left, page_ns, fixed_ns,
                dirty_pages_per_second: dirty,
                sent_pages_per_second: sent,
            };
            policy.deferrable_pages(&measured);
            match policy.decide(&measured) {
                Decision::Stop => prop_assert!(measured.expected_downtime() <= goal),
                Decision::GiveUp(_) => {}
                Decision::PostCopy => prop_assert!(false, "nobody asked for it"),
                Decision::Continue => prop_assert!(rounds < 8),
                Decision::Throttle(next) => {
                    prop_assert!(throttle && rounds < 8);
                    prop_assert!(next > percent && next - percent <= THROTTLE_STEP_MAX);
                    percent = next;
                }
            }
        }
    }
}
