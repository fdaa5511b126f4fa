//! `cargo xtask sim`: groups, hosts and faults by seed, many of them, or one with its trace.

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::time::Instant;

use cutover_cluster::sim::{Faults, MS, Options, Outcome, SECOND, run};

/// Columns of the table of groups that grow.
const HEADINGS: &str = "members  messages/cut  ms/cut (simulated)  µs of processor/cut";

/// What is said on the command line: `--name value` pairs.
struct Arguments(BTreeMap<String, String>);

impl Arguments {
    fn read() -> Result<Self, String> {
        let mut all = BTreeMap::new();
        let mut words = std::env::args().skip(1);
        while let Some(word) = words.next() {
            let name = word.strip_prefix("--").ok_or(format!("'{word}' is no option"))?;
            let value = words.next().ok_or(format!("--{name} needs a value"))?;
            all.insert(name.to_owned(), value);
        }
        Ok(Self(all))
    }

    fn number(&mut self, name: &str, otherwise: u64) -> Result<u64, String> {
        match self.0.remove(name) {
            Some(text) => text.parse().map_err(|_| format!("--{name}: '{text}' is no number")),
            None => Ok(otherwise),
        }
    }

    fn small(&mut self, name: &str, otherwise: u16) -> Result<u16, String> {
        let number = self.number(name, otherwise.into())?;
        u16::try_from(number).map_err(|_| format!("--{name}: {number} is too large"))
    }
}

fn main() -> ExitCode {
    match simulate() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("simulate: error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn simulate() -> Result<(), String> {
    let mut arguments = Arguments::read()?;
    if arguments.0.remove("grow").is_some() {
        return grow();
    }
    let first = arguments.number("seed", 0)?;
    let count = arguments.number("seeds", 1)?;
    let faults = arguments.0.remove("faults").unwrap_or_else(|| "storm".to_owned());
    let options = Options {
        members: arguments.small("members", 3)?,
        hosts: arguments.small("hosts", 3)?,
        length: arguments.number("seconds", 10)? * SECOND,
        faults: faults.parse::<Faults>()?,
        trace: false,
    };
    if let Some(name) = arguments.0.keys().next() {
        return Err(format!("--{name} is no option"));
    }
    let began = Instant::now();
    let mut all = Outcome::default();
    for seed in first..first + count {
        match run(seed, &options) {
            Ok(outcome) => add(&mut all, &outcome),
            Err((violation, _)) => {
                show(seed, &options);
                return Err(format!("seed {seed}: {violation}"));
            }
        }
    }
    println!(
        "{count} seeds in {:.1} s, without a violation: {all:#?}",
        began.elapsed().as_secs_f64()
    );
    Ok(())
}

/// The same run again, as text.
fn show(seed: u64, options: &Options) {
    let traced = Options {
        trace: true,
        ..*options
    };
    if let Err((_, trace)) = run(seed, &traced) {
        for line in trace {
            println!("{line}");
        }
    }
}

fn add(all: &mut Outcome, one: &Outcome) {
    all.steps += one.steps;
    all.messages += one.messages;
    all.took += one.took;
    all.faults += one.faults;
    all.cuts += one.cuts;
    all.invalid += one.invalid;
    all.recoveries += one.recoveries;
    all.unprotected += one.unprotected;
    all.lost += one.lost;
    all.stored += one.stored;
    all.outputs += one.outputs;
    all.cut_time += one.cut_time;
}

/// Groups of more and more members, undisturbed: what a cut costs.
fn grow() -> Result<(), String> {
    println!("{HEADINGS}");
    for members in [1, 3, 10, 30, 100, 300, 1000] {
        let options = Options {
            members,
            hosts: members.clamp(2, 100),
            length: 2 * SECOND,
            faults: Faults::None,
            trace: false,
        };
        let began = Instant::now();
        let outcome = run(1, &options).map_err(|(violation, _)| violation.to_string())?;
        let cuts = outcome.cuts.max(1);
        let spent = began.elapsed().as_micros() / u128::from(cuts);
        let (messages, took) = (outcome.messages / cuts, outcome.cut_time / cuts);
        println!("{members:7}  {messages:12}  {:18.1}  {spent:19}", ratio(took, MS));
    }
    Ok(())
}

#[allow(clippy::cast_precision_loss)]
fn ratio(a: u64, b: u64) -> f64 {
    a as f64 / b as f64
}
