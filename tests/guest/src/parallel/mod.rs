//! Parallel jobs whose right result is known: kernels compatible with EP ("embarrassingly parallel": nothing but
//! arithmetic) and IS ("integer sort": nothing but communication) of the NAS Parallel Benchmarks, as their report
//! specifies them (Bailey et al., RNR-94-007), between guests over plain TCP. The numbers they are verified by are those
//! of the benchmarks.
//!
//! - [`random`]: the generator both begin with;
//! - [`mesh`]: connections between all ranks;
//! - [`ep`], [`is`]: the kernels.

use std::fmt;
use std::str::FromStr;

pub mod ep;
pub mod is;
pub mod mesh;
pub mod random;

/// How large a problem is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// The sample.
    S,
    /// For a workstation of its time.
    W,
}

/// What is to be computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kernel {
    /// Pairs of Gaussian deviates.
    Ep,
    /// Ranks of integers.
    Is,
}

/// A word that names neither a kernel nor a class.
#[derive(Debug)]
pub struct Unknown(String);

impl fmt::Display for Unknown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "'{}' is neither a kernel (ep, is) nor a class (S, W)", self.0)
    }
}

impl std::error::Error for Unknown {}

impl FromStr for Class {
    type Err = Unknown;

    fn from_str(word: &str) -> Result<Self, Unknown> {
        match word {
            "S" => Ok(Self::S),
            "W" => Ok(Self::W),
            _ => Err(Unknown(word.to_owned())),
        }
    }
}

impl FromStr for Kernel {
    type Err = Unknown;

    fn from_str(word: &str) -> Result<Self, Unknown> {
        match word {
            "ep" => Ok(Self::Ep),
            "is" => Ok(Self::Is),
            _ => Err(Unknown(word.to_owned())),
        }
    }
}

/// The part of `whole` that is `rank`'s among `ranks`: in order, none missing, none twice.
fn share(whole: u64, rank: usize, ranks: usize) -> std::ops::Range<u64> {
    let bound = |rank: usize| whole * widen(rank) / widen(ranks);
    bound(rank)..bound(rank + 1)
}

/// A count as it is on the wire.
fn widen(count: usize) -> u64 {
    u64::try_from(count).expect("a count fits 64 bits")
}

/// Numbers as they are on the wire.
fn to_bytes<const N: usize, T>(numbers: impl IntoIterator<Item = T>, bytes: impl Fn(T) -> [u8; N]) -> Vec<u8> {
    numbers.into_iter().flat_map(bytes).collect()
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, SocketAddr, TcpListener};
    use std::thread;

    use super::mesh::Mesh;
    use super::*;

    /// What each of `ranks` makes of it, connected over the loopback interface.
    fn on_all<T: Send>(ranks: usize, work: impl Fn(&mut Mesh) -> T + Sync) -> Vec<T> {
        let listeners: Vec<_> = (0..ranks)
            .map(|_| TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap())
            .collect();
        let addresses: Vec<SocketAddr> = listeners
            .iter()
            .map(|listener| listener.local_addr().unwrap())
            .collect();
        let (addresses, work) = (&addresses, &work);
        thread::scope(|scope| {
            let threads: Vec<_> = listeners
                .into_iter()
                .enumerate()
                .map(|(rank, listener)| {
                    scope.spawn(move || work(&mut Mesh::join_at(&listener, rank, addresses).unwrap()))
                })
                .collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        })
    }

    #[test]
    fn shares_make_up_the_whole() {
        for ranks in 1..7 {
            let ends = |rank: usize| share(100, rank, ranks);
            assert_eq!(ends(0).start, 0);
            assert_eq!(ends(ranks - 1).end, 100);
            assert!((1..ranks).all(|rank| ends(rank - 1).end == ends(rank).start));
        }
    }

    #[test]
    fn sorting_gives_the_published_ranks_however_many_take_part() {
        let alone = on_all(1, |mesh| is::run(Class::S, mesh).unwrap());
        let together = on_all(4, |mesh| is::run(Class::S, mesh).unwrap());
        assert!(alone[0].is_verified(), "{}", alone[0]);
        assert!(together.iter().all(|outcome| outcome == &alone[0]), "{together:?}");
        let odd = on_all(3, |mesh| is::run(Class::W, mesh).unwrap());
        assert!(odd[0].is_verified(), "{}", odd[0]);
    }

    #[test]
    fn deviates_have_the_published_sums() {
        let outcomes = on_all(4, |mesh| ep::run(Class::S, mesh).unwrap());
        assert!(outcomes[0].is_verified(), "{}", outcomes[0]);
        assert!(outcomes.iter().all(|outcome| outcome == &outcomes[0]), "{outcomes:?}");
    }
}
