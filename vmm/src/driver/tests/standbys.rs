//! Real VMs that go on where their standby has them, both in this process.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::mpsc::Sender;

use cutover_devices::GuestMemory;
use cutover_migration::epoch;
use cutover_migration::transport::{Endpoint, tls};
use tempfile::TempDir;
use vm_memory::{Bytes, GuestAddress};

use super::migrations::{Cutter, Way};
use super::snapshots::{COUNTING, moment, wait_for_a_round};
use super::*;
use crate::migration::{MigrationStatus, ReceiveRequest};
use crate::protection::{Notice, Protection, StandbyAddress, StandbyListener, StandbyNotice, StandbyRequest};

/// Where the counters of the guest are that counts.
const COUNTERS: u64 = 0x20_0000;
const COUNTERS_COUNT: u64 = 256;

/// A member of a group.
struct Member {
    guest: RunningVm,
    protection: Protection,
    memory: GuestMemory,
    notices: Receiver<Notice>,
}

/// What a standby's process is told, one after the other.
enum Say {
    Permanent(u64),
    Promote(u64),
}

/// A standby, whose process becomes the VM's.
struct Waiting {
    address: StandbyAddress,
    say: Sender<Say>,
    told: Receiver<StandbyNotice>,
    arrival: JoinHandle<Result<RunningVm, Error>>,
    member: Receiver<(Protection, GuestMemory, Receiver<Notice>)>,
}

/// How the link of a test is.
fn link() -> epoch::Options {
    epoch::Options {
        // Whatever else this machine is doing.
        silence: PATIENCE,
        ..epoch::Options::default()
    }
}

/// Has a process wait in `place` to be the standby of a VM whose disks are to be there.
fn standby(place: &TempDir, name: &str) -> Waiting {
    standby_at(Endpoint::Unix(place.path().join(name)), None, place)
}

/// As [`standby`], where `listen` says, with its certificate in `tls`.
fn standby_at(listen: Endpoint, tls: Option<PathBuf>, place: &TempDir) -> Waiting {
    let request = StandbyRequest {
        receive: ReceiveRequest {
            listen,
            tls: tls.clone(),
            name: None,
            nets: BTreeMap::new(),
            disks: BTreeMap::new(),
            disks_dir: Some(place.path().to_owned()),
            vsock: None,
            serial: SerialSpec::Null,
        },
        link: link(),
    };
    let listener = StandbyListener::bind(request).expect("a socket");
    let endpoint = listener.endpoint().clone();
    let ((say, said), (tell, told), (made, member)) = (channel(), channel(), channel());
    let arrival = std::thread::spawn(move || {
        try_start(true, move |options| {
            let status = MigrationStatus::default();
            let mut standby = listener.accept(options, &status, &mut |_| Ok(()), tell)?;
            loop {
                match said.recv() {
                    Ok(Say::Permanent(epoch)) => standby.permanent(epoch)?,
                    Ok(Say::Promote(cut)) => break member_of(standby.promote(cut)?, &made),
                    Err(_) => break Err(cutover_migration::Error::Cancelled.into()),
                }
            }
        })
    });
    Waiting {
        address: StandbyAddress {
            endpoint,
            tls,
            link: link(),
        },
        say,
        told,
        arrival,
        member,
    }
}

fn member_of(mut vmm: Vmm, made: &Sender<(Protection, GuestMemory, Receiver<Notice>)>) -> Result<Vmm, Error> {
    let (tell, notices) = channel();
    let protection = vmm.protect(tell)?;
    let memory = vmm.machine.memory().clone();
    made.send((protection, memory, notices)).expect("the test listens");
    Ok(vmm)
}

impl Waiting {
    fn say(&self, what: Say) {
        self.say.send(what).expect("the standby is there");
    }

    /// The VM as it was at `cut`; it stands still.
    fn promote(self, cut: u64) -> Member {
        self.say(Say::Promote(cut));
        let guest = self.arrival.join().expect("no panic").expect("it is promoted");
        let (protection, memory, notices) = self.member.recv().expect("it is a member");
        Member {
            guest,
            protection,
            memory,
            notices,
        }
    }
}

impl Member {
    fn run(change: impl FnOnce(&mut VmSpec)) -> Option<Self> {
        if !has_kvm() {
            return None;
        }
        let kernel = kernel(COUNTING);
        let mut spec = tiny_spec(kernel.path());
        change(&mut spec);
        let (made, member) = channel();
        let guest = start(true, move |options| member_of(Vmm::build(&spec, options)?, &made));
        let (protection, memory, notices) = member.recv().expect("it is a member");
        wait_for_a_round(&guest.vm);
        Some(Self {
            guest,
            protection,
            memory,
            notices,
        })
    }

