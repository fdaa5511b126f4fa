//! Loads kernel modules, in the order of a list made when the image was built.

use std::fs::{self, File};
use std::io;

use rustix::system::finit_module;

/// Loads every module of the file `list`, one absolute path a line.
///
/// A module that cannot be loaded is reported on the console and left out: the tests that need it say so better.
pub fn load_listed(list: &str) -> io::Result<()> {
    for path in fs::read_to_string(list)?.lines() {
        if let Err(error) = File::open(path).and_then(|file| Ok(finit_module(file, c"", 0)?)) {
            eprintln!("guest-init: cannot load {path}: {error}");
        }
    }
    Ok(())
}
