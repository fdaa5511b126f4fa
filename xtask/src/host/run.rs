//! Starting nested hosts, passing their output through, and getting the exit code of the command they ran.

use std::ffi::OsString;
use std::fs;
use std::io::{BufRead, BufReader, IsTerminal, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Signal, set_parent_process_death_signal};
use tempfile::TempDir;

use super::image::Image;
use super::qemu::{self, Host};
use super::{Options, switch};
use crate::ui;
use crate::workspace::{Workspace, text};

/// Runs `command` on every host and returns the first exit code that is not 0.
pub fn run(workspace: &Workspace, image: &Image, options: &Options, command: &[OsString]) -> Result<i32> {
    let interactive = std::io::stdin().is_terminal() && options.hosts == 1;
    ensure!(
        interactive || !command.is_empty(),
        "a shell needs a terminal and a single host; otherwise give a command after --"
    );
    let share = workspace.target.join("host");
    fs::create_dir_all(share.join("out")).with_context(|| format!("cannot create {}", share.display()))?;
    ensure!(
        !text(&share)?.contains([' ', '\t', '\n', ',']),
        "a nested host cannot use {}: set CARGO_TARGET_DIR to a path without blanks and commas",
        share.display()
    );
    let run = TempDir::with_prefix_in("run-", &share)?;
    let sockets = TempDir::new()?;
    let links = match options.hosts {
        1 => Vec::new(),
        hosts => switch::start(sockets.path(), hosts)?,
    };
    let mut hosts = Vec::new();
    for number in 1..=options.hosts {
        let directory = run.path().join(number.to_string());
        fs::create_dir(&directory)?;
        let script = script(command, options.hosts, number, &share.join("out"), interactive)?;
        fs::write(directory.join("command"), script).context("cannot write the command for the nested host")?;
        let link = links.get(usize::from(number) - 1);
        let arguments = qemu::arguments(
            image,
            options,
            &Host {
                number,
                share: &share,
                run: &directory,
                link: link.map(|link| (link.host.as_path(), link.switch.as_path())),
                interactive,
                restarts: options.first_leads && number > 1,
            },
        );
        hosts.push(RunningHost::start(
            &arguments,
            number,
            options.hosts > 1 || options.silence_max.is_some(),
            interactive,
            directory,
        )?);
    }
    if options.first_leads {
        let followers = hosts.split_off(1);
        let code = hosts.remove(0).wait(options.silence_max);
        for follower in followers {
            follower.end()?;
        }
        return code;
    }
    // All are waited for before the first failure is reported, so that what the others found out is not lost.
    let codes: Vec<_> = hosts.into_iter().map(|host| host.wait(options.silence_max)).collect();
    let codes = codes.into_iter().collect::<Result<Vec<_>>>()?;
    Ok(codes.into_iter().find(|&code| code != 0).unwrap_or(0))
}

/// A QEMU process and what to do when it ends.
struct RunningHost {
    number: u8,
    qemu: Child,
    /// Says that something was printed; closed at the end of the output.
    output: Option<Receiver<()>>,
    directory: PathBuf,
}

impl RunningHost {
    fn start(
        arguments: &[OsString],
        number: u8,
        labelled: bool,
        interactive: bool,
        directory: PathBuf,
    ) -> Result<Self> {
        let mut command = Command::new("qemu-system-x86_64");
        command.args(arguments);
        if !interactive {
            command.stdin(Stdio::null());
        }
        if labelled {
            command.stdout(Stdio::piped());
        }
        // SAFETY: prctl is async-signal-safe and touches nothing of the parent's that the fork may have left in pieces.
        unsafe {
            command.pre_exec(|| Ok(set_parent_process_death_signal(Some(Signal::KILL))?));
        }
        let mut qemu = command.spawn().context("cannot run qemu-system-x86_64")?;
        let output = qemu.stdout.take().map(|output| {
            let (printed, heard) = channel();
            thread::spawn(move || {
                for line in BufReader::new(output).split(b'\n').map_while(Result::ok) {
                    print_labelled(number, &line);
                    // Nobody listens any more when the run is given up.
                    let _ = printed.send(());
                }
            });
            heard
        });
        Ok(Self {
            number,
            qemu,
            output,
            directory,
        })
    }