    fn counters(&self) -> Vec<u32> {
        let addresses = (0..COUNTERS_COUNT).map(|page| GuestAddress(COUNTERS + (page << 12)));
        addresses
            .map(|address| self.memory.read_obj(address).expect("RAM"))
            .collect()
    }

    fn seed(&mut self, standby: &Waiting, epoch: u64) {
        let seeded = self.protection.seed(&standby.address, &[], epoch);
        seeded.unwrap_or_else(|error| panic!("it cannot be seeded: {error:?}"));
        let told = standby.told.recv_timeout(PATIENCE).expect("it is told");
        assert_eq!(told, StandbyNotice::Seeded);
    }

    /// Takes a cut, and waits until the standby holds it.
    fn ship(&mut self, epoch: u64, standby: &Waiting) {
        self.protection.block(epoch).expect("it is protected");
        self.protection.take(epoch).expect("it can be taken");
        self.protection.validate(epoch).expect("it was taken");
        let held = self.notices.recv_timeout(PATIENCE).expect("it is told");
        assert_eq!(held, Notice::Holds(epoch));
        let told = standby.told.recv_timeout(PATIENCE).expect("it is told");
        assert_eq!(told, StandbyNotice::Holds(epoch));
    }

    /// Takes a cut that everyone relies on.
    fn cut(&mut self, epoch: u64, standby: &Waiting) {
        self.ship(epoch, standby);
        self.protection.permanent(epoch).expect("it is held");
        standby.say(Say::Permanent(epoch));
    }

    /// Takes such a cut of a guest that is paused; returns what it had counted.
    fn cut_paused(&mut self, epoch: u64, standby: &Waiting) -> Vec<u32> {
        self.guest.vm.pause().expect("it runs");
        self.cut(epoch, standby);
        let counters = self.counters();
        self.guest.vm.resume().expect("it is paused");
        counters
    }

    fn count_on(&self) {
        wait_for_a_round(&self.guest.vm);
    }

    /// Takes cuts that are permanent as soon as they are held, until the standby is lost. Returns the last one, and what the
    /// guest had counted then.
    fn replicate(&mut self, standby: &Waiting) -> (u64, Vec<u32>) {
        // So that there is no more to be sent than there is.
        self.guest.vm.pause().expect("it runs");
        let mut last = (0, Vec::new());
        if self.protection.seed(&standby.address, &[], 1).is_err() {
            return last;
        }
        for epoch in 1.. {
            self.protection.block(epoch).expect("it is protected");
            self.protection.take(epoch).expect("it can be taken");
            self.protection.validate(epoch).expect("it was taken");
            let Ok(Notice::Holds(_)) = self.notices.recv_timeout(PATIENCE) else {
                break;
            };
            self.protection.permanent(epoch).expect("it is held");
            standby.say(Say::Permanent(epoch));
            last = (epoch, self.counters());
            self.guest.vm.resume().expect("it is paused");
            self.count_on();
            self.guest.vm.pause().expect("it runs");
        }
        last
    }
}

#[test]
fn a_promoted_standby_goes_on_from_the_cut_to_the_last_counter() {
    let Some(mut member) = Member::run(|_| {}) else { return };
    let place = TempDir::new().expect("temporary directory");
    let standby = standby(&place, "standby");
    member.seed(&standby, 1);
    member.cut(1, &standby);
    member.count_on();
    let at_cut = member.cut_paused(2, &standby);
    member.count_on();
    // What is held and not permanent is of a future that there will not be.
    member.ship(3, &standby);
    member.count_on();
    drop(member);
    let mut promoted = standby.promote(2);
    assert_eq!(promoted.counters(), at_cut);
    promoted.protection.resume().expect("it stands still");
    promoted.guest.vm.resume().expect("it was paused at the cut");
    promoted.count_on();
    assert!(promoted.counters()[0] > at_cut[0]);
}

#[test]
fn a_vm_is_replicated_over_a_link_where_both_sides_are_authenticated() {
    let Some(mut member) = Member::run(|_| {}) else { return };
    let place = TempDir::new().expect("temporary directory");
    let certificates = place.path().join("tls");
    tls::init(&certificates, &["127.0.0.1".to_owned()]).expect("certificates");
    let anywhere = "tls://127.0.0.1:0".parse().expect("an endpoint");
    let standby = standby_at(anywhere, Some(certificates), &place);
    member.seed(&standby, 1);
    let at_cut = member.cut_paused(1, &standby);
    member.count_on();
    drop(member);
    assert_eq!(standby.promote(1).counters(), at_cut);
}

