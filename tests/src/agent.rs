//! The harness's end of the agent's protocol (see [`cutover_guest::agent`]).

use std::cell::Cell;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use cutover_guest::agent::{COMMAND_MAX, READY, Reply, Request};

use crate::console::{Console, Heard};
use crate::environment::PATIENCE;

/// How long to listen before asking again the first time; doubled each time, for commands that take long.
const ASK_AGAIN_AFTER: Duration = Duration::from_secs(10);

/// Runs commands in the guest, one at a time (and so is not `Sync`).
#[derive(Debug, Default)]
pub(crate) struct Agent {
    last_number: Cell<u32>,
}

impl Agent {
    /// One for a guest that has answered commands of another, which must not be mistaken for its own.
    pub(crate) fn of_restored() -> Self {
        /// More commands than any test has.
        const COMMANDS: u32 = 1 << 16;
        static RESTORED: AtomicU32 = AtomicU32::new(1);
        let restored = RESTORED.fetch_add(1, Ordering::Relaxed);
        Self {
            last_number: Cell::new(restored * COMMANDS),
        }
    }

    /// Waits until the agent is up.
    #[track_caller]
    pub(crate) fn wait_ready(&self, console: &Console) {
        let number = READY;
        let command = String::new();
        hear(console, &Request { number, command }, false);
    }

    /// Runs a shell command to its end.
    #[track_caller]
    pub(crate) fn run(&self, console: &Console, command: &str) -> Reply {
        hear(console, &self.request(command), true)
    }

    /// Sends a shell command and waits for no answer.
    #[track_caller]
    pub(crate) fn tell(&self, console: &Console, command: &str) {
        console.send_frame(&self.request(command).encode());
    }

    #[track_caller]
    fn request(&self, command: &str) -> Request {
        assert!(
            command.len() <= COMMAND_MAX,
            "a command of {} bytes is too long",
            command.len()
        );
        let number = self.last_number.get() + 1;
        self.last_number.set(number);
        let command = command.to_owned();
        Request { number, command }
    }
}

/// The reply to `request`, which is sent again when there is reason to think that it or the reply went astray.
#[track_caller]
fn hear(console: &Console, request: &Request, mut ask: bool) -> Reply {
    let deadline = Instant::now() + PATIENCE;
    let mut patience = ASK_AGAIN_AFTER;
    loop {
        if ask {
            console.send_frame(&request.encode());
        }
        match console.hear_frame(deadline.min(Instant::now() + patience)) {
            Heard::Payload(payload) => match Reply::decode(&payload) {
                Some(reply) if reply.number == request.number => return reply,
                // The repeated reply to an earlier request.
                _ => ask = false,
            },
            Heard::Damage => ask = true,
            Heard::Silence if Instant::now() < deadline => {
                ask = true;
                patience *= 2;
            }
            Heard::Silence => panic!("the guest did not answer '{}' within {PATIENCE:?}", request.command),
            Heard::End => panic!("the console ended while the guest was asked '{}'", request.command),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;
    use std::thread;

    use cutover_guest::frame::{self, Item};

    use super::*;

    /// The next request that comes over `line`.
    fn next_request(line: &mut UnixStream, reader: &mut frame::Reader) -> Request {
        let mut buffer = [0; 64];
        loop {
            if let Some(Item::Payload(payload)) = reader.next_item() {
                return Request::decode(&payload).unwrap();
            }
            let length = line.read(&mut buffer).unwrap();
            reader.push(&buffer[..length]);
        }
    }

    fn reply(number: u32, stdout: &str) -> Vec<u8> {
        let reply = Reply {
            number,
            stdout: stdout.into(),
            ..Reply::default()
        };
        let mut bytes = Vec::new();
        frame::write(&mut bytes, &reply.encode()).unwrap();
        bytes
    }

    #[test]
    fn a_reply_that_the_kernel_printed_into_is_asked_for_again_and_an_old_one_is_passed_over() {
        let (near, mut far) = UnixStream::pair().unwrap();
        let console = Console::attach(near.try_clone().unwrap(), near);
        let guest = thread::spawn(move || {
            let mut reader = frame::Reader::default();
            let first = next_request(&mut far, &mut reader);
            let answer = reply(first.number, "answer");
            let (start, end) = answer.split_at(answer.len() / 2);
            far.write_all(&[start, b"\r\n[ 1.0] a kernel message\r\n", end].concat())
                .unwrap();
            let second = next_request(&mut far, &mut reader);
            far.write_all(&[reply(first.number - 1, "old"), answer].concat())
                .unwrap();
            (first, second)
        });

        let heard = Agent::default().run(&console, "question");
        assert_eq!(heard.stdout, b"answer");
        let (first, second) = guest.join().unwrap();
        assert_eq!(first.command, "question");
        assert_eq!(first, second, "the same request is sent again");
        assert!(console.text().contains("[ 1.0] a kernel message"));
    }

    #[test]
    #[should_panic(expected = "the console ended while the guest was asked 'question'")]
    fn a_guest_that_is_gone_is_not_waited_for() {
        let (near, far) = UnixStream::pair().unwrap();
        let console = Console::attach(near.try_clone().unwrap(), near);
        far.shutdown(std::net::Shutdown::Write).unwrap();
        Agent::default().run(&console, "question");
    }
}
