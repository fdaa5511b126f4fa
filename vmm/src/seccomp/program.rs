//! Filters as programs: a search tree over the numbers of system calls.
//!
//! The kernel runs a filter at each system call, and when it is put in place once for every number there is, to find those
//! that are allowed whatever their arguments. A list would be gone through from its beginning each time, which makes
//! putting it in place the longest step of many a thread's life.
//!
//! ```text
//!              number ≥ 72?
//!            no /        \ yes
//!       ≥ 9?  …           …  ≥ 200?
//!       /  \                 /    \
//!   [0…3]  [9…14]       [72] and  [202]        in a range: allowed;  in none: trapped
//!                   the second argument: a tree of its own
//! ```

use std::collections::BTreeMap;

use libc::{BPF_ABS, BPF_JA, BPF_JEQ, BPF_JGE, BPF_JGT, BPF_JMP, BPF_K, BPF_LD, BPF_RET, BPF_W};
use libc::{SECCOMP_RET_ALLOW, SECCOMP_RET_KILL_PROCESS, SECCOMP_RET_TRAP};
use seccompiler::{BpfProgram, sock_filter};

/// `AUDIT_ARCH_X86_64` (linux/audit.h).
const ARCHITECTURE: u32 = 0xc000_003e;

/// Where `struct seccomp_data` (linux/seccomp.h) has the number of the call, the architecture, and the low halves of
/// arguments.
const NUMBER: u32 = 0;
const ARCHITECTURE_AT: u32 = 4;
const FIRST_ARGUMENT: u32 = 16;
const SECOND_ARGUMENT: u32 = 24;

/// What is allowed of a system call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Allowed {
    /// All of it.
    Always,
    /// With one of these as the low 32 bits of the first argument: operations of `prctl`.
    WithFirst(Vec<u32>),
    /// The same of the second argument: requests of `ioctl`, commands of `fcntl`.
    WithSecond(Vec<u32>),
}

/// Values from the first to the last, and what is allowed with them.
struct Range<'a> {
    first: u32,
    last: u32,
    then: &'a Allowed,
}

/// The filter that allows `calls`, by their numbers, and traps all others.
pub fn assemble(calls: &BTreeMap<u32, Allowed>) -> BpfProgram {
    let mut ranges: Vec<Range> = Vec::new();
    for (&number, then) in calls {
        match ranges.last_mut() {
            Some(range) if range.last + 1 == number && range.then == then => range.last = number,
            _ => ranges.push(Range {
                first: number,
                last: number,
                then,
            }),
        }
    }
    let mut program = Program::default();
    let start = program.search(&ranges, 0);
    program.follow(start);
    program.add(load(NUMBER));
    let start = program.place();
    let other = program.verdict(SECCOMP_RET_KILL_PROCESS);
    program.compare(BPF_JEQ, ARCHITECTURE, start, other);
    program.add(load(ARCHITECTURE_AT));
    program.reversed.reverse();
    program.reversed
}

/// A program that is written from its end to its beginning, as jumps go forward: where they lead to is there already.
#[derive(Default)]
struct Program {
    reversed: BpfProgram,
    /// Where verdicts are that were written last.
    verdicts: BTreeMap<u32, Place>,
}

/// An instruction of a program, counted from its end, from 1.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Place(usize);

impl Program {
    /// Instructions that decide on the value that was loaded, which is not less than `least`, as `ranges` (in order,
    /// without overlaps) say.
    fn search(&mut self, ranges: &[Range], least: u32) -> Place {
        match ranges {
            [] => self.verdict(SECCOMP_RET_TRAP),
            [range] => {
                let within = match range.then {
                    Allowed::Always => self.verdict(SECCOMP_RET_ALLOW),
                    Allowed::WithFirst(values) => self.look_at(FIRST_ARGUMENT, values),
                    Allowed::WithSecond(values) => self.look_at(SECOND_ARGUMENT, values),
                };
                let outside = self.verdict(SECCOMP_RET_TRAP);
                let within = self.compare(BPF_JGT, range.last, outside, within);
                if range.first == least {
                    return within;
                }
                let outside = self.verdict(SECCOMP_RET_TRAP);
                self.compare(BPF_JGE, range.first, within, outside)
            }
            _ => {
                let (below, above) = ranges.split_at(ranges.len() / 2);
                let first = above[0].first;
                let above = self.search(above, first);
                let below = self.search(below, least);
                self.compare(BPF_JGE, first, above, below)
            }
        }
    }

    /// Instructions that load an argument and allow it to be one of `values`.
    fn look_at(&mut self, argument: u32, values: &[u32]) -> Place {
        let mut values = values.to_vec();
        values.sort_unstable();
        values.dedup();
        let one = |value| Range {
            first: value,
            last: value,
            then: &Allowed::Always,
        };
        let ranges: Vec<_> = values.into_iter().map(one).collect();
        let start = self.search(&ranges, 0);
        self.follow(start);
        self.add(load(argument));
        self.place()
    }

    /// An instruction near by that ends with `verdict`.
    fn verdict(&mut self, verdict: u32) -> Place {
        if let Some(&place) = self.verdicts.get(&verdict)
            && self.is_near(place)
        {
            return place;
        }
        self.add(instruction(BPF_RET | BPF_K, verdict, 0, 0));
        self.verdicts.insert(verdict, self.place());
        self.place()
    }

