//! The shape of `cutover jail …`, and its help text.

// Documentation here is help text, in which brackets mean that something can be left out.
#![allow(rustdoc::broken_intra_doc_links)]

use std::ffi::OsString;
use std::path::PathBuf;

use clap::Args;
use cutover_jail::{Limits, Setting, SharedFile};

use crate::options;
use crate::runtime_dir::VmName;

/// Where jails are, and the control group that theirs are in, if nothing else is said.
const BASE: &str = "/srv/cutover";
const PARENT_CGROUP: &str = "cutover";

/// `cutover jail`.
#[derive(Debug, Args)]
pub struct JailArgs {
    /// Name of the jail, that of its folder and its control group
    #[arg(long, value_name = "NAME", help_heading = "Jail")]
    pub id: Option<VmName>,

    /// User that the monitor becomes; best one for each VM
    #[arg(long, value_name = "UID", help_heading = "Jail")]
    pub uid: Option<u32>,

    /// Group that the monitor has instead of all others
    #[arg(long, value_name = "GID", help_heading = "Jail")]
    pub gid: Option<u32>,

    /// Folder of jails, which only root can write [default: /srv/cutover]
    ///
    /// The root of the jail is BASE/NAME/root. What the monitor writes to /run in there is in BASE/NAME/root/run.
    #[arg(long, value_name = "BASE", help_heading = "Jail")]
    pub chroot: Option<PathBuf>,

    /// Network namespace of the monitor, such as /run/netns/NAME [default: one without any network]
    #[arg(long, value_name = "FILE", help_heading = "Jail")]
    pub netns: Option<PathBuf>,

    /// Limit by a control group: FILE=VALUE, such as memory.max=2G, cpu.max='50000 100000', pids.max=64
    ///
    /// FILE is one of a control group of version 2.
    #[arg(long = "cgroup", value_name = "LIMIT", help_heading = "Jail")]
    pub cgroups: Vec<Setting>,

    /// Control group that the VM's own is made in [default: cutover]
    #[arg(long, value_name = "PATH", help_heading = "Jail")]
    pub parent_cgroup: Option<PathBuf>,

    /// Give the monitor a file, folder or device: path=FILE[,readonly][,at=PATH]
    ///
    /// In a jail it is at PATH, or where it is outside. It keeps its owner and mode: the monitor's user must be allowed to
    /// use it. Without root, FILE is what Landlock allows.
    #[arg(long = "file", value_name = "FILE", value_parser = options::shared_file)]
    pub files: Vec<SharedFile>,

    /// Limit the process: [no-file=N][,fsize=SIZE] [default: no-file=4096]
    ///
    /// no-file is how many files it can have open, fsize the largest it can make or extend (disks, snapshots, memory that
    /// is shared).
    #[arg(long = "resource-limit", value_name = "LIMITS", value_parser = options::resource_limits)]
    pub resource_limits: Option<Limits>,

    /// Keep a variable of the environment, of which otherwise nothing is left
    #[arg(long, value_name = "NAME")]
    pub env: Vec<OsString>,

    /// Go on in the background, without the terminal, once the monitor is confined
    #[arg(long)]
    pub daemonize: bool,

    /// Confine the monitor by Landlock alone, as is done without root
    #[arg(long, help_heading = "Without root")]
    pub landlock: bool,

    /// Let the monitor use TCP (migration, buckets)
    #[arg(long, help_heading = "Without root")]
    pub tcp: bool,

    /// What to run: a command of this program that runs a VM, with its arguments
    #[arg(last = true, required = true, value_name = "COMMAND")]
    pub command: Vec<OsString>,
}

impl JailArgs {
    /// The folder of jails.
    pub fn base(&self) -> PathBuf {
        self.chroot.clone().unwrap_or_else(|| BASE.into())
    }

    /// The group that the VM's own is made in.
    pub fn parent_cgroup(&self) -> PathBuf {
        self.parent_cgroup.clone().unwrap_or_else(|| PARENT_CGROUP.into())
    }

    /// The first option given that only root's jails have.
    pub fn takes_root(&self) -> Option<&'static str> {
        let is_elsewhere = |file: &SharedFile| file.at != file.path;
        [
            (self.id.is_some(), "--id"),
            (self.uid.is_some(), "--uid"),
            (self.gid.is_some(), "--gid"),
            (self.chroot.is_some(), "--chroot"),
            (self.netns.is_some(), "--netns"),
            (!self.cgroups.is_empty(), "--cgroup"),
            (self.parent_cgroup.is_some(), "--parent-cgroup"),
            (self.files.iter().any(is_elsewhere), "--file …,at="),
        ]
        .into_iter()
        .find_map(|(given, option)| given.then_some(option))
    }
}

/// What `cutover jail --help` says after the options.
pub const JAIL_HELP: &str = "\
As root, a jail: a root file system with nothing in it but devices and the files given, namespaces
of its own, limits, and a user without any privileges. Without root, Landlock: no files can be opened
but those given. docs/jail.md says more.

Examples:
  A VM behind its API, as user 3000, with a disk and a tap of that user:
    chown 3000:3000 /srv/images/web.ext4
    ip netns add web
    ip -n web tuntap add tap0 mode tap user 3000
    cutover jail --id web --uid 3000 --gid 3000 --netns /run/netns/web \\
        --cgroup memory.max=1200M --cgroup pids.max=64 \\
        --file path=/srv/images/vmlinuz,readonly --file path=/srv/images/web.ext4 \\
        -- vmm --id web --api-sock /run/api.sock
    cutover vm info /srv/cutover/web/root/run/api.sock

  What a monitor in there finds:
    cutover jail --id test --uid 3000 --gid 3000 -- check

  Without root:
    cutover jail --file path=vmlinuz,readonly --file path=disk.ext4 \\
        -- run --kernel vmlinuz --disk path=disk.ext4

Signals:
  SIGTERM and SIGINT are passed on to the monitor. SIGKILL ends both.

Exit codes:
  1  the jail could not be made, or the monitor was killed
  2  the command line is wrong
  Any other, and these two as well, is that of the command.";
