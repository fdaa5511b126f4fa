//! The progress bar of commands that take long.

use cutover_snapshot::image::Progress;
use indicatif::{ProgressBar, ProgressStyle};

/// A bar for `what` is done, which is shown only on a terminal.
pub fn bar(what: &'static str) -> ProgressBar {
    let style = ProgressStyle::with_template("{msg} {wide_bar} {bytes}/{total_bytes} {eta}");
    ProgressBar::no_length()
        .with_message(what)
        .with_style(style.expect("a valid template"))
}

/// Does something long under a bar.
pub fn with_bar<T>(what: &'static str, work: impl FnOnce(&mut dyn FnMut(Progress)) -> T) -> T {
    let bar = bar(what);
    let result = work(&mut |Progress { done, total }| {
        bar.set_length(total);
        bar.set_position(done);
    });
    bar.finish_and_clear();
    result
}
