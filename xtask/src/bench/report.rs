//! From samples to medians, ratios and bars that are met or missed.

use std::fmt;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use super::catalogue::{Bar, Bench, Goal, Metric};

/// What the names of Cutover's entries begin with.
const OURS: &str = "Cutover";

/// One line of the bench binary.
#[derive(Debug, Deserialize)]
pub struct Sample {
    contestant: String,
    metric: String,
    value: f64,
}

/// Reads the bench binary's output.
pub fn parse_samples(text: &str) -> Result<Vec<Sample>> {
    text.lines()
        .map(|line| serde_json::from_str(line).with_context(|| format!("not a sample: {line}")))
        .collect()
}

/// What a second is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Clock {
    /// 10⁹ executed instructions of a nested host.
    Instructions,
    /// A second.
    Wall,
}

impl fmt::Display for Clock {
    fn fmt(&self, out: &mut fmt::Formatter) -> fmt::Result {
        out.write_str(match self {
            Self::Instructions => "1 ms = 1 million instructions of a nested host with one processor",
            Self::Wall => "wall clock",
        })
    }
}

/// The results of one bench.
#[derive(Serialize)]
pub struct Report {
    /// The bench's name.
    pub bench: &'static str,
    /// What was compared.
    pub title: &'static str,
    /// What a second is.
    pub clock: Clock,
    /// The results of each metric.
    pub metrics: Vec<MetricReport>,
}

/// The results of one metric.
#[derive(Serialize)]
pub struct MetricReport {
    /// What was measured.
    pub title: &'static str,
    /// Unit of the values.
    pub unit: &'static str,
    /// Each contestant's, in the order in which they were measured.
    pub series: Vec<Series>,
    /// What had to be achieved.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub verdict: Option<Verdict>,
}

/// The results of one contestant in one metric.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Series {
    /// Its name.
    pub contestant: String,
    /// Every value, in the order of the runs.
    pub values: Vec<f64>,
    /// Their median.
    pub median: f64,
    /// Cutover's median divided by this one's; none for Cutover itself and where there is nothing to gain.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ratio: Option<f64>,
}

/// How a result compares with its bar.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Verdict {
    /// The bar, in words.
    pub bar: String,
    /// What was achieved.
    pub achieved: f64,
    /// Whether that is enough.
    pub met: bool,
}

impl Report {
    /// Sums `samples` up.
    pub fn new(bench: &Bench, clock: Clock, samples: Vec<Sample>) -> Self {
        let metrics = bench
            .metrics
            .iter()
            .map(|metric| MetricReport::new(metric, &samples))
            .collect();
        Self {
            bench: bench.name,
            title: bench.title,
            clock,
            metrics,
        }
    }
}

impl MetricReport {
    fn new(metric: &Metric, samples: &[Sample]) -> Self {
        let mut series: Vec<Series> = Vec::new();
        for sample in samples.iter().filter(|sample| sample.metric == metric.id) {
            match series.iter_mut().find(|series| series.contestant == sample.contestant) {
                Some(series) => series.values.push(sample.value),
                None => series.push(Series::starting_with(sample)),
            }
        }
        for series in &mut series {
            series.median = median(&series.values);
        }
        if metric.goal != Goal::Neither {
            compare(&mut series);
        }
        let verdict = metric.bar.and_then(|bar| judge(bar, metric.unit, &series));
        Self {
            title: metric.title,
            unit: metric.unit,
            series,
            verdict,
        }
    }
}

impl Series {
    fn starting_with(sample: &Sample) -> Self {
        Self {
            contestant: sample.contestant.clone(),
            values: vec![sample.value],
            median: sample.value,
            ratio: None,
        }
    }

    /// Smallest value.
    pub fn min(&self) -> f64 {
        self.values.iter().copied().fold(f64::INFINITY, f64::min)
    }

    /// Largest value.
    pub fn max(&self) -> f64 {
        self.values.iter().copied().fold(f64::NEG_INFINITY, f64::max)
    }

    /// Whether it is one of Cutover's.
    pub fn is_ours(&self) -> bool {
        self.contestant.starts_with(OURS)
    }
}

/// The middle value, or the mean of the two in the middle; not a number if there is none.
fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.get(middle) {
        None => f64::NAN,
        Some(&upper) if sorted.len() % 2 == 1 => upper,
        Some(&upper) => f64::midpoint(sorted[middle - 1], upper),
    }
}

/// Sets each peer's ratio: to Cutover's entry of the same variant (what follows a comma in the name), or to its first.
fn compare(series: &mut [Series]) {
    let ours: Vec<(Option<String>, f64)> = series
        .iter()
        .filter(|series| series.is_ours())
        .map(|series| (variant(&series.contestant).map(str::to_owned), series.median))
        .collect();
    for peer in series.iter_mut().filter(|series| !series.is_ours()) {
        let same = ours.iter().find(|(own, _)| own.as_deref() == variant(&peer.contestant));
        peer.ratio = same.or(ours.first()).map(|(_, median)| median / peer.median);
    }
}

