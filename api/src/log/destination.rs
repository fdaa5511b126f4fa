//! Where messages go: the standard error, or a file or named pipe.

use std::fs::{File, OpenOptions};
use std::io::{self, IsTerminal, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use rustix::fs::OFlags;

/// Permissions of a new log or metrics file: what a VM does is its owner's business.
const MODE: u32 = 0o600;

/// Where messages go.
#[derive(Debug)]
pub enum Destination {
    /// The standard error.
    Stderr,
    /// A file, to which is appended, or a named pipe.
    File(File),
}

impl Destination {
    /// The file or named pipe at `path`; a file that does not exist is made.
    ///
    /// # Errors
    /// It cannot be opened for writing.
    pub fn open(path: &Path) -> io::Result<Self> {
        open_for_lines(path).map(Self::File)
    }

    /// Whether colours are welcome: a terminal, and its user has not asked for none (<https://no-color.org>).
    pub fn has_colours(&self) -> bool {
        matches!(self, Self::Stderr) && io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none()
    }

    /// Writes a line, which ends in a newline.
    ///
    /// # Errors
    /// The line is lost, or part of it.
    pub fn write(&self, line: &str) -> io::Result<()> {
        match self {
            Self::Stderr => io::stderr().write_all(line.as_bytes()),
            Self::File(file) => write_line(file, line),
        }
    }
}

/// Opens the file or named pipe at `path` for appending lines to it.
///
/// A pipe is opened for reading too, so that it needs no reader yet, and nobody ever waits for the one it has.
///
/// # Errors
/// It cannot be opened so.
pub fn open_for_lines(path: &Path) -> io::Result<File> {
    let flags = OFlags::NONBLOCK.bits().cast_signed();
    let mut options = OpenOptions::new();
    options
        .create(true)
        .read(true)
        .append(true)
        .mode(MODE)
        .custom_flags(flags);
    options.open(path)
}

/// Writes `line` in one piece, so that those of several threads do not mix.
///
/// # Errors
/// It was not taken, or only in part.
pub fn write_line(mut file: &File, line: &str) -> io::Result<()> {
    match file.write(line.as_bytes())? {
        written if written == line.len() => Ok(()),
        _ => Err(io::ErrorKind::WriteZero.into()),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::{BufRead, BufReader, Read};
    use std::os::unix::fs::PermissionsExt;

    use rustix::fs::{CWD, FileType, Mode, mknodat};

    use super::*;

    #[test]
    fn lines_are_appended_to_a_file_for_its_owner_only() {
        let folder = tempfile::tempdir().expect("folder");
        let path = folder.path().join("log");
        for line in ["one\n", "two\n"] {
            Destination::open(&path).expect("opened").write(line).expect("written");
        }
        assert_eq!(fs::read_to_string(&path).expect("read"), "one\ntwo\n");
        let mode = fs::metadata(&path).expect("there").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }

    #[test]
    fn a_pipe_needs_no_reader_and_one_that_is_full_loses_lines_instead_of_waiting() {
        let folder = tempfile::tempdir().expect("folder");
        let path = folder.path().join("fifo");
        mknodat(CWD, &path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).expect("fifo");
        let pipe = Destination::open(&path).expect("opened without a reader");
        let line = "x".repeat(1023) + "\n";
        let written = (0..1_000_000).take_while(|_| pipe.write(&line).is_ok()).count();
        assert!(written > 0);
        let mut reader = BufReader::new(File::open(&path).expect("opened"));
        let mut first = String::new();
        reader.read_line(&mut first).expect("a line");
        assert_eq!(first, line);
        drop(pipe);
        let mut rest = String::new();
        reader.read_to_string(&mut rest).expect("what was written before");
        assert_eq!(rest, line.repeat(written - 1));
    }

    #[test]
    fn a_place_that_cannot_be_written_is_an_error() {
        let folder = tempfile::tempdir().expect("folder");
        let error = Destination::open(folder.path()).expect_err("a directory");
        assert_eq!(error.kind(), io::ErrorKind::IsADirectory);
    }
}
