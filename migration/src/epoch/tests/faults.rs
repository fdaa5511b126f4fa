//! Links that break, and bytes that change, at every place there is.

use proptest::prelude::*;

use super::*;
use crate::tests::proxy::{Action, Fault, Proxy, Transcript, Trouble, Way};

/// Small enough that there is time to cut at every message.
const FEW: [u64; 2] = [9, 3];

/// Replicates over a link on which `fault` happens, up to its end: epochs are permanent one behind, now and then the VM
/// rolls back. Whatever happens, the image is that of the last permanent cut, and so is who is promoted.
fn survives(pages: &[u64], seed: u64, options: &Options, fault: Option<Fault>) -> (u64, Vec<Transcript>) {
    let directory = tempfile::tempdir().expect("a directory");
    let [near, far] = ["near", "far"].map(|name| directory.path().join(name));
    let proxy = Proxy::start(
        &near,
        &far,
        Trouble {
            fault,
            ..Trouble::default()
        },
    );
    let mut pair = connect(&near, &far, Guest::new(pages, seed), Host::default(), options);
    let permanent = replicate(&mut pair);
    if let Ok(permanent) = permanent {
        if permanent > 0 {
            assert!(pair.image() == pair.guest.at(permanent), "{fault:?}: at {permanent}");
        }
        // The primary dies now.
        drop(pair.replica);
        let standby = pair.standby.expect("epochs were permanent, or it was seeded");
        match standby.promote(permanent) {
            Ok(twin) => {
                assert_eq!(twin.restored, Some(permanent), "{fault:?}");
                assert!(twin.contents() == pair.guest.at(permanent), "{fault:?}: at {permanent}");
            }
            Err(error) => assert_eq!(permanent, 0, "{fault:?}: {error}"),
        }
    }
    (permanent.unwrap_or(0), proxy.end())
}

/// Replicates until something fails; returns the last permanent cut, or that there was none before.
fn replicate(pair: &mut Pair) -> Result<u64, ()> {
    if pair.replica.is_err() || pair.standby.is_err() || pair.seed().is_err() {
        return Err(());
    }
    let mut permanent = 0;
    for epoch in 1..=6 {
        if pair.ship(epoch).is_err() {
            return Ok(permanent);
        }
        match epoch {
            1 => {}
            4 => {
                if pair.replica().roll_back(permanent).is_err() {
                    return Ok(permanent);
                }
                pair.guest.roll_back(permanent);
                pair.guest.run();
                let again = pair.guest.epoch(4);
                // There is no 3 any more: numbers need not follow one another.
                pair.guest.cuts.insert(3, Vec::new());
                if pair.replica().ship(again).is_err() {
                    return Ok(permanent);
                }
                pair.standby().permanent(4).expect("it is held");
                permanent = 4;
            }
            _ => {
                pair.standby().permanent(epoch - 1).expect("it is held");
                permanent = epoch - 1;
                assert!(pair.image() == pair.guest.at(permanent));
            }
        }
    }
    Ok(permanent)
}

/// Where messages and batches begin.
fn boundaries(bytes: &[u8]) -> Vec<usize> {
    let begins = |at: &usize| [&b"CoMg"[..], b"CoPg"].contains(&&bytes[*at..*at + 4]);
    (0..bytes.len().saturating_sub(4)).filter(begins).collect()
}

#[test]
fn a_link_cut_at_any_message_leaves_the_image_at_the_last_permanent_cut() {
    let (permanent, transcripts) = survives(&FEW, 17, &options(), None);
    assert_eq!(permanent, 5);
    let transcript = &transcripts[0];
    for (way, bytes) in [
        (Way::ToDestination, &transcript.to_destination),
        (Way::ToSource, &transcript.to_source),
    ] {
        for boundary in boundaries(bytes) {
            for at in [boundary, boundary + 1, boundary + 25, boundary + 41] {
                let fault = Fault {
                    connection: 0,
                    way,
                    at,
                    action: Action::Cut,
                };
                if at < bytes.len() {
                    survives(&FEW, 17, &options(), Some(fault));
                }
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(120))]

    #[test]
    fn whatever_happens_to_a_byte_the_image_is_that_of_the_last_permanent_cut(
        seed in any::<u64>(),
        to_standby in prop::bool::weighted(0.8),
        at in 0..1_500_000usize,
        near_the_beginning in prop::bool::weighted(0.3),
        bits in prop::option::of(1..=255u8),
        compressed in any::<bool>(),
    ) {
        let fault = Fault {
            connection: 0,
            way: if to_standby { Way::ToDestination } else { Way::ToSource },
            at: if near_the_beginning || !to_standby { at % 1500 } else { at },
            action: bits.map_or(Action::Cut, Action::Flip),
        };
        let compression = if compressed { Compression::Always } else { Compression::Never };
        let options = Options { compression, ..Options::default() };
        survives(&PAGES, seed, &options, Some(fault));
    }
}
