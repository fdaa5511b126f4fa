//! A report as a picture: one panel per metric, one bar per contestant, with the range of the single values.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, anyhow};
use plotters::coord::Shift;
use plotters::prelude::*;

use super::report::{MetricReport, Report, Series, figure};

// All in pixels.
const WIDTH: i32 = 760;
const MARGIN: i32 = 12;
const HEADING_HEIGHT: i32 = 44;
const TITLE_HEIGHT: i32 = 22;
const ROW_HEIGHT: i32 = 24;
const BAR_HEIGHT: i32 = 16;
const PANEL_GAP: i32 = 16;
/// Where bars begin, right of the contestants' names.
const BARS_START: i32 = 160;
/// Length of the longest bar.
const BAR_LENGTH_MAX: i32 = 430;
/// Where ranges are cut off, in bar lengths: a single outlier must not make all bars dots. The table has the figure.
const RANGE_MAX: f64 = 1.1;

const OURS: RGBColor = RGBColor(0x1f, 0x6f, 0xb4);
const PEERS: RGBColor = RGBColor(0xa8, 0xb0, 0xb8);

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Drawn = Result<(), Box<dyn std::error::Error>>;

/// Writes `report` as an SVG file.
pub fn draw(report: &Report, path: &Path) -> Result<()> {
    // The library's errors cannot be sent between threads, as anyhow's must; their message can.
    let svg = render(report).map_err(|error| anyhow!("cannot draw {}: {error}", path.display()))?;
    fs::write(path, svg).with_context(|| format!("cannot write {}", path.display()))
}

fn render(report: &Report) -> Result<String, Box<dyn std::error::Error>> {
    let height = HEADING_HEIGHT + report.metrics.iter().map(panel_height).sum::<i32>();
    let mut svg = String::new();
    let root = SVGBackend::with_string(&mut svg, (WIDTH.cast_unsigned(), height.cast_unsigned())).into_drawing_area();
    root.fill(&WHITE)?;
    let heading = format!("{}: {}", report.bench, report.title);
    text(&root, &heading, (MARGIN, MARGIN), 16)?;
    let mut top = HEADING_HEIGHT;
    for metric in &report.metrics {
        draw_panel(&root, metric, top)?;
        top += panel_height(metric);
    }
    root.present()?;
    drop(root);
    Ok(svg)
}

fn panel_height(metric: &MetricReport) -> i32 {
    metric.series.iter().map(|_| ROW_HEIGHT).sum::<i32>() + TITLE_HEIGHT + PANEL_GAP
}

fn draw_panel(area: &Area, metric: &MetricReport, top: i32) -> Drawn {
    text(area, &format!("{} ({})", metric.title, metric.unit), (MARGIN, top), 14)?;
    let longest = metric
        .series
        .iter()
        .map(|series| series.median)
        .fold(f64::MIN_POSITIVE, f64::max);
    let mut row = top + TITLE_HEIGHT;
    for series in &metric.series {
        draw_row(area, series, longest, row)?;
        row += ROW_HEIGHT;
    }
    Ok(())
}

fn draw_row(area: &Area, series: &Series, longest: f64, top: i32) -> Drawn {
    let x = |value: f64| BARS_START + pixels(value / longest);
    let (bottom, middle) = (top + BAR_HEIGHT, top + BAR_HEIGHT / 2);
    text(area, &series.contestant, (MARGIN, top), 13)?;
    let color = if series.is_ours() { OURS } else { PEERS };
    area.draw(&Rectangle::new(
        [(BARS_START, top), (x(series.median), bottom)],
        color.filled(),
    ))?;
    let (least, most) = (x(series.min()), x(series.max()));
    area.draw(&PathElement::new([(least, middle), (most, middle)], BLACK))?;
    for end in [least, most] {
        area.draw(&PathElement::new([(end, middle - 4), (end, middle + 4)], BLACK))?;
    }
    text(area, &figure(series.median), (x(series.median).max(most) + 6, top), 13)
}

/// The length of something that is `share` of the longest bar, as far as it is drawn.
#[expect(
    clippy::cast_possible_truncation,
    reason = "a picture's coordinates are small, and pixels have no fractions"
)]
fn pixels(share: f64) -> i32 {
    (share.min(RANGE_MAX) * f64::from(BAR_LENGTH_MAX)).round() as i32
}

fn text(area: &Area, text: &str, position: (i32, i32), size: i32) -> Drawn {
    area.draw(&Text::new(text.to_owned(), position, ("sans-serif", size)))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::report::Clock;
    use super::*;

    #[test]
    fn a_plot_names_the_metric_and_each_contestant_with_its_median() {
        let series = |contestant: &str, values: [f64; 2], median| Series {
            contestant: contestant.to_owned(),
            values: values.to_vec(),
            median,
            ratio: None,
        };
        let metric = MetricReport {
            title: "time",
            unit: "ms",
            series: vec![
                series("Cutover", [1.0, 2.0], 1.5),
                series("Peer <1>", [200.0, 400.0], 300.0),
            ],
            verdict: None,
        };
        let svg = render(&Report {
            bench: "boot",
            title: "start",
            clock: Clock::Wall,
            metrics: vec![metric],
        })
        .unwrap();
        for text in ["boot: start", "time (ms)", "Cutover", "1.50", "Peer &lt;1&gt;", "300"] {
            assert!(svg.contains(text), "{text} is missing in {svg}");
        }
    }

    #[test]
    fn bars_are_proportional_and_outliers_are_cut_off() {
        assert_eq!(
            (pixels(0.0), pixels(0.5), pixels(1.0)),
            (0, BAR_LENGTH_MAX / 2, BAR_LENGTH_MAX)
        );
        assert!(BARS_START + pixels(1000.0) < WIDTH - 100, "room for the value is left");
    }
}
