//! Numbers in LEB128: seven bits a byte, the lowest first; the highest bit says that more follow.

/// Most bytes of a number.
pub const BYTES_MAX: usize = 10;

/// Appends `number` to `out`.
pub fn write(mut number: u64, out: &mut Vec<u8>) {
    while number >= 0x80 {
        out.push(number.to_le_bytes()[0] | 0x80);
        number >>= 7;
    }
    out.push(number.to_le_bytes()[0]);
}

/// Takes a number off the front of `bytes`; none if there is none, or it has more than 64 bits.
pub fn read(bytes: &mut &[u8]) -> Option<u64> {
    let mut number = 0;
    for (index, byte) in bytes.iter().enumerate().take(BYTES_MAX) {
        let bits = u64::from(byte & 0x7f);
        let shifted = bits << (7 * index);
        if shifted >> (7 * index) != bits {
            return None;
        }
        number |= shifted;
        if byte & 0x80 == 0 {
            *bytes = &bytes[index + 1..];
            return Some(number);
        }
    }
    None
}

/// Takes a number off the front of `bytes` that is at most `most`.
pub fn read_at_most(bytes: &mut &[u8], most: usize) -> Option<usize> {
    let number = usize::try_from(read(bytes)?).ok()?;
    (number <= most).then_some(number)
}

/// How many bytes `number` takes.
pub fn len(number: u64) -> u32 {
    (u64::BITS - (number | 1).leading_zeros()).div_ceil(7)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn numbers_read_back(number: u64, shift in 0..64u32) {
            let number = number >> shift;
            let mut bytes = Vec::new();
            write(number, &mut bytes);
            prop_assert_eq!(bytes.len(), usize::try_from(len(number)).unwrap());
            bytes.push(7);
            let mut rest = bytes.as_slice();
            prop_assert_eq!(read(&mut rest), Some(number));
            prop_assert_eq!(rest, &[7]);
        }
    }

    #[test]
    fn what_is_cut_short_or_too_large_is_no_number() {
        assert_eq!(read(&mut [].as_slice()), None);
        assert_eq!(read(&mut [0xff].as_slice()), None);
        assert_eq!(read(&mut [0xff; 11].as_slice()), None);
        let (mut largest, mut larger) = ([0xff; 10], [0xff; 10]);
        (largest[9], larger[9]) = (1, 2);
        assert_eq!(read(&mut largest.as_slice()), Some(u64::MAX));
        assert_eq!(read(&mut larger.as_slice()), None);
        assert_eq!(read_at_most(&mut [5].as_slice(), 5), Some(5));
        assert_eq!(read_at_most(&mut [6].as_slice(), 5), None);
    }
}
