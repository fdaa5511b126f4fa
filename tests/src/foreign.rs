//! Programs that nobody here wrote, in the Python environment that `cargo xtask test` has made.

use std::path::Path;
use std::process::Command;

use crate::environment::client_program;

/// A program of that environment, such as `python`, to be run in `directory`. What it leaves behind stays there.
pub fn foreign_client(program: &str, directory: &Path) -> Command {
    let mut command = Command::new(client_program(program));
    command
        .current_dir(directory)
        .env("HOME", directory)
        .env("PYTHONDONTWRITEBYTECODE", "1");
    command
}
