//! The command line of QEMU that is a nested host.

use std::ffi::OsString;
use std::path::Path;
use std::time::{Duration, Instant};

use super::Options;
use super::image::Image;

/// The key that QEMU listens to on an interactive console: Ctrl-]. Ctrl-A stays free for the monitor under test.
const ESCAPE_KEY: &str = "29";

/// An AMD processor with nested paging, less what the emulator lacks and would warn about.
const PROCESSOR: &str = "EPYC,+svm,+npt,-rdseed,-sha-ni,-fxsr-opt,-misalignsse,-3dnowprefetch,-osvw,-topoext,\
                         -nrip-save,-xsavec";

/// One nested host of a run.
pub struct Host<'a> {
    /// Its number, from 1.
    pub number: u8,
    /// The folder shared writable.
    pub share: &'a Path,
    /// The folder below it with the command, and where the exit code appears.
    pub run: &'a Path,
    /// Its end and the switch's end of its network link, if there are several hosts.
    pub link: Option<(&'a Path, &'a Path)>,
    /// Whether a person sits at the console.
    pub interactive: bool,
    /// Whether it starts again when it was reset, instead of ending.
    pub restarts: bool,
}

/// QEMU's arguments for `host`.
pub fn arguments(image: &Image, options: &Options, host: &Host) -> Vec<OsString> {
    let mut arguments = Vec::new();
    let mut add = |words: &[&str]| arguments.extend(words.iter().map(OsString::from));
    add(&[
        "-M",
        "q35",
        "-cpu",
        PROCESSOR,
        "-nodefaults",
        "-no-user-config",
        "-display",
        "none",
    ]);
    if !host.restarts {
        add(&["-no-reboot"]);
    }
    if options.icount {
        add(&[
            "-accel",
            "tcg,thread=single",
            "-icount",
            "shift=0,sleep=off",
            "-smp",
            "1",
        ]);
    } else {
        add(&[
            "-accel",
            "tcg,thread=multi,tb-size=512",
            "-smp",
            &options.cpus.to_string(),
        ]);
    }
    add(&["-m", &options.memory_mib.to_string()]);
    if host.interactive {
        add(&["-chardev", "stdio,id=console,mux=on,signal=off", "-echr", ESCAPE_KEY]);
        add(&["-serial", "chardev:console", "-mon", "chardev=console"]);
    } else {
        add(&["-chardev", "stdio,id=console,signal=on", "-serial", "chardev:console"]);
    }
    add(&[
        "-virtfs",
        "local,path=/,mount_tag=machine,security_model=none,multidevs=remap,readonly=on",
    ]);
    let share = host.share.display();
    add(&[
        "-virtfs",
        &format!("local,path={share},mount_tag=share,security_model=none,multidevs=remap"),
    ]);
    if let Some((own, other)) = host.link {
        let (own, other) = (own.display(), other.display());
        let mac = format!("52:54:00:77:00:{:02x}", host.number);
        add(&["-netdev"]);
        add(&[&format!(
            "dgram,id=link,local.type=unix,local.path={own},remote.type=unix,remote.path={other}"
        )]);
        add(&["-device", &format!("virtio-net-pci,netdev=link,mac={mac},romfile=")]);
    }
    add(&[
        "-kernel",
        &image.kernel.display().to_string(),
        "-initrd",
        &image.initrd.display().to_string(),
    ]);
    add(&["-append", &kernel_command_line(image, options, host)]);
    arguments
}

/// What the kernel is to know of the emulator's TSC: that it is steady, and its frequency.
///
/// On a loaded machine the kernel's comparison with other clocks would find it wanting and give it up; guests' clocks
/// would then stand still and jump whenever a vCPU moves. And it would measure a frequency that is off by as much as a
/// factor of ten.
fn tsc_parameters(options: &Options) -> String {
    /// One instruction counted is one nanosecond.
    const ICOUNT_KHZ: u64 = 1_000_000;
    let khz = if options.icount { ICOUNT_KHZ } else { tsc_khz() };
    format!("tsc=reliable tsc_early_khz={khz}")
}

/// The frequency of this machine's TSC, which is the emulator's.
fn tsc_khz() -> u64 {
    let ticks = || {
        // SAFETY: every x86-64 processor has the instruction, and Linux lets programs use it.
        unsafe { core::arch::x86_64::_rdtsc() }
    };
    /// Long enough for a reading that is late by a few microseconds not to matter.
    const SPAN: Duration = Duration::from_millis(50);
    let (start, first) = (Instant::now(), ticks());
    let (elapsed, last) = loop {
        let (elapsed, last) = (start.elapsed(), ticks());
        if elapsed >= SPAN {
            break (elapsed, last);
        }
    };
    let khz = u128::from(last.wrapping_sub(first)) * 1_000_000 / elapsed.as_nanos();
    u64::try_from(khz).expect("a TSC runs at some GHz")
}

/// What keeps a host alive whose emulator loses an interrupt.
///
/// QEMU notes interrupts for a processor in a word that entering and leaving a guest also write, without the lock that
/// protects it (`interrupt_request` in `svm_helper.c`): now and then one is lost. If it is that of a one-shot timer,
/// nothing is ever due again. A timer that ticks by itself makes up for it within one period.
fn timer_parameters(options: &Options) -> &'static str {
    if options.icount {
        // There, processor and devices share a thread, and nothing is lost.
        ""
    } else {
        "nohz=off highres=off"
    }
}

fn kernel_command_line(image: &Image, options: &Options, host: &Host) -> String {
    let mut line = format!(
        "console=ttyS0 loglevel=3 panic=-1 {} {} host.share={} host.run={} host.number={} host.release={}",
        tsc_parameters(options),
        timer_parameters(options),
        host.share.display(),
        host.run.display(),
        host.number,
        image.modules.display()
    );
    if options.exit_after_injection {
        line.push_str(" host.exit_after_injection");
    }
    if host.interactive {
        line.push_str(" host.interactive");
    }
    line
}
