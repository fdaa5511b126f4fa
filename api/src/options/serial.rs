//! The value of `--serial`.

use cutover_snapshot::spec::SerialSpec;

use super::key_value::OptionError;

/// Reads `stdio`, `file=FILE`, `socket=FILE`, `pty` or `null`.
///
/// # Errors
/// It is none of them.
pub fn serial(text: &str) -> Result<SerialSpec, OptionError> {
    match text.split_once('=') {
        None if text == "stdio" => Ok(SerialSpec::Stdio),
        None if text == "pty" => Ok(SerialSpec::Pty),
        None if text == "null" => Ok(SerialSpec::Null),
        Some(("file" | "socket", "")) | None if matches!(text.trim_end_matches('='), "file" | "socket") => {
            Err(OptionError::NeedsValue(text.trim_end_matches('=').to_owned()))
        }
        Some(("file", path)) => Ok(SerialSpec::File(path.into())),
        Some(("socket", path)) => Ok(SerialSpec::Socket(path.into())),
        _ => Err(OptionError::UnknownKey {
            key: text.to_owned(),
            known: "stdio, file=…, socket=…, pty or null".to_owned(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_of_console_is_read() {
        for (text, spec) in [
            ("stdio", SerialSpec::Stdio),
            ("pty", SerialSpec::Pty),
            ("null", SerialSpec::Null),
            ("file=/var/log/a,b=c", SerialSpec::File("/var/log/a,b=c".into())),
            ("socket=console.sock", SerialSpec::Socket("console.sock".into())),
        ] {
            assert_eq!(serial(text), Ok(spec), "{text}");
        }
    }

    #[test]
    fn what_is_no_console_is_refused_with_the_choice() {
        for text in ["", "tty", "stdio=x", "File=a"] {
            let message = format!("there is no key '{text}': it takes stdio, file=…, socket=…, pty or null");
            assert_eq!(serial(text).expect_err(text).to_string(), message);
        }
        for (text, key) in [("file", "file"), ("file=", "file"), ("socket=", "socket")] {
            assert_eq!(serial(text), Err(OptionError::NeedsValue(key.to_owned())), "{text}");
        }
    }
}
