//! [`QemuMonitor`]: QEMU's human monitor (QEMU manual, "QEMU Monitor"), on a Unix socket.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

/// What the monitor prints when it takes the next line.
const PROMPT: &[u8] = b"(qemu) ";

/// The monitor of one QEMU.
pub struct QemuMonitor {
    socket: PathBuf,
}

impl QemuMonitor {
    /// The one at `socket`, which need not exist yet.
    pub fn at(socket: &Path) -> Self {
        Self {
            socket: socket.to_owned(),
        }
    }

    /// Has the QEMU that `command` is to start listen there.
    pub fn listen(&self, command: &mut Command) {
        command
            .arg("-monitor")
            .arg(format!("unix:{},server,nowait", self.socket.display()));
    }

    /// Has `line` carried out, and returns what was said to it.
    ///
    /// # Errors
    /// QEMU is not there, or it reports an error.
    pub fn tell(&self, line: &str) -> Result<String> {
        let mut stream = UnixStream::connect(&self.socket).context("cannot reach QEMU's monitor")?;
        read_to_prompt(&mut stream)?;
        writeln!(stream, "{line}")?;
        let answer = read_to_prompt(&mut stream)?;
        ensure!(!answer.contains("Error"), "'{line}': {answer}");
        Ok(answer)
    }
}

fn read_to_prompt(stream: &mut UnixStream) -> Result<String> {
    let mut seen = Vec::new();
    let mut buffer = [0; 4096];
    while !seen.ends_with(PROMPT) {
        let length = stream.read(&mut buffer).context("cannot read QEMU's monitor")?;
        ensure!(length > 0, "QEMU's monitor is gone");
        seen.extend_from_slice(&buffer[..length]);
    }
    Ok(String::from_utf8_lossy(&seen).into_owned())
}