    /// Ends the host by force.
    fn end(mut self) -> Result<()> {
        self.qemu.kill()?;
        self.qemu.wait()?;
        Ok(())
    }

    /// Waits for the host's end and returns the exit code of its command. A host that prints nothing for longer than
    /// `silence_max` is ended.
    fn wait(mut self, silence_max: Option<Duration>) -> Result<i32> {
        if let Some(output) = &self.output {
            let silence_max = silence_max.unwrap_or(Duration::MAX);
            loop {
                match output.recv_timeout(silence_max) {
                    Ok(()) => {}
                    Err(RecvTimeoutError::Disconnected) => break,
                    Err(RecvTimeoutError::Timeout) => {
                        ui::say(format_args!(
                            "nested host {} printed nothing for {silence_max:?}: it hangs and is ended",
                            self.number
                        ));
                        self.qemu.kill()?;
                    }
                }
            }
        }
        let status = self.qemu.wait()?;
        let reported = fs::read_to_string(self.directory.join("status")).unwrap_or_default();
        match reported.trim().parse() {
            Ok(code) => Ok(code),
            Err(_) => bail!("nested host {} ended ({status}) before its command did", self.number),
        }
    }
}

/// Lines of different hosts do not mix: each is written under the lock of standard output.
fn print_labelled(number: u8, line: &[u8]) {
    let mut out = std::io::stdout().lock();
    let _ = out
        .write_all(format!("[host {number}] ").as_bytes())
        .and_then(|()| out.write_all(line))
        .and_then(|()| out.write_all(b"\n"));
}

/// The shell script that a host runs: this process's environment and directory, then the command.
fn script(command: &[OsString], hosts: u8, number: u8, out: &Path, interactive: bool) -> Result<String> {
    let mut script = String::new();
    for (name, value) in std::env::vars_os() {
        if let (Some(name), Some(value)) = (name.to_str(), value.to_str())
            && is_shell_name(name)
        {
            script.push_str(&format!("export {name}={}\n", quote(value)));
        }
    }
    script.push_str(&format!(
        "export CUTOVER_HOST={number} CUTOVER_HOSTS={hosts} CUTOVER_OUT={}\n",
        quote(text(out)?)
    ));
    if interactive {
        let size = rustix::termios::tcgetwinsize(std::io::stdin())?;
        script.push_str(&format!("stty rows {} cols {}\n", size.ws_row, size.ws_col));
    }
    let directory = std::env::current_dir()?;
    script.push_str(&format!("cd {}\nexec", quote(text(&directory)?)));
    let shell = [OsString::from("bash")];
    for word in if command.is_empty() { &shell } else { command } {
        let word = word
            .to_str()
            .with_context(|| format!("{} is not UTF-8", word.display()))?;
        script.push_str(&format!(" {}", quote(word)));
    }
    script.push('\n');
    Ok(script)
}

fn is_shell_name(name: &str) -> bool {
    name.starts_with(|first: char| first.is_ascii_alphabetic() || first == '_')
        && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
}

/// `word` as one word of a POSIX shell.
fn quote(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_survive_the_shell_unchanged() {
        for word in ["plain", "two words", "it's", "$HOME `id` \\ \"x\"", "", "a\nb"] {
            let script = format!("printf %s {}", quote(word));
            let output = Command::new("sh").args(["-c", &script]).output().unwrap();
            assert_eq!(String::from_utf8(output.stdout).unwrap(), word);
        }
    }

    #[test]
    fn the_script_ends_with_the_command_in_the_current_directory() {
        let script = script(&["echo".into(), "it's on".into()], 2, 1, Path::new("/out"), false).unwrap();
        let directory = std::env::current_dir().unwrap();
        let expected = format!("cd '{}'\nexec 'echo' 'it'\\''s on'\n", directory.display());
        assert!(script.ends_with(&expected), "{script}");
        assert!(script.contains("export CUTOVER_HOST=1 CUTOVER_HOSTS=2 CUTOVER_OUT='/out'\n"));
    }
}
