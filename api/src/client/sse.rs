//! Server-sent events, taken out of the bytes of a stream (WHATWG HTML §9.2).
//!
//! Of an event only `id` and `data` are kept: its type is in our data too.

/// Most bytes of one line, and of the data of one event.
pub const EVENT_MAX: usize = 64 << 10;

/// An event of a stream.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Message {
    /// Its id, if it has one.
    pub id: Option<String>,
    /// Its data lines, joined.
    pub data: String,
}

/// Something longer than [`EVENT_MAX`] came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TooLong;

/// What has come and is not a whole event yet.
#[derive(Debug, Default)]
pub struct Parser {
    line: Vec<u8>,
    message: Message,
    /// A carriage return ended the last line: a line feed right after it belongs to it.
    after_return: bool,
}

impl Parser {
    /// Takes `bytes`, and returns the events that they complete.
    ///
    /// # Errors
    /// A line or an event has no end in sight; the stream is of no use any more.
    pub fn feed(&mut self, bytes: &[u8]) -> Result<Vec<Message>, TooLong> {
        let mut messages = Vec::new();
        for &byte in bytes {
            let after_return = std::mem::replace(&mut self.after_return, byte == b'\r');
            match byte {
                b'\n' if after_return => {}
                b'\n' | b'\r' => messages.extend(self.end_line()?),
                _ if self.line.len() == EVENT_MAX => return Err(TooLong),
                _ => self.line.push(byte),
            }
        }
        Ok(messages)
    }

    /// An event is complete at an empty line; one without data is none.
    fn end_line(&mut self) -> Result<Option<Message>, TooLong> {
        let line = std::mem::take(&mut self.line);
        if line.is_empty() {
            let message = std::mem::take(&mut self.message);
            return Ok((!message.data.is_empty()).then_some(message));
        }
        let line = String::from_utf8_lossy(&line);
        let (field, value) = line.split_once(':').unwrap_or((&line, ""));
        let value = value.strip_prefix(' ').unwrap_or(value);
        match field {
            "id" => self.message.id = Some(value.to_owned()),
            "data" => {
                if self.message.data.len() + value.len() >= EVENT_MAX {
                    return Err(TooLong);
                }
                if !self.message.data.is_empty() {
                    self.message.data.push('\n');
                }
                self.message.data.push_str(value);
            }
            // The type, the time to wait before a new connection, comments, and what is not known.
            _ => {}
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(id: &str, data: &str) -> Message {
        Message {
            id: Some(id.to_owned()),
            data: data.to_owned(),
        }
    }

    const STREAM: &[u8] = b": welcome\n\nid: 0\n\nid: 1\nevent: vm_state\ndata: {\"a\":1}\n\nid:2\r\ndata:one\r\ndata: two\r\n\r\nretry: 5\n\n";

    #[test]
    fn events_are_found_however_the_bytes_are_cut() {
        let expected = [message("1", "{\"a\":1}"), message("2", "one\ntwo")];
        for size in 1..=STREAM.len() {
            let mut parser = Parser::default();
            let found = STREAM.chunks(size).map(|chunk| parser.feed(chunk).expect("short"));
            assert_eq!(found.flatten().collect::<Vec<_>>(), expected, "in pieces of {size}");
        }
    }

    #[test]
    fn an_event_that_is_cut_off_is_none() {
        assert_eq!(Parser::default().feed(b"id: 1\ndata: x\n"), Ok(Vec::new()));
    }

    #[test]
    fn what_has_no_end_is_refused() {
        let endless = vec![b'x'; EVENT_MAX + 1];
        assert_eq!(Parser::default().feed(&endless), Err(TooLong));
        let lines = "data: 0123456789\n".repeat(EVENT_MAX / 10);
        assert_eq!(Parser::default().feed(lines.as_bytes()), Err(TooLong));
    }

    #[test]
    fn bytes_that_are_no_text_do_no_harm() {
        let found = Parser::default().feed(b"id: \xff\ndata: \xfe\n\n").expect("short");
        assert_eq!(found, [message("\u{fffd}", "\u{fffd}")]);
    }
}
