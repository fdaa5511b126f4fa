//! `cutover jail`: a command that runs a VM, with no more rights than the VM needs.
//!
//! ```text
//!  cutover jail OPTIONS -- vmm …
//!      └─ begin anew: nothing inherited ─► Jail (root) or Sandbox (Landlock) ─► what is after `--`, in the same program
//! ```

mod args;

use std::ffi::OsString;
use std::{io, iter};

use clap::Parser;
use cutover_jail::{CgroupSettings, Ended, Jail, Limits, Sandbox, Teller, User, begin_anew, in_background};
use rustix::process::geteuid;

use crate::cli::{Cli, Command};
use crate::exit::{ExitStatus, report};

pub use args::{JAIL_HELP, JailArgs};

/// Why a command is not run.
#[derive(Debug, thiserror::Error)]
enum JailError {
    #[error("{0} takes root: run `cutover jail` as root, or leave it out to be confined by Landlock")]
    TakesRoot(&'static str),
    #[error("a jail needs {0}: give it one, or have the VM confined by --landlock alone")]
    Missing(&'static str),
    #[error("--tcp is for --landlock: a jail has the network of its namespace (--netns)")]
    TcpInJail,
    #[error("'cutover jail' does not run itself: give it a command that runs a VM")]
    Nested,
    #[error(transparent)]
    Jail(#[from] cutover_jail::Error),
    #[error(
        "the monitor was killed by signal {0}; where it has a limit of memory (--cgroup memory.max), look there first"
    )]
    Killed(i32),
}

impl JailError {
    fn status(&self) -> ExitStatus {
        match self {
            Self::Jail(cutover_jail::Error::Id(_) | cutover_jail::Error::Place { .. }) => ExitStatus::Usage,
            Self::Jail(_) | Self::Killed(_) => ExitStatus::Failure,
            _ => ExitStatus::Usage,
        }
    }
}

/// What confines the command.
#[derive(Debug)]
enum Confinement {
    Jail(Jail),
    Sandbox(Sandbox),
}

/// Runs the command that `args` name, confined, and tells how it ended.
pub fn run(args: JailArgs) -> ExitStatus {
    let arguments = iter::once(OsString::from("cutover")).chain(args.command.iter().cloned());
    // Told now, while somebody sees it.
    let command = Cli::try_parse_from(arguments)
        .unwrap_or_else(|error| error.exit())
        .command;
    run_confined(&args, command).unwrap_or_else(|error| {
        report(&error);
        error.status()
    })
}

fn run_confined(args: &JailArgs, command: Command) -> Result<ExitStatus, JailError> {
    if matches!(command, Command::Jail(_)) {
        return Err(JailError::Nested);
    }
    let confinement = confinement(args, geteuid().is_root())?;
    begin_anew(&args.env)?;
    // Process lists show what it is.
    let _ = rustix::thread::set_name(c"cutover-jail");
    if args.daemonize {
        let in_there = |started| {
            let ended = run_in(&confinement, command, Some(started));
            // Whoever started this has been told what went wrong, and has gone if nothing did.
            ended.unwrap_or(ExitStatus::Failure) as u8
        };
        in_background(in_there)?;
        return Ok(ExitStatus::Success);
    }
    run_in(&confinement, command, None)
}

/// Runs `command` in `confinement`; `started` is told when it is confined, if that goes on in the background.
fn run_in(confinement: &Confinement, command: Command, started: Option<Teller>) -> Result<ExitStatus, JailError> {
    match confinement {
        Confinement::Jail(jail) => match jail.run(started, || crate::carry_out(command) as u8)? {
            Ended::Exited(code) => Ok(ExitStatus::of_code(code)),
            Ended::Killed(signal) => Err(JailError::Killed(signal)),
        },
        Confinement::Sandbox(sandbox) => {
            let code = sandbox.run(started, |unrestricted| {
                warn_of(unrestricted);
                crate::carry_out(command) as u8
            })?;
            Ok(ExitStatus::of_code(code))
        }
    }
}

/// What of Landlock this kernel lacks, a user should know.
fn warn_of(unrestricted: &[&str]) {
    if !unrestricted.is_empty() {
        let text = format!(
            "cutover: warning: this kernel's Landlock does not restrict {}\n",
            unrestricted.join("; ")
        );
        // There is nobody left to tell if the standard error is closed.
        let _ = io::Write::write_all(&mut io::stderr(), text.as_bytes());
    }
}

/// What `args` ask for, of root or somebody else.
fn confinement(args: &JailArgs, is_root: bool) -> Result<Confinement, JailError> {
    let limits = args.resource_limits.unwrap_or_default();
    if is_root && !args.landlock {
        return jail(args, limits).map(Confinement::Jail);
    }
    match args.takes_root() {
        Some(option) => Err(JailError::TakesRoot(option)),
        None => Ok(Confinement::Sandbox(Sandbox {
            files: args.files.clone(),
            tcp: args.tcp,
            limits,
        })),
    }
}

fn jail(args: &JailArgs, limits: Limits) -> Result<Jail, JailError> {
    if args.tcp {
        return Err(JailError::TcpInJail);
    }
    let id = args.id.as_ref().ok_or(JailError::Missing("a name (--id)"))?;
    let uid = args.uid.ok_or(JailError::Missing("a user (--uid)"))?;
    let gid = args.gid.ok_or(JailError::Missing("a group (--gid)"))?;
    Ok(Jail {
        id: id.to_string(),
        base: args.base(),
        user: User::new(uid, gid)?,
        network: args.netns.clone(),
        files: args.files.clone(),
        limits,
        cgroup: (!args.cgroups.is_empty()).then(|| CgroupSettings {
            parent: args.parent_cgroup(),
            settings: args.cgroups.clone(),
        }),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(line: &str) -> JailArgs {
        let line = format!("cutover jail {line} -- vmm --api-sock /run/api.sock");
        match Cli::try_parse_from(line.split_whitespace()).expect("valid").command {
            Command::Jail(args) => *args,
            other => panic!("not a jail: {other:?}"),
        }
    }

    fn refusal(line: &str, is_root: bool) -> String {
        let error = confinement(&args(line), is_root).expect_err(line);
        assert_eq!(error.status(), ExitStatus::Usage, "{line}");
        error.to_string()
    }

    #[test]
    fn root_makes_a_jail_of_every_option() {
        let args = args(
            "--id web --uid 3000 --gid 3001 --chroot /srv/vms --netns /run/netns/web --file path=/srv/disk \
             --cgroup memory.max=1G --cgroup pids.max=64 --parent-cgroup vms --resource-limit no-file=64 --env NAME \
             --daemonize",
        );
        assert_eq!(args.command, ["vmm", "--api-sock", "/run/api.sock"]);
        assert_eq!((args.daemonize, args.env.as_slice()), (true, &["NAME".into()][..]));
        let Ok(Confinement::Jail(jail)) = confinement(&args, true) else {
            panic!("root has jails")
        };
        assert_eq!((jail.id.as_str(), jail.base.to_str()), ("web", Some("/srv/vms")));
        assert_eq!(jail.user, User::new(3000, 3001).expect("not root"));
        assert_eq!(jail.network, Some("/run/netns/web".into()));
        assert_eq!(jail.files.len(), 1);
        assert_eq!(jail.limits.descriptors, 64);
        let cgroup = jail.cgroup.expect("limits are given");
        assert_eq!((cgroup.parent.to_str(), cgroup.settings.len()), (Some("vms"), 2));
    }

    #[test]
    fn without_root_or_by_choice_there_is_landlock() {
        for (line, is_root) in [("--tcp", false), ("--landlock --tcp", true)] {
            let Ok(Confinement::Sandbox(sandbox)) = confinement(&args(line), is_root) else {
                panic!("not a sandbox: {line}")
            };
            assert!(sandbox.tcp);
        }
    }

    #[test]
    fn what_does_not_go_together_is_refused_with_what_to_do() {
        let uid = "--uid takes root: run `cutover jail` as root, or leave it out to be confined by Landlock";
        assert_eq!(refusal("--uid 3000", false), uid);
        assert!(refusal("--landlock --cgroup memory.max=1G", true).starts_with("--cgroup takes root"));
        assert!(refusal("--file path=/srv/disk,at=/disk", false).starts_with("--file …,at= takes root"));
        assert!(refusal("--uid 3000 --gid 3000", true).starts_with("a jail needs a name (--id)"));
        assert!(refusal("--id web --gid 3000", true).starts_with("a jail needs a user (--uid)"));
        assert!(refusal("--id web --uid 3000 --gid 3000 --tcp", true).starts_with("--tcp is for --landlock"));
        assert!(refusal("--id web --uid 0 --gid 3000", true).starts_with("0 is no user or group"));
    }

    #[test]
    fn names_are_no_paths() {
        for id in ["../web", "a/b", "..", ""] {
            let line = ["cutover", "jail", "--id", id, "--", "vmm"];
            assert!(Cli::try_parse_from(line).is_err(), "{id}");
        }
    }
}
