//! What there is to measure: the benches, their metrics, and the bars these must clear.

/// One bench, that is one run of the bench binary.
pub struct Bench {
    /// Its name on the command line, here and of the bench binary.
    pub name: &'static str,
    /// What it compares, in a few words.
    pub title: &'static str,
    /// Whether it has so many interrupts that a nested host needs `exit_after_injection` to get through.
    pub many_interrupts: bool,
    /// Parts of it that run in a host of their own each, so that one that hangs costs no other; none if it is one.
    pub parts: &'static [&'static str],
    /// What it measures, in the order of the report.
    pub metrics: &'static [Metric],
}

/// One quantity that is measured of every contestant.
pub struct Metric {
    /// Its name in the samples.
    pub id: &'static str,
    /// Its name in reports.
    pub title: &'static str,
    /// Unit of its values.
    pub unit: &'static str,
    /// Which values are better.
    pub goal: Goal,
    /// What Cutover must achieve.
    pub bar: Option<Bar>,
}

/// Which values are better.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Goal {
    /// Small ones.
    Less,
    /// Large ones.
    More,
    /// None: the metric explains others.
    Neither,
}

/// What Cutover must achieve in a metric.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Bar {
    /// A median of at most this.
    Median {
        /// In the metric's unit.
        most: f64,
    },
    /// A ratio of Cutover's median to that of a contestant of at most this.
    Ratio {
        /// The other contestant.
        to: &'static str,
        /// Cutover's share.
        most: f64,
    },
}

