//! The progress bar of a migration, on both sides: which round, how fast, what is left, how long it would stand still.

use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

use crate::client::{bytes, milliseconds};
use crate::server::v1::types::{MigrationPhaseV1, MigrationProgressV1};

/// How often it is drawn at least, so that what hangs does not look dead.
const TICK: Duration = Duration::from_millis(500);

/// A bar that is shown only on a terminal.
pub struct MigrationBar {
    bar: ProgressBar,
    /// The round it is that of.
    round: u32,
    /// Most pages that this round was seen to have left.
    round_pages: u64,
}

impl MigrationBar {
    /// A bar that has nothing to show yet.
    pub fn new() -> Self {
        let style = ProgressStyle::with_template("{spinner} {msg} {wide_bar} {percent}%");
        let bar = ProgressBar::no_length().with_style(style.expect("a valid template"));
        if !bar.is_hidden() {
            bar.enable_steady_tick(TICK);
        }
        Self {
            bar,
            round: 0,
            round_pages: 0,
        }
    }

    /// Whether nobody sees it.
    pub fn is_hidden(&self) -> bool {
        self.bar.is_hidden()
    }

    /// Shows how far it is.
    pub fn show(&mut self, progress: &MigrationProgressV1) {
        if progress.round != self.round {
            (self.round, self.round_pages) = (progress.round, 0);
        }
        self.round_pages = self.round_pages.max(progress.pages_left);
        // Before there is anything to send, the bar is empty, not full.
        self.bar.set_length(self.round_pages.max(1));
        self.bar.set_position(self.round_pages - progress.pages_left);
        self.bar.set_message(in_words(progress));
    }

    /// Removes it.
    pub fn clear(&self) {
        self.bar.finish_and_clear();
    }
}

fn in_words(progress: &MigrationProgressV1) -> String {
    let phase = match progress.phase {
        MigrationPhaseV1::Connecting => return "connecting".to_owned(),
        MigrationPhaseV1::Reserving => return "the destination builds the VM".to_owned(),
        MigrationPhaseV1::HandedOver => return "handed over".to_owned(),
        MigrationPhaseV1::Done => return "done".to_owned(),
        MigrationPhaseV1::PreCopy => format!("round {}", progress.round),
        MigrationPhaseV1::Stopping => "last pages".to_owned(),
        MigrationPhaseV1::PostCopy => "it runs there, the rest follows".to_owned(),
        MigrationPhaseV1::Unknown => "under way".to_owned(),
    };
    if progress.bytes_sent == 0 {
        // The destination does not count.
        return phase;
    }
    let mut text = format!(
        "{phase}: {} sent, {}/s, {} pages left",
        bytes(progress.bytes_sent),
        bytes(progress.bytes_per_second),
        progress.pages_left
    );
    if let Some(downtime) = progress.expected_downtime_ns {
        text.push_str(&format!(", standstill of {}", milliseconds(downtime)));
    }
    if progress.throttle_percent > 0 {
        text.push_str(&format!(", slowed down by {}%", progress.throttle_percent));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn progress(phase: MigrationPhaseV1) -> MigrationProgressV1 {
        MigrationProgressV1 {
            phase,
            round: 3,
            pages_sent: 1000,
            pages_left: 20,
            bytes_sent: 4 << 20,
            bytes_per_second: 1 << 20,
            dirty_pages_per_second: 7,
            expected_downtime_ns: None,
            throttle_percent: 0,
        }
    }

    #[test]
    fn a_round_is_shown_with_its_rate_and_what_is_left() {
        let mut progress = progress(MigrationPhaseV1::PreCopy);
        assert_eq!(in_words(&progress), "round 3: 4 MiB sent, 1 MiB/s, 20 pages left");
        progress.expected_downtime_ns = Some(12_000_000);
        progress.throttle_percent = 30;
        let text = in_words(&progress);
        assert!(
            text.ends_with("20 pages left, standstill of 12.00 ms, slowed down by 30%"),
            "{text}"
        );
        progress.bytes_sent = 0;
        assert_eq!(in_words(&progress), "round 3");
        progress.phase = MigrationPhaseV1::Reserving;
        assert_eq!(in_words(&progress), "the destination builds the VM");
    }

    #[test]
    fn the_bar_begins_anew_with_each_round() {
        let mut bar = MigrationBar::new();
        let mut progress = progress(MigrationPhaseV1::PreCopy);
        for (round, left, position, length) in [
            (0, 0, 0, 1),
            (1, 100, 0, 100),
            (1, 40, 60, 100),
            (2, 10, 0, 10),
            (2, 0, 10, 10),
        ] {
            (progress.round, progress.pages_left) = (round, left);
            bar.show(&progress);
            assert_eq!((bar.bar.position(), bar.bar.length()), (position, Some(length)));
        }
    }
}
