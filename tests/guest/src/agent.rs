//! The messages between the harness and the agent in the guest, each the payload of one [`frame`](crate::frame).
//!
//! ```text
//! harness                          agent
//!    |   <--------------- reply 0  |   unasked, once it is up
//!    |  request 1 --------------->  |   runs the command
//!    |   <--------------- reply 1  |
//! ```
//! The agent keeps its last reply. A harness that saw a damaged frame, or nothing for a while, sends the same request
//! again, and a request whose number is that of the last reply gets that reply once more: no command runs twice.

use crate::frame::PAYLOAD_MAX;

/// Most bytes of one output stream in a reply.
pub const OUTPUT_MAX: usize = 64 << 10;
/// Most bytes of a command.
pub const COMMAND_MAX: usize = PAYLOAD_MAX - 4;
/// The number of the reply that says the agent is up.
pub const READY: u32 = 0;

/// Asks for a command to be run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// Counts up from 1; [`READY`] asks for the first reply again.
    pub number: u32,
    /// Given to `/bin/sh -c`.
    pub command: String,
}

/// What became of a command.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reply {
    /// The request's number.
    pub number: u32,
    /// Exit code, or 128 and the number of the signal that ended the shell, as shells count.
    pub exit_code: i32,
    /// Standard output, its first [`OUTPUT_MAX`] bytes.
    pub stdout: Vec<u8>,
    /// Standard error, its first [`OUTPUT_MAX`] bytes.
    pub stderr: Vec<u8>,
    /// Whether a stream was longer than [`OUTPUT_MAX`].
    pub truncated: bool,
}

impl Request {
    /// The payload for the wire.
    pub fn encode(&self) -> Vec<u8> {
        [&self.number.to_le_bytes(), self.command.as_bytes()].concat()
    }

    /// The request in a payload; none if it is not one.
    pub fn decode(payload: &[u8]) -> Option<Self> {
        let (number, command) = payload.split_first_chunk()?;
        Some(Self {
            number: u32::from_le_bytes(*number),
            command: String::from_utf8(command.to_vec()).ok()?,
        })
    }
}

impl Reply {
    /// The payload for the wire.
    ///
    /// # Panics
    /// An output stream is longer than [`OUTPUT_MAX`].
    pub fn encode(&self) -> Vec<u8> {
        assert!(self.stdout.len() <= OUTPUT_MAX && self.stderr.len() <= OUTPUT_MAX);
        let stdout_len = u32::try_from(self.stdout.len()).expect("checked above");
        [
            self.number.to_le_bytes().as_slice(),
            &self.exit_code.to_le_bytes(),
            &[u8::from(self.truncated)],
            &stdout_len.to_le_bytes(),
            &self.stdout,
            &self.stderr,
        ]
        .concat()
    }

    /// The reply in a payload; none if it is not one.
    pub fn decode(payload: &[u8]) -> Option<Self> {
        let (number, rest) = payload.split_first_chunk()?;
        let (exit_code, rest) = rest.split_first_chunk()?;
        let (&[truncated], rest) = rest.split_first_chunk()?;
        let (stdout_len, rest) = rest.split_first_chunk()?;
        let (stdout, stderr) = rest.split_at_checked(usize::try_from(u32::from_le_bytes(*stdout_len)).ok()?)?;
        Some(Self {
            number: u32::from_le_bytes(*number),
            exit_code: i32::from_le_bytes(*exit_code),
            stdout: stdout.to_vec(),
            stderr: stderr.to_vec(),
            truncated: truncated != 0,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_read_back_as_written() {
        let request = Request {
            number: 7,
            command: "echo größe".to_owned(),
        };
        assert_eq!(Request::decode(&request.encode()), Some(request));
        let reply = Reply {
            number: 7,
            exit_code: -3,
            stdout: vec![0xff; OUTPUT_MAX],
            stderr: b"no".to_vec(),
            truncated: true,
        };
        assert_eq!(Reply::decode(&reply.encode()), Some(reply));
    }

    #[test]
    fn the_longest_messages_fit_a_frame() {
        let reply = Reply {
            stdout: vec![0; OUTPUT_MAX],
            stderr: vec![0; OUTPUT_MAX],
            ..Reply::default()
        };
        assert!(reply.encode().len() <= PAYLOAD_MAX);
    }

    #[test]
    fn short_payloads_and_lengths_past_the_end_are_not_replies() {
        let whole = Reply::default().encode();
        for length in 0..whole.len() {
            assert_eq!(Reply::decode(&whole[..length]), None, "{length} bytes");
        }
        let mut lying = whole;
        lying[9] = 1;
        assert_eq!(Reply::decode(&lying), None);
        assert_eq!(Request::decode(&[1, 2, 3]), None);
    }
}