/// All benches. The names of contestants and metrics are those that the bench binary writes.
pub const BENCHES: [Bench; 8] = [
    Bench {
        name: "boot",
        title: "exec to the guest's user space; ELF kernel, 1 vCPU, 128 MiB",
        many_interrupts: true,
        parts: &[],
        metrics: &[
            Metric {
                id: "user_space_ms",
                title: "time to user space",
                unit: "ms",
                goal: Goal::Less,
                bar: Some(Bar::Ratio {
                    to: "Firecracker",
                    most: 1.0,
                }),
            },
            at_most("overhead_mib", "resident beyond the guest's memory", "MiB", 4.5),
            Metric {
                id: "guest_resident_mib",
                title: "resident of the guest's memory",
                unit: "MiB",
                goal: Goal::Neither,
                bar: None,
            },
        ],
    },
    Bench {
        name: "api",
        title: "the API on a Unix socket; 1 vCPU, 128 MiB, an idle guest",
        many_interrupts: false,
        parts: &[],
        metrics: &[
            at_most("api_up_ms", "exec to the socket taking connections", "ms", 3.0),
            Metric {
                id: "first_answer_ms",
                title: "exec to the first answer",
                unit: "ms",
                goal: Goal::Less,
                bar: None,
            },
            at_most("pause_ms", "pause", "ms", 0.4),
            at_most("resume_ms", "resume", "ms", 0.4),
            at_most("overhead_mib", "resident beyond the guest's memory", "MiB", 4.5),
        ],
    },
    Bench {
        name: "block",
        title: "fio in the guest, direct, 16 in flight, on a raw image in the host's memory",
        many_interrupts: true,
        parts: &[],
        metrics: &[
            throughput("random_read_4k_iops", "random read, 4 KiB", "IOPS"),
            throughput("random_write_4k_iops", "random write, 4 KiB", "IOPS"),
            throughput("sequential_read_1m_mib_s", "sequential read, 1 MiB", "MiB/s"),
            throughput("sequential_write_1m_mib_s", "sequential write, 1 MiB", "MiB/s"),
        ],
    },
    Bench {
        name: "net",
        title: "iperf3 between the guest and its host, TCP over a tap",
        many_interrupts: false,
        parts: &[],
        metrics: &[
            throughput("guest_to_host_mib_s", "guest to host", "MiB/s"),
            throughput("host_to_guest_mib_s", "host to guest", "MiB/s"),
        ],
    },
    Bench {
        name: "snapshot",
        title: "snapshots of a guest with its memory in use; 1 vCPU",
        many_interrupts: true,
        parts: &[],
        metrics: &[
            at_most("full_pause_128_ms", "pause, full, 128 MiB", "ms", SNAPSHOT_PAUSE_MS),
            at_most("full_pause_512_ms", "pause, full, 512 MiB", "ms", SNAPSHOT_PAUSE_MS),
            at_most("full_pause_2048_ms", "pause, full, 2 GiB", "ms", SNAPSHOT_PAUSE_MS),
            at_most(
                "diff_0_pause_128_ms",
                "pause, 128 MiB, nothing written",
                "ms",
                SNAPSHOT_PAUSE_MS,
            ),
            at_most(
                "diff_16_pause_128_ms",
                "pause, 128 MiB, 16 MiB written",
                "ms",
                SNAPSHOT_PAUSE_MS,
            ),
            at_most(
                "diff_0_pause_512_ms",
                "pause, 512 MiB, nothing written",
                "ms",
                SNAPSHOT_PAUSE_MS,
            ),
            at_most(
                "diff_16_pause_512_ms",
                "pause, 512 MiB, 16 MiB written",
                "ms",
                SNAPSHOT_PAUSE_MS,
            ),
            at_most(
                "diff_64_pause_512_ms",
                "pause, 512 MiB, 64 MiB written",
                "ms",
                SNAPSHOT_PAUSE_MS,
            ),
            at_most(
                "diff_0_pause_2048_ms",
                "pause, 2 GiB, nothing written",
                "ms",
                SNAPSHOT_PAUSE_MS,
            ),
            at_most(
                "diff_16_pause_2048_ms",
                "pause, 2 GiB, 16 MiB written",
                "ms",
                SNAPSHOT_PAUSE_MS,
            ),
            at_most(
                "diff_64_pause_2048_ms",
                "pause, 2 GiB, 64 MiB written",
                "ms",
                SNAPSHOT_PAUSE_MS,
            ),
            at_most(
                "diff_0_pause_4096_ms",
                "pause, idle 4 GiB, nothing written",
                "ms",
                HARVEST_MS,
            ),
            less(
                "full_slowdown_512_percent",
                "a working guest is slower while a full one of 512 MiB is made",
                "%",
            ),
            explains("full_total_128_ms", "until a full one of 128 MiB is permanent", "ms"),
            explains("full_total_512_ms", "until a full one of 512 MiB is permanent", "ms"),
            explains("full_total_2048_ms", "until a full one of 2 GiB is permanent", "ms"),
            explains("full_bytes_128_mib", "size of a full one of 128 MiB", "MiB"),
            explains("full_bytes_512_mib", "size of a full one of 512 MiB", "MiB"),
            explains("full_bytes_2048_mib", "size of a full one of 2 GiB", "MiB"),
        ],
    },
    Bench {
        name: "restore",
        title: "exec to a restored guest's first sign of life, every 10 ms; 1 vCPU, its memory in use",
        many_interrupts: false,
        parts: &[],
        metrics: &[
            at_most("restore_128_ms", "128 MiB", "ms", RESTORE_MS),
            at_most("restore_512_ms", "512 MiB", "ms", RESTORE_MS),
            at_most("restore_2048_ms", "2 GiB", "ms", RESTORE_MS),
            at_most(
                "restore_chain_ms",
                "128 MiB, the last of a chain of ten",
                "ms",
                RESTORE_MS,
            ),
            less("restore_first_ms", "128 MiB, the first restore of all", "ms"),
        ],
    },
    Bench {
        name: "migration",
        title: "live migration over the loopback interface; 1 vCPU, 256 MiB, 64 of them the guest's program's",
        many_interrupts: true,
        parts: &["idle", "busy", "narrow", "flat", "post", "local"],
        metrics: &[
            at_most("idle_total_ms", "idle: in all", "ms", 180.0),
            at_most("idle_downtime_ms", "idle: downtime", "ms", 5.0),
            at_most("idle_gap_ms", "idle: nothing heard of the guest", "ms", 15.0),
            less("idle_sent_mib", "idle: sent", "MiB"),
            at_most("busy_total_ms", "20000 pages/s: in all", "ms", 250.0),
            at_most("busy_downtime_ms", "20000 pages/s: downtime", "ms", 10.0),
            at_most("busy_gap_ms", "20000 pages/s: nothing heard of the guest", "ms", 20.0),
            less("busy_sent_mib", "20000 pages/s: sent", "MiB"),
            at_most("narrow_total_ms", "the same at 64 MiB/s: in all", "ms", 1800.0),
            at_most("narrow_downtime_ms", "the same at 64 MiB/s: downtime", "ms", 15.0),
            at_most(
                "narrow_gap_ms",
                "the same at 64 MiB/s: nothing heard of the guest",
                "ms",
                25.0,
            ),
            at_most("narrow_sent_mib", "the same at 64 MiB/s: sent", "MiB", 140.0),
            at_most("flat_total_ms", "flat out at 8 MiB/s: in all", "ms", 15000.0),
            less("flat_downtime_ms", "flat out at 8 MiB/s: downtime", "ms"),
            at_most(
                "flat_gap_ms",
                "flat out at 8 MiB/s: nothing heard of the guest",
                "ms",
                200.0,
            ),
            less("flat_sent_mib", "flat out at 8 MiB/s: sent", "MiB"),
            less("post_total_ms", "post-copy, idle: in all", "ms"),
            less("post_downtime_ms", "post-copy, idle: downtime", "ms"),
            at_most("post_gap_ms", "post-copy, idle: nothing heard of the guest", "ms", 20.0),
            less("post_sent_mib", "post-copy, idle: sent", "MiB"),
            less("local_total_ms", "local upgrade: in all", "ms"),
            less("local_downtime_ms", "local upgrade: downtime", "ms"),
            at_most("local_gap_ms", "local upgrade: nothing heard of the guest", "ms", 10.0),
            less("local_sent_mib", "local upgrade: sent", "MiB"),
        ],
    },
    Bench {
        name: "protect",
        title: "four guests that compute together, cut every 100 ms; 1 vCPU, 512 MiB each, standbys on the same processor",
        many_interrupts: true,
        parts: &[],
        metrics: &[
            ratio_to_unprotected("ep_ms", "EP-compatible, class S", 1.1),
            ratio_to_unprotected("is_ms", "IS-compatible, class S, 5 times", 1.3),
            less("answer_ms", "an answer from a member, as seen from outside", "ms"),
            at_most(
                "pause_ms",
                "longest of the last pauses of all members",
                "ms",
                PROTECTION_PAUSE_MS,
            ),
            explains("detect_ms", "a member is killed: until it is known to be lost", "ms"),
            explains("decide_ms", "until that is journalled", "ms"),
            explains("restore_ms", "until all stand at the last permanent cut", "ms"),
            explains("resume_ms", "until all are told to run", "ms"),
        ],
    },
];

