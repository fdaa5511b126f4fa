//! What speaks against a VM, found before anything of it is built.

use cutover_migration::vm::Descriptors;
use cutover_snapshot::manifest::{CpuNeeds, MemoryRegion};
use cutover_snapshot::spec::{DiskSpec, SerialSpec};

use super::*;
use crate::testing::{has_kvm, kernel, tiny_spec};

/// Why a host that is asked for `spec` with a CPU as `cpu` says refuses it, whose memory `may_follow`.
fn reasons(spec: VmSpec, cpu: CpuNeeds, may_follow: bool) -> Vec<String> {
    let ranges = memory::ram_ranges(spec.memory.size.bytes());
    let regions = ranges.iter().map(|range| MemoryRegion {
        start: range.start,
        bytes: range.size,
    });
    let reservation = Reservation {
        generation: 1,
        monitor: "made up".to_owned(),
        memory: regions.collect(),
        cpu,
        images: vec![memory_shape(spec.memory.size.bytes() / PAGE_SIZE)],
        spec,
    };
    let request = ReceiveRequest {
        listen: "unix:nowhere".parse().unwrap(),
        tls: None,
        name: None,
        nets: Default::default(),
        disks: Default::default(),
        disks_dir: None,
        vsock: None,
        serial: SerialSpec::Null,
    };
    let mut host = Host {
        request: &request,
        options: &Options::default(),
        admit: &mut |_| panic!("it is asked for what speaks against itself"),
    };
    let refused = host.reserve(&reservation, Descriptors::new(), may_follow);
    refused.err().expect("something speaks against it")
}

#[test]
fn everything_that_a_host_lacks_is_said_at_once() {
    if !has_kvm() {
        return;
    }
    let kernel = kernel(&[]);
    let mut spec = tiny_spec(kernel.path());
    spec.memory.hugepages = true;
    let disk: DiskSpec = serde_json::from_value(serde_json::json!({ "path": "/nowhere/disk" })).unwrap();
    spec.disks = vec![disk];
    let cpu = CpuNeeds {
        vendor: "NoSuchVendor".to_owned(),
        features: Vec::new(),
    };
    let reasons = reasons(spec, cpu, true);
    for lacking in [
        "NoSuchVendor",
        "/nowhere/disk",
        "(post-copy): guest memory is in huge pages",
    ] {
        let found = reasons.iter().filter(|reason| reason.contains(lacking)).count();
        assert_eq!(found, 1, "{lacking}: {reasons:?}");
    }
}
