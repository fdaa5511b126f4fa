//! The benchmarks' generator: x' = a·x mod 2^46 with a = 5^13, as a fraction of 2^46.

/// The multiplier, 5^13.
const MULTIPLIER: u64 = 1_220_703_125;
/// Values are below this.
const MODULUS: u64 = 1 << 46;

/// A place in the sequence of some seed.
#[derive(Clone, Copy, Debug)]
pub struct Random(u64);

impl Random {
    /// The sequence of `seed`, after the first `skipped` numbers.
    pub fn after(seed: u64, skipped: u64) -> Self {
        let (mut state, mut factor, mut left) = (seed, MULTIPLIER, skipped);
        while left > 0 {
            if left & 1 == 1 {
                state = times(state, factor);
            }
            factor = times(factor, factor);
            left >>= 1;
        }
        Self(state)
    }

    /// The next number, above 0 and below 1.
    pub fn next_fraction(&mut self) -> f64 {
        /// 2^-46.
        const UNIT: f64 = 1.0 / 70_368_744_177_664.0;
        self.0 = times(self.0, MULTIPLIER);
        // Below 2^46: exact.
        self.0 as f64 * UNIT
    }
}

/// The product of two values. What is lost at the top is a multiple of the modulus.
fn times(a: u64, b: u64) -> u64 {
    a.wrapping_mul(b) % MODULUS
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn skipping_is_as_good_as_drawing() {
        let mut drawn = Random::after(271_828_183, 0);
        for skipped in 1..100 {
            drawn.next_fraction();
            assert_eq!(Random::after(271_828_183, skipped).0, drawn.0);
        }
    }
}
