//! The command line's shape and its help texts; what the options mean is for [`config`](crate::config) to say.

// Documentation here is help text, in which brackets mean that something can be left out.
#![allow(rustdoc::broken_intra_doc_links)]

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use clap::{Args, Parser, Subcommand, ValueEnum};
use clap_complete::Shell;
use cutover_snapshot::size::ByteSize;
use cutover_snapshot::spec::{BalloonSpec, BootProtocol, DiskSpec, MmdsSpec, NetSpec, SerialSpec, VsockSpec};
use cutover_vmm::dirty::DirtyLog;

use crate::client::{VM_HELP, VmArgs};
use crate::group_command::{
    BACKUP_HELP, BackupArgs, COORDINATOR_HELP, CoordinatorArgs, GROUP_HELP, GroupArgs, STANDBY_HELP, StandbyArgs,
};
use crate::jail_command::{JAIL_HELP, JailArgs};
use crate::log::LogArgs;
use crate::migration_command::{MIGRATE_HELP, MigrateArgs, RECEIVE_HELP, ReceiveArgs, TLS_HELP, TlsArgs};
use crate::options;
use crate::snapshot_command::{SNAPSHOT_HELP, SnapshotArgs};
use crate::vmm::{VMM_HELP, VmmArgs};

/// A KVM microVM monitor that boots stock Linux.
#[derive(Debug, Parser)]
#[command(name = "cutover", version, after_help = OVERVIEW)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run a VM until its guest ends or it is ended
    #[command(after_help = RUN_HELP)]
    Run(Box<RunArgs>),
    /// Serve the API of a VM, which describes, starts and steers it: a stand-in for Firecracker
    #[command(version, after_help = VMM_HELP)]
    Vmm(Box<VmmArgs>),
    /// See and steer the VMs that run
    #[command(after_help = VM_HELP)]
    Vm(VmArgs),
    /// Make snapshots of running VMs, run VMs of them, and look after those on disk
    #[command(after_help = SNAPSHOT_HELP)]
    Snapshot(SnapshotArgs),
    /// Have a running VM go on under another monitor, on this host or another
    #[command(after_help = MIGRATE_HELP)]
    Migrate(MigrateArgs),
    /// Wait for a VM that another monitor sends, and run it
    #[command(after_help = RECEIVE_HELP)]
    Receive(Box<ReceiveArgs>),
    /// Protect groups of VMs together against the loss of hosts
    #[command(after_help = GROUP_HELP)]
    Group(Box<GroupArgs>),
    /// Decide for groups of VMs when checkpoints are taken, and who takes whose place
    #[command(after_help = COORDINATOR_HELP)]
    Coordinator(Box<CoordinatorArgs>),
    /// Have VMs of this host join groups, and keep standbys of others here
    #[command(after_help = BACKUP_HELP)]
    Backup(Box<BackupArgs>),
    /// Keep the image of a VM, and become it when that is lost; started by `cutover backup`
    #[command(hide = true, after_help = STANDBY_HELP)]
    Standby(Box<StandbyArgs>),
    /// Run a command that runs a VM with least privilege
    #[command(after_help = JAIL_HELP)]
    Jail(Box<JailArgs>),
    /// Make certificates by which hosts know each other
    #[command(after_help = TLS_HELP)]
    Tls(TlsArgs),
    /// Tell whether this machine can run guests, and if not, why
    #[command(after_help = CHECK_HELP)]
    Check(CheckArgs),
    /// Print a completion script for a shell
    #[command(after_help = COMPLETIONS_HELP)]
    Completions {
        /// The shell
        shell: Shell,
    },
}

/// Arguments of `cutover run`.
#[derive(Debug, Default, Args)]
pub struct RunArgs {
    /// Kernel to boot: a bzImage (a distribution's vmlinuz) or an ELF vmlinux
    #[arg(long, value_name = "FILE", help_heading = "Boot")]
    pub kernel: Option<PathBuf>,

