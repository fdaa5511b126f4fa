//! A report as a picture: one panel per metric, one bar per contestant, with the range of the single values.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, anyhow};
use plotters::coord::Shift;
use plotters::prelude::*;

use super::report::{MetricReport, Report, figure};

const WIDTH: u32 = 760;
const HEADING_HEIGHT: u32 = 34;
const PANEL_HEADING_HEIGHT: u32 = 26;
const BAR_HEIGHT: u32 = 24;
const PANEL_GAP: u32 = 30;
/// Room for the contestants' names.
const NAMES_WIDTH: u32 = 130;
/// Room right of the longest bar for its value, as a share of its length.
const VALUE_ROOM: f64 = 1.25;

const OURS: RGBColor = RGBColor(0x1f, 0x6f, 0xb4);
const PEERS: RGBColor = RGBColor(0xa8, 0xb0, 0xb8);

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// Writes `report` as an SVG file.
pub fn draw(report: &Report, path: &Path) -> Result<()> {
    let mut svg = String::new();
    // The library's error type borrows from the drawing, so only its message can leave.
    draw_panels(report, &mut svg).map_err(|error| anyhow!("cannot draw {}: {error}", path.display()))?;
    fs::write(path, svg).with_context(|| format!("cannot write {}", path.display()))
}

fn draw_panels(report: &Report, svg: &mut String) -> Result<(), Box<dyn std::error::Error>> {
    let heights: Vec<u32> = report.metrics.iter().map(panel_height).collect();
    let height = HEADING_HEIGHT + heights.iter().sum::<u32>();
    let root = SVGBackend::with_string(svg, (WIDTH, height)).into_drawing_area();
    root.fill(&WHITE)?;
    let heading = format!("{}: {}", report.bench, report.title);
    root.draw(&Text::new(heading, (10, 10), ("sans-serif", 16)))?;
    let (_, mut rest) = root.split_vertically(HEADING_HEIGHT);
    for (metric, height) in report.metrics.iter().zip(heights) {
        let (panel, below) = rest.split_vertically(height);
        draw_panel(metric, &panel)?;
        rest = below;
    }
    root.present()?;
    Ok(())
}

fn panel_height(metric: &MetricReport) -> u32 {
    let bars = u32::try_from(metric.series.len()).unwrap_or(u32::MAX);
    PANEL_HEADING_HEIGHT + BAR_HEIGHT.saturating_mul(bars) + PANEL_GAP
}

fn draw_panel(metric: &MetricReport, panel: &Area) -> Result<(), Box<dyn std::error::Error>> {
    let count = i32::try_from(metric.series.len())?;
    let longest = metric.series.iter().map(|series| series.median).fold(f64::MIN_POSITIVE, f64::max);
    let mut chart = ChartBuilder::on(panel)
        .caption(format!("{} ({})", metric.title, metric.unit), ("sans-serif", 14))
        .margin_left(10)
        .margin_right(10)
        .x_label_area_size(PANEL_GAP)
        .y_label_area_size(NAMES_WIDTH)
        // Downwards, in the order of the table.
        .build_cartesian_2d(0.0..longest * VALUE_ROOM, (count..0).into_segmented())?;
    let _ = &mut chart;
    Ok(())
}
