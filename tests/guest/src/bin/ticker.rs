//! Prints a byte every 10 ms for as long as the guest lives: a gap in them is a pause as seen from outside.
#![forbid(unsafe_code)]

use std::io::{Result, Write, stdout};
use std::thread::sleep;
use std::time::Duration;

/// Time between two bytes.
const TICK: Duration = Duration::from_millis(10);

fn main() -> Result<()> {
    let mut out = stdout();
    loop {
        out.write_all(b".")?;
        out.flush()?;
        sleep(TICK);
    }
}