    /// Initial RAM disk
    #[arg(long, value_name = "FILE", help_heading = "Boot")]
    pub initrd: Option<PathBuf>,

    /// How the kernel is entered: PVH where an ELF kernel has that entry (auto), or by force one of the two
    #[arg(long, value_name = "PROTOCOL", help_heading = "Boot")]
    pub boot_protocol: Option<Protocol>,

    /// Kernel command line [default: console=ttyS0 panic=-1]
    #[arg(long, value_name = "TEXT", help_heading = "Boot")]
    pub cmdline: Option<String>,

    /// Number of vCPUs, 1 to 32 [default: 1]
    #[arg(long, value_name = "N", help_heading = "Machine")]
    pub cpus: Option<u8>,

    /// Guest memory, with a unit: 128M, 4G [default: 512M]
    #[arg(long, value_name = "SIZE", help_heading = "Machine")]
    pub memory: Option<ByteSize>,

    /// Let other processes map the guest's memory
    #[arg(long, help_heading = "Machine")]
    pub memory_shared: bool,

    /// Back the guest's memory with the host's reserved 2 MiB pages
    #[arg(long, help_heading = "Machine")]
    pub hugepages: bool,

    /// Add a disk: path=FILE[,readonly][,id=ID][,serial=TEXT][,io=auto|io-uring|threads][,bandwidth=SIZE][,iops=N]
    ///
    /// FILE is a raw image or a block device whose size is a multiple of 512 bytes. The guest sees the disks as
    /// /dev/vda, /dev/vdb, … in the order given. A path with a comma in it can only be given in a configuration file.
    /// bandwidth (with a unit: 100M) and iops are the most bytes and requests a second. ID, of letters, digits and
    /// underscores, is what the API calls the disk [default: disk0, disk1, …].
    #[arg(long = "disk", value_name = "DISK", value_parser = options::disk, help_heading = "Devices")]
    pub disks: Vec<DiskSpec>,

    /// Add a network interface: [tap=NAME|fd=N][,id=ID][,mac=MAC][,mtu=N][,host-ip=ADDRESS/PREFIX][,LIMIT…]
    ///
    /// tap=NAME uses that tap device, and creates it if there is none; fd=N uses an open tap inherited as descriptor
    /// N; without either a tap is created for as long as the VM runs. host-ip gives the host's end an address and
    /// brings it up. Limits are rx-bandwidth=SIZE and rx-pps=N, the most bytes and frames a second that the guest
    /// receives, and tx-bandwidth=SIZE and tx-pps=N for what it sends. ID, of letters, digits and underscores, is what
    /// the API calls the interface [default: net0, net1, …].
    #[arg(
        long = "net", value_name = "NET", value_parser = options::net, num_args = 0..=1, default_missing_value = "",
        help_heading = "Devices"
    )]
    pub nets: Vec<NetSpec>,

    /// Give the guest an entropy device
    #[arg(long, help_heading = "Devices")]
    pub rng: bool,

    /// Give the guest a socket device: cid=N,uds=PATH
    ///
    /// PATH is a Unix socket that is created: programs of this host connect to it, write "CONNECT PORT", and are connected
    /// to that port of the guest. Connections of the guest to a port of CID 2 go to PATH_PORT, where somebody listens. N, 3
    /// or more, is the guest's own address.
    #[arg(long, value_name = "VSOCK", value_parser = options::vsock, help_heading = "Devices")]
    pub vsock: Option<VsockSpec>,

    /// Have the metadata service (MMDS) answer the guest: [version=V1|V2][,address=ADDRESS][,net=ID][,imds-compat]
    ///
    /// The guest reads what --metadata or the API has put there at http://169.254.169.254, or another link-local ADDRESS,
    /// through each of its network interfaces, or the one called ID. Version V2, the default, asks for a token. imds-compat
    /// has all answers be as EC2's.
    #[arg(
        long, value_name = "MMDS", value_parser = options::mmds, num_args = 0..=1, default_missing_value = "",
        help_heading = "Devices"
    )]
    pub mmds: Option<MmdsSpec>,

    /// Give the guest a memory balloon: amount=SIZE[,deflate-on-oom][,stats=SECONDS][,reporting]
    ///
    /// The guest gives SIZE of its memory back to the host, none if not given; how much is changed while it runs, over the
    /// API. With "deflate-on-oom" it takes some back before it is out of memory, with "stats" it tells every so many
    /// seconds how it uses its memory, and with "reporting" it gives back what it does not use, without being asked.
    #[arg(long, value_name = "BALLOON", value_parser = options::balloon, help_heading = "Devices")]
    pub balloon: Option<BalloonSpec>,

    /// Read the VM from a JSON file; options given beside it change or add to what it says
    ///
    /// A disk or network interface given as an option comes after those of the file; any other option replaces the
    /// file's value. The format is described with the examples in resources/examples.
    #[arg(long, value_name = "FILE", help_heading = "Monitor")]
    pub config: Option<PathBuf>,

    /// How the process that runs the VM behaves.
    #[command(flatten)]
    pub monitor: MonitorArgs,
}

