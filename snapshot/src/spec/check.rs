//! Whether a [`VmSpec`] describes a VM: limits, names, duplicates. Looks at nothing but the spec.

use std::collections::HashSet;
use std::os::unix::ffi::OsStrExt;

use super::{
    BalloonSpec, BootSpec, CID_MAX, CID_MIN, CMDLINE_MAX, CPUS_MAX, DEVICES_MAX, DISK_SERIAL_MAX, DiskSpec, ID_MAX,
    MEMORY_MAX, MEMORY_MIN, MTU_MIN, MemorySpec, MmdsSpec, NAME_MAX, NetSpec, SpecError, TAP_NAME_MAX, TapSpec,
    UDS_PATH_MAX, VmSpec, VsockSpec,
};
use crate::size::ByteSize;

const PAGE: ByteSize = ByteSize::from_bytes(4096);
const HUGE_PAGE: ByteSize = ByteSize::from_mib(2);
const MIB: ByteSize = ByteSize::from_mib(1);

impl VmSpec {
    /// Whether this describes a VM that some host could build.
    ///
    /// # Errors
    /// The first fault, naming the field, its value and the limit.
    pub fn check(&self) -> Result<(), SpecError> {
        if let Some(name) = &self.name
            && (name.is_empty() || name.len() > NAME_MAX || name.chars().any(char::is_control))
        {
            return Err(SpecError::Name(name.clone()));
        }
        if !(1..=CPUS_MAX).contains(&self.cpus) {
            return Err(SpecError::Cpus(self.cpus));
        }
        self.memory.check()?;
        self.boot.check()?;
        let devices = self.devices();
        if devices > DEVICES_MAX {
            return Err(SpecError::Devices(devices));
        }
        self.disks.iter().try_for_each(DiskSpec::check)?;
        self.nets.iter().try_for_each(NetSpec::check)?;
        self.vsock.iter().try_for_each(VsockSpec::check)?;
        self.mmds.iter().try_for_each(|mmds| mmds.check(&self.nets))?;
        self.balloon
            .iter()
            .try_for_each(|balloon| balloon.check(&self.memory))?;
        let disk_ids = self.disks.iter().enumerate().map(|(index, disk)| disk.id_at(index));
        let net_ids = self.nets.iter().enumerate().map(|(index, net)| net.id_at(index));
        check_ids("disk", disk_ids)?;
        check_ids("net", net_ids)?;
        no_disk_written_twice(&self.disks)?;
        no_tap_taken_twice(&self.nets)
    }

    /// How many virtio devices it has.
    pub fn devices(&self) -> usize {
        let single = [self.rng.is_some(), self.vsock.is_some(), self.balloon.is_some()];
        self.disks.len() + self.nets.len() + single.into_iter().filter(|&is_there| is_there).count()
    }
}

impl MmdsSpec {
    /// Whether the service can be at interfaces of `nets`, which are all of its VM.
    ///
    /// # Errors
    /// There is no such interface, or its address cannot be used.
    pub fn check(&self, nets: &[NetSpec]) -> Result<(), SpecError> {
        let [first, second, third, _] = self.address.octets();
        if (first, second) != (169, 254) || [0, 255].contains(&third) {
            return Err(SpecError::MmdsAddress(self.address));
        }
        let has = |id: &String| nets.iter().enumerate().any(|(index, net)| net.id_at(index) == *id);
        if let Some(id) = self.nets.iter().find(|id| !has(id)) {
            return Err(SpecError::MmdsNet(id.clone()));
        }
        if nets.is_empty() {
            return Err(SpecError::MmdsNowhere);
        }
        Ok(())
    }

    /// Whether it answers at the interface `id`.
    pub fn is_at(&self, id: &str) -> bool {
        self.nets.is_empty() || self.nets.iter().any(|net| net == id)
    }
}

impl VsockSpec {
    /// Whether there can be such a device.
    ///
    /// # Errors
    /// Its address or its path cannot be used.
    pub fn check(&self) -> Result<(), SpecError> {
        if !(CID_MIN..=CID_MAX).contains(&self.cid) {
            return Err(SpecError::Cid(self.cid));
        }
        let path = self.uds.as_os_str().as_bytes();
        if !(1..=UDS_PATH_MAX).contains(&path.len()) || path.contains(&0) {
            return Err(SpecError::UdsPath(self.uds.clone()));
        }
        Ok(())
    }
}

