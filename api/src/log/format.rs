//! How a message is written: a line for people, or a JSON object for programs.
//!
//! ```text
//!  2026-11-21T12:00:00.000000Z  WARN disk request failed device=disk0 error=no space (7 like it held back)
//!  {"timestamp":"2026-11-21T12:00:00.000000Z","level":"WARN","target":"cutover_devices::virtio::block",
//!   "fields":{"message":"disk request failed","device":"disk0","error":"no space"},"held_back":7}
//! ```
//!
//! One message is one line, whatever a guest has a hand in: control characters are escaped.

use std::fmt::{self, Write};

use anstyle::{AnsiColor, Style};
use clap::ValueEnum;
use jiff::Timestamp;
use serde::ser::SerializeMap;
use serde::{Serialize, Serializer};
use serde_json::Value;
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Metadata};

use super::limit::WINDOW;
use crate::text::escaped;

/// Most bytes of one text in a message; what is longer is cut.
pub const TEXT_MAX: usize = 1024;

/// The field that has the message itself.
const MESSAGE: &str = "message";
/// What a text that was cut ends with.
const CUT: char = '…';

/// Who is to read the log.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// People: a line for each message.
    #[default]
    Human,
    /// Programs: a JSON object on a line for each message.
    Json,
}

/// What lines for people show.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LineStyle {
    /// The level.
    pub level: bool,
    /// File and line of the source.
    pub origin: bool,
    /// Colours.
    pub colour: bool,
}

/// A message, and what became of others like it.
pub struct Record {
    time: Timestamp,
    metadata: &'static Metadata<'static>,
    fields: Fields,
    held_back: u64,
    last: bool,
}

/// The values of a message, in the order given.
#[derive(Default)]
struct Fields {
    message: String,
    others: Vec<(&'static str, Value)>,
}

impl Record {
    /// The message of `event`, at `time`; `held_back` ones of the same place were not logged before it, and if it is
    /// the `last`, more will not be after it.
    pub fn new(event: &Event<'_>, time: Timestamp, held_back: u64, last: bool) -> Self {
        let mut fields = Fields::default();
        event.record(&mut fields);
        Self {
            time,
            metadata: event.metadata(),
            fields,
            held_back,
            last,
        }
    }

    /// The line for people, with its end.
    pub fn line(&self, style: LineStyle) -> String {
        let mut line = String::new();
        // Writing to a String does not fail.
        let _ = self.write_line(&mut line, style);
        line.push('\n');
        line
    }

    fn write_line(&self, line: &mut String, style: LineStyle) -> fmt::Result {
        let painted = |style_if: Style| if style.colour { style_if } else { Style::new() };
        let faint = painted(Style::new().dimmed());
        write!(line, "{faint}{:.6}{faint:#} ", self.time)?;
        if style.level {
            let level = self.metadata.level();
            let paint = painted(colour(*level));
            write!(line, "{paint}{level:>5}{paint:#} ")?;
        }
        if style.origin
            && let (Some(file), Some(number)) = (self.metadata.file(), self.metadata.line())
        {
            write!(line, "{faint}{file}:{number}:{faint:#} ")?;
        }
        line.push_str(&escaped(&self.fields.message));
        for (name, value) in &self.fields.others {
            write!(line, " {faint}{name}={faint:#}")?;
            match value {
                Value::String(text) => line.push_str(&escaped(text)),
                value => write!(line, "{value}")?,
            }
        }
        if self.held_back > 0 {
            write!(line, " {faint}({} like it held back){faint:#}", self.held_back)?;
        }
        if self.last {
            let seconds = WINDOW.as_secs();
            write!(line, " {faint}(more like it are held back for {seconds} s){faint:#}")?;
        }
        Ok(())
    }

    /// The JSON object, with the end of its line.
    pub fn json(&self) -> String {
        #[derive(Serialize)]
        struct Json<'a> {
            timestamp: String,
            level: &'static str,
            target: &'static str,
            fields: &'a Fields,
            #[serde(skip_serializing_if = "is_zero")]
            held_back: u64,
        }
        fn is_zero(number: &u64) -> bool {
            *number == 0
        }
        let json = serde_json::to_string(&Json {
            timestamp: format!("{:.6}", self.time),
            level: self.metadata.level().as_str(),
            target: self.metadata.target(),
            fields: &self.fields,
            held_back: self.held_back,
        });
        // Numbers and strings can always be written.
        json.unwrap_or_default() + "\n"
    }
}

impl Serialize for Fields {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(1 + self.others.len()))?;
        map.serialize_entry(MESSAGE, &self.message)?;
        for (name, value) in &self.others {
            map.serialize_entry(name, value)?;
        }
        map.end()
    }
}

impl Fields {
    fn add(&mut self, field: &Field, value: Value) {
        match (field.name(), value) {
            (MESSAGE, Value::String(text)) => self.message = cut(text),
            (name, Value::String(text)) => self.others.push((name, Value::String(cut(text)))),
            (name, value) => self.others.push((name, value)),
        }
    }
}

