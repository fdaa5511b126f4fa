//! What a client has configured so far, and what it may do when: a pure state machine.
//!
//! ```text
//!               start, restore                 finish_start
//!  NotStarted ─────────────────► Starting or ───────────────► Started
//!   configure   ▲                Restoring                     drives and network interfaces can be changed,
//!               └────────────────────┘                         the rest is as it is
//!                that failed
//! ```
//! A restored VM is what its snapshot says, and from then on that is what is configured.
//!
//! Files, taps and consoles are opened at the start; nothing here looks at the host.

use cutover_snapshot::spec::{
    BootProtocol, BootSpec, DEVICES_MAX, ID_MAX, MmdsSpec, RngSpec, SerialSpec, SpecError, VmSpec,
};

use super::balloon::BalloonDevice;
use super::boot_source::BootSource;
use super::drives::Drive;
use super::entropy::EntropyDevice;
use super::logger::LoggerConfiguration;
use super::machine_config::{MachineConfiguration, MachineConfigurationPatch};
use super::metrics::MetricsConfiguration;
use super::mmds::MmdsConfig;
use super::network_interfaces::NetworkInterface;
use super::rejection::Rejection;
use super::serial::SerialDevice;
use super::vsock::VsockDevice;

/// Everything that can be configured.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Configuration {
    /// vCPUs and memory.
    pub machine: MachineConfiguration,
    /// Kernel, initial RAM disk and command line.
    pub boot_source: Option<BootSource>,
    /// Disks, the root device first.
    pub drives: Vec<Drive>,
    /// Network interfaces.
    pub network_interfaces: Vec<NetworkInterface>,
    /// The entropy device.
    pub entropy: Option<EntropyDevice>,
    /// The socket device.
    pub vsock: Option<VsockDevice>,
    /// The metadata service.
    pub mmds: Option<MmdsConfig>,
    /// The balloon.
    pub balloon: Option<BalloonDevice>,
    /// Where the serial console goes.
    pub serial: SerialSpec,
    /// What was last said about the log.
    pub logger: Option<LoggerConfiguration>,
    /// Where metrics are written.
    pub metrics: Option<MetricsConfiguration>,
}

/// One request to configure something.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// `PUT /machine-config`.
    Machine(MachineConfiguration),
    /// `PATCH /machine-config`.
    MachinePatch(MachineConfigurationPatch),
    /// `PUT /boot-source`.
    BootSource(BootSource),
    /// `PUT /drives/{drive_id}`.
    Drive(Drive),
    /// `PUT /network-interfaces/{iface_id}`.
    NetworkInterface(NetworkInterface),
    /// `PUT /entropy`.
    Entropy(EntropyDevice),
    /// `PUT /vsock`.
    Vsock(VsockDevice),
    /// `PUT /mmds/config`.
    Mmds(MmdsConfig),
    /// `PUT /balloon`.
    Balloon(BalloonDevice),
    /// `PUT /serial`.
    Serial(SerialDevice),
    /// `PUT /logger`.
    Logger(LoggerConfiguration),
    /// `PUT /metrics`.
    Metrics(MetricsConfiguration),
}

impl Change {
    /// What it is about, for people.
    pub fn subject(&self) -> &'static str {
        match self {
            Self::Machine(_) | Self::MachinePatch(_) => "the machine",
            Self::BootSource(_) => "the boot source",
            Self::Drive(_) => "a drive",
            Self::NetworkInterface(_) => "a network interface",
            Self::Entropy(_) => "the entropy device",
            Self::Vsock(_) => "the vsock device",
            Self::Mmds(_) => "the metadata service",
            Self::Balloon(_) => "the balloon",
            Self::Serial(_) => "the serial console",
            Self::Logger(_) => "the log",
            Self::Metrics(_) => "the metrics file",
        }
    }
}