impl BalloonSpec {
    fn check(&self, memory: &MemorySpec) -> Result<(), SpecError> {
        if self.amount > memory.size || !self.amount.bytes().is_multiple_of(MIB.bytes()) {
            return Err(SpecError::BalloonAmount {
                amount: self.amount,
                memory: memory.size,
            });
        }
        Ok(())
    }
}

impl MemorySpec {
    fn check(&self) -> Result<(), SpecError> {
        let size = self.size;
        if !(MEMORY_MIN..=MEMORY_MAX).contains(&size) {
            return Err(SpecError::MemoryRange(size));
        }
        let page = if self.hugepages { HUGE_PAGE } else { PAGE };
        if !size.bytes().is_multiple_of(page.bytes()) {
            return Err(SpecError::MemoryPages { size, page });
        }
        Ok(())
    }
}

impl BootSpec {
    fn check(&self) -> Result<(), SpecError> {
        if self.cmdline.len() > CMDLINE_MAX {
            return Err(SpecError::CmdlineLength(self.cmdline.len()));
        }
        match self.cmdline.bytes().position(|byte| byte == 0) {
            Some(position) => Err(SpecError::CmdlineNul(position)),
            None => Ok(()),
        }
    }
}

impl DiskSpec {
    fn check(&self) -> Result<(), SpecError> {
        let printable = |byte: u8| (b' '..=b'~').contains(&byte);
        match &self.serial {
            Some(serial) if !(1..=DISK_SERIAL_MAX).contains(&serial.len()) || !serial.bytes().all(printable) => {
                Err(SpecError::DiskSerial {
                    path: self.path.clone(),
                    serial: serial.clone(),
                })
            }
            _ => Ok(()),
        }
    }
}

impl NetSpec {
    fn check(&self) -> Result<(), SpecError> {
        match &self.tap {
            TapSpec::Name(name) if !is_interface_name(name) => return Err(SpecError::TapName(name.clone())),
            TapSpec::Fd(fd) if *fd < 0 => return Err(SpecError::TapFd(*fd)),
            TapSpec::Create | TapSpec::Name(_) | TapSpec::Fd(_) => {}
        }
        match self.mtu {
            Some(mtu) if mtu < MTU_MIN => Err(SpecError::Mtu(mtu)),
            _ => Ok(()),
        }
    }
}

/// Ids are unique among devices of a kind, those that are not given included.
fn check_ids(device: &'static str, ids: impl Iterator<Item = String>) -> Result<(), SpecError> {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
    let mut taken = HashSet::new();
    for id in ids {
        if !(1..=ID_MAX).contains(&id.len()) || !id.bytes().all(allowed) {
            return Err(SpecError::Id { device, id });
        }
        if !taken.insert(id.clone()) {
            return Err(SpecError::IdTwice { device, id });
        }
    }
    Ok(())
}

/// What Linux takes as the name of a network interface; '%' would make it a pattern for a free name.
fn is_interface_name(name: &str) -> bool {
    let refused = |c: char| c.is_whitespace() || matches!(c, '/' | ':' | '%' | '\0');
    (1..=TAP_NAME_MAX).contains(&name.len()) && !matches!(name, "." | "..") && !name.contains(refused)
}

fn no_disk_written_twice(disks: &[DiskSpec]) -> Result<(), SpecError> {
    for (index, disk) in disks.iter().enumerate() {
        let again = disks[..index].iter().find(|earlier| earlier.path == disk.path);
        if again.is_some_and(|earlier| !(earlier.readonly && disk.readonly)) {
            return Err(SpecError::DiskTwice(disk.path.clone()));
        }
    }
    Ok(())
}

