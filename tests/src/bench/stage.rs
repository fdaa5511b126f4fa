//! Copies on tmpfs of everything that contestants read, so that no measurement waits for a slower file system.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use tempfile::TempDir;

use crate::environment::{guest_file, monitor_binary, scratch};

/// The copies, removed when dropped.
pub struct Stage {
    /// An ELF kernel.
    pub kernel: PathBuf,
    /// The initramfs of the `micro` guest.
    pub initrd: PathBuf,
    /// The program under test.
    pub cutover: PathBuf,
    /// Firecracker, if it takes part.
    pub firecracker: Option<PathBuf>,
    directory: TempDir,
}

impl Stage {
    /// Copies kernel, initramfs and programs.
    pub fn new(firecracker: Option<&Path>) -> Result<Self> {
        stay_in_memory()?;
        let directory = scratch();
        let copy = |from: &Path| {
            let to = directory.path().join(from.file_name().context("a program has a name")?);
            fs::copy(from, &to).with_context(|| format!("cannot copy {}", from.display()))?;
            Ok::<_, anyhow::Error>(to)
        };
        Ok(Self {
            kernel: copy(&guest_file("micro/vmlinux"))?,
            initrd: copy(&guest_file("micro/initrd"))?,
            cutover: copy(&monitor_binary())?,
            firecracker: firecracker.map(copy).transpose()?,
            directory,
        })
    }

    /// The command that runs one of the programs with copies of its libraries too: where a start takes a few
    /// milliseconds, waiting for a slow file system once would be most of it. Runs other programs, which may have to wait
    /// for that, so it is to be called before time counts.
    pub fn command(&self, program: &Path) -> Result<Command> {
        let libraries = self.directory.path().join("lib");
        fs::create_dir_all(&libraries)?;
        let mut loader = None;
        for library in libraries_of(program)? {
            let copy = libraries.join(library.file_name().context("a library has a name")?);
            if !copy.exists() {
                fs::copy(&library, &copy).with_context(|| format!("cannot copy {}", library.display()))?;
            }
            if copy.to_string_lossy().contains("/ld-linux") {
                loader = Some(copy);
            }
        }
        let mut command = Command::new(loader.context("no dynamic loader among the libraries")?);
        command.arg("--library-path").arg(libraries).arg(program);
        Ok(command)
    }

    /// Reads a program and its libraries, so that the host has them in memory: where it waits for them while somebody
    /// is patient for a time, all of that time can be over at once.
    pub fn warm(program: &Path) -> Result<()> {
        let libraries = libraries_of(program)?;
        for file in std::iter::once(program).chain(libraries.iter().map(PathBuf::as_path)) {
            fs::read(file).with_context(|| format!("cannot read {}", file.display()))?;
        }
        Ok(())
    }

    /// A place for further files.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }
}

/// Has all of this program that there is in memory, and keeps it there, so that it waits for nothing while it measures.
fn stay_in_memory() -> Result<()> {
    // SAFETY: reads pages of this process, and changes nothing.
    let result = unsafe { libc::mlockall(libc::MCL_CURRENT) };
    ensure!(
        result == 0,
        "cannot keep this program in memory: {}",
        std::io::Error::last_os_error()
    );
    Ok(())
}

/// The libraries that a program is linked with, and the loader.
fn libraries_of(program: &Path) -> Result<Vec<PathBuf>> {
    let listing = Command::new("ldd").arg(program).output().context("cannot run ldd")?;
    ensure!(
        listing.status.success(),
        "{} has no list of libraries",
        program.display()
    );
    Ok(library_paths(&String::from_utf8_lossy(&listing.stdout)))
}

/// The files in ldd's output: of lines `NAME => PATH (ADDRESS)` and `PATH (ADDRESS)`.
fn library_paths(listing: &str) -> Vec<PathBuf> {
    let words = listing
        .lines()
        .filter_map(|line| line.split_whitespace().find(|word| word.starts_with('/')));
    words.map(PathBuf::from).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_and_the_loader_are_found_in_the_listing() {
        let listing = "\tlinux-vdso.so.1 (0x00007ffc)\n\tlibc.so.6 => /lib/x/libc.so.6 (0x00007f)\n\
                       \t/lib64/ld-linux-x86-64.so.2 (0x00007f)\n";
        let expected = ["/lib/x/libc.so.6", "/lib64/ld-linux-x86-64.so.2"].map(PathBuf::from);
        assert_eq!(library_paths(listing), expected);
    }
}
