//! Answers as a VM gives them.

use std::collections::BTreeMap;

use crate::server::v1::types::{
    CpuStatsV1, DiskStatsV1, InfoV1, MemoryStatsV1, NetStatsV1, SerialInfoV1, StateV1, StatsV1,
};

/// What a small VM says of itself.
pub fn info(id: &str) -> InfoV1 {
    InfoV1 {
        id: id.to_owned(),
        version: "1.2.3".to_owned(),
        pid: 42,
        state: StateV1::Running,
        cpus: 2,
        memory_bytes: 256 << 20,
        kernel: Some("vmlinux".to_owned()),
        initrd: None,
        cmdline: Some("console=ttyS0".to_owned()),
        disks: Vec::new(),
        nets: Vec::new(),
        rng: true,
        vsock: None,
        balloon: None,
        serial: SerialInfoV1::Null,
        last_event: 7,
    }
}

/// Counters of a VM that is up for so long, all of them `count` (two kinds of exits).
pub fn stats(uptime_ns: u64, count: u64) -> StatsV1 {
    StatsV1 {
        state: StateV1::Running,
        boots: 1,
        uptime_ns,
        cpus: vec![CpuStatsV1 {
            cpu: 0,
            time_ns: count,
            exits: BTreeMap::from([("io_in".to_owned(), count), ("mmio_read".to_owned(), count)]),
        }],
        memory: MemoryStatsV1 {
            size_bytes: 256 << 20,
            resident_bytes: 64 << 20,
        },
        disks: vec![DiskStatsV1 {
            id: "disk0".to_owned(),
            reads: count,
            writes: count,
            flushes: count,
            discards: count,
            read_bytes: count,
            written_bytes: count,
            failed: count,
            throttled: count,
        }],
        nets: vec![NetStatsV1 {
            id: "net0".to_owned(),
            rx_frames: count,
            rx_bytes: count,
            tx_frames: count,
            tx_bytes: count,
            tx_dropped: count,
            rx_throttled: count,
            tx_throttled: count,
        }],
    }
}
