//! Numbers to show.

use cutover_devices::stats::{BalloonCounts, DiskStats, MmdsStats, NetStats, RngStats, SerialStats, VsockStats};
use cutover_vmm::stats::{MemoryStats, VcpuExits, VcpuStats};
use cutover_vmm::{DeviceStats, State, VmStats};

/// What is counted of a VM with two vCPUs, two disks, an interface, an entropy and a vsock device, the metadata service,
/// and a balloon, every number `count`.
pub fn stats(count: u64) -> VmStats {
    let vcpu = |cpu| VcpuStats {
        cpu,
        cpu_time_ns: count * 500_000_000,
        exits: VcpuExits {
            io_in: count,
            io_out: count,
            mmio_read: count,
            mmio_write: count,
            interrupted: count,
            failed: count,
        },
    };
    let disk = |id: &str| DiskStats {
        id: id.to_owned(),
        reads: count,
        writes: count,
        flushes: count,
        discards: count,
        read_bytes: count,
        written_bytes: count,
        failed: count,
        throttled: count,
    };
    VmStats {
        state: State::Running,
        boots: 1,
        uptime_ns: 1_500_000_000,
        vcpus: vec![vcpu(0), vcpu(1)],
        memory: MemoryStats {
            size_bytes: 256 << 20,
            resident_bytes: 64 << 20,
        },
        devices: DeviceStats {
            disks: vec![disk("root"), disk("data")],
            nets: vec![NetStats {
                id: "eth0".to_owned(),
                rx_frames: count,
                rx_bytes: count,
                rx_throttled: count,
                tx_frames: count,
                tx_bytes: count,
                tx_dropped: count,
                tx_throttled: count,
            }],
            rng: Some(RngStats {
                requests: count,
                bytes: count,
                throttled: count,
            }),
            vsock: Some(VsockStats {
                rx_packets: count,
                rx_bytes: count,
                tx_packets: count,
                tx_bytes: count,
                opened: count,
                closed: count,
                refused: count,
            }),
            mmds: Some(MmdsStats {
                rx_frames: count,
                rx_dropped: count,
                tx_frames: count,
                opened: count,
                closed: count,
                requests: count,
                no_token: count,
                invalid_token: count,
            }),
            balloon: Some(BalloonCounts {
                inflated: count,
                deflated: count,
                statistics: count,
                reported: count,
                reported_bytes: count,
                reclaimed_bytes: count,
            }),
            serial: SerialStats {
                output_bytes: count,
                input_bytes: count,
            },
        },
        protection: None,
    }
}

/// `stats` of the VM's build number `boots`.
pub fn boots(boots: u64, stats: VmStats) -> VmStats {
    VmStats { boots, ..stats }
}