/// How a process that runs a VM behaves, wherever the VM comes from.
#[derive(Debug, Default, Args)]
pub struct MonitorArgs {
    /// Where the guest's ttyS0 goes: stdio, file=FILE, socket=FILE, pty or null [default: stdio]
    ///
    /// file appends the output to FILE and has no input. socket listens on a Unix socket for one client at a time. pty
    /// makes a new pseudo-terminal and prints its name.
    #[arg(long, value_name = "CONSOLE", value_parser = options::serial, help_heading = "Devices")]
    pub serial: Option<SerialSpec>,

    /// What the metadata service tells at first: a JSON file
    #[arg(long, value_name = "FILE", help_heading = "Devices")]
    pub metadata: Option<PathBuf>,

    /// Name of the VM, for logs and `cutover vm`
    #[arg(long, value_name = "NAME", help_heading = "Monitor")]
    pub name: Option<String>,

    /// Let the VM be seen and steered while it runs: listen for `cutover vm NAME` and other clients of the API
    ///
    /// The VM needs a name then. It listens at NAME.sock in the runtime directory: $XDG_RUNTIME_DIR/cutover, or
    /// /run/cutover for root.
    #[arg(long, help_heading = "Monitor")]
    pub api: bool,

    /// Listen for clients of the API at PATH instead
    #[arg(long, value_name = "PATH", help_heading = "Monitor")]
    pub api_sock: Option<PathBuf>,

    /// How it is noticed which pages the guest writes, while a snapshot, migration or group wants to know
    ///
    /// bitmap is KVM's bitmap, which is exact everywhere. ring is KVM's dirty rings, whose cost follows what is written
    /// instead of how much memory there is. scan is the kernel's record of written pages (Linux 6.7 and later); snapshots
    /// are not live then. The last two are tried with a guest of their own first: where they lose a page, the VM does not
    /// start. auto is ring where that is exact, else bitmap.
    #[arg(long, value_name = "LOG", default_value = "bitmap", help_heading = "Monitor")]
    pub dirty_log: DirtyLogChoice,

    /// Do not confine the monitor's threads to the system calls they need (for debugging)
    #[arg(long, help_heading = "Monitor")]
    pub no_seccomp: bool,

    /// What is logged, how, and where to.
    #[command(flatten)]
    pub log: LogArgs,
}

/// Arguments of `cutover check`.
#[derive(Debug, Args)]
pub struct CheckArgs {
    /// Print the findings as JSON
    #[arg(long)]
    pub json: bool,
}

/// How a kernel is entered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Protocol {
    /// PVH where there is that entry, else Linux.
    Auto,
    /// The Linux 64-bit boot protocol.
    Linux,
    /// PVH.
    Pvh,
}

