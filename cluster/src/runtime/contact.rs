//! A link that somebody keeps open: opened again whenever it breaks, for as long as he is there.

use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::Duration;

use cutover_migration::Error as LinkError;
use cutover_migration::transport::{Endpoint, Security};

use super::link::{self, Content, ControlLink, Incoming, spawn};

/// How long to wait before a link is opened again.
const RETRY_EVERY: Duration = Duration::from_millis(100);

/// What happens to a link that is kept open.
#[derive(Debug)]
pub enum Contact<Out, In> {
    /// It is open. What comes next came over this one.
    Up(ControlLink<Out>),
    /// A message.
    Says(In),
    /// It broke, or could not be opened. Told once until it is open again.
    Down(LinkError),
}

/// Keeps a link open until dropped.
#[derive(Debug)]
pub struct Keeper {
    _wanted: Sender<()>,
}

impl Keeper {
    /// Keeps a link to `to` open, and gives to `tell` what happens to it; `hello` says who calls, or that nobody need call
    /// now.
    ///
    /// # Errors
    /// There is no thread to be had.
    pub fn start<H: Content, Out: Content, In: Content>(
        to: Endpoint,
        security: Security,
        hello: impl Fn() -> Option<H> + Send + 'static,
        tell: impl Fn(Contact<Out, In>) + Clone + Send + 'static,
    ) -> Result<Self, LinkError> {
        let (wanted, is_unwanted) = channel();
        spawn("control-keep", move || {
            // What is worth telling is that it is not open any more, not each time that it does not open.
            let mut is_told = false;
            loop {
                if let Some(hello) = hello() {
                    let (over, was_open) = match hold(&to, &security, hello, &tell) {
                        Ok(over) => (over, true),
                        Err(error) => (error, false),
                    };
                    if was_open || !is_told {
                        tell(Contact::Down(over));
                    }
                    is_told = true;
                }
                if !is_wanted_after(&is_unwanted, RETRY_EVERY) {
                    return;
                }
            }
        })?;
        Ok(Self { _wanted: wanted })
    }
}

/// Opens a link, and returns when it is over: why.
fn hold<H: Content, Out: Content, In: Content>(
    to: &Endpoint,
    security: &Security,
    hello: H,
    tell: &(impl Fn(Contact<Out, In>) + Clone + Send + 'static),
) -> Result<LinkError, LinkError> {
    let (link, ears) = link::open(to, security, hello)?;
    tell(Contact::Up(link));
    let (over, is_over) = channel();
    let tell = tell.clone();
    ears.listen(move |incoming| match incoming {
        Incoming::Says(message) => tell(Contact::Says(message)),
        // It is waited for below.
        Incoming::Over(error) => drop(over.send(error)),
    })?;
    Ok(is_over.recv().unwrap_or(LinkError::Cancelled))
}

/// Whether the other end of `unwanted` is still there after `time`.
fn is_wanted_after(unwanted: &Receiver<()>, time: Duration) -> bool {
    unwanted.recv_timeout(time) == Err(RecvTimeoutError::Timeout)
}
