//! The IS-compatible kernel: ten times, all ranks exchange all keys, so that each has those of one range of values, and
//! the place of a key among all of them is known.

use std::fmt;
use std::io;

use super::mesh::{Mesh, invalid};
use super::random::Random;
use super::{Class, share, to_bytes, widen};

const ITERATIONS: u32 = 10;
const SEED: u64 = 314_159_265;
/// Keys whose rank is looked at in each iteration.
const PROBES: usize = 5;

/// What came of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    class: Class,
    /// Ranks that were looked at and were the published ones.
    right: u32,
    /// Over all keys of the last iteration and their ranks.
    checksum: u64,
}

/// What is published of a class: the keys looked at, the rank of each before the first iteration, and by how much more
/// than one an iteration it grows, or shrinks.
struct Published {
    probes: [(u64, i64); PROBES],
    /// Of the first probes the ranks grow, of the others they shrink.
    growing: usize,
    /// What the growing ones are off by.
    offset: i64,
}

impl Class {
    fn keys(self) -> u64 {
        match self {
            Self::S => 1 << 16,
            Self::W => 1 << 20,
        }
    }

    /// Keys are below this.
    fn key_max(self) -> u32 {
        match self {
            Self::S => 1 << 11,
            Self::W => 1 << 16,
        }
    }

    fn published(self) -> Published {
        match self {
            Self::S => Published {
                probes: [
                    (48_427, 0),
                    (17_148, 18),
                    (23_627, 346),
                    (62_548, 64_917),
                    (4_431, 65_463),
                ],
                growing: 3,
                offset: 0,
            },
            Self::W => Published {
                probes: [
                    (357_773, 1_249),
                    (934_767, 11_698),
                    (875_723, 1_039_987),
                    (898_999, 1_043_896),
                    (404_505, 1_048_018),
                ],
                growing: 2,
                offset: -2,
            },
        }
    }
}

impl Published {
    /// The rank of probe `number` in `iteration`.
    fn rank(&self, number: usize, iteration: u32) -> i64 {
        let (_, first) = self.probes[number];
        match number < self.growing {
            true => first + i64::from(iteration) + self.offset,
            false => first - i64::from(iteration),
        }
    }
}

impl Outcome {
    /// Whether all ranks that were looked at are the published ones.
    pub fn is_verified(&self) -> bool {
        u64::from(self.right) == u64::from(ITERATIONS) * widen(PROBES)
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let verified = if self.is_verified() { "verified" } else { "WRONG" };
        let Self { class, right, checksum } = self;
        write!(
            f,
            "IS class {class:?} {verified} ranks {right} checksum {checksum:016x}"
        )
    }
}

/// Sorts the keys of `class` together with all other ranks; each gets the same outcome.
///
/// # Errors
/// A connection has ended.
pub fn run(class: Class, mesh: &mut Mesh) -> io::Result<Outcome> {
    let mut sort = Sort::new(class, mesh);
    let mut outcome = Outcome {
        class,
        right: 0,
        checksum: 0,
    };
    for iteration in 1..=ITERATIONS {
        sort.change_keys(iteration);
        let probes = sort.probes(mesh)?;
        let (before, counts) = sort.count(mesh)?;
        // Of the probes and the checksum each rank knows what is in its range of values; their sum is all.
        let known = sort.judge(before, &counts, &probes, iteration);
        let shares = mesh.share(&to_bytes(known, u64::to_le_bytes))?;
        let mut total = [0_u64; 2];
        for bytes in shares {
            let part = numbers::<8, u64>(&bytes, u64::from_le_bytes)?;
            total
                .iter_mut()
                .zip(part)
                .for_each(|(sum, more)| *sum = sum.wrapping_add(more));
        }
        outcome.right += u32::try_from(total[0]).map_err(|_| invalid("more probes than there are"))?;
        outcome.checksum = total[1];
    }
    Ok(outcome)
}

/// One rank's part of the work.
struct Sort {
    class: Class,
    published: Published,
    /// Which of all keys `keys` are.
    places: std::ops::Range<u64>,
    keys: Vec<u32>,
    /// The range of values of each rank.
    values: Vec<std::ops::Range<u32>>,
    rank: usize,
}

