//! One process tells another whether it is confined.

use std::fs::File;
use std::io::{self, Read, Write};

use rustix::pipe::{PipeFlags, pipe_with};

use crate::Error;

/// What is said of success; no message of an error has it.
const CONFINED: &[u8] = b"\0";
/// Most bytes of a message, and no more than a pipe takes at once.
const MESSAGE_MAX: u64 = 4096;

/// Tells, once.
#[derive(Debug)]
pub struct Teller(File);

/// Hears it.
pub(crate) struct Hearer(File);

/// The two, before they go to two processes.
pub(crate) fn pair() -> Result<(Hearer, Teller), Error> {
    let (hear, tell) =
        pipe_with(PipeFlags::CLOEXEC).map_err(Error::step("make a pipe", "descriptors that are free"))?;
    Ok((Hearer(hear.into()), Teller(tell.into())))
}

impl Teller {
    /// Tells what has come of it.
    pub fn tell(mut self, outcome: &Result<(), Error>) {
        // Whoever does not hear this any more does not want to know.
        let _ = match outcome {
            Ok(()) => self.0.write_all(CONFINED),
            Err(error) => self.0.write_all(error.told().as_bytes()),
        };
    }
}

impl Hearer {
    /// Waits to be told.
    pub(crate) fn hear(self) -> Result<(), Error> {
        let mut said = Vec::new();
        let heard: io::Result<_> = self.0.take(MESSAGE_MAX).read_to_end(&mut said);
        heard.map_err(Error::step("hear of the monitor", "nothing"))?;
        match &*said {
            [] => Err(Error::Died),
            CONFINED => Ok(()),
            message => Err(Error::NotConfined(String::from_utf8_lossy(message).into_owned())),
        }
    }
}
