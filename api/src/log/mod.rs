//! The log: which messages, how many of them, in what form, where to.
//!
//! ```text
//!  tracing event ─► filter (level, by part of the program) ─► limit (per place, overall) ─► format ─► destination
//! ```
//!
//! All four can be exchanged while messages come: [`Logger::reconfigure`] is what `PUT /logger` does. A message that
//! cannot be written is counted, never waited for.

mod args;
mod destination;
mod filter;
mod format;
mod limit;

use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard};
use std::time::Instant;

use jiff::Timestamp;
use tracing::callsite::{self, Identifier};
use tracing::level_filters::LevelFilter;
use tracing::subscriber::{Interest, SetGlobalDefaultError, Subscriber, set_global_default};
use tracing::{Event, Metadata};
use tracing_subscriber::layer::{Context, Layer, SubscriberExt};
use tracing_subscriber::registry;

pub use args::LogArgs;
pub use destination::{open_for_lines, write_line};
pub use filter::{FilterError, LogFilter, level};
pub use format::LogFormat;

use destination::Destination;
use format::{LineStyle, Record};
use limit::{Limiter, Verdict};

/// Why the log cannot be as asked; it is as before.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// The file or pipe cannot be opened.
    #[error("cannot log to {}", .path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The part of the program or its level makes no sense.
    #[error(transparent)]
    Filter(#[from] FilterError),
    /// There is a log already.
    #[error("this process has a log already")]
    Started(#[from] SetGlobalDefaultError),
}

/// What is to be changed about the log; what is none stays as it is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LogUpdate {
    /// The file or named pipe messages go to.
    pub path: Option<PathBuf>,
    /// From which level on messages are logged; takes the place of the levels of parts, too.
    pub level: Option<LevelFilter>,
    /// Nothing but messages of this part of the program; [`LevelFilter::INFO`] if no level is given beside it.
    pub module: Option<String>,
    /// Whether lines show the level.
    pub show_level: Option<bool>,
    /// Whether lines show file and line of the source.
    pub show_origin: Option<bool>,
}

/// What became of messages that were not filtered out, since the beginning.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LogCounts {
    /// Held back by the limits.
    pub held_back: u64,
    /// Lost because they could not be written.
    pub lost: u64,
}

/// The log of this process; clones are the same log.
#[derive(Clone)]
pub struct Logger(Arc<Shared>);

struct Shared {
    settings: RwLock<Settings>,
    limiter: Mutex<Limiter<Identifier>>,
    lost: AtomicU64,
}

struct Settings {
    filter: LogFilter,
    format: LogFormat,
    show_level: bool,
    show_origin: bool,
    destination: Destination,
}

/// Begins to log what this process has to say, as `args` ask.
///
/// # Errors
/// The file cannot be opened, or there is a log already.
pub fn start(args: &LogArgs) -> Result<Logger, LogError> {
    let logger = Logger::open(args)?;
    set_global_default(registry().with(logger.clone()))?;
    Ok(logger)
}

impl Logger {
    pub(crate) fn open(args: &LogArgs) -> Result<Self, LogError> {
        let destination = args.log_file.clone().map_or(Ok(Destination::Stderr), open)?;
        Ok(Self(Arc::new(Shared {
            settings: RwLock::new(Settings {
                filter: args.log_level.clone(),
                format: args.log_format,
                show_level: true,
                show_origin: false,
                destination,
            }),
            limiter: Mutex::default(),
            lost: AtomicU64::new(0),
        })))
    }

    /// Changes the log as `update` says, all of it or nothing.
    ///
    /// # Errors
    /// The file cannot be opened, or the part of the program is none.
    pub fn reconfigure(&self, update: LogUpdate) -> Result<(), LogError> {
        let filter = match (&update.module, update.level) {
            (Some(module), level) => Some(LogFilter::only(module, level.unwrap_or(LevelFilter::INFO))?),
            (None, level) => level.map(LogFilter::all),
        };
        let destination = update.path.map(open).transpose()?;
        {
            let mut settings = self.0.settings.write().unwrap_or_else(PoisonError::into_inner);
            replace(&mut settings.filter, filter);
            replace(&mut settings.destination, destination);
            replace(&mut settings.show_level, update.show_level);
            replace(&mut settings.show_origin, update.show_origin);
        }
        callsite::rebuild_interest_cache();
        Ok(())
    }