impl From<Protocol> for BootProtocol {
    fn from(protocol: Protocol) -> Self {
        match protocol {
            Protocol::Auto => Self::Auto,
            Protocol::Linux => Self::Linux,
            Protocol::Pvh => Self::Pvh,
        }
    }
}

/// How it is noticed what a guest writes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum DirtyLogChoice {
    /// KVM's bitmap.
    #[default]
    Bitmap,
    /// KVM's dirty rings.
    Ring,
    /// The kernel's record of written pages.
    Scan,
    /// Rings where they are exact, else the bitmap.
    Auto,
}

impl From<DirtyLogChoice> for DirtyLog {
    fn from(choice: DirtyLogChoice) -> Self {
        match choice {
            DirtyLogChoice::Bitmap => Self::Bitmap,
            DirtyLogChoice::Ring => Self::Ring,
            DirtyLogChoice::Scan => Self::Scan,
            DirtyLogChoice::Auto => Self::Auto,
        }
    }
}

/// The command line as if this program were called `cutover`: called `firecracker`, it is `cutover vmm`.
pub fn arguments(given: impl IntoIterator<Item = OsString>) -> Vec<OsString> {
    let mut arguments: Vec<OsString> = given.into_iter().collect();
    let name = arguments.first().map(Path::new).and_then(Path::file_name);
    if name.is_some_and(|name| name == "firecracker") {
        arguments.insert(1, "vmm".into());
    }
    arguments
}

/// Whether `arguments` begin as those of a process that becomes a VM's monitor. Whether they are right is not known yet.
pub fn is_about_a_new_vm(arguments: &[OsString]) -> bool {
    let mut words = arguments.iter().skip(1).map(|word| word.to_str());
    match words.next().flatten() {
        Some("run" | "vmm" | "receive") => true,
        Some("snapshot") => words.next().flatten() == Some("restore"),
        _ => false,
    }
}

const OVERVIEW: &str = "\
Examples:
  Can this machine run guests?
    cutover check

  Boot a kernel with an initial RAM disk, console on this terminal (Ctrl-A x ends it):
    cutover run --kernel vmlinuz --initrd initrd.img --cpus 1 --memory 256M

  See and steer VMs that run:
    cutover vm list
    cutover vm shutdown web

  Save a VM while it runs, and run it again:
    cutover snapshot create web --store snapshots --name monday
    cutover snapshot restore snapshots/monday

  Move a VM to another host while it runs:
    cutover receive --listen tls://[::]:7000 --name web --api    (there)
    cutover migrate web --to tls://there:7000                    (here)

  Run a VM with no more rights than it needs:
    cutover jail --help

  Protect VMs against the loss of their hosts:
    cutover group --help

`cutover run --help` has more, and lists the exit codes.";

const RUN_HELP: &str = "\
Examples:
  Boot a kernel and an initial RAM disk, console on this terminal:
    cutover run --kernel vmlinuz --initrd initrd.img --cpus 1 --memory 256M

  A Debian system on a disk, with a network:
    cutover run --kernel vmlinuz --initrd initrd.img --cpus 2 --memory 1G \\
        --cmdline 'console=ttyS0 root=/dev/vda rw' \\
        --disk path=root.ext4 --net tap=tap0,host-ip=172.16.0.1/24 --rng

  A disk and a network that take no more than their share of the host's:
    cutover run --kernel vmlinuz --initrd initrd.img --disk path=root.ext4,bandwidth=100M,iops=1000 \\
        --net tap=tap0,rx-bandwidth=10M,tx-bandwidth=10M

  A second disk the guest cannot write, console on a socket:
    cutover run --kernel vmlinux --memory 128M --disk path=root.ext4 \\
        --disk path=data.img,readonly,serial=data --serial socket=console.sock

  A VM from a file, with more memory than the file says:
    cutover run --config vm.json --memory 4G

  A VM in the background, to be steered with `cutover vm`:
    cutover run --config vm.json --name web --api --serial socket=web-console &
    cutover vm console web

