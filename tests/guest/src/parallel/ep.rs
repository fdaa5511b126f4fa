//! The EP-compatible kernel: pairs of Gaussian deviates by the acceptance-rejection method, their sums, and how many
//! fall into each square annulus. Ranks work alone and add up at the end.

use std::fmt;
use std::io;

use super::mesh::{Mesh, invalid};
use super::random::Random;
use super::{Class, share, to_bytes};

/// Pairs tried in one batch.
const BATCH: u64 = 1 << 16;
const SEED: u64 = 271_828_183;
/// Annuli that are counted.
const ANNULI: usize = 10;
/// Relative error of the sums that is accepted.
const TOLERANCE: f64 = 1e-8;

/// What came of it.
#[derive(Clone, Debug, PartialEq)]
pub struct Outcome {
    class: Class,
    /// Sums of the deviates of each pair.
    sums: [f64; 2],
    /// How many pairs are in each annulus.
    counts: [u64; ANNULI],
}

impl Class {
    /// Pairs that are tried.
    fn pairs(self) -> u64 {
        match self {
            Self::S => 1 << 24,
            Self::W => 1 << 25,
        }
    }

    /// The published sums.
    fn sums(self) -> [f64; 2] {
        match self {
            Self::S => [-3.247_834_652_034_74e3, -6.958_407_078_382_297e3],
            Self::W => [-2.863_319_731_645_753e3, -6.320_053_679_109_499e3],
        }
    }
}

impl Outcome {
    /// Whether the sums are the published ones.
    pub fn is_verified(&self) -> bool {
        let expected = self.class.sums();
        let close = |(sum, expected): (&f64, &f64)| ((sum - expected) / expected).abs() <= TOLERANCE;
        self.sums.iter().zip(&expected).all(close)
    }

    fn add(&mut self, other: &Self) {
        self.sums
            .iter_mut()
            .zip(other.sums)
            .for_each(|(sum, more)| *sum += more);
        self.counts
            .iter_mut()
            .zip(other.counts)
            .for_each(|(count, more)| *count += more);
    }

    fn none(class: Class) -> Self {
        Self {
            class,
            sums: [0.0; 2],
            counts: [0; ANNULI],
        }
    }

    fn to_bytes(&self) -> Vec<u8> {
        let sums = self.sums.map(f64::to_bits);
        to_bytes(sums.into_iter().chain(self.counts), u64::to_le_bytes)
    }

    fn read(class: Class, bytes: &[u8]) -> io::Result<Self> {
        let (numbers, rest) = bytes.as_chunks();
        let numbers: Vec<u64> = numbers.iter().map(|number| u64::from_le_bytes(*number)).collect();
        let [x, y, counts @ ..] = &numbers[..] else {
            return Err(invalid("no sums"));
        };
        let counts = <[u64; ANNULI]>::try_from(counts).map_err(|_| invalid("another number of counts"))?;
        if !rest.is_empty() {
            return Err(invalid("half a number"));
        }
        Ok(Self {
            class,
            sums: [*x, *y].map(f64::from_bits),
            counts,
        })
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let verified = if self.is_verified() { "verified" } else { "WRONG" };
        let [x, y] = self.sums;
        write!(
            f,
            "EP class {:?} {verified} sums {x:.12e} {y:.12e} counts {:?}",
            self.class, self.counts
        )
    }
}

/// Computes the problem of `class` together with all other ranks; each gets the same outcome.
///
/// # Errors
/// A connection has ended.
pub fn run(class: Class, mesh: &mut Mesh) -> io::Result<Outcome> {
    let mut own = Outcome::none(class);
    share(class.pairs() / BATCH, mesh.rank(), mesh.ranks()).for_each(|batch| tally(batch, &mut own));
    let mut total = Outcome::none(class);
    // In order of ranks, so that each adds up the same.
    for bytes in mesh.share(&own.to_bytes())? {
        total.add(&Outcome::read(class, &bytes)?);
    }
    Ok(total)
}

/// Adds what batch `number` has.
fn tally(number: u64, outcome: &mut Outcome) {
    let mut random = Random::after(SEED, 2 * BATCH * number);
    for _ in 0..BATCH {
        let x = 2.0 * random.next_fraction() - 1.0;
        let y = 2.0 * random.next_fraction() - 1.0;
        let square = x * x + y * y;
        if square > 1.0 {
            continue;
        }
        let factor = (-2.0 * square.ln() / square).sqrt();
        let pair = [x * factor, y * factor];
        outcome
            .sums
            .iter_mut()
            .zip(pair)
            .for_each(|(sum, deviate)| *sum += deviate);
        let farther = pair[0].abs().max(pair[1].abs());
        // No deviate of this generator is in a farther one.
        if let Some(count) = (0..ANNULI).position(|annulus| farther < (annulus + 1) as f64) {
            outcome.counts[count] += 1;
        }
    }
}