#[test]
fn one_standby_after_the_other_takes_the_place_of_the_one_before() {
    let Some(mut member) = Member::run(|_| {}) else { return };
    let place = TempDir::new().expect("temporary directory");
    let mut last = 0;
    for generation in 0..3 {
        let standby = standby(&place, &format!("standby{generation}"));
        let first = generation * 10 + 1;
        member.seed(&standby, first);
        for epoch in first..first + 4 {
            member.cut(epoch, &standby);
            member.count_on();
        }
        // As if its host were gone.
        drop(member);
        member = standby.promote(first + 3);
        let counted = moment(&member.counters());
        assert!(counted > last, "{counted} after {last}");
        last = counted;
        member.protection.resume().expect("it stands still");
        member.count_on();
    }
}

#[test]
fn a_standby_goes_on_with_a_primary_that_went_back() {
    let Some(mut member) = Member::run(|_| {}) else { return };
    let place = TempDir::new().expect("temporary directory");
    let standby = standby(&place, "standby");
    member.seed(&standby, 1);
    member.cut(1, &standby);
    member.count_on();
    member.ship(2, &standby);
    member.count_on();
    member.protection.roll_back(1).expect("it is permanent");
    member.protection.resume().expect("it stands still");
    member.count_on();
    let at_cut = member.cut_paused(2, &standby);
    drop(member);
    assert_eq!(standby.promote(2).counters(), at_cut);
}

#[test]
fn wherever_the_link_is_cut_the_standby_is_at_the_last_permanent_cut() {
    // While it is seeded, in its first epochs, and between two of them.
    for bytes in [5_000, 40_000, 52_000, 60_000] {
        let Some(mut member) = Member::run(|_| {}) else { return };
        let place = TempDir::new().expect("temporary directory");
        let mut standby = standby(&place, "standby");
        let front = place.path().join("front");
        let _cutter = Cutter::between(front.clone(), place.path().join("standby"), Way::ToDestination, bytes);
        standby.address.endpoint = Endpoint::Unix(front);
        let (permanent, at_cut) = member.replicate(&standby);
        drop(member);
        if permanent > 0 {
            assert_eq!(standby.promote(permanent).counters(), at_cut, "{bytes} bytes");
        }
    }
}

#[test]
fn a_disk_has_its_name_when_the_standby_is_promoted_and_not_before() {
    let image = NamedTempFile::new().expect("temporary file");
    let content: Vec<u8> = (0..1_u32 << 18)
        .flat_map(|word| word.wrapping_mul(0x9e37_79b1).to_le_bytes())
        .collect();
    std::fs::write(image.path(), &content).expect("temporary file");
    let disk = disk(&image, DiskIo::Auto);
    let file = format!("{}.img", disk.id_at(0));
    let Some(mut member) = Member::run(|spec| spec.disks.push(disk)) else {
        return;
    };
    let place = TempDir::new().expect("temporary directory");
    let there: PathBuf = place.path().join(file);
    let standby = standby(&place, "standby");
    member.seed(&standby, 1);
    member.cut(1, &standby);
    member.cut(2, &standby);
    assert!(!there.exists());
    drop(member);
    let _promoted = standby.promote(2);
    assert!(std::fs::read(&there).expect("it has its name") == content);
}

#[test]
fn a_standby_whose_primary_is_gone_before_the_first_cut_is_not_promoted() {
    let Some(mut member) = Member::run(|_| {}) else { return };
    let place = TempDir::new().expect("temporary directory");
    let standby = standby(&place, "standby");
    member.seed(&standby, 1);
    drop(member);
    let told = standby.told.recv_timeout(PATIENCE).expect("it is told");
    assert!(matches!(told, StandbyNotice::PrimaryLost(_)), "{told:?}");
    standby.say(Say::Promote(1));
    let error = standby
        .arrival
        .join()
        .expect("no panic")
        .err()
        .expect("there is no cut");
    assert!(error.to_string().contains("cut 1"), "{error}");
}

#[test]
fn a_standby_and_what_it_becomes_can_be_handed_to_other_threads() {
    fn can_be_sent<T: Send>() {}
    can_be_sent::<crate::protection::Standby>();
    can_be_sent::<Vmm>();
}
