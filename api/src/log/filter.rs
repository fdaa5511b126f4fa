//! Which messages are logged: a level for all, and levels of their own for parts of the program.
//!
//! `info,virtio=debug,net=off` logs everything from info on, virtio devices from debug on, and nothing of the network.
//! A part is named by a run of segments of a module's path: `virtio::net` is part of `cutover_devices::virtio::net::tx`.
//! The longest name that fits decides, and of equally long ones the last.

use std::fmt;
use std::str::FromStr;

use tracing::level_filters::LevelFilter;

/// Most parts with a level of their own.
pub const PARTS_MAX: usize = 32;

/// What our crates' names begin with, which may be left out.
const CRATE_PREFIX: &str = "cutover_";

/// The names of levels; "warning" is Firecracker's.
const LEVELS: [(&str, LevelFilter); 7] = [
    ("off", LevelFilter::OFF),
    ("error", LevelFilter::ERROR),
    ("warn", LevelFilter::WARN),
    ("info", LevelFilter::INFO),
    ("debug", LevelFilter::DEBUG),
    ("trace", LevelFilter::TRACE),
    ("warning", LevelFilter::WARN),
];

/// Why a text says nothing about what to log.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FilterError {
    /// No such level.
    #[error("'{0}' is not a level: it is one of off, error, warn, info, debug, trace, or PART=LEVEL")]
    Level(String),
    /// Not the path of a module.
    #[error("'{0}' is not a part of the program: write a module's path, such as virtio::net")]
    Part(String),
    /// More parts than `PARTS_MAX`.
    #[error("more than {PARTS_MAX} parts have a level of their own")]
    TooMany,
}

/// Which messages are logged.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogFilter {
    default: LevelFilter,
    parts: Vec<(Vec<String>, LevelFilter)>,
}

impl Default for LogFilter {
    /// Warnings and errors.
    fn default() -> Self {
        Self::all(LevelFilter::WARN)
    }
}

impl LogFilter {
    /// Everything from `level` on.
    pub fn all(level: LevelFilter) -> Self {
        Self {
            default: level,
            parts: Vec::new(),
        }
    }

    /// Nothing but what `part` says from `level` on.
    ///
    /// # Errors
    /// `part` is not the path of a module.
    pub fn only(part: &str, level: LevelFilter) -> Result<Self, FilterError> {
        Ok(Self {
            default: LevelFilter::OFF,
            parts: vec![(segments_of_name(part)?, level)],
        })
    }

    /// From which level on messages of the module `target` are logged.
    pub fn level_of(&self, target: &str) -> LevelFilter {
        if self.parts.is_empty() {
            return self.default;
        }
        let path: Vec<&str> = segments(target).collect();
        let fits = |name: &[String]| path.windows(name.len()).any(|run| run == name);
        let fitting = self.parts.iter().filter(|(name, _)| fits(name));
        // Of equal maxima, the last.
        fitting
            .max_by_key(|(name, _)| name.len())
            .map_or(self.default, |(_, level)| *level)
    }

    /// The level below which nothing is logged.
    pub fn max_level(&self) -> LevelFilter {
        let parts = self.parts.iter().map(|(_, level)| *level);
        parts.fold(self.default, LevelFilter::max)
    }
}

impl FromStr for LogFilter {
    type Err = FilterError;

    fn from_str(text: &str) -> Result<Self, FilterError> {
        let mut filter = Self::default();
        for directive in text.split(',') {
            match directive.split_once('=') {
                None => filter.default = level(directive)?,
                Some(_) if filter.parts.len() == PARTS_MAX => return Err(FilterError::TooMany),
                Some((part, text)) => filter.parts.push((segments_of_name(part)?, level(text)?)),
            }
        }
        Ok(filter)
    }
}

impl fmt::Display for LogFilter {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}", self.default)?;
        for (part, level) in &self.parts {
            write!(formatter, ",{}={level}", part.join("::"))?;
        }
        Ok(())
    }
}

/// The level called `text`, in whatever case.
///
/// # Errors
/// There is none.
pub fn level(text: &str) -> Result<LevelFilter, FilterError> {
    let found = LEVELS.iter().find(|(name, _)| text.eq_ignore_ascii_case(name));
    found
        .map(|(_, level)| *level)
        .ok_or_else(|| FilterError::Level(text.to_owned()))
}

