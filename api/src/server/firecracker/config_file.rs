//! The form of Firecracker's configuration files, and of `GET /vm/config`: all resources in one object.

use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::ToSchema;

use super::balloon::BalloonDevice;
use super::boot_source::BootSource;
use super::drives::Drive;
use super::entropy::EntropyDevice;
use super::logger::LoggerConfiguration;
use super::machine_config::MachineConfiguration;
use super::metrics::MetricsConfiguration;
use super::mmds::MmdsConfig;
use super::network_interfaces::NetworkInterface;
use super::rejection::Rejection;
use super::setup::{Change, Configuration};
use super::vsock::VsockDevice;

/// All resources.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct FullConfiguration {
    /// Kernel, initial RAM disk and command line.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub boot_source: Option<BootSource>,
    /// Disks.
    #[serde(default)]
    pub drives: Vec<Drive>,
    /// vCPUs and memory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub machine_config: Option<MachineConfiguration>,
    /// Network interfaces.
    #[serde(default)]
    pub network_interfaces: Vec<NetworkInterface>,
    /// The entropy device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub entropy: Option<EntropyDevice>,
    /// The socket device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vsock: Option<VsockDevice>,
    /// The metadata service.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mmds_config: Option<MmdsConfig>,
    /// The balloon.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub balloon: Option<BalloonDevice>,
    /// The log.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub logger: Option<LoggerConfiguration>,
    /// The metrics file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metrics: Option<MetricsConfiguration>,
    /// Not supported, as what follows; read so that it can be refused by name.
    #[serde(default, skip_serializing)]
    #[schema(ignore)]
    pub cpu_config: Option<Value>,
    /// Not supported.
    #[serde(default, skip_serializing)]
    #[schema(ignore)]
    pub memory_hotplug: Option<Value>,
    /// Not supported.
    #[serde(default, skip_serializing)]
    #[schema(ignore)]
    pub pmem: Vec<Value>,
}

impl TryFrom<FullConfiguration> for Vec<Change> {
    type Error = Rejection;

    fn try_from(file: FullConfiguration) -> Result<Self, Rejection> {
        for (is_given, subject) in [
            (file.cpu_config.is_some(), "cpu-config"),
            (file.memory_hotplug.is_some(), "memory-hotplug"),
            (!file.pmem.is_empty(), "pmem"),
        ] {
            if is_given {
                return Err(Rejection::Unsupported(subject));
            }
        }
        // The log first, so that it has the rest.
        let mut changes: Self = file.logger.map(Change::Logger).into_iter().collect();
        changes.extend(file.metrics.map(Change::Metrics));
        changes.extend(file.machine_config.map(Change::Machine));
        changes.extend(file.boot_source.map(Change::BootSource));
        changes.extend(file.drives.into_iter().map(Change::Drive));
        changes.extend(file.network_interfaces.into_iter().map(Change::NetworkInterface));
        changes.extend(file.entropy.map(Change::Entropy));
        changes.extend(file.vsock.map(Change::Vsock));
        changes.extend(file.mmds_config.map(Change::Mmds));
        changes.extend(file.balloon.map(Change::Balloon));
        Ok(changes)
    }
}

impl From<Configuration> for FullConfiguration {
    fn from(configuration: Configuration) -> Self {
        Self {
            boot_source: configuration.boot_source,
            drives: configuration.drives,
            machine_config: Some(configuration.machine),
            network_interfaces: configuration.network_interfaces,
            entropy: configuration.entropy,
            vsock: configuration.vsock,
            mmds_config: configuration.mmds,
            balloon: configuration.balloon,
            logger: configuration.logger,
            metrics: configuration.metrics,
            ..Self::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::server::firecracker::setup::Setup;

    /// With everything that Firecracker's own examples have.
    const FILE: &str = r#"{
        "boot-source": { "kernel_image_path": "vmlinux", "boot_args": "console=ttyS0 reboot=k panic=1", "initrd_path": null },
        "drives": [{
            "drive_id": "rootfs", "partuuid": null, "is_root_device": true, "cache_type": "Unsafe", "is_read_only": false,
            "path_on_host": "root.ext4", "io_engine": "Sync", "rate_limiter": null, "socket": null
        }],
        "machine-config": { "vcpu_count": 2, "mem_size_mib": 1024, "smt": false, "track_dirty_pages": false, "huge_pages": "None" },
        "cpu-config": null,
        "balloon": { "amount_mib": 64, "deflate_on_oom": true, "stats_polling_interval_s": 1 },
        "network-interfaces": [{
            "iface_id": "eth0", "guest_mac": "06:00:c0:a8:00:02", "host_dev_name": "tap0",
            "rx_rate_limiter": null, "tx_rate_limiter": null
        }],
        "vsock": { "guest_cid": 3, "uds_path": "v.sock" }, "logger": null, "metrics": null, "mmds-config": { "version": "V2", "network_interfaces": ["eth0"] },
        "entropy": null, "pmem": [],
        "memory-hotplug": null
    }"#;

    fn setup(file: FullConfiguration) -> Setup {
        let mut setup = Setup::default();
        for change in Vec::<Change>::try_from(file).expect("all is supported") {
            setup.configure(change).expect("all is right");
        }
        setup
    }

    #[test]
    fn a_file_as_firecracker_has_them_is_a_vm() {
        let mut setup = setup(serde_json::from_str(FILE).expect("valid"));
        let spec = setup.start().expect("a VM");
        assert_eq!((spec.cpus, spec.disks.len(), spec.nets.len()), (2, 1, 1));
        assert_eq!(spec.boot.cmdline, "console=ttyS0 reboot=k panic=1 root=/dev/vda rw");
    }

    #[test]
    fn what_is_configured_can_be_written_and_read_again() {
        let configuration = setup(serde_json::from_str(FILE).expect("valid"))
            .configuration()
            .clone();
        let json = serde_json::to_string(&FullConfiguration::from(configuration.clone())).expect("JSON");
        let again = setup(serde_json::from_str(&json).expect("its own form"));
        assert_eq!(again.configuration(), &configuration);
    }

    #[test]
    fn what_is_not_supported_is_refused_by_name() {
        for (field, name) in [
            (r#""cpu-config":"template.json""#, "cpu-config"),
            (r#""memory-hotplug":{}"#, "memory-hotplug"),
            (r#""pmem":[{}]"#, "pmem"),
        ] {
            let file: FullConfiguration = serde_json::from_str(&format!("{{{field}}}")).expect(field);
            assert_eq!(Vec::<Change>::try_from(file), Err(Rejection::Unsupported(name)));
        }
        assert!(serde_json::from_str::<FullConfiguration>(r#"{"drive":[]}"#).is_err());
    }
}
