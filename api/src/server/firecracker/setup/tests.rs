//! What may be configured when, and which VM comes of it.

use cutover_snapshot::size::ByteSize;
use proptest::prelude::*;
use serde::de::DeserializeOwned;

use super::*;

fn read<T: DeserializeOwned>(json: &str) -> T {
    serde_json::from_str(json).expect(json)
}

fn drive(id: &str, is_root: bool) -> Drive {
    read(&format!(
        r#"{{"drive_id":"{id}","path_on_host":"{id}.img","is_root_device":{is_root}}}"#
    ))
}

fn interface(id: &str, mac: &str) -> NetworkInterface {
    read(&format!(
        r#"{{"iface_id":"{id}","host_dev_name":"tap_{id}","guest_mac":"{mac}"}}"#
    ))
}

fn boot_source() -> Change {
    Change::BootSource(read(r#"{"kernel_image_path":"vmlinux","boot_args":"quiet"}"#))
}

fn configured(changes: impl IntoIterator<Item = Change>) -> Setup {
    let mut setup = Setup::default();
    for change in changes {
        setup.configure(change).expect("nothing is wrong with it");
    }
    setup
}

fn vsock() -> VsockDevice {
    read(r#"{"guest_cid":3,"uds_path":"v.sock"}"#)
}

fn mmds() -> MmdsConfig {
    read(r#"{"network_interfaces":["eth0"]}"#)
}

fn balloon() -> BalloonDevice {
    read(r#"{"amount_mib":64,"deflate_on_oom":true}"#)
}

#[test]
fn a_kernel_is_enough_for_a_vm_of_firecrackers_default_size() {
    let spec = configured([boot_source()]).start().expect("a VM");
    assert_eq!((spec.cpus, spec.memory.size), (1, ByteSize::from_mib(128)));
    assert_eq!((spec.boot.cmdline.as_str(), spec.serial), ("quiet", SerialSpec::Stdio));
    assert!(spec.disks.is_empty() && spec.nets.is_empty() && spec.rng.is_none());
}

#[test]
fn without_a_kernel_nothing_is_started() {
    let mut setup = Setup::default();
    assert_eq!(setup.start(), Err(Rejection::NoBootSource));
    setup.configure(boot_source()).expect("still to be configured");
}

#[test]
fn everything_that_is_configured_becomes_part_of_the_vm() {
    let mut setup = configured([
        boot_source(),
        Change::Machine(read(r#"{"vcpu_count":2,"mem_size_mib":256}"#)),
        Change::MachinePatch(read(r#"{"mem_size_mib":512}"#)),
        Change::Drive(drive("data", false)),
        Change::Drive(drive("rootfs", true)),
        Change::NetworkInterface(interface("eth0", "02:00:00:00:00:01")),
        Change::Entropy(EntropyDevice::default()),
        Change::Vsock(vsock()),
        Change::Mmds(mmds()),
        Change::Balloon(balloon()),
        Change::Serial(read(r#"{"serial_out_path":"console"}"#)),
    ]);
    let spec = setup.start().expect("a VM");
    assert_eq!((spec.cpus, spec.memory.size), (2, ByteSize::from_mib(512)));
    assert_eq!(spec.boot.cmdline, "quiet root=/dev/vda rw");
    let disks: Vec<_> = spec.disks.iter().filter_map(|disk| disk.id.as_deref()).collect();
    assert_eq!(disks, ["rootfs", "data"], "the root device comes first");
    assert_eq!(spec.nets[0].id.as_deref(), Some("eth0"));
    assert_eq!(
        (spec.rng, spec.serial),
        (Some(RngSpec::default()), SerialSpec::File("console".into()))
    );
    assert_eq!(spec.vsock, Some(vsock().spec()));
    assert_eq!(spec.mmds, Some(MmdsSpec::from(&mmds())));
    assert_eq!(spec.balloon, Some(balloon().spec()));
}

#[test]
fn a_device_that_is_put_again_replaces_the_one_before() {
    let setup = configured([
        Change::Drive(drive("a", false)),
        Change::Drive(drive("b", false)),
        Change::Drive(drive("b", true)),
        Change::Drive(read(
            r#"{"drive_id":"a","path_on_host":"other.img","is_root_device":false}"#,
        )),
        Change::NetworkInterface(interface("eth0", "02:00:00:00:00:01")),
        Change::NetworkInterface(interface("eth0", "02:00:00:00:00:01")),
    ]);
    let drives: Vec<_> = setup.configuration().drives.iter().collect();
    let paths: Vec<_> = drives
        .iter()
        .filter_map(|drive| drive.path_on_host.as_deref())
        .collect();
    assert_eq!(paths, ["b.img", "other.img"]);
    assert_eq!(setup.configuration().network_interfaces.len(), 1);
}

#[test]
fn there_is_one_root_device_and_each_address_is_there_once() {
    let mut setup = configured([
        Change::Drive(drive("a", true)),
        Change::NetworkInterface(interface("eth0", "02:00:00:00:00:01")),
    ]);
    let second = setup.configure(Change::Drive(drive("b", true)));
    assert_eq!(second, Err(Rejection::RootTaken("a".to_owned())));
    let twin = setup.configure(Change::NetworkInterface(interface("eth1", "02:00:00:00:00:01")));
    assert!(matches!(twin, Err(Rejection::MacTaken { .. })), "{twin:?}");
}

#[test]
fn the_metadata_service_is_at_interfaces_that_are_configured_before() {
    let mut setup = Setup::default();
    let unknown = Err(Rejection::Spec(SpecError::MmdsNet("eth0".to_owned())));
    assert_eq!(setup.configure(Change::Mmds(mmds())), unknown);
    let mut setup = configured([Change::NetworkInterface(interface("eth0", "02:00:00:00:00:01"))]);
    let nowhere = read(r#"{"network_interfaces":[]}"#);
    let nowhere = setup.configure(Change::Mmds(nowhere));
    assert_eq!(nowhere, Err(Rejection::Spec(SpecError::MmdsNowhere)));
    setup.configure(Change::Mmds(mmds())).expect("there is one");
}

#[test]
fn more_devices_than_a_vm_can_have_are_refused_as_they_come() {
    let mut setup = configured((0..DEVICES_MAX).map(|n| Change::Drive(drive(&format!("d{n}"), false))));
    let too_many = Err(Rejection::Spec(SpecError::Devices(DEVICES_MAX + 1)));
    assert_eq!(setup.configure(Change::Drive(drive("more", false))), too_many);
    assert_eq!(
        setup.configure(Change::NetworkInterface(interface("eth0", "02:00:00:00:00:01"))),
        too_many
    );
    assert_eq!(setup.configure(Change::Entropy(EntropyDevice::default())), too_many);
    assert_eq!(setup.configure(Change::Vsock(vsock())), too_many);
    assert_eq!(setup.configure(Change::Balloon(balloon())), too_many);
    setup
        .configure(Change::Drive(drive("d0", false)))
        .expect("replaces one");
}

#[test]
fn metrics_go_to_one_file() {
    let metrics = || Change::Metrics(read(r#"{"metrics_path":"m"}"#));
    let mut setup = configured([metrics()]);
    assert_eq!(setup.configure(metrics()), Err(Rejection::MetricsTaken));
}

#[test]
fn nothing_is_configured_during_a_start_or_after_it_and_it_happens_once() {
    let mut setup = configured([boot_source()]);
    let spec = setup.start().expect("a VM");
    assert_eq!(setup.configure(boot_source()), Err(Rejection::Starting));
    assert_eq!(setup.start(), Err(Rejection::Starting));
    assert_eq!(setup.check(Needs::Started), Err(Rejection::Starting));
    setup.finish_start(Some(&spec));
    assert_eq!(
        setup.configure(boot_source()),
        Err(Rejection::Started("the boot source"))
    );
    assert_eq!(setup.start(), Err(Rejection::StartedAlready));
    assert_eq!(setup.check(Needs::Started), Ok(()));
}

#[test]
fn after_a_start_that_failed_everything_can_be_put_right() {
    let mut setup = configured([boot_source()]);
    setup.start().expect("a VM");
    setup.finish_start(None);
    setup.configure(Change::Drive(drive("a", true))).expect("not started");
    setup.start().expect("once more");
}

#[test]
fn a_vm_that_is_restored_is_what_its_snapshot_says_with_the_log_and_metrics_of_this_process() {
    let saved = configured([
        boot_source(),
        Change::Drive(drive("a", false)),
        Change::NetworkInterface(interface("eth0", "02:00:00:00:00:01")),
    ])
    .start()
    .expect("a VM");
    let mut setup = configured([
        Change::Metrics(read(r#"{"metrics_path":"m"}"#)),
        Change::Serial(read(r#"{"serial_out_path":"console"}"#)),
    ]);
    assert_eq!(setup.restore(true), Ok(SerialSpec::File("console".into())));
    assert_eq!(setup.restore(true), Err(Rejection::Starting));
    assert_eq!(setup.configure(boot_source()), Err(Rejection::Starting));
    setup.finish_start(Some(&saved));
    assert_eq!(setup.configuration().draft(), Ok(saved));
    assert!(setup.configuration().metrics.is_some() && setup.configuration().machine.track_dirty_pages);
    assert_eq!(setup.restore(true), Err(Rejection::StartedAlready));
    assert!(setup.drive("a").is_ok());
}

#[test]
fn what_a_snapshot_says_cannot_be_configured_before_and_a_failed_restore_leaves_all_as_it_was() {
    for (change, subject) in [
        (
            Change::Machine(read(r#"{"vcpu_count":2,"mem_size_mib":64}"#)),
            "the machine",
        ),
        (boot_source(), "a boot source"),
        (Change::Drive(drive("a", false)), "a drive"),
        (
            Change::NetworkInterface(interface("e", "02:00:00:00:00:01")),
            "a network interface",
        ),
        (Change::Entropy(EntropyDevice::default()), "the entropy device"),
        (Change::Vsock(vsock()), "the vsock device"),
        (Change::Balloon(balloon()), "the balloon"),
    ] {
        assert_eq!(configured([change]).restore(false), Err(Rejection::Configured(subject)));
    }
    let mut setup = Setup::default();
    assert_eq!(setup.restore(false), Ok(SerialSpec::Stdio));
    setup.finish_start(None);
    setup.configure(boot_source()).expect("not started");
    setup.start().expect("booted instead");
}

#[test]
fn devices_are_changed_once_the_vm_is_started_and_by_their_ids() {
    let mut setup = configured([boot_source(), Change::Drive(drive("a", true))]);
    assert_eq!(setup.drive("a").err(), Some(Rejection::NotStarted));
    let spec = setup.start().expect("a VM");
    setup.finish_start(Some(&spec));
    assert_eq!(setup.drive("b").err(), Some(Rejection::NoDrive("b".to_owned())));
    assert_eq!(
        setup.network_interface("e").err(),
        Some(Rejection::NoInterface("e".to_owned()))
    );
    assert_eq!(setup.drive("a").expect("there is one").drive_id, "a");
}

#[test]
fn the_setup_of_a_vm_that_runs_describes_that_vm() {
    let mut setup = configured([
        boot_source(),
        Change::Drive(drive("a", false)),
        Change::NetworkInterface(interface("eth0", "02:00:00:00:00:01")),
        Change::Entropy(EntropyDevice::default()),
        Change::Vsock(vsock()),
        Change::Mmds(mmds()),
        Change::Balloon(balloon()),
    ]);
    let spec = setup.start().expect("a VM");
    assert_eq!(Setup::of_started(&spec).configuration().draft(), Ok(spec));
}

fn any_change() -> impl Strategy<Value = Change> {
    let id = || (0_u8..4).prop_map(|n| format!("id{n}"));
    prop_oneof![
        Just(boot_source()),
        (id(), any::<bool>()).prop_map(|(id, is_root)| Change::Drive(drive(&id, is_root))),
        (id(), 0_u8..3).prop_map(|(id, n)| Change::NetworkInterface(interface(&id, &format!("02:00:00:00:00:0{n}")))),
        Just(Change::Entropy(EntropyDevice::default())),
        Just(Change::Vsock(vsock())),
        Just(Change::Mmds(read(r#"{"network_interfaces":["id0"]}"#))),
        Just(Change::Balloon(balloon())),
    ]
}

proptest! {
    #[test]
    fn whatever_is_accepted_makes_a_vm_with_its_root_device_first(changes in prop::collection::vec(any_change(), 0..32)) {
        let mut setup = configured([boot_source()]);
        for change in changes {
            let before = setup.configuration().clone();
            if setup.configure(change).is_err() {
                prop_assert_eq!(setup.configuration(), &before);
            }
        }
        let drives = &setup.configuration().drives;
        prop_assert!(drives.iter().skip(1).all(|drive| !drive.is_root_device));
        prop_assert!(setup.start().is_ok());
    }
}
