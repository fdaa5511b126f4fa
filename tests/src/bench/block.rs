//! Throughput of a disk: fio in the guest on a raw image that lies on the host's tmpfs.
//!
//! tmpfs is as fast as memory, so what is compared are the monitors' paths from the ring to the file, not a disk.

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

/// Cutover and QEMU, each with io_uring and with threads.
pub fn contestants() -> Vec<Contestant<'static>> {
    let root = Disk::debian_root();
    vec![
        contestant("Cutover, io_uring", |target| boot_cutover(&root, target, "io-uring")),
        contestant("QEMU, io_uring", |target| boot_qemu(&root, target, "io_uring")),
        contestant("Cutover, threads", |target| boot_cutover(&root, target, "threads")),
        contestant("QEMU, threads", |target| boot_qemu(&root, target, "threads")),
    ]
}

/// A guest that stays booted between its turns. (Its monitor keeps the disks open, so their names may go.)
fn contestant(name: &'static str, boot: impl Fn(&Disk) -> Vm) -> Contestant<'static> {
    // Written through, so that no run pays for the allocation of the image's pages.
    let vm = boot(&Disk::holding(&vec![0x5a; IMAGE_SIZE]));
    tools::mount(&vm);
    let device = tools::disk_device(&vm, SERIAL);
    Contestant {
        name,
        measure: Box::new(move || run_fio(&vm, &device)),
    }
}

fn boot_cutover(root: &Disk, target: &Disk, io: &str) -> Vm {
    Guest::micro()
        .memory(&format!("{}M", tools::MEMORY_MIB))
        .disk_with(root, &tools::disk_options())
        .disk_with(target, &format!("serial={SERIAL},io={io}"))
        .boot()
}

fn boot_qemu(root: &Disk, target: &Disk, aio: &str) -> Vm {
    let mut command = tools::qemu(root);
    peers::add_qemu_disk(&mut command, SERIAL, target.path(), &format!("aio={aio}"));
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
