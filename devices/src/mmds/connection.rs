//! One connection: a request comes in, an answer goes out, and that was it.

use std::time;

use smoltcp::iface::SocketHandle;
use smoltcp::socket::tcp::{Socket, SocketBuffer, State};
use smoltcp::time::{Duration, Instant};

use super::http::{HEAD_MAX, read};
use super::service::Service;

/// For how long there may be a connection, whatever its peer does: a request takes no time here.
const LIFETIME: Duration = Duration::from_secs(30);
/// Bytes of an answer that are on their way to the guest.
const SEND_BUFFER: usize = 16 << 10;
/// Routers pass nothing on that has this time to live: the service is for the guest alone.
const HOP_LIMIT: u8 = 1;

/// See the module.
pub struct Connection {
    /// Its socket.
    pub handle: SocketHandle,
    /// When it is ended by force.
    pub deadline: Instant,
    stage: Stage,
}

enum Stage {
    Receiving(Vec<u8>),
    Sending { answer: Vec<u8>, sent: usize },
    Closing,
}

/// What became of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// Nothing can be done before the guest does something.
    None,
    /// There may be something to be sent.
    Some,
    /// It is over.
    Over,
}

/// A socket in which nobody has listened yet.
pub fn socket() -> Socket<'static> {
    let buffer = |len| SocketBuffer::new(vec![0; len]);
    let mut socket = Socket::new(buffer(HEAD_MAX), buffer(SEND_BUFFER));
    socket.set_hop_limit(Some(HOP_LIMIT));
    socket.set_nagle_enabled(false);
    socket.set_ack_delay(None);
    socket
}

impl Connection {
    /// The connection that somebody asked `handle` for.
    pub fn new(handle: SocketHandle, now: Instant) -> Self {
        Self {
            handle,
            deadline: now + LIFETIME,
            stage: Stage::Receiving(Vec::new()),
        }
    }

    /// Goes on as far as `socket` lets it.
    pub fn serve(&mut self, socket: &mut Socket<'_>, service: &Service, now: Instant) -> Progress {
        // A peer that takes back what it asked for leaves its socket listening. Of one that has said goodbye nothing is
        // awaited that could have been lost.
        if matches!(socket.state(), State::Closed | State::Listen | State::TimeWait) {
            return Progress::Over;
        }
        if now >= self.deadline {
            socket.abort();
            return Progress::Some;
        }
        match &mut self.stage {
            Stage::Receiving(head) => {
                receive(socket, head);
                if let Some(answer) = service.answer(read(head), time::Instant::now()) {
                    let answer = answer.into_bytes();
                    self.stage = Stage::Sending { answer, sent: 0 };
                    return Progress::Some;
                }
                if socket.state() == State::CloseWait {
                    return self.close(socket);
                }
                Progress::None
            }
            Stage::Sending { answer, sent } => match socket.send_slice(&answer[*sent..]) {
                Ok(0) if *sent < answer.len() => Progress::None,
                Ok(count) if *sent + count < answer.len() => {
                    *sent += count;
                    Progress::Some
                }
                Ok(_) | Err(_) => self.close(socket),
            },
            Stage::Closing => {
                // What comes after a request is nothing that anybody waits for.
                let _ = socket.recv(|data| (data.len(), ()));
                Progress::None
            }
        }
    }

    fn close(&mut self, socket: &mut Socket<'_>) -> Progress {
        socket.close();
        self.stage = Stage::Closing;
        Progress::Some
    }
}

/// Takes what there is into `head`, as far as a request may be long.
fn receive(socket: &mut Socket<'_>, head: &mut Vec<u8>) {
    // The buffer is a ring: what is in it may come in two pieces.
    for _ in 0..2 {
        let took = socket.recv(|data| {
            let count = data.len().min(HEAD_MAX - head.len());
            head.extend_from_slice(&data[..count]);
            (count, ())
        });
        if took.is_err() {
            return;
        }
    }
}
