//! [`Guest`]: what to boot, with what around it.

use std::ffi::{OsStr, OsString};
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::environment::guest_file;
use crate::vm::Vm;
use crate::{Disk, Jail, Lan, Monitor, Network, Terminal};

/// The kernel's messages stay off the console, but for warnings; a panic ends the guest at once.
const CMDLINE: &str = "console=ttyS0 quiet panic=-1";

/// A guest that can be started, any number of times.
#[derive(Clone, Debug)]
pub struct Guest {
    pub(crate) kernel: PathBuf,
    pub(crate) initrd: PathBuf,
    pub(crate) cmdline: String,
    pub(crate) cpus: u32,
    pub(crate) memory: String,
    /// Further arguments of `cutover run`.
    arguments: Vec<OsString>,
    /// A command that executes its own arguments after it has changed something about its process.
    wrapper: Vec<OsString>,
    /// Options of `cutover jail`, in which the monitor then runs.
    jail: Vec<OsString>,
    greeting: Greeting,
}

/// How a guest says that it is ready.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Greeting {
    /// The agent reports.
    Agent,
    /// There is a login prompt on the console.
    LoginPrompt,
}

impl Guest {
    /// A stock kernel with a small initramfs that runs the agent; 1 vCPU, 128 MiB.
    pub fn micro() -> Self {
        Self {
            kernel: guest_file("micro/vmlinuz"),
            initrd: guest_file("micro/initrd"),
            cmdline: CMDLINE.to_owned(),
            cpus: 1,
            memory: "128M".to_owned(),
            arguments: Vec::new(),
            wrapper: Vec::new(),
            jail: Vec::new(),
            greeting: Greeting::Agent,
        }
    }

    /// A whole Debian, its root file system on `root`; 1 vCPU, 768 MiB. Its network interface has the guest's address
    /// of `network`.
    pub fn debian(root: &Disk, network: &Network) -> Self {
        Self::debian_at(root, network.guest(), network.host()).net(network)
    }

    /// The same on one of the taps of `lan`.
    pub fn debian_on(root: &Disk, lan: &Lan, tap: &str) -> Self {
        Self::debian_at(root, lan.guest(), lan.host()).arguments(["--net", &format!("tap={tap}")])
    }

    fn debian_at(root: &Disk, address: Ipv4Addr, gateway: Ipv4Addr) -> Self {
        let guest = Self {
            kernel: guest_file("debian/vmlinuz"),
            initrd: guest_file("debian/initrd"),
            greeting: Greeting::LoginPrompt,
            ..Self::micro()
        };
        guest
            .memory("768M")
            .disk(root)
            .cmdline("root=/dev/vda rw")
            .cmdline(&format!("cutover.ip={address}/24 cutover.gw={gateway}"))
    }

    /// Boots another kernel.
    pub fn kernel(mut self, kernel: &Path) -> Self {
        self.kernel = kernel.to_owned();
        self
    }

    /// Adds kernel parameters.
    pub fn cmdline(mut self, parameters: &str) -> Self {
        self.cmdline = format!("{} {parameters}", self.cmdline);
        self
    }

    /// Number of vCPUs.
    pub fn cpus(mut self, cpus: u32) -> Self {
        self.cpus = cpus;
        self
    }

    /// Guest memory, with a unit.
    pub fn memory(mut self, size: &str) -> Self {
        self.memory = size.to_owned();
        self
    }

    /// Adds a disk.
    pub fn disk(self, disk: &Disk) -> Self {
        self.disk_with(disk, "")
    }

    /// Adds a disk with options, such as `readonly,serial=A1`.
    pub fn disk_with(self, disk: &Disk, options: &str) -> Self {
        let separator = if options.is_empty() { "" } else { "," };
        self.arguments(["--disk", &format!("path={}{separator}{options}", disk.path().display())])
    }

    /// Adds a network interface.
    pub fn net(self, network: &Network) -> Self {
        self.arguments(["--net", &network.argument()])
    }

    /// Adds arguments of `cutover run`.
    pub fn arguments<S: AsRef<OsStr>>(mut self, arguments: impl IntoIterator<Item = S>) -> Self {
        self.arguments
            .extend(arguments.into_iter().map(|argument| argument.as_ref().to_owned()));
        self
    }

    /// Starts the monitor through another program, which must execute its arguments in its own process.
    pub fn through<S: AsRef<OsStr>>(mut self, wrapper: impl IntoIterator<Item = S>) -> Self {
        self.wrapper = wrapper.into_iter().map(|word| word.as_ref().to_owned()).collect();
        self
    }

    /// Starts the monitor in `jail`; the process that is started is the monitor's keeper then.
    pub fn in_jail(self, jail: &Jail) -> Self {
        self.confined(jail.options())
    }

    /// Starts the monitor by `cutover jail` with `options`.
    pub fn confined<S: AsRef<OsStr>>(mut self, options: impl IntoIterator<Item = S>) -> Self {
        self.jail = options.into_iter().map(|option| option.as_ref().to_owned()).collect();
        self
    }

    /// Starts the monitor and waits for nothing.
    #[track_caller]
    pub fn start(&self) -> Vm {
        Vm::start(self.command())
    }

    /// Starts the monitor on a terminal and waits for nothing.
    #[track_caller]
    pub fn start_on(&self, terminal: &Terminal) -> Vm {
        Vm::start_on(self.command(), terminal)
    }

    /// Starts the monitor and waits until the guest is ready.
    #[track_caller]
    pub fn boot(&self) -> Vm {
        let vm = self.start();
        vm.wait_ready(self.greeting);
        vm
    }

    fn command(&self) -> Command {
        let monitor = Monitor::command();
        let mut command = match self.wrapper.split_first() {
            None => monitor,
            Some((program, arguments)) => {
                let mut wrapper = Command::new(program);
                wrapper.args(arguments).arg(monitor.get_program());
                wrapper
            }
        };
        if !self.jail.is_empty() {
            command.arg("jail").args(&self.jail).arg("--");
        }
        command
            .arg("run")
            .arg("--kernel")
            .arg(&self.kernel)
            .arg("--initrd")
            .arg(&self.initrd);
        command.args([
            "--cmdline",
            &self.cmdline,
            "--cpus",
            &self.cpus.to_string(),
            "--memory",
            &self.memory,
        ]);
        command.args(&self.arguments);
        command
    }
}
