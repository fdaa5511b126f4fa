//! Text from elsewhere, made fit for terminals and log files.

use std::borrow::Cow;

/// `text` with its control characters escaped, so that it stays on its line and moves no cursor.
pub fn escaped(text: &str) -> Cow<'_, str> {
    if !text.contains(char::is_control) {
        return text.into();
    }
    let mut escaped = String::with_capacity(text.len());
    for character in text.chars() {
        if character.is_control() {
            escaped.extend(character.escape_default());
        } else {
            escaped.push(character);
        }
    }
    escaped.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_characters_are_written_out_and_nothing_else_is() {
        assert_eq!(escaped("a\nb\x1b[2J\u{9b}c\u{7f}"), r"a\nb\u{1b}[2J\u{9b}c\u{7f}");
        assert!(matches!(escaped("plain 'text' \\n é"), Cow::Borrowed(_)));
    }
}