Console on a terminal:
  Ctrl-A x       end the VM now
  Ctrl-A Ctrl-A  send Ctrl-A to the guest
  Ctrl-A h       show this list
  All other keys, Ctrl-C among them, go to the guest.

Signals:
  The first SIGTERM or SIGINT presses the guest's power button, the second ends the VM.

Exit codes:
  0  the guest shut itself down, or has moved to another monitor
  1  the monitor failed
  2  the command line or the configuration file is wrong
  3  the guest asked for a reboot
  4  the guest panicked
  5  the VM was ended by force (console escape, second signal)";

const CHECK_HELP: &str = "\
Examples:
  cutover check
  cutover check --json | jq .can_run_guests

Exit codes:
  0  this machine can run guests
  1  it cannot; the findings say why and what to do";

const COMPLETIONS_HELP: &str = "\
Examples:
  bash: cutover completions bash > ~/.local/share/bash-completion/completions/cutover
  zsh:  cutover completions zsh > \"${fpath[1]}/_cutover\"
  fish: cutover completions fish > ~/.config/fish/completions/cutover.fish";

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;
    use crate::log::{LogFilter, LogFormat};

    fn parse(line: &str) -> Result<RunArgs, clap::Error> {
        match Cli::try_parse_from(line.split(' '))?.command {
            Command::Run(args) => Ok(*args),
            other => panic!("not a run: {other:?}"),
        }
    }

    #[test]
    fn the_definition_is_consistent() {
        Cli::command().debug_assert();
    }

    /// The words of a command line.
    fn line(text: &str) -> Vec<OsString> {
        text.split(' ').map(OsString::from).collect()
    }

    #[test]
    fn a_process_knows_before_it_reads_its_command_line_that_it_will_need_a_vm() {
        for text in [
            "cutover run --kernel k",
            "cutover vmm",
            "cutover receive --listen x",
            "cutover snapshot restore s",
        ] {
            assert!(is_about_a_new_vm(&line(text)), "{text}");
        }
        for text in [
            "cutover",
            "cutover vm list",
            "cutover snapshot",
            "cutover snapshot create restore",
        ] {
            assert!(!is_about_a_new_vm(&line(text)), "{text}");
        }
    }

    #[test]
    fn a_program_called_firecracker_takes_its_arguments() {
        let given = line("/usr/bin/firecracker --api-sock a");
        assert_eq!(arguments(given), line("/usr/bin/firecracker vmm --api-sock a"));
        assert_eq!(arguments(line("cutover vmm")), line("cutover vmm"));
    }

    #[test]
    fn every_option_of_run_is_read() {
        let args = parse(
            "cutover run --kernel k --initrd i --cmdline quiet --cpus 4 --memory 5GiB --memory-shared --hugepages \
             --disk path=a --disk path=b,readonly --net tap=t0 --net --rng --vsock cid=3,uds=v.sock --mmds version=V1,net=net0 \
             --balloon amount=64M,reporting \
             --metadata m.json --serial file=log --config c.json \
             --name web --dirty-log auto --no-seccomp --log-level info,virtio=debug --log-format json --log-file l \
             --api --api-sock s",
        )
        .expect("valid");
        assert_eq!(args.kernel, Some("k".into()));
        assert_eq!(args.initrd, Some("i".into()));
        assert_eq!(args.cmdline.as_deref(), Some("quiet"));
        assert_eq!(args.cpus, Some(4));
        assert_eq!(args.memory, Some(ByteSize::from_mib(5 << 10)));
        assert_eq!(args.vsock, options::vsock("cid=3,uds=v.sock").ok());
        assert_eq!(args.mmds, options::mmds("version=V1,net=net0").ok());
        assert_eq!(args.monitor.metadata, Some("m.json".into()));
        assert_eq!(args.balloon, options::balloon("amount=64M,reporting").ok());
        assert!(args.memory_shared && args.hugepages && args.rng && args.monitor.no_seccomp);
        assert_eq!(args.monitor.dirty_log, DirtyLogChoice::Auto);
        assert_eq!(
            args.disks.iter().map(|disk| disk.readonly).collect::<Vec<_>>(),
            [false, true]
        );
        assert_eq!(
            args.nets,
            [options::net("tap=t0").expect("valid"), options::net("").expect("valid")]
        );
        assert_eq!(args.monitor.serial, Some(SerialSpec::File("log".into())));
        assert_eq!(args.config, Some("c.json".into()));
        assert_eq!(args.monitor.name.as_deref(), Some("web"));
        assert_eq!(args.monitor.log.log_level.to_string(), "info,virtio=debug");
        assert_eq!((args.monitor.api, args.monitor.api_sock), (true, Some("s".into())));
        assert_eq!(args.monitor.log.log_format, LogFormat::Json);
        assert_eq!(args.monitor.log.log_file, Some("l".into()));
    }

    #[test]
    fn an_option_that_is_not_given_says_nothing() {
        let args = parse("cutover run").expect("valid");
        assert_eq!(
            (args.kernel, args.cpus, args.memory, args.monitor.serial),
            (None, None, None, None)
        );
        assert_eq!(args.monitor.log.log_level, LogFilter::default());
        assert_eq!(
            (args.monitor.log.log_format, args.monitor.log.log_file),
            (LogFormat::Human, None)
        );
        assert!(!args.monitor.no_seccomp);
        assert_eq!(args.monitor.dirty_log, DirtyLogChoice::Bitmap);
    }

    #[test]
    fn a_wrong_value_is_refused_with_the_option_and_the_reason() {
        for (line, option, reason) in [
            (
                "--memory 12X",
                "--memory <SIZE>",
                "'12X' is not a size: write a number with an optional unit",
            ),
            ("--cpus 300", "--cpus <N>", "300 is not in 0..=255"),
            (
                "--disk root.img",
                "--disk <DISK>",
                "there is no key 'root.img': it takes path=…",
            ),
            ("--net mtu=x", "--net [<NET>]", "mtu: 'x': invalid digit"),
            (
                "--serial tty",
                "--serial <CONSOLE>",
                "it takes stdio, file=…, socket=…, pty or null",
            ),
            (
                "--log-level loud",
                "--log-level <LEVEL>",
                "'loud' is not a level: it is one of off, error, warn, info, debug, trace, or PART=LEVEL",
            ),
        ] {
            let error = parse(&format!("cutover run {line}")).expect_err(line);
            assert_eq!(error.exit_code(), 2, "{line}");
            let message = error.to_string();
            assert!(message.contains(option) && message.contains(reason), "{message}");
        }
    }

    #[test]
    fn help_has_examples_at_every_level() {
        fn check(command: &mut clap::Command) {
            let help = command.render_long_help().to_string();
            assert!(help.contains("Examples:"), "{}", command.get_name());
            let commands = command.get_subcommands_mut();
            commands.filter(|command| command.get_name() != "help").for_each(check);
        }
        let mut cutover = Cli::command();
        for name in ["run", "vmm", "vm", "snapshot", "check", "completions"] {
            assert!(cutover.find_subcommand(name).is_some(), "{name}");
        }
        check(&mut cutover);
    }

    #[test]
    fn completions_know_the_options_in_every_shell() {
        for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "cutover", &mut script);
            let script = String::from_utf8(script).expect("a script is text");
            for word in [
                "run",
                "check",
                "completions",
                "memory-shared",
                "log-level",
                "shutdown",
                "no-wait",
            ] {
                assert!(script.contains(word), "{shell}: {word}");
            }
        }
    }
}