fn variant(contestant: &str) -> Option<&str> {
    contestant.split_once(", ").map(|(_, variant)| variant)
}

/// None where the contestant to be compared with was not measured.
fn judge(bar: Bar, unit: &str, series: &[Series]) -> Option<Verdict> {
    let (bar, most, achieved) = match bar {
        Bar::Median { most } => {
            let ours = series.iter().find(|series| series.is_ours())?;
            (format!("{OURS} ≤ {most:.1} {unit}"), most, ours.median)
        }
        Bar::Ratio { to, most } => {
            let peer = series.iter().find(|series| series.contestant == to)?;
            (format!("{OURS} ÷ {to} ≤ {most:.2}"), most, peer.ratio?)
        }
    };
    Some(Verdict {
        bar,
        achieved,
        met: achieved <= most,
    })
}

/// A table in Markdown, which terminals show well enough.
impl fmt::Display for Report {
    fn fmt(&self, out: &mut fmt::Formatter) -> fmt::Result {
        writeln!(out, "{}: {} ({})\n", self.bench, self.title, self.clock)?;
        writeln!(
            out,
            "| {:<42} | {:<17} | {:>10} | {:>21} | {:>7} |",
            "metric", "contestant", "median", "least … most", "ratio"
        )?;
        writeln!(out, "|{:-<44}|{:-<19}|{:->11}:|{:->22}:|{:->8}:|", "", "", "", "", "")?;
        for metric in &self.metrics {
            let mut title = format!("{} ({})", metric.title, metric.unit);
            for series in &metric.series {
                let range = format!("{} … {}", figure(series.min()), figure(series.max()));
                let ratio = series.ratio.map(|ratio| format!("{ratio:.2}")).unwrap_or_default();
                let median = figure(series.median);
                let name = &series.contestant;
                writeln!(
                    out,
                    "| {title:<42} | {name:<17} | {median:>10} | {range:>21} | {ratio:>7} |"
                )?;
                title.clear();
            }
        }
        writeln!(out, "\nratio = Cutover's median ÷ the other's")?;
        for verdict in self.metrics.iter().filter_map(|metric| metric.verdict.as_ref()) {
            let met = if verdict.met { "met" } else { "MISSED" };
            writeln!(out, "bar: {}: {met} ({:.3})", verdict.bar, verdict.achieved)?;
        }
        Ok(())
    }
}

/// Three significant digits or more, and no more than anybody reads.
pub fn figure(value: f64) -> String {
    if value.abs() < 100.0 {
        format!("{value:.2}")
    } else {
        format!("{value:.0}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TIME: Metric = Metric {
        id: "time_ms",
        title: "time",
        unit: "ms",
        goal: Goal::Less,
        bar: Some(Bar::Ratio { to: "Peer", most: 1.0 }),
    };

    fn report(samples: &[(&str, f64)]) -> MetricReport {
        let samples: Vec<Sample> = samples
            .iter()
            .map(|(contestant, value)| Sample {
                contestant: (*contestant).to_owned(),
                metric: "time_ms".to_owned(),
                value: *value,
            })
            .collect();
        MetricReport::new(&TIME, &samples)
    }

    #[test]
    fn the_median_ignores_an_outlier_and_the_order() {
        assert_eq!(median(&[9000.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 3.0, 2.0]), 2.5);
        assert!(median(&[]).is_nan());
    }

    #[test]
    fn a_ratio_is_our_median_by_the_peers_and_is_held_against_the_bar() {
        let slower = report(&[("Cutover", 3.0), ("Peer", 2.0), ("Cutover", 3.0), ("Peer", 2.0)]);
        assert_eq!(slower.series[1].values, [2.0, 2.0]);
        assert_eq!((slower.series[0].ratio, slower.series[1].ratio), (None, Some(1.5)));
        assert!(!slower.verdict.unwrap().met);
        let level = report(&[("Cutover", 2.0), ("Peer", 2.0)]);
        assert!(level.verdict.unwrap().met);
    }

    #[test]
    fn variants_are_compared_with_the_same_variant_and_without_one_with_the_first() {
        let report = report(&[
            ("Cutover, a", 1.0),
            ("Cutover, b", 4.0),
            ("Peer, b", 2.0),
            ("Peer, other", 2.0),
        ]);
        assert_eq!(report.series[2].ratio, Some(2.0));
        assert_eq!(report.series[3].ratio, Some(0.5));
    }

    #[test]
    fn without_the_peer_of_a_bar_there_is_no_verdict() {
        assert_eq!(report(&[("Cutover", 1.0)]).verdict, None);
    }

    #[test]
    fn samples_are_read_as_the_bench_binary_writes_them() {
        let samples = parse_samples("{\"contestant\":\"a\",\"metric\":\"m_ms\",\"value\":1.5}\n").unwrap();
        assert_eq!((samples[0].contestant.as_str(), samples[0].value), ("a", 1.5));
        assert!(parse_samples("panic").is_err());
    }
}