fn segments_of_name(name: &str) -> Result<Vec<String>, FilterError> {
    let is_identifier =
        |segment: &str| !segment.is_empty() && segment.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_');
    let segments: Vec<&str> = segments(name).collect();
    if segments.iter().all(|segment| is_identifier(segment)) {
        Ok(segments.into_iter().map(str::to_owned).collect())
    } else {
        Err(FilterError::Part(name.to_owned()))
    }
}

fn segments(path: &str) -> impl Iterator<Item = &str> {
    path.strip_prefix(CRATE_PREFIX).unwrap_or(path).split("::")
}

#[cfg(test)]
mod tests {
    use super::*;

    const NET_TX: &str = "cutover_devices::virtio::net::tx";

    fn filter(text: &str) -> LogFilter {
        text.parse().expect(text)
    }

    #[test]
    fn a_level_alone_is_for_everything() {
        for (text, level) in [
            ("off", LevelFilter::OFF),
            ("error", LevelFilter::ERROR),
            ("warn", LevelFilter::WARN),
            ("info", LevelFilter::INFO),
            ("debug", LevelFilter::DEBUG),
            ("trace", LevelFilter::TRACE),
            ("Warning", LevelFilter::WARN),
        ] {
            assert_eq!(filter(text), LogFilter::all(level));
            assert_eq!(filter(text).level_of(NET_TX), level);
        }
    }

    #[test]
    fn a_part_is_named_by_any_run_of_its_path() {
        for part in [
            "cutover_devices",
            "devices",
            "virtio",
            "net",
            "virtio::net",
            "devices::virtio",
        ] {
            let filter = filter(&format!("off,{part}=debug"));
            assert_eq!(filter.level_of(NET_TX), LevelFilter::DEBUG, "{part}");
            assert_eq!(filter.level_of("hyper::proto"), LevelFilter::OFF, "{part}");
        }
        for part in ["vir", "net::virtio", "devices::net", "tx::more"] {
            assert_eq!(
                filter(&format!("off,{part}=debug")).level_of(NET_TX),
                LevelFilter::OFF,
                "{part}"
            );
        }
    }

    #[test]
    fn the_longest_name_decides_and_of_equals_the_last() {
        let filter = filter("virtio::net=error,info,virtio=debug,net=trace,virtio=off");
        assert_eq!(filter.level_of(NET_TX), LevelFilter::ERROR);
        assert_eq!(filter.level_of("cutover_devices::virtio::block"), LevelFilter::OFF);
        assert_eq!(filter.level_of("cutover_vmm::driver"), LevelFilter::INFO);
        assert_eq!(filter.max_level(), LevelFilter::TRACE);
    }

    #[test]
    fn a_module_alone_silences_the_others() {
        let filter = LogFilter::only("api::server", LevelFilter::INFO).expect("a path");
        assert_eq!(filter.level_of("cutover_api::server::v1"), LevelFilter::INFO);
        assert_eq!(filter.level_of("cutover_api::client"), LevelFilter::OFF);
    }

    #[test]
    fn what_says_nothing_about_levels_is_refused() {
        for (text, message) in [
            (
                "loud",
                "'loud' is not a level: it is one of off, error, warn, info, debug, trace, or PART=LEVEL",
            ),
            (
                "",
                "'' is not a level: it is one of off, error, warn, info, debug, trace, or PART=LEVEL",
            ),
            (
                "virtio=loud",
                "'loud' is not a level: it is one of off, error, warn, info, debug, trace, or PART=LEVEL",
            ),
            (
                "vir tio=info",
                "'vir tio' is not a part of the program: write a module's path, such as virtio::net",
            ),
            (
                "=info",
                "'' is not a part of the program: write a module's path, such as virtio::net",
            ),
        ] {
            assert_eq!(text.parse::<LogFilter>().expect_err(text).to_string(), message);
        }
        let many = vec!["net=info"; PARTS_MAX + 1].join(",");
        assert_eq!(many.parse::<LogFilter>(), Err(FilterError::TooMany));
    }

    #[test]
    fn a_filter_is_shown_as_it_is_written() {
        assert_eq!(filter("info,virtio::net=debug").to_string(), "info,virtio::net=debug");
    }
}