    /// What became of messages so far.
    pub fn counts(&self) -> LogCounts {
        LogCounts {
            held_back: self.limiter(|limiter| limiter.held_back()),
            lost: self.0.lost.load(Ordering::Relaxed),
        }
    }

    /// Says how many messages were held back without a later one that tells; for the end of the process.
    pub fn tell_untold(&self) {
        let messages = self.limiter(|limiter| limiter.untold());
        if messages > 0 {
            tracing::warn!(messages, "messages were held back: there were too many");
        }
    }

    fn limiter<T>(&self, ask: impl FnOnce(&mut Limiter<Identifier>) -> T) -> T {
        ask(&mut self.0.limiter.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn settings(&self) -> RwLockReadGuard<'_, Settings> {
        self.0.settings.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_logged(&self, metadata: &Metadata<'_>) -> bool {
        *metadata.level() <= self.settings().filter.level_of(metadata.target())
    }
}

impl<S: Subscriber> Layer<S> for Logger {
    fn register_callsite(&self, metadata: &'static Metadata<'static>) -> Interest {
        if metadata.is_event() && self.is_logged(metadata) {
            Interest::always()
        } else {
            Interest::never()
        }
    }

    fn enabled(&self, metadata: &Metadata<'_>, _: Context<'_, S>) -> bool {
        self.is_logged(metadata)
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        Some(self.settings().filter.max_level())
    }

    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let metadata = event.metadata();
        let verdict = self.limiter(|limiter| limiter.admit(metadata.callsite(), *metadata.level(), Instant::now()));
        let Verdict::Log { held_back, last } = verdict else {
            return;
        };
        let record = Record::new(event, Timestamp::now(), held_back, last);
        if self.settings().write(&record).is_err() {
            self.0.lost.fetch_add(1, Ordering::Relaxed);
        }
    }
}

impl Settings {
    fn write(&self, record: &Record) -> io::Result<()> {
        let line = match self.format {
            LogFormat::Human => record.line(LineStyle {
                level: self.show_level,
                origin: self.show_origin,
                colour: self.destination.has_colours(),
            }),
            LogFormat::Json => record.json(),
        };
        self.destination.write(&line)
    }
}

fn open(path: PathBuf) -> Result<Destination, LogError> {
    Destination::open(&path).map_err(|source| LogError::Open { path, source })
}

fn replace<T>(value: &mut T, new: Option<T>) {
    if let Some(new) = new {
        *value = new;
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use tracing::subscriber::with_default;

    use super::*;

    /// What is in the log after `run`, which may reconfigure it.
    fn logged(args: LogArgs, run: impl FnOnce(&Logger)) -> String {
        let folder = tempfile::tempdir().expect("folder");
        let path = folder.path().join("log");
        let logger = Logger::open(&LogArgs {
            log_file: Some(path.clone()),
            ..args
        })
        .expect("a new file");
        with_default(registry().with(logger.clone()), || run(&logger));
        read(&path)
    }

    fn read(path: &Path) -> String {
        fs::read_to_string(path).expect("text")
    }

    fn level(text: &str) -> LogArgs {
        LogArgs {
            log_level: text.parse().expect(text),
            ..LogArgs::default()
        }
    }

    /// Logs one message of each level for two parts of the program.
    fn say_everything() {
        tracing::error!(target: "cutover_vmm::driver", "vmm error");
        tracing::info!(target: "cutover_vmm::driver", "vmm info");
        tracing::debug!(target: "cutover_devices::virtio", "virtio debug");
        tracing::trace!(target: "cutover_devices::virtio", "virtio trace");
    }

    fn messages(log: &str) -> Vec<&str> {
        ["vmm error", "vmm info", "virtio debug", "virtio trace"]
            .into_iter()
            .filter(|message| log.contains(message))
            .collect()
    }

    #[test]
    fn warnings_and_errors_are_logged_unless_told_otherwise() {
        let log = logged(LogArgs::default(), |_| say_everything());
        assert_eq!(messages(&log), ["vmm error"]);
    }

    #[test]
    fn parts_of_the_program_have_levels_of_their_own() {
        let log = logged(level("info,virtio=debug"), |_| say_everything());
        assert_eq!(messages(&log), ["vmm error", "vmm info", "virtio debug"]);
    }

    #[test]
    fn levels_can_be_changed_at_any_time() {
        let log = logged(level("off"), |logger| {
            say_everything();
            let update = LogUpdate {
                module: Some("devices".to_owned()),
                level: Some(LevelFilter::TRACE),
                ..LogUpdate::default()
            };
            logger.reconfigure(update).expect("valid");
            say_everything();
        });
        assert_eq!(messages(&log), ["virtio debug", "virtio trace"]);
    }

    #[test]
    fn a_new_file_takes_the_place_of_the_old_one() {
        let folder = tempfile::tempdir().expect("folder");
        let path = folder.path().join("new");
        let log = logged(LogArgs::default(), |logger| {
            tracing::error!("before");
            let update = LogUpdate {
                path: Some(path.clone()),
                show_level: Some(false),
                show_origin: Some(true),
                ..LogUpdate::default()
            };
            logger.reconfigure(update).expect("a new file");
            tracing::error!("after");
        });
        assert!(log.ends_with(" ERROR before\n") && !log.contains("after"), "{log}");
        let log = read(&path);
        assert!(log.contains("log/mod.rs:") && log.ends_with(": after\n"), "{log}");
        assert!(!log.contains("ERROR"), "{log}");
    }

    #[test]
    fn an_update_that_fails_changes_nothing() {
        let log = logged(LogArgs::default(), |logger| {
            let update = LogUpdate {
                path: Some("/nonexistent/log".into()),
                level: Some(LevelFilter::OFF),
                ..LogUpdate::default()
            };
            let error = logger.reconfigure(update).expect_err("no such folder");
            assert_eq!(error.to_string(), "cannot log to /nonexistent/log");
            tracing::error!("still here");
        });
        assert!(log.contains("still here"));
    }

    #[test]
    fn a_flood_is_cut_off_counted_and_told() {
        let log = logged(level("info"), |logger| {
            for number in 0..1000 {
                tracing::warn!(number, "flood");
            }
            assert_eq!(
                logger.counts(),
                LogCounts {
                    held_back: 990,
                    lost: 0
                }
            );
            tracing::warn!("something else");
            logger.tell_untold();
        });
        assert_eq!(log.matches(" flood ").count(), 10);
        assert!(
            log.contains("flood number=9 (more like it are held back for 10 s)\n"),
            "{log}"
        );
        assert!(log.contains("something else\n"));
        assert!(
            log.ends_with("messages were held back: there were too many messages=990\n"),
            "{log}"
        );
    }

    #[test]
    fn json_is_a_line_for_each_message() {
        let args = LogArgs {
            log_format: LogFormat::Json,
            ..LogArgs::default()
        };
        let log = logged(args, |_| tracing::warn!(device = "disk0", "failed"));
        let json: serde_json::Value = serde_json::from_str(&log).expect("one JSON object");
        assert_eq!(json["fields"]["device"], "disk0");
    }

    #[test]
    fn a_message_that_cannot_be_written_is_counted() {
        let args = LogArgs {
            log_file: Some("/dev/full".into()),
            ..LogArgs::default()
        };
        let logger = Logger::open(&args).expect("it can be opened");
        with_default(registry().with(logger.clone()), || tracing::error!("lost"));
        assert_eq!(logger.counts().lost, 1);
    }
}