impl Visit for Fields {
    fn record_u64(&mut self, field: &Field, value: u64) {
        self.add(field, value.into());
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.add(field, value.into());
    }

    fn record_f64(&mut self, field: &Field, value: f64) {
        self.add(field, value.into());
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.add(field, value.into());
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.add(field, value.into());
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.add(field, format!("{value:?}").into());
    }
}

/// `text`, cut to at most [`TEXT_MAX`] bytes.
fn cut(mut text: String) -> String {
    if text.len() > TEXT_MAX {
        let mut end = TEXT_MAX - CUT.len_utf8();
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        text.truncate(end);
        text.push(CUT);
    }
    text
}

fn colour(level: Level) -> Style {
    let colour = match level {
        Level::ERROR => AnsiColor::Red,
        Level::WARN => AnsiColor::Yellow,
        Level::INFO => AnsiColor::Green,
        Level::DEBUG => AnsiColor::Blue,
        Level::TRACE => AnsiColor::Magenta,
    };
    colour.on_default()
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use tracing_subscriber::layer::{Context, Layer, SubscriberExt};
    use tracing_subscriber::registry;

    use super::*;

    const PLAIN: LineStyle = LineStyle {
        level: true,
        origin: false,
        colour: false,
    };

    /// Keeps the last message, as if seven like it had been held back.
    struct Keep(Mutex<Option<Record>>);

    impl<S: tracing::Subscriber> Layer<S> for &'static Keep {
        fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
            let time = Timestamp::from_microsecond(1_500_000).expect("in range");
            *self.0.lock().unwrap() = Some(Record::new(event, time, 7, true));
        }
    }

    fn record(log: impl FnOnce()) -> Record {
        let keep: &'static Keep = Box::leak(Box::new(Keep(Mutex::new(None))));
        tracing::subscriber::with_default(registry().with(keep), log);
        keep.0.lock().unwrap().take().expect("a message")
    }

    #[test]
    fn a_line_has_time_level_message_and_values_in_the_order_given() {
        let error = std::io::Error::other("no space");
        let record = record(|| tracing::warn!(device = "disk0", %error, sector = 8, full = true, "request failed"));
        assert_eq!(
            record.line(PLAIN),
            "1970-01-01T00:00:01.500000Z  WARN request failed device=disk0 error=no space sector=8 full=true \
             (7 like it held back) (more like it are held back for 10 s)\n"
        );
    }

    #[test]
    fn level_and_origin_are_shown_as_asked() {
        let record = record(|| tracing::error!("request failed"));
        let style = LineStyle {
            level: false,
            origin: true,
            colour: false,
        };
        let line = record.line(style);
        let (origin, rest) = line.split_once(": request failed").expect(&line);
        let number = origin.strip_prefix("1970-01-01T00:00:01.500000Z api/src/log/format.rs:");
        assert!(number.is_some_and(|number| number.parse::<u32>().is_ok()), "{line}");
        assert!(!rest.contains("ERROR"), "{line}");
    }

    #[test]
    fn colours_are_left_out_unless_asked_for() {
        let record = record(|| tracing::error!("request failed"));
        assert!(!record.line(PLAIN).contains('\x1b'));
        let coloured = record.line(LineStyle { colour: true, ..PLAIN });
        assert!(coloured.contains("\x1b[31mERROR\x1b[0m request failed"), "{coloured:?}");
    }

    #[test]
    fn text_cannot_break_out_of_its_line() {
        let record = record(|| tracing::warn!(name = "a\n2026 ERROR b\x1b[2J", "c\rd"));
        let line = record.line(PLAIN);
        assert!(line.contains(r"c\rd name=a\n2026 ERROR b\u{1b}[2J"), "{line}");
        assert_eq!(line.matches(char::is_control).collect::<Vec<_>>(), ["\n"]);
        assert_eq!(record.json().lines().count(), 1);
    }

    #[test]
    fn json_has_every_value_in_its_type() {
        let record =
            record(|| tracing::info!(target: "cutover_vmm::driver", cpu = 3_u8, share = 0.5, name = "web", "runs"));
        assert_eq!(
            serde_json::from_str::<Value>(&record.json()).expect("it is JSON"),
            serde_json::json!({
                "timestamp": "1970-01-01T00:00:01.500000Z",
                "level": "INFO",
                "target": "cutover_vmm::driver",
                "fields": { "message": "runs", "cpu": 3, "share": 0.5, "name": "web" },
                "held_back": 7,
            })
        );
    }

    #[test]
    fn a_text_that_is_too_long_is_cut_between_characters() {
        let long = "é".repeat(TEXT_MAX);
        let record = record(|| tracing::warn!(name = long, "{long}"));
        for text in [
            &record.fields.message,
            record.fields.others[0].1.as_str().expect("a text"),
        ] {
            assert!(text.len() <= TEXT_MAX && text.ends_with("é…"), "{}", text.len());
        }
        assert!(serde_json::from_str::<Value>(&record.json()).is_ok());
    }
}