fn no_tap_taken_twice(nets: &[NetSpec]) -> Result<(), SpecError> {
    let mut taken = HashSet::new();
    let shareable = nets.iter().map(|net| match &net.tap {
        TapSpec::Create => None,
        TapSpec::Name(name) => Some(name.clone()),
        TapSpec::Fd(fd) => Some(format!("file descriptor {fd}")),
    });
    match shareable.flatten().find(|tap| !taken.insert(tap.clone())) {
        Some(tap) => Err(SpecError::TapTwice(tap)),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::super::{BootProtocol, DEFAULT_CMDLINE, DiskIo, MmdsVersion, RateLimiterSpec, RngSpec, SerialSpec};
    use super::*;

    fn spec() -> VmSpec {
        VmSpec {
            name: None,
            cpus: 1,
            memory: MemorySpec {
                size: ByteSize::from_mib(512),
                shared: false,
                hugepages: false,
            },
            boot: BootSpec {
                kernel: "vmlinuz".into(),
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
        }
    }

    fn disk(path: &str, readonly: bool) -> DiskSpec {
        DiskSpec {
            id: None,
            path: path.into(),
            readonly,
            serial: None,
            io: DiskIo::Auto,
            rate_limiter: RateLimiterSpec::default(),
        }
    }

    fn disk_with_serial(serial: &str) -> DiskSpec {
        DiskSpec {
            serial: Some(serial.to_owned()),
            ..disk("a", false)
        }
    }

    fn vsock(cid: u32, uds: &str) -> VsockSpec {
        VsockSpec { cid, uds: uds.into() }
    }

    fn net(tap: TapSpec) -> NetSpec {
        NetSpec {
            tap,
            ..NetSpec::default()
        }
    }

    fn balloon(amount: ByteSize) -> BalloonSpec {
        BalloonSpec {
            amount,
            ..BalloonSpec::default()
        }
    }

    fn tap(name: &str) -> NetSpec {
        net(TapSpec::Name(name.to_owned()))
    }

    fn net_with_mtu(mtu: u16) -> NetSpec {
        NetSpec {
            mtu: Some(mtu),
            ..net(TapSpec::Create)
        }
    }

    fn memory(size: ByteSize, hugepages: bool) -> MemorySpec {
        MemorySpec {
            size,
            shared: false,
            hugepages,
        }
    }

    fn check(change: impl FnOnce(&mut VmSpec)) -> Result<(), SpecError> {
        let mut spec = spec();
        change(&mut spec);
        spec.check()
    }

    /// The message with which a changed spec is refused.
    fn refusal(change: impl FnOnce(&mut VmSpec)) -> String {
        check(change).expect_err("the spec was accepted").to_string()
    }

    #[test]
    fn values_at_their_limits_are_accepted() {
        check(|vm| vm.cpus = 32).expect("most vCPUs");
        check(|vm| vm.memory = memory(MEMORY_MIN, true)).expect("least memory");
        check(|vm| vm.memory = memory(MEMORY_MAX, false)).expect("most memory");
        check(|vm| vm.memory = memory(ByteSize::from_bytes((64 << 20) + 4096), false)).expect("whole pages");
        check(|vm| vm.boot.cmdline = "x".repeat(CMDLINE_MAX)).expect("longest command line");
        check(|vm| vm.boot.cmdline = String::new()).expect("no command line");
        check(|vm| vm.name = Some("ü".repeat(32))).expect("longest name");
        check(|vm| vm.disks = vec![disk_with_serial(&"s".repeat(20))]).expect("longest serial");
        check(|vm| vm.nets = vec![tap(&"t".repeat(15))]).expect("longest tap name");
        check(|vm| vm.nets = vec![net_with_mtu(68), net_with_mtu(65535)]).expect("both ends of the MTU");
        check(|vm| vm.nets = vec![net(TapSpec::Create); 16]).expect("most devices");
        for cid in [CID_MIN, CID_MAX] {
            check(|vm| vm.vsock = Some(vsock(cid, &"p".repeat(UDS_PATH_MAX)))).expect("both ends of the addresses");
        }
        for mib in [0, 512] {
            check(|vm| vm.balloon = Some(balloon(ByteSize::from_mib(mib)))).expect("none and all of its memory");
        }
    }

    #[test]
    fn values_beyond_their_limits_are_refused_with_value_and_limit() {
        assert_eq!(
            refusal(|vm| vm.cpus = 0),
            "cpus: 0 is out of range: a VM has 1 to 32 vCPUs"
        );
        assert_eq!(
            refusal(|vm| vm.cpus = 33),
            "cpus: 33 is out of range: a VM has 1 to 32 vCPUs"
        );
        assert_eq!(
            refusal(|vm| vm.memory = memory(ByteSize::from_mib(31), false)),
            "memory: 31M is out of range: a VM has 32M to 4T of memory"
        );
        assert_eq!(
            refusal(|vm| vm.memory = memory(ByteSize::from_mib(5 << 20), false)),
            "memory: 5T is out of range: a VM has 32M to 4T of memory"
        );
        assert_eq!(
            refusal(|vm| vm.memory = memory(ByteSize::from_bytes((32 << 20) + 1), false)),
            "memory: 33554433 is not a multiple of the page size, 4K"
        );
        assert_eq!(
            refusal(|vm| vm.memory = memory(ByteSize::from_mib(33), true)),
            "memory: 33M is not a multiple of the page size, 2M"
        );
        assert_eq!(
            refusal(|vm| vm.boot.cmdline = "x".repeat(2048)),
            "cmdline: 2048 bytes are too long: a kernel takes at most 2047"
        );
        assert_eq!(
            refusal(|vm| vm.boot.cmdline = "quiet\0".to_owned()),
            "cmdline: the byte at position 5 is NUL, which would end the command line"
        );
        for cid in [0, 2, u32::MAX] {
            assert_eq!(
                refusal(|vm| vm.vsock = Some(vsock(cid, "v.sock"))),
                format!("vsock: cid: {cid} is out of range: a guest has an address from 3 to 4294967294")
            );
        }
        for (amount, text) in [(ByteSize::from_mib(513), "513M"), (ByteSize::from_bytes(4096), "4K")] {
            assert_eq!(
                refusal(|vm| vm.balloon = Some(balloon(amount))),
                format!(
                    "balloon: amount: {text} cannot be asked for: it is a multiple of 1M, at most the guest's memory of 512M"
                )
            );
        }
        for path in [String::new(), "p".repeat(UDS_PATH_MAX + 1)] {
            assert_eq!(
                refusal(|vm| vm.vsock = Some(vsock(3, &path))),
                format!("vsock: uds: {path} cannot be used: the path has 1 to 96 bytes, so that _PORT can be appended")
            );
        }
        assert_eq!(
            refusal(|vm| vm.nets = vec![net_with_mtu(67)]),
            "net: mtu: 67 is out of range: it is 68 to 65535 bytes"
        );
        assert_eq!(
            refusal(|vm| {
                vm.rng = Some(RngSpec::default());
                vm.nets = vec![net(TapSpec::Create); 16];
            }),
            "17 devices (disks, network interfaces, rng, vsock, balloon) are too many: a VM has interrupt lines for 16"
        );
    }

    fn mmds(nets: &[&str], address: [u8; 4]) -> MmdsSpec {
        MmdsSpec {
            version: MmdsVersion::V2,
            nets: nets.iter().map(|&id| id.to_owned()).collect(),
            address: address.into(),
            imds_compat: false,
        }
    }

    #[test]
    fn the_metadata_service_has_a_link_local_address_at_interfaces_that_there_are() {
        let with = |nets: Vec<NetSpec>, mmds: MmdsSpec| {
            check(|vm| {
                vm.nets = nets;
                vm.mmds = Some(mmds);
            })
        };
        let two = || vec![tap("t0"), tap("t1")];
        for ids in [&[][..], &["net1"], &["net0", "net1"]] {
            with(two(), mmds(ids, [169, 254, 1, 0])).expect("interfaces that there are");
        }
        assert!(mmds(&[], [169, 254, 1, 1]).is_at("net7"));
        assert!(mmds(&["a"], [169, 254, 1, 1]).is_at("a") && !mmds(&["a"], [169, 254, 1, 1]).is_at("b"));
        let refused = with(two(), mmds(&["net0", "eth0"], [169, 254, 254, 255]));
        assert_eq!(refused, Err(SpecError::MmdsNet("eth0".to_owned())));
        assert_eq!(
            with(Vec::new(), mmds(&[], [169, 254, 1, 1])),
            Err(SpecError::MmdsNowhere)
        );
        for address in [[169, 254, 0, 255], [169, 254, 255, 0], [169, 253, 1, 1], [10, 0, 0, 1]] {
            assert_eq!(
                with(two(), mmds(&[], address)),
                Err(SpecError::MmdsAddress(address.into()))
            );
        }
    }

    #[test]
    fn names_that_cannot_be_used_are_refused_with_the_name() {
        for name in ["", "a\nb", &"n".repeat(65)] {
            let message = refusal(|vm| vm.name = Some(name.to_owned()));
            assert!(
                message.starts_with(&format!("name: {name:?} cannot be used")),
                "{message}"
            );
        }
        for name in ["", "..", "a b", "a/b", "a:b", "tap%d", "sixteen-bytes-xx"] {
            let message = refusal(|vm| vm.nets = vec![tap(name)]);
            assert!(
                message.starts_with(&format!("net: tap: {name:?} is not an interface name")),
                "{message}"
            );
        }
        for serial in ["", "tab\t", "sérial", &"s".repeat(21)] {
            let message = refusal(|vm| vm.disks = vec![disk_with_serial(serial)]);
            assert!(
                message.starts_with(&format!("disk a: serial: {serial:?} cannot be used")),
                "{message}"
            );
        }
        assert_eq!(
            refusal(|vm| vm.nets = vec![net(TapSpec::Fd(-1))]),
            "net: fd: -1 is not a file descriptor"
        );
    }

    fn disk_with_id(path: &str, id: &str) -> DiskSpec {
        DiskSpec {
            id: Some(id.to_owned()),
            ..disk(path, false)
        }
    }

    #[test]
    fn a_device_without_an_id_is_called_by_its_kind_and_place() {
        let disks = [disk_with_id("a", "rootfs"), disk("b", false)];
        let ids: Vec<_> = (0..).zip(&disks).map(|(index, disk)| disk.id_at(index)).collect();
        assert_eq!(ids, ["rootfs", "disk1"]);
        assert_eq!(tap("t0").id_at(3), "net3");
    }

    #[test]
    fn what_is_no_id_is_refused_with_the_id() {
        for id in ["", "a-b", "a b", "é", "../x", &"x".repeat(65)] {
            assert_eq!(
                check(|vm| vm.disks = vec![disk_with_id("a", id)]),
                Err(SpecError::Id {
                    device: "disk",
                    id: id.to_owned()
                })
            );
        }
        check(|vm| vm.disks = vec![disk_with_id("a", &"x".repeat(64))]).expect("longest id");
    }

    #[test]
    fn devices_of_a_kind_have_different_ids_also_where_none_is_given() {
        check(|vm| {
            vm.disks = vec![disk_with_id("a", "x")];
            vm.nets = vec![NetSpec {
                id: Some("x".to_owned()),
                ..net(TapSpec::Create)
            }];
        })
        .expect("kinds have names of their own");
        assert_eq!(
            refusal(|vm| vm.disks = vec![disk_with_id("a", "disk1"), disk("b", false)]),
            "disk: id: \"disk1\" is that of more than one device; the n-th has diskN if none is given, from 0 on"
        );
    }

    #[test]
    fn a_disk_may_be_given_twice_only_if_nobody_writes_it() {
        check(|vm| vm.disks = vec![disk("a", true), disk("a", true), disk("b", false)]).expect("readers only");
        for (first, second) in [(false, false), (true, false), (false, true)] {
            assert_eq!(
                check(|vm| vm.disks = vec![disk("a", first), disk("b", false), disk("a", second)]),
                Err(SpecError::DiskTwice("a".into()))
            );
        }
    }

    #[test]
    fn a_tap_belongs_to_one_interface() {
        check(|vm| vm.nets = vec![tap("t0"), tap("t1"), net(TapSpec::Create), net(TapSpec::Create)]).expect("distinct");
        assert_eq!(
            refusal(|vm| vm.nets = vec![tap("t0"), tap("t1"), tap("t0")]),
            "net: tap: t0 is given to more than one network interface"
        );
        assert_eq!(
            refusal(|vm| vm.nets = vec![net(TapSpec::Fd(7)), net(TapSpec::Fd(7))]),
            "net: tap: file descriptor 7 is given to more than one network interface"
        );
    }
}
