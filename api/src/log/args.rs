//! The options of commands that log.

use std::path::PathBuf;

use clap::Args;

use super::filter::LogFilter;
use super::format::LogFormat;

/// What is logged, how, and where to.
#[derive(Clone, Debug, Default, Args)]
#[command(next_help_heading = "Log")]
pub struct LogArgs {
    /// Least severity of what is logged: off, error, warn, info, debug or trace
    ///
    /// Parts of the monitor can have levels of their own: info,virtio=debug,virtio::net=trace. A part is a run of
    /// segments of a module's path; the longest that fits decides. Guests cannot flood the log: what comes too often
    /// is held back, and counted.
    #[arg(long, value_name = "LEVEL", default_value = "warn")]
    pub log_level: LogFilter,

    /// Form of the log: a line for people (human) or a JSON object (json) for each message
    #[arg(long, value_name = "FORMAT", default_value = "human")]
    pub log_format: LogFormat,

    /// Append the log to FILE, which may be a named pipe, instead of writing it to the standard error
    #[arg(long, value_name = "FILE")]
    pub log_file: Option<PathBuf>,
}
