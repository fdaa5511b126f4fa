//! `/logger`: what is logged, and where to.

use std::sync::Arc;

use axum::extract::State;
use serde::{Deserialize, Deserializer, Serialize};
use tracing::level_filters::LevelFilter;
use utoipa::ToSchema;

use super::setup::Change;
use crate::log::LogUpdate;
use crate::server::http::{Changed, Json, Outcome};
use crate::server::instance::Instance;

/// Body of `PUT /logger`; what is not given stays as it is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct LoggerConfiguration {
    /// File or named pipe that the log is appended to, instead of the standard error.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub log_path: Option<String>,
    /// Least severity of what is logged, in upper or lower case.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub level: Option<LogLevel>,
    /// Whether lines show the level.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub show_level: Option<bool>,
    /// Whether lines show file and line of the source.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub show_log_origin: Option<bool>,
    /// Log nothing but what this part of the program says, such as `virtio`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub module: Option<String>,
}

/// How much is logged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub enum LogLevel {
    /// Nothing.
    Off,
    /// What went wrong.
    Error,
    /// Also what may go wrong.
    Warning,
    /// Also what happens to the VM.
    Info,
    /// Also what the devices do.
    Debug,
    /// Everything.
    Trace,
}

impl LogLevel {
    /// The level of this name, in upper or lower case.
    pub fn named(name: &str) -> Option<Self> {
        Some(match name.to_ascii_lowercase().as_str() {
            "off" => Self::Off,
            "error" => Self::Error,
            "warn" | "warning" => Self::Warning,
            "info" => Self::Info,
            "debug" => Self::Debug,
            "trace" => Self::Trace,
            _ => return None,
        })
    }
}

impl<'de> Deserialize<'de> for LogLevel {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        const LEVELS: &[&str] = &["Off", "Error", "Warning", "Info", "Debug", "Trace"];
        let name = String::deserialize(deserializer)?;
        Self::named(&name).ok_or_else(|| serde::de::Error::unknown_variant(&name, LEVELS))
    }
}

impl From<LogLevel> for LevelFilter {
    fn from(level: LogLevel) -> Self {
        match level {
            LogLevel::Off => Self::OFF,
            LogLevel::Error => Self::ERROR,
            LogLevel::Warning => Self::WARN,
            LogLevel::Info => Self::INFO,
            LogLevel::Debug => Self::DEBUG,
            LogLevel::Trace => Self::TRACE,
        }
    }
}

impl From<LoggerConfiguration> for LogUpdate {
    fn from(logger: LoggerConfiguration) -> Self {
        Self {
            path: logger.log_path.map(Into::into),
            level: logger.level.map(Into::into),
            module: logger.module,
            show_level: logger.show_level,
            show_origin: logger.show_log_origin,
        }
    }
}

/// Changes the log. Before the start only.
#[utoipa::path(
    put, path = "/logger", operation_id = "putLogger", tag = "firecracker",
    request_body = LoggerConfiguration, responses(Changed)
)]
pub async fn put(State(instance): State<Arc<Instance>>, Json(body): Json<LoggerConfiguration>) -> Outcome {
    instance.configure(Change::Logger(body))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_field_of_firecracker_becomes_part_of_the_update() {
        let json =
            r#"{"log_path":"log","level":"warning","show_level":true,"show_log_origin":false,"module":"virtio"}"#;
        let logger: LoggerConfiguration = serde_json::from_str(json).expect("valid");
        let update = LogUpdate {
            path: Some("log".into()),
            level: Some(LevelFilter::WARN),
            module: Some("virtio".to_owned()),
            show_level: Some(true),
            show_origin: Some(false),
        };
        assert_eq!(LogUpdate::from(logger), update);
    }

    #[test]
    fn levels_are_read_in_any_case_and_others_are_refused() {
        for (name, level) in [
            ("\"OFF\"", LogLevel::Off),
            ("\"Error\"", LogLevel::Error),
            ("\"Warn\"", LogLevel::Warning),
            ("\"info\"", LogLevel::Info),
            ("\"DEBUG\"", LogLevel::Debug),
            ("\"Trace\"", LogLevel::Trace),
        ] {
            assert_eq!(serde_json::from_str::<LogLevel>(name).expect(name), level);
        }
        let error = serde_json::from_str::<LogLevel>("\"loud\"").expect_err("no level");
        assert!(error.to_string().contains("unknown variant `loud`"), "{error}");
    }
}