/// Longest pause of a cut, with as many as 2000 pages written.
const PROTECTION_PAUSE_MS: f64 = 5.0;
/// Longest pause of a snapshot, whatever the size of the guest's memory.
const SNAPSHOT_PAUSE_MS: f64 = 5.0;
/// Longest pause of a snapshot of a large guest that has written nothing.
const HARVEST_MS: f64 = 1.0;
/// Longest time until a restored guest gives a sign of life, whatever the size of its memory.
const RESTORE_MS: f64 = 25.0;

const fn at_most(id: &'static str, title: &'static str, unit: &'static str, most: f64) -> Metric {
    Metric {
        id,
        title,
        unit,
        goal: Goal::Less,
        bar: Some(Bar::Median { most }),
    }
}

/// What a job takes, which may be so many times as much as without protection.
const fn ratio_to_unprotected(id: &'static str, title: &'static str, most: f64) -> Metric {
    Metric {
        id,
        title,
        unit: "ms",
        goal: Goal::Less,
        bar: Some(Bar::Ratio {
            to: "unprotected",
            most,
        }),
    }
}

const fn less(id: &'static str, title: &'static str, unit: &'static str) -> Metric {
    Metric {
        id,
        title,
        unit,
        goal: Goal::Less,
        bar: None,
    }
}

const fn explains(id: &'static str, title: &'static str, unit: &'static str) -> Metric {
    Metric {
        id,
        title,
        unit,
        goal: Goal::Neither,
        bar: None,
    }
}

const fn throughput(id: &'static str, title: &'static str, unit: &'static str) -> Metric {
    Metric {
        id,
        title,
        unit,
        goal: Goal::More,
        bar: None,
    }
}