/// What a request needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Needs {
    /// That the VM has not been started; what is to be configured.
    NotStarted(&'static str),
    /// That it has.
    Started,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Stage {
    #[default]
    NotStarted,
    Starting,
    Restoring {
        /// What the guest writes is to be tracked from then on.
        track: bool,
    },
    Started,
}

/// The configuration, and whether there is a VM of it yet.
#[derive(Debug, Default)]
pub struct Setup {
    stage: Stage,
    configuration: Configuration,
}

impl Setup {
    /// The setup of a VM that runs already.
    pub fn of_started(spec: &VmSpec) -> Self {
        Self {
            stage: Stage::Started,
            configuration: spec.into(),
        }
    }

    /// The setup of a VM that comes from another monitor.
    pub fn of_arriving() -> Self {
        Self {
            stage: Stage::Restoring { track: false },
            configuration: Configuration::default(),
        }
    }

    /// What is configured.
    pub fn configuration(&self) -> &Configuration {
        &self.configuration
    }

    /// Whether a request with these needs can be served.
    ///
    /// # Errors
    /// It comes too early or too late.
    pub fn check(&self, needs: Needs) -> Result<(), Rejection> {
        match (self.stage, needs) {
            (Stage::NotStarted, Needs::NotStarted(_)) | (Stage::Started, Needs::Started) => Ok(()),
            (Stage::NotStarted, Needs::Started) => Err(Rejection::NotStarted),
            (Stage::Starting | Stage::Restoring { .. }, _) => Err(Rejection::Starting),
            (Stage::Started, Needs::NotStarted(subject)) => Err(Rejection::Started(subject)),
        }
    }

    /// Configures something.
    ///
    /// # Errors
    /// It comes too late, or there can be no such VM; nothing has changed.
    pub fn configure(&mut self, change: Change) -> Result<(), Rejection> {
        self.check(Needs::NotStarted(change.subject()))?;
        self.configuration.apply(change)
    }

    /// Begins the start of the VM that is configured.
    ///
    /// # Errors
    /// It has been started, or what is configured is no VM.
    pub fn start(&mut self) -> Result<VmSpec, Rejection> {
        self.check_startable()?;
        let spec = VmSpec::try_from(&self.configuration)?;
        self.stage = Stage::Starting;
        Ok(spec)
    }

    /// Begins to make the VM of a snapshot instead; returns where its console is to go. What its guest writes is to be
    /// tracked, or not.
    ///
    /// # Errors
    /// It has been started, or something is configured that the snapshot will say.
    pub fn restore(&mut self, track: bool) -> Result<SerialSpec, Rejection> {
        self.check_startable()?;
        if let Some(subject) = self.configuration.described() {
            return Err(Rejection::Configured(subject));
        }
        self.stage = Stage::Restoring { track };
        Ok(self.configuration.serial.clone())
    }

    fn check_startable(&self) -> Result<(), Rejection> {
        match self.stage {
            Stage::NotStarted => Ok(()),
            Stage::Starting | Stage::Restoring { .. } => Err(Rejection::Starting),
            Stage::Started => Err(Rejection::StartedAlready),
        }
    }

    /// The VM of `spec` has been started; or none has, and then the configuration can be changed again.
    pub fn finish_start(&mut self, spec: Option<&VmSpec>) {
        self.stage = match (self.stage, spec) {
            (_, None) => Stage::NotStarted,
            (Stage::Restoring { track }, Some(spec)) => {
                self.configuration.become_restored(spec, track);
                Stage::Started
            }
            (_, Some(_)) => Stage::Started,
        };
    }

    /// A drive of the started VM.
    ///
    /// # Errors
    /// The VM has not been started, or has no such drive.
    pub fn drive(&mut self, id: &str) -> Result<&mut Drive, Rejection> {
        self.check(Needs::Started)?;
        let mut drives = self.configuration.drives.iter_mut();
        let drive = drives.find(|drive| drive.drive_id == id);
        drive.ok_or_else(|| Rejection::NoDrive(id.to_owned()))
    }

    /// The balloon of the started VM.
    ///
    /// # Errors
    /// The VM has not been started, or has none.
    pub fn balloon(&mut self) -> Result<&mut BalloonDevice, Rejection> {
        self.check(Needs::Started)?;
        self.configuration.balloon.as_mut().ok_or(Rejection::NoBalloon)
    }

    /// A network interface of the started VM.
    ///
    /// # Errors
    /// The VM has not been started, or has no such interface.
    pub fn network_interface(&mut self, id: &str) -> Result<&mut NetworkInterface, Rejection> {
        self.check(Needs::Started)?;
        let mut interfaces = self.configuration.network_interfaces.iter_mut();
        let interface = interfaces.find(|interface| interface.iface_id == id);
        interface.ok_or_else(|| Rejection::NoInterface(id.to_owned()))
    }
}

impl Configuration {
    fn apply(&mut self, change: Change) -> Result<(), Rejection> {
        match change {
            Change::Machine(machine) => self.put_machine(machine),
            Change::MachinePatch(patch) => self.put_machine(self.machine.patched(patch)?),
            Change::BootSource(source) => {
                source.check()?;
                self.boot_source = Some(source);
                Ok(())
            }
            Change::Drive(drive) => self.put_drive(drive),
            Change::NetworkInterface(interface) => self.put_network_interface(interface),
            Change::Entropy(device) => {
                if self.entropy.is_none() {
                    self.check_room()?;
                }
                self.entropy = Some(device);
                Ok(())
            }
            Change::Vsock(device) => {
                device.check()?;
                if self.vsock.is_none() {
                    self.check_room()?;
                }
                self.vsock = Some(device);
                Ok(())
            }
            Change::Mmds(config) => self.put_mmds(config),
            Change::Balloon(device) => {
                device.check()?;
                if self.balloon.is_none() {
                    self.check_room()?;
                }
                self.balloon = Some(device);
                Ok(())
            }
            Change::Serial(device) => {
                device.check()?;
                self.serial = device.spec();
                Ok(())
            }
            Change::Logger(logger) => {
                self.logger = Some(logger);
                Ok(())
            }
            Change::Metrics(metrics) => {
                if self.metrics.is_some() {
                    return Err(Rejection::MetricsTaken);
                }
                self.metrics = Some(metrics);
                Ok(())
            }
        }
    }

    fn put_machine(&mut self, machine: MachineConfiguration) -> Result<(), Rejection> {
        machine.check()?;
        self.machine = machine;
        Ok(())
    }

    /// Replaces the drive with the same id, or adds one; the root device becomes the first.
    fn put_drive(&mut self, drive: Drive) -> Result<(), Rejection> {
        drive.check()?;
        let other_root = self.root().filter(|root| root.drive_id != drive.drive_id);
        if let (true, Some(root)) = (drive.is_root_device, other_root) {
            return Err(Rejection::RootTaken(root.drive_id.clone()));
        }
        let position = self.drives.iter().position(|other| other.drive_id == drive.drive_id);
        if position.is_none() {
            self.check_room()?;
        }
        let place = match position {
            Some(position) => {
                self.drives.remove(position);
                position
            }
            None => self.drives.len(),
        };
        self.drives.insert(if drive.is_root_device { 0 } else { place }, drive);
        Ok(())
    }

    /// Replaces the interface with the same id, or adds one.
    fn put_network_interface(&mut self, interface: NetworkInterface) -> Result<(), Rejection> {
        interface.check()?;
        let others = || {
            let others = self.network_interfaces.iter();
            others.filter(|other| other.iface_id != interface.iface_id)
        };
        if let Some(mac) = interface.guest_mac
            && let Some(other) = others().find(|other| other.guest_mac == Some(mac))
        {
            return Err(Rejection::MacTaken {
                mac: mac.to_string(),
                other: other.iface_id.clone(),
            });
        }
        let mut interfaces = self.network_interfaces.iter();
        match interfaces.position(|other| other.iface_id == interface.iface_id) {
            Some(position) => self.network_interfaces[position] = interface,
            None => {
                self.check_room()?;
                self.network_interfaces.push(interface);
            }
        }
        Ok(())
    }

    /// Has the service be at interfaces that there are.
    fn put_mmds(&mut self, config: MmdsConfig) -> Result<(), Rejection> {
        if config.network_interfaces.is_empty() {
            return Err(SpecError::MmdsNowhere.into());
        }
        let nets: Vec<_> = self.network_interfaces.iter().map(NetworkInterface::spec).collect();
        MmdsSpec::from(&config).check(&nets)?;
        self.mmds = Some(config);
        Ok(())
    }

    /// Whether one more device fits.
    fn check_room(&self) -> Result<(), Rejection> {
        let single = [self.entropy.is_some(), self.vsock.is_some(), self.balloon.is_some()];
        let single = single.into_iter().filter(|&is_there| is_there).count();
        let devices = self.drives.len() + self.network_interfaces.len() + single;
        if devices == DEVICES_MAX {
            return Err(SpecError::Devices(devices + 1).into());
        }
        Ok(())
    }

    /// Something that is configured and is part of what a VM consists of.
    fn described(&self) -> Option<&'static str> {
        [
            (self.machine != MachineConfiguration::default(), "the machine"),
            (self.boot_source.is_some(), "a boot source"),
            (!self.drives.is_empty(), "a drive"),
            (!self.network_interfaces.is_empty(), "a network interface"),
            (self.entropy.is_some(), "the entropy device"),
            (self.vsock.is_some(), "the vsock device"),
            (self.mmds.is_some(), "the metadata service"),
            (self.balloon.is_some(), "the balloon"),
        ]
        .into_iter()
        .find_map(|(is_described, subject)| is_described.then_some(subject))
    }

    /// What it consists of is what `spec` says; the rest belongs to this process.
    fn become_restored(&mut self, spec: &VmSpec, track: bool) {
        let restored = Self::from(spec);
        *self = Self {
            machine: MachineConfiguration {
                track_dirty_pages: track,
                ..restored.machine
            },
            logger: self.logger.take(),
            metrics: self.metrics.take(),
            ..restored
        };
    }

    fn root(&self) -> Option<&Drive> {
        self.drives.iter().find(|drive| drive.is_root_device)
    }

    /// The VM as far as it is configured: if there is no boot source yet, its kernel has an empty path.
    ///
    /// # Errors
    /// The kernel command line has no room for the root device.
    pub fn draft(&self) -> Result<VmSpec, Rejection> {
        let boot = match &self.boot_source {
            Some(source) => source.spec(self.root())?,
            None => BootSpec {
                kernel: Default::default(),
                initrd: None,
                protocol: BootProtocol::Auto,
                cmdline: String::new(),
            },
        };
        Ok(VmSpec {
            name: None,
            cpus: self.machine.vcpu_count,
            memory: self.machine.memory(),
            boot,
            disks: self.drives.iter().map(Drive::spec).collect(),
            nets: self.network_interfaces.iter().map(NetworkInterface::spec).collect(),
            rng: self.entropy.map(RngSpec::from),
            vsock: self.vsock.as_ref().map(VsockDevice::spec),
            mmds: self.mmds.as_ref().map(MmdsSpec::from),
            balloon: self.balloon.as_ref().map(BalloonDevice::spec),
            serial: self.serial.clone(),
        })
    }
}

