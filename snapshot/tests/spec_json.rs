//! The JSON form of a VM specification, as users write it: the examples of `resources/examples` are read here.

use cutover_snapshot::size::ByteSize;
use cutover_snapshot::spec::{
    BalloonSpec, BootProtocol, BootSpec, DEFAULT_CMDLINE, DiskIo, DiskSpec, MacAddr, MemorySpec, MmdsSpec, MmdsVersion,
    NetSpec, RateLimiterSpec, RngSpec, SerialSpec, TapSpec, TokenBucketSpec, VmSpec, VsockSpec,
};

const MINIMAL: &str = include_str!("../../resources/examples/minimal.json");
const FULL: &str = include_str!("../../resources/examples/full.json");

fn read(json: &str) -> VmSpec {
    serde_json::from_str(json).expect("an example is valid")
}

#[test]
fn the_minimal_example_takes_every_default() {
    let expected = VmSpec {
        name: None,
        cpus: 1,
        memory: MemorySpec {
            size: ByteSize::from_mib(128),
            shared: false,
            hugepages: false,
        },
        boot: BootSpec {
            kernel: "/boot/vmlinuz".into(),
            initrd: None,
            protocol: BootProtocol::Auto,
            cmdline: DEFAULT_CMDLINE.to_owned(),
        },
        disks: Vec::new(),
        nets: Vec::new(),
        rng: None,
        vsock: None,
        mmds: None,
        balloon: None,
        serial: SerialSpec::Stdio,
    };
    assert_eq!(read(MINIMAL), expected);
}

#[test]
fn the_full_example_sets_every_field() {
    let net = |tap| NetSpec {
        tap,
        ..NetSpec::default()
    };
    let bucket = |size| TokenBucketSpec {
        size,
        one_time_burst: None,
        refill_time_ms: 100,
    };
    let bandwidth = |size| RateLimiterSpec {
        bandwidth: Some(bucket(size)),
        ops: None,
    };
    let expected = VmSpec {
        name: Some("web-1".to_owned()),
        cpus: 4,
        memory: MemorySpec {
            size: ByteSize::from_mib(2048),
            shared: true,
            hugepages: true,
        },
        boot: BootSpec {
            kernel: "/srv/vms/web-1/vmlinuz".into(),
            initrd: Some("/srv/vms/web-1/initrd.img".into()),
            protocol: BootProtocol::Linux,
            cmdline: "console=ttyS0 panic=-1 root=/dev/vda ro".to_owned(),
        },
        disks: vec![
            DiskSpec {
                id: Some("rootfs".to_owned()),
                path: "/srv/vms/web-1/root.ext4".into(),
                readonly: false,
                serial: Some("web-1-root".to_owned()),
                io: DiskIo::IoUring,
                rate_limiter: RateLimiterSpec {
                    bandwidth: Some(TokenBucketSpec {
                        one_time_burst: Some(100 << 20),
                        ..bucket(10 << 20)
                    }),
                    ops: Some(bucket(100)),
                },
            },
            DiskSpec {
                id: None,
                path: "/srv/vms/seed.img".into(),
                readonly: true,
                serial: None,
                io: DiskIo::Threads,
                rate_limiter: RateLimiterSpec::default(),
            },
        ],
        nets: vec![
            NetSpec {
                id: Some("uplink".to_owned()),
                tap: TapSpec::Name("web1".to_owned()),
                mac: Some(MacAddr([2, 0, 0, 0, 0, 1])),
                mtu: Some(1500),
                host_ip: Some("172.16.0.1/24".parse().expect("an address")),
                rx_rate_limiter: bandwidth(1 << 20),
                tx_rate_limiter: bandwidth(1 << 20),
            },
            net(TapSpec::Fd(5)),
            net(TapSpec::Create),
        ],
        rng: Some(RngSpec {
            rate_limiter: bandwidth(4096),
        }),
        vsock: Some(VsockSpec {
            cid: 3,
            uds: "/run/cutover/web-1.vsock".into(),
        }),
        mmds: Some(MmdsSpec {
            version: MmdsVersion::V1,
            nets: vec!["uplink".to_owned()],
            address: [169, 254, 169, 254].into(),
            imds_compat: true,
        }),
        balloon: Some(BalloonSpec {
            amount: ByteSize::from_mib(512),
            deflate_on_oom: true,
            stats_interval_s: 5,
            free_page_reporting: true,
        }),
        serial: SerialSpec::Socket("/run/cutover/web-1.console".into()),
    };
    assert_eq!(read(FULL), expected);
}

#[test]
fn every_example_describes_a_vm_and_survives_being_written_and_read_again() {
    for example in [MINIMAL, FULL] {
        let spec = read(example);
        spec.check().expect("an example describes a VM");
        let written = serde_json::to_string(&spec).expect("a spec can always be written");
        assert_eq!(read(&written), spec);
    }
}

#[test]
fn a_field_nobody_knows_is_refused_by_name_wherever_it_is() {
    for (field, misspelt) in [
        ("\"cpus\"", "\"cpu\""),
        ("\"size\"", "\"sise\""),
        ("\"kernel\"", "\"kernal\""),
    ] {
        let error = serde_json::from_str::<VmSpec>(&MINIMAL.replace(field, misspelt)).expect_err(misspelt);
        assert!(error.to_string().contains(misspelt.trim_matches('"')), "{error}");
    }
    for (field, misspelt) in [("\"readonly\"", "\"read_only\""), ("\"mtu\"", "\"MTU\"")] {
        let error = serde_json::from_str::<VmSpec>(&FULL.replace(field, misspelt)).expect_err(misspelt);
        assert!(error.to_string().contains(misspelt.trim_matches('"')), "{error}");
    }
}

#[test]
fn values_of_the_wrong_form_are_refused_with_the_value() {
    for (value, wrong) in [
        ("2G", "2X"),
        ("02:00:00:00:00:01", "01:00:00:00:00:01"),
        ("172.16.0.1/24", "172.16.0.1"),
    ] {
        let error = serde_json::from_str::<VmSpec>(&FULL.replace(value, wrong)).expect_err(wrong);
        assert!(error.to_string().contains(&format!("'{wrong}'")), "{error}");
    }
}
