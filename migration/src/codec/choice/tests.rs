//! What links and compressors of made-up speeds make the choice.

use super::*;

const MIB: u64 = 1 << 20;
const RUN: usize = 128 << 10;

fn at(bytes: u64, mib_per_second: u64) -> Duration {
    Duration::from_nanos(bytes * 1_000_000_000 / (mib_per_second * MIB))
}

/// A choice that knows a copy to do 4 GiB/s.
fn choice() -> Choice {
    let mut choice = Choice::new(Compression::Auto);
    choice.copied(4096 * MIB, Duration::from_secs(1));
    choice
}

/// One that knows lz4 as well, to do 800 MiB/s and leave a half.
fn choice_with_lz4(link_mib_per_second: u64) -> Choice {
    let mut choice = choice();
    choice.set_limit(Some(link_mib_per_second * MIB));
    choice.compressed(Tool::Lz4, RUN, RUN / 2, at(RUN as u64, 800));
    choice
}

fn link_takes(choice: &mut Choice, mib_per_second: u64) {
    for _ in 0..20 {
        choice.sent(MIB, at(MIB, mib_per_second));
    }
}

#[test]
fn a_link_is_narrow_if_it_is_much_slower_than_a_copy_and_stays_so_for_a_while() {
    let mut choice = choice();
    let table = [
        (2_000, Width::Wide),
        (600, Width::Wide),
        (400, Width::Narrow),
        (900, Width::Narrow),
        (1_100, Width::Wide),
    ];
    for (mib_per_second, expected) in table {
        link_takes(&mut choice, mib_per_second);
        assert_eq!(choice.width(), expected, "{mib_per_second} MiB/s");
    }
}

#[test]
fn batches_of_few_bytes_say_nothing_of_the_link() {
    let mut choice = choice();
    link_takes(&mut choice, 2_000);
    for _ in 0..1_000 {
        choice.sent(10 << 10, at(10 << 10, 8));
    }
    assert_eq!(choice.width(), Width::Wide);
}

#[test]
fn a_limit_makes_a_link_narrow_at_once_and_lifting_it_wide() {
    let mut choice = choice();
    choice.set_limit(Some(64 * MIB));
    assert_eq!(choice.width(), Width::Narrow);
    link_takes(&mut choice, 2_000);
    assert_eq!(choice.width(), Width::Narrow);
    choice.set_limit(None);
    assert_eq!(choice.width(), Width::Wide);
}

#[test]
fn nothing_is_measured_before_something_is_known_of_the_link() {
    let mut choice = Choice::new(Compression::Auto);
    assert!(!choice.wants_sample());
    assert_eq!(choice.width(), Width::Wide);
    choice.set_limit(Some(MIB));
    assert!(choice.wants_sample());
    assert_eq!(choice.width(), Width::Wide, "a copy may be slower still");
    choice.copied(4096 * MIB, Duration::from_secs(1));
    assert!(!choice.wants_sample());
    assert_eq!(choice.width(), Width::Narrow);
}

#[test]
fn who_does_not_want_compression_never_gets_it_and_who_wants_it_always() {
    let mut never = Choice::new(Compression::Never);
    never.set_limit(Some(1));
    assert!(!never.wants_sample());
    assert_eq!(never.width(), Width::Wide);
    assert_eq!(Choice::new(Compression::Always).width(), Width::Narrow);
}

#[test]
fn zstd_is_for_links_on_which_it_brings_pages_sooner() {
    let mut choice = choice_with_lz4(64);
    assert_eq!(choice.tool(), Tool::Zstd, "it has to be tried once");
    choice.compressed(Tool::Zstd, RUN, RUN * 2 / 5, at(RUN as u64, 500));
    for (mib_per_second, expected) in [(8, Tool::Zstd), (64, Tool::Zstd), (300, Tool::Lz4), (390, Tool::Lz4)] {
        choice.set_limit(Some(mib_per_second * MIB));
        assert_eq!(choice.tool(), expected, "{mib_per_second} MiB/s");
    }
}

#[test]
fn the_tool_that_is_not_in_use_is_tried_now_and_then() {
    let mut choice = choice_with_lz4(1);
    choice.compressed(Tool::Zstd, RUN, RUN * 2 / 5, at(RUN as u64, 500));
    let lz4 = (0..640).filter(|_| choice.tool() == Tool::Lz4).count();
    assert_eq!(lz4, 10);
}

#[test]
fn data_that_does_not_shrink_is_looked_at_ever_more_seldom_until_it_does() {
    let mut choice = choice_with_lz4(64);
    let at_800 = |bytes: usize| at(bytes as u64, 800);
    assert_eq!(choice.attempt(), Attempt::Compress);
    choice.compressed(Tool::Lz4, RUN, RUN, at_800(RUN));
    let mut waits = Vec::new();
    for _ in 0..7 {
        let mut wait = 0;
        while choice.attempt() == Attempt::None {
            wait += 1;
        }
        waits.push(wait);
        assert!(!choice.looked(4096, 4000, at_800(4096)));
    }
    assert_eq!(waits, [1, 2, 4, 8, 16, 16, 16]);
    while choice.attempt() == Attempt::None {}
    assert!(choice.looked(4096, 2000, at_800(4096)));
    assert_eq!(choice.attempt(), Attempt::Compress);
}

#[test]
fn data_that_shrinks_but_takes_longer_than_to_send_it_does_not_pay() {
    let mut choice = choice_with_lz4(200);
    assert_eq!(choice.attempt(), Attempt::Compress);
    choice.compressed(Tool::Lz4, RUN, RUN / 4, at(RUN as u64, 190));
    assert_eq!(choice.attempt(), Attempt::None);
    choice.set_limit(Some(100 * MIB));
    assert!(choice.looked(4096, 1024, at(4096, 190)));
}

#[test]
fn a_link_that_a_compressor_keeps_waiting_seems_wider_only_by_and_by() {
    let mut choice = choice();
    link_takes(&mut choice, 100);
    assert_eq!(choice.width(), Width::Narrow);
    choice.sent(MIB, Duration::from_nanos(1));
    assert_eq!(choice.width(), Width::Narrow);
    link_takes(&mut choice, 100_000);
    assert_eq!(choice.width(), Width::Wide);
}

#[test]
fn measurements_beyond_all_measure_do_no_harm() {
    let mut choice = Choice::new(Compression::Auto);
    choice.sent(u64::MAX / 2, Duration::ZERO);
    choice.sent(0, Duration::MAX);
    choice.sent(MIB, Duration::MAX);
    choice.set_limit(Some(0));
    choice.copied(0, Duration::MAX);
    choice.copied(u64::MAX, Duration::ZERO);
    choice.compressed(Tool::Lz4, 0, 0, Duration::ZERO);
    choice.compressed(Tool::Zstd, 1, usize::MAX, Duration::MAX);
    choice.width();
    choice.tool();
}
