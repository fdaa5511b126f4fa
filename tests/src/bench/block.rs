//! Throughput of a disk: fio in the guest on a raw image that lies on the host's tmpfs.
//!
//! tmpfs is as fast as memory, so what is compared are the monitors' paths from the ring to the file, not a disk.

use std::rc::Rc;

use anyhow::{Context, Result};

use super::{Contestant, Values, peers, tools};
use crate::{Disk, Guest, Vm};

/// Size of the image. The guest bypasses its own cache, so it need not exceed the guest's memory.
const IMAGE_SIZE: usize = 128 << 20;
const SERIAL: &str = "target";
/// Requests in flight of each job.
const DEPTH: u32 = 16;

/// fio's name of a job, its pattern and block size, and what is of interest.
const JOBS: [(&str, &str, &str, Unit); 4] = [
    ("random_read_4k_iops", "randread", "4k", Unit::Requests),
    ("random_write_4k_iops", "randwrite", "4k", Unit::Requests),
    ("sequential_read_1m_mib_s", "read", "1m", Unit::Mebibytes),
    ("sequential_write_1m_mib_s", "write", "1m", Unit::Mebibytes),
];

/// Of what to report how many pass per second.
#[derive(Clone, Copy)]
enum Unit {
    Requests,
    Mebibytes,
}

/// Cutover and QEMU, both with io_uring.
pub fn contestants() -> Vec<Contestant<'static>> {
    let root = Rc::new(Disk::debian_root());
    vec![
        contestant("Cutover", root.clone(), boot_cutover),
        contestant("QEMU", root, boot_qemu),
    ]
}

/// Boots for each measurement, so that no more than one guest is alive: others, even idle, would take
/// instructions.
fn contestant(name: &'static str, root: Rc<Disk>, boot: fn(&Disk, &Disk) -> Vm) -> Contestant<'static> {
    let measure = move || {
        // Written through, so that no run pays for the allocation of the image's pages.
        let target = Disk::holding(&vec![0x5a; IMAGE_SIZE]);
        let vm = boot(&root, &target);
        tools::mount(&vm);
        run_fio(&vm, &tools::disk_device(&vm, SERIAL))
    };
    Contestant {
        name,
        measure: Box::new(measure),
    }
}

fn boot_cutover(root: &Disk, target: &Disk) -> Vm {
    Guest::micro()
        .memory(&format!("{}M", tools::MEMORY_MIB))
        .disk_with(root, &tools::disk_options())
        .disk_with(target, &format!("serial={SERIAL},io=io-uring"))
        .boot()
}

fn boot_qemu(root: &Disk, target: &Disk) -> Vm {
    let mut command = tools::qemu(root);
    peers::add_qemu_disk(&mut command, SERIAL, target.path(), "aio=io_uring");
    peers::boot(command)
}

/// One fio process that does the jobs one after the other, directly on `device`.
fn run_fio(vm: &Vm, device: &str) -> Result<Values> {
    let mut command = format!(
        "fio --output-format=json --thread --filename={device} --direct=1 --ioengine=libaio --iodepth={DEPTH} \
         --time_based --runtime=500ms --ramp_time=100ms"
    );
    for (name, pattern, block_size, _) in JOBS {
        command.push_str(&format!(" --name={name} --stonewall --rw={pattern} --bs={block_size}"));
    }
    let report = tools::run_json(vm, &command)?;
    let jobs = JOBS.iter().enumerate();
    jobs.map(|(index, (name, pattern, _, unit))| {
        let direction = if pattern.ends_with("write") { "write" } else { "read" };
        let figures = &report["jobs"][index][direction];
        let value = match unit {
            Unit::Requests => figures["iops"].as_f64(),
            Unit::Mebibytes => figures["bw_bytes"].as_f64().map(|bytes| bytes / f64::from(1 << 20)),
        };
        Ok((
            *name,
            value.with_context(|| format!("fio reported nothing about {name}: {report}"))?,
        ))
    })
    .collect()
}