impl Sort {
    fn new(class: Class, mesh: &Mesh) -> Self {
        let (rank, ranks) = (mesh.rank(), mesh.ranks());
        let places = share(class.keys(), rank, ranks);
        let mut random = Random::after(SEED, 4 * places.start);
        let scale = f64::from(class.key_max() / 4);
        let mut key = || {
            let sum: f64 = (0..4).map(|_| random.next_fraction()).sum();
            to_key(scale * sum)
        };
        let keys = places.clone().map(|_| key()).collect();
        let key_max = u64::from(class.key_max());
        let narrow = |value: u64| u32::try_from(value).expect("values are below the largest key");
        let range = |rank| {
            let range = share(key_max, rank, ranks);
            narrow(range.start)..narrow(range.end)
        };
        Self {
            class,
            published: class.published(),
            places,
            keys,
            values: (0..ranks).map(range).collect(),
            rank,
        }
    }

    /// Has each iteration be different from the last.
    fn change_keys(&mut self, iteration: u32) {
        let changes = [
            (iteration, iteration),
            (iteration + ITERATIONS, self.class.key_max() - iteration),
        ];
        for (place, key) in changes {
            if let Some(index) = self.index(place.into()) {
                self.keys[index] = key;
            }
        }
    }

    /// Where the key at `place` among all keys is, if it is here.
    fn index(&self, place: u64) -> Option<usize> {
        let index = self.places.contains(&place).then(|| place - self.places.start)?;
        usize::try_from(index).ok()
    }

    /// The keys to be looked at, which are where they are.
    fn probes(&self, mesh: &mut Mesh) -> io::Result<[u32; PROBES]> {
        let here = self
            .published
            .probes
            .map(|(place, _)| self.index(place).map_or(0, |index| self.keys[index]));
        let mut probes = [0; PROBES];
        for bytes in mesh.share(&to_bytes(here, u32::to_le_bytes))? {
            // All but one rank have 0 for each.
            let known = numbers::<4, u32>(&bytes, u32::from_le_bytes)?;
            probes.iter_mut().zip(known).for_each(|(probe, key)| *probe |= key);
        }
        Ok(probes)
    }

    /// Exchanges keys; returns how many are below this rank's range of values, and how many there are of each value in
    /// it.
    fn count(&self, mesh: &mut Mesh) -> io::Result<(u64, Vec<u64>)> {
        let mut outgoing = vec![Vec::new(); self.values.len()];
        for key in &self.keys {
            let owner = self.values.partition_point(|range| range.end <= *key);
            outgoing[owner].extend_from_slice(&key.to_le_bytes());
        }
        let own = &self.values[self.rank];
        let mut counts = vec![0_u64; own.len()];
        for bytes in mesh.exchange(outgoing)? {
            for key in numbers::<4, u32>(&bytes, u32::from_le_bytes)? {
                let index = key.checked_sub(own.start).and_then(|index| usize::try_from(index).ok());
                let count = index.and_then(|index| counts.get_mut(index));
                *count.ok_or_else(|| invalid("a key of another rank"))? += 1;
            }
        }
        let mut before = 0;
        let total: u64 = counts.iter().sum();
        for bytes in mesh.share(&total.to_le_bytes())?.iter().take(self.rank) {
            before += numbers::<8, u64>(bytes, u64::from_le_bytes)?.sum::<u64>();
        }
        Ok((before, counts))
    }

    /// How many of the `probes` that are in this range of values have the published rank, and the checksum over it.
    fn judge(&self, before: u64, counts: &[u64], probes: &[u32; PROBES], iteration: u32) -> [u64; 2] {
        let (mut rank, mut right, mut checksum) = (before, 0, 0_u64);
        for (value, count) in self.values[self.rank].clone().zip(counts) {
            for (number, _) in probes.iter().enumerate().filter(|(_, probe)| **probe == value) {
                // A probe's rank is how many keys are smaller.
                if i64::try_from(rank) == Ok(self.published.rank(number, iteration)) {
                    right += 1;
                }
            }
            checksum = checksum.wrapping_add(rank.wrapping_add(1).wrapping_mul(u64::from(value)).wrapping_mul(*count));
            rank += count;
        }
        [right, checksum]
    }
}

/// The integer part of a number between 0 and the largest key.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "that is what is asked for"
)]
fn to_key(number: f64) -> u32 {
    number as u32
}

/// Numbers that came from another rank.
fn numbers<const N: usize, T>(bytes: &[u8], number: impl Fn([u8; N]) -> T) -> io::Result<impl Iterator<Item = T>> {
    let (chunks, rest) = bytes.as_chunks::<N>();
    if !rest.is_empty() {
        return Err(invalid("half a number"));
    }
    Ok(chunks.iter().map(move |chunk| number(*chunk)))
}
