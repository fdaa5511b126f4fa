//! The escape of a console on a terminal: Ctrl-A is taken from what the person types, with the key after it.
//!
//! | keys            | meaning                     |
//! |-----------------|-----------------------------|
//! | Ctrl-A x        | end the VM                  |
//! | Ctrl-A Ctrl-A   | send one Ctrl-A to the guest |
//! | Ctrl-A h        | show this list              |
//!
//! Ctrl-A followed by anything else sends nothing.

/// Ctrl-A.
const PREFIX: u8 = 0x01;

/// Shown for Ctrl-A h.
pub const HELP: &str = "\r\n\
    Ctrl-A x       end the VM now\r\n\
    Ctrl-A Ctrl-A  send Ctrl-A to the guest\r\n\
    Ctrl-A h       show this help\r\n";

/// What the person asked of whoever holds the terminal, not of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// End the VM; for a client of its console, leave it.
    Quit,
    /// Show the keys.
    Help,
}

/// Separates commands from input; remembers a Ctrl-A whose second key has not come yet.
#[derive(Debug, Default)]
pub struct Escape {
    prefixed: bool,
}

impl Escape {
    /// Removes the escapes from `input`, leaving what is for the guest, and returns the commands in order.
    pub fn filter(&mut self, input: &mut Vec<u8>) -> Vec<Command> {
        let mut commands = Vec::new();
        input.retain(|&byte| {
            if !std::mem::take(&mut self.prefixed) {
                self.prefixed = byte == PREFIX;
                return !self.prefixed;
            }
            match byte {
                b'x' | b'X' => commands.push(Command::Quit),
                b'h' | b'H' | b'?' => commands.push(Command::Help),
                _ => {}
            }
            byte == PREFIX
        });
        commands
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escapes_are_taken_out_and_all_else_reaches_the_guest() {
        let cases: [(&[u8], &[u8], &[Command]); 8] = [
            (b"ls\r", b"ls\r", &[]),
            (b"\x01x", b"", &[Command::Quit]),
            (b"\x01h", b"", &[Command::Help]),
            (b"a\x01\x01b", b"a\x01b", &[]),
            (b"\x01\x01x", b"\x01x", &[]),
            (b"a\x01qb", b"ab", &[]),
            (b"\x03\x04\x1a", b"\x03\x04\x1a", &[]),
            (b"a\x01hb\x01xc", b"abc", &[Command::Help, Command::Quit]),
        ];
        for (typed, guest, commands) in cases {
            let mut input = typed.to_vec();
            assert_eq!(Escape::default().filter(&mut input), commands, "{typed:?}");
            assert_eq!(input, guest, "{typed:?}");
        }
    }

    #[test]
    fn an_escape_may_be_split_between_two_reads() {
        let mut escape = Escape::default();
        let mut input = b"a\x01".to_vec();
        assert_eq!(escape.filter(&mut input), []);
        assert_eq!(input, b"a");
        let mut input = b"xb".to_vec();
        assert_eq!(escape.filter(&mut input), [Command::Quit]);
        assert_eq!(input, b"b");
    }
}