impl TryFrom<&Configuration> for VmSpec {
    type Error = Rejection;

    fn try_from(configuration: &Configuration) -> Result<Self, Rejection> {
        if configuration.boot_source.is_none() {
            return Err(Rejection::NoBootSource);
        }
        let spec = configuration.draft()?;
        spec.check()?;
        Ok(spec)
    }
}

impl From<&VmSpec> for Configuration {
    fn from(spec: &VmSpec) -> Self {
        Self {
            machine: spec.into(),
            boot_source: Some(spec.into()),
            drives: (0..)
                .zip(&spec.disks)
                .map(|(index, disk)| Drive::of(disk, index))
                .collect(),
            network_interfaces: (0..)
                .zip(&spec.nets)
                .map(|(index, net)| NetworkInterface::of(net, index))
                .collect(),
            entropy: spec.rng.map(EntropyDevice::from),
            vsock: spec.vsock.as_ref().map(VsockDevice::from),
            mmds: MmdsConfig::of(spec),
            balloon: spec.balloon.as_ref().map(BalloonDevice::from),
            serial: spec.serial.clone(),
            logger: None,
            metrics: None,
        }
    }
}

/// Whether a device can be called that.
///
/// # Errors
/// It cannot.
pub fn check_id(device: &'static str, id: &str) -> Result<(), Rejection> {
    let is_allowed = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
    if (1..=ID_MAX).contains(&id.len()) && id.bytes().all(is_allowed) {
        return Ok(());
    }
    Err(SpecError::Id {
        device,
        id: id.to_owned(),
    }
    .into())
}

#[cfg(test)]
mod tests;