    /// Goes on at one of two places, depending on how what was loaded compares with `value`.
    fn compare(&mut self, comparison: u32, value: u32, if_true: Place, if_false: Place) -> Place {
        let (if_true, if_false) = (self.near(if_true), self.near(if_false));
        let [jt, jf] = [if_true, if_false].map(|place| {
            // What is near stays so for another instruction.
            u8::try_from(self.distance(place)).expect("a place near by")
        });
        self.add(instruction(BPF_JMP | BPF_K | comparison, value, jt, jf));
        self.place()
    }

    /// Has `place` come next.
    fn follow(&mut self, place: Place) {
        if place != self.place() {
            let over = u32::try_from(self.distance(place)).expect("the kernel takes 4096 instructions");
            self.add(instruction(BPF_JMP | BPF_JA, over, 0, 0));
        }
    }

    /// `place`, or one from where it goes on there, that a comparison reaches.
    fn near(&mut self, place: Place) -> Place {
        if self.is_near(place) {
            return place;
        }
        self.follow(place);
        self.place()
    }

    fn is_near(&self, place: Place) -> bool {
        /// As far as comparisons go, with room for what may come in between.
        const NEAR: usize = 250;
        self.distance(place) <= NEAR
    }

    /// How many instructions the next one has to leave out to get to `place`.
    fn distance(&self, place: Place) -> usize {
        self.reversed.len() - place.0
    }

    /// That of the instruction that was added last.
    fn place(&self) -> Place {
        Place(self.reversed.len())
    }

    fn add(&mut self, instruction: sock_filter) {
        self.reversed.push(instruction);
    }
}

/// Loads a word of the call's description.
fn load(offset: u32) -> sock_filter {
    instruction(BPF_LD | BPF_W | BPF_ABS, offset, 0, 0)
}

fn instruction(code: u32, k: u32, jt: u8, jf: u8) -> sock_filter {
    let code = u16::try_from(code).expect("codes of classic BPF have 8 bits");
    sock_filter { code, jt, jf, k }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// What `program` makes of a call, and how many instructions that takes.
    fn run(program: &[sock_filter], architecture: u32, number: u32, [first, second]: [u32; 2]) -> (u32, usize) {
        let (mut at, mut value) = (0, 0);
        for steps in 1.. {
            let sock_filter { code, jt, jf, k } = program[at];
            let code = u32::from(code);
            at += 1;
            let condition = match code & 0xf0 {
                BPF_JEQ => value == k,
                BPF_JGT => value > k,
                _ => value >= k,
            };
            match code & 0x07 {
                BPF_RET => return (k, steps),
                BPF_LD => {
                    value = match k {
                        NUMBER => number,
                        ARCHITECTURE_AT => architecture,
                        FIRST_ARGUMENT => first,
                        SECOND_ARGUMENT => second,
                        _ => panic!("loads from {k}"),
                    }
                }
                BPF_JMP if code == BPF_JMP | BPF_JA => at += k as usize,
                BPF_JMP => at += usize::from(if condition { jt } else { jf }),
                _ => panic!("unknown code {code:#x}"),
            }
        }
        unreachable!("every program ends")
    }

    fn allowed() -> impl Strategy<Value = Allowed> {
        prop_oneof![
            4 => Just(Allowed::Always),
            1 => prop::collection::vec(0_u32..300, 0..200).prop_map(Allowed::WithFirst),
            1 => prop::collection::vec(0_u32..300, 0..200).prop_map(Allowed::WithSecond),
        ]
    }

    proptest! {
        #[test]
        fn a_program_allows_what_the_list_does_and_nothing_else(
            calls in prop::collection::btree_map(0_u32..460, allowed(), 0..120),
            asked in prop::collection::vec((0_u32..500, [0_u32..320, 0..320]), 1..300),
        ) {
            let program = assemble(&calls);
            for (number, arguments) in asked {
                let is_allowed = match calls.get(&number) {
                    Some(Allowed::Always) => true,
                    Some(Allowed::WithFirst(values)) => values.contains(&arguments[0]),
                    Some(Allowed::WithSecond(values)) => values.contains(&arguments[1]),
                    None => false,
                };
                let expected = if is_allowed { SECCOMP_RET_ALLOW } else { SECCOMP_RET_TRAP };
                let (verdict, _) = run(&program, ARCHITECTURE, number, arguments);
                prop_assert_eq!(verdict, expected, "call {} with {:?}", number, arguments);
            }
        }
    }

    #[test]
    fn calls_of_other_architectures_end_the_process_and_those_of_x32_are_trapped() {
        let program = assemble(&(0..400).map(|number| (number, Allowed::Always)).collect());
        assert_eq!(run(&program, 0x4000_0003, 1, [0; 2]).0, SECCOMP_RET_KILL_PROCESS);
        assert_eq!(run(&program, ARCHITECTURE, 0x4000_0001, [0; 2]).0, SECCOMP_RET_TRAP);
    }

    #[test]
    fn a_verdict_takes_few_instructions_however_long_the_list_is() {
        let calls: BTreeMap<_, _> = (0..150).map(|number| (number * 3, Allowed::Always)).collect();
        let program = assemble(&calls);
        let longest = (0..460)
            .map(|number| run(&program, ARCHITECTURE, number, [0; 2]).1)
            .max();
        assert!(longest.unwrap() <= 16, "{longest:?} of {}", program.len());
    }
}
