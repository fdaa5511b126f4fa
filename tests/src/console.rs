//! A guest's console as seen from outside: what it printed so far, and frames of the agent that came in between.

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use cutover_guest::frame::{self, Item};

use crate::environment::PATIENCE;

/// Most console output kept; of more, the end.
const TEXT_MAX: usize = 4 << 20;
/// Most times of arrival kept; of more, the last.
const ARRIVALS_MAX: usize = 1 << 16;

/// Both directions of a serial line.
pub struct Console {
    shared: Arc<Shared>,
    input: Mutex<Box<dyn Write + Send>>,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    text: Vec<u8>,
    /// Where [`Console::wait_for`] goes on looking.
    position: usize,
    /// When text came.
    arrivals: VecDeque<Instant>,
    payloads: VecDeque<Vec<u8>>,
    damaged: bool,
    ended: bool,
}

/// What waiting for the agent came to.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Heard {
    /// A whole frame.
    Payload(Vec<u8>),
    /// A frame that a kernel message was printed into.
    Damage,
    /// Nothing until the given moment.
    Silence,
    /// The line is closed.
    End,
}

impl Console {
    /// Listens to `output`, on a thread of its own, and types into `input`.
    pub fn attach(mut output: impl Read + Send + 'static, input: impl Write + Send + 'static) -> Self {
        let shared = Arc::new(Shared::default());
        let listener = shared.clone();
        std::thread::spawn(move || {
            let mut reader = frame::Reader::default();
            let mut buffer = [0; 4096];
            // A pseudo-terminal whose other end is gone reports an error instead of an end.
            while let Ok(length @ 1..) = output.read(&mut buffer) {
                let now = Instant::now();
                reader.push(&buffer[..length]);
                let mut state = listener.lock();
                while let Some(item) = reader.next_item() {
                    state.take_in(item, now);
                }
                listener.changed.notify_all();
            }
            listener.lock().ended = true;
            listener.changed.notify_all();
        });
        Self {
            shared,
            input: Mutex::new(Box::new(input)),
        }
    }

    /// Waits until the guest has printed `text`, after what the last call waited for.
    #[track_caller]
    pub fn wait_for(&self, text: &str) {
        let found = self.shared.wait_until(Instant::now() + PATIENCE, |state| {
            let start = position(&state.text[state.position..], text.as_bytes());
            if let Some(start) = start {
                state.position += start + text.len();
            }
            (start.is_some() || state.ended).then_some(start.is_some())
        });
        match found {
            Some(true) => {}
            Some(false) => panic!("the console ended before the guest printed '{text}'"),
            None => panic!("the guest did not print '{text}' within {PATIENCE:?}"),
        }
    }

    /// Types `text`.
    #[track_caller]
    pub fn type_text(&self, text: &str) {
        self.write(|input| input.write_all(text.as_bytes()));
    }

    /// Everything printed so far; bytes that are not UTF-8 are replaced.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.shared.lock().text).into_owned()
    }

    /// When the guest has printed something: as many moments as there were pieces, the last at the end.
    pub(crate) fn arrivals(&self) -> Vec<Instant> {
        self.shared.lock().arrivals.iter().copied().collect()
    }

    #[track_caller]
    pub(crate) fn send_frame(&self, payload: &[u8]) {
        self.write(|mut input| frame::write(&mut input, payload));
    }

    pub(crate) fn hear_frame(&self, until: Instant) -> Heard {
        let heard = self.shared.wait_until(until, |state| {
            if let Some(payload) = state.payloads.pop_front() {
                Some(Heard::Payload(payload))
            } else if std::mem::take(&mut state.damaged) {
                Some(Heard::Damage)
            } else {
                state.ended.then_some(Heard::End)
            }
        });
        heard.unwrap_or(Heard::Silence)
    }

    #[track_caller]
    fn write(&self, write: impl FnOnce(&mut (dyn Write + Send)) -> std::io::Result<()>) {
        let mut input = self.input.lock().unwrap_or_else(PoisonError::into_inner);
        if let Err(error) = write(&mut **input).and_then(|()| input.flush()) {
            panic!("cannot type on the guest's console: {error}");
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Looks at the state again whenever it changes; none if `find` found nothing in time.
    fn wait_until<T>(&self, deadline: Instant, mut find: impl FnMut(&mut State) -> Option<T>) -> Option<T> {
        let mut state = self.lock();
        loop {
            if let Some(found) = find(&mut state) {
                return Some(found);
            }
            let left = deadline.checked_duration_since(Instant::now())?;
            state = self
                .changed
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }
}

impl State {
    fn take_in(&mut self, item: Item, now: Instant) {
        match item {
            Item::Payload(payload) => self.payloads.push_back(payload),
            Item::Damage => self.damaged = true,
            Item::Text(text) => {
                self.text.extend(text);
                if self.arrivals.len() == ARRIVALS_MAX {
                    self.arrivals.pop_front();
                }
                self.arrivals.push_back(now);
                let excess = self.text.len().saturating_sub(TEXT_MAX);
                self.text.drain(..excess);
                self.position = self.position.saturating_sub(excess);
            }
        }
    }
}

fn position(text: &[u8], wanted: &[u8]) -> Option<usize> {
    text.windows(wanted.len()).position(|bytes| bytes == wanted)
}
