//! The network device (virtio 1.2 §5.1): an Ethernet interface whose other end is a tap device of the host.
//!
//! Frames go between guest memory and the tap without a copy in the monitor, each behind the 12-byte header that tap
//! and virtio share. `rx` brings frames in; `tx` takes frames out, all of them through the `gate`. Each direction has its
//! own rate limiter: what waits for one is left on the tap or in the guest's queue.
//!
//! Frames for the [metadata service](crate::mmds), if it is at this interface, go there instead of out, and its own come in
//! before those on the tap.
//!
//! What frames tell of the guest's `addresses` is kept, so that after a migration it can be made known to the LAN where
//! the guest is now: that is `announce`.

use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use cutover_snapshot::spec::{MacAddr, NetSpec, RateLimiterSpec};
use event_manager::{EventOps, Events, MutEventSubscriber};
use rustix::rand::{GetRandomFlags, getrandom};
use virtio_bindings::virtio_net::*;
use virtio_queue::Queue;
use vm_memory::ByteValued;
use vmm_sys_util::epoll::EventSet;

use self::addresses::Addresses;
pub use self::addresses::AddressesState;
use self::announce::Announcer;
use self::gate::{Gate, Step};
pub use self::gate::{HELD_BYTES_MAX, Held, MacTable};
use self::rx::Receiver;
pub use self::tap::Tap;
use self::tx::Transmitter;
use super::queue::QueueError;
use super::rate_limiter::Throttle;
use super::{ConfigSpace, DeviceError, Notifier, StartedQueues, VirtioDevice, has_feature};
use crate::CheckpointSoon;
use crate::mmds;
use crate::stats::NetCounters;

mod addresses;
mod announce;
mod gate;
mod interface;
mod rx;
mod tap;
#[cfg(test)]
mod tests;
mod tx;

/// Descriptors of the receive and of the transmit queue.
const QUEUE_SIZES: [u16; 2] = [256, 256];
/// Bytes of `struct virtio_net_hdr_v1`, in front of each frame.
const HEADER_LEN: usize = 12;
/// Most bytes of a frame with its header: 64 KiB of IP, the largest a segmentation offload makes, behind Ethernet and
/// VLAN headers.
const FRAME_LEN_MAX: usize = HEADER_LEN + 14 + 4 + (64 << 10);
/// Frames moved in one direction before the event loop's other work gets its turn.
const FRAMES_PER_TURN: u16 = 64;
/// Least MTU of IPv4, and of the specification (virtio 1.2 §5.1.4).
const MTU_MIN: u16 = 68;

const RX_DOORBELL: u32 = 0;
const TX_DOORBELL: u32 = 1;
const TAP: u32 = 2;
const RX_RESUME: u32 = 3;
const TX_RESUME: u32 = 4;
const ANNOUNCE: u32 = 5;
const GATE: u32 = 6;
const MMDS: u32 = 7;

/// A virtio network interface.
pub struct Net {
    mac: MacAddr,
    cable: Cable,
    announcer: Announcer,
    features: u64,
    config: ConfigSpace,
    limits: Limits,
    counters: Arc<NetCounters>,
    service: Option<Service>,
}

/// The way to the LAN, and what is known from there.
struct Cable {
    tap: Tap,
    gate: Gate,
    /// The guest's addresses.
    seen: Addresses,
    /// What answers some frames itself.
    mmds: Option<mmds::Endpoint>,
}

/// What holds frames back, in each direction.
struct Limits {
    rx: Throttle,
    tx: Throttle,
}

/// What there is between start and stop.
struct Service {
    notifier: Notifier,
    rx: Receiver,
    tx: Transmitter,
}

/// Why the device stops serving.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error(transparent)]
    Queue(#[from] QueueError),
    #[error("the event loop refused the tap device: {0}")]
    EventLoop(#[from] event_manager::Error),
}

/// [`virtio_net_config`] as the bytes a driver reads (virtio 1.2 §5.1.4).
#[derive(Clone, Copy, Default)]
#[repr(transparent)]
struct Config(virtio_net_config);

// SAFETY: the structure is packed integers, any bytes of which are valid.
unsafe impl ByteValued for Config {}

impl Net {
    /// Opens or creates the tap device that `spec` describes.
    ///
    /// # Errors
    /// It cannot be had, or is not a tap device.
    pub fn open(spec: &NetSpec) -> Result<Self, DeviceError> {
        Self::over(Tap::open(spec)?, spec)
    }

    /// A network device whose other end is `tap`.
    fn over(tap: Tap, spec: &NetSpec) -> Result<Self, DeviceError> {
        if let Some(mtu) = spec.mtu
            && mtu < MTU_MIN
        {
            return Err(DeviceError::Mtu { mtu, min: MTU_MIN });
        }
        let mac = match spec.mac {
            Some(mac) => mac,
            None => random_mac()?,
        };
        let config = Config(virtio_net_config {
            mac: mac.0,
            status: u16::try_from(VIRTIO_NET_S_LINK_UP).expect("one bit").to_le(),
            mtu: spec.mtu.unwrap_or_default().to_le(),
            ..Default::default()
        });
        let mut features = 1 << VIRTIO_NET_F_MAC | 1 << VIRTIO_NET_F_STATUS | 1 << VIRTIO_NET_F_MRG_RXBUF;
        if spec.mtu.is_some() {
            features |= 1 << VIRTIO_NET_F_MTU;
        }
        let counters = Arc::<NetCounters>::default();
        let gate = tap.gate(counters.clone())?;
        Ok(Self {
            mac,
            features: features | tap.features(),
            cable: Cable {
                tap,
                gate,
                seen: Addresses::default(),
                mmds: None,
            },
            announcer: Announcer::new()?,
            config: ConfigSpace::new(config.as_slice().to_vec()),
            limits: Limits {
                rx: Throttle::new(&spec.rx_rate_limiter)?,
                tx: Throttle::new(&spec.tx_rate_limiter)?,
            },
            counters,
            service: None,
        })
    }

    /// Has `service` answer at `address`. The MTU of the interface is `mtu`, if it is told one.
    ///
    /// # Errors
    /// The operating system refused what that takes.
    pub fn serve_metadata(
        &mut self,
        service: Arc<mmds::Service>,
        address: Ipv4Addr,
        mtu: Option<u16>,
    ) -> Result<(), DeviceError> {
        self.cable.mmds = Some(mmds::Endpoint::new(service, address, mtu, HEADER_LEN)?);
        Ok(())
    }

    /// The tap device for another process on this host, which goes on with it when this one has stopped.
    ///
    /// # Errors
    /// There are no descriptors left.
    pub fn share_tap(&self) -> Result<OwnedFd, DeviceError> {
        self.cable.tap.share()
    }

    /// The guest's own address.
    pub fn mac(&self) -> MacAddr {
        self.mac
    }

    /// Changes the limits of what the guest receives and sends; see [`RateLimiterSpec`] for what is left as it is.
    pub fn limit(&mut self, rx: &RateLimiterSpec, tx: &RateLimiterSpec) {
        self.limits.rx.update(rx);
        self.limits.tx.update(tx);
    }

    /// Has the LAN told that the guest is behind this interface now, several times over the next half second, as soon
    /// as its driver runs. What is told is what is known of it now.
    pub fn announce(&mut self) {
        let frames = announce::frames(self.mac.0, &self.cable.seen);
        self.announcer.begin(frames);
    }

    /// From now on holds what the guest sends in `epoch` to others than the members of `group`, until that is
    /// [released](Self::release). Each time half of [`HELD_BYTES_MAX`] is held, `soon` is called; when all of it is, the
    /// guest's frames wait in its queue.
    pub fn hold(&mut self, group: Arc<MacTable>, epoch: u64, soon: CheckpointSoon) {
        self.cable.gate.ask(soon);
        self.cable.gate.take(Step::Hold { group, epoch });
    }

    /// No frame leaves any more, not even to members of the group, until it is [unblocked](Self::unblock).
    pub fn block(&mut self) {
        self.cable.gate.take(Step::Block);
    }

    /// Frames to members of the group leave again.
    pub fn unblock(&mut self) {
        self.cable.gate.take(Step::Unblock);
    }

    /// What the guest sends from here on belongs to epoch `next`. The device is stopped.
    pub fn cut(&mut self, next: u64) {
        self.cable.gate.take(Step::Cut(next));
    }

    /// Epoch `epoch` is permanent: what was sent in it and before it leaves, as soon as the interface is not blocked.
    pub fn release(&mut self, epoch: u64) {
        self.cable.gate.take(Step::Release(epoch));
    }

    /// Nobody protects the VM any more: all that is held leaves, and nothing more is.
    pub fn open_gate(&mut self) {
        self.cable.gate.take(Step::Open);
    }

    /// Drops what is held of epochs that are not [released](Self::release), as the guest of the stopped device goes back to
    /// a checkpoint from before it was sent. Returns what it was.
    pub fn discard(&mut self) -> Held {
        self.cable.gate.discard()
    }

    /// What is held, or waits for room on the tap.
    pub fn held(&self) -> Held {
        self.cable.gate.held()
    }

    /// Drops what waits to be received: it was sent to a guest that there is no more, as it went back to a checkpoint.
    /// Returns how many frames it was.
    pub fn drop_received(&mut self) -> usize {
        self.cable.tap.drop_received()
    }

    /// The addresses that the guest was seen to use.
    pub fn addresses(&self) -> AddressesState {
        (&self.cable.seen).into()
    }

    /// Goes on from the addresses that the guest was seen to use before.
    pub fn recall(&mut self, addresses: &AddressesState) {
        self.cable.seen = addresses.into();
    }

    /// What it has done.
    pub fn counters(&self) -> &Arc<NetCounters> {
        &self.counters
    }
}

impl Limits {
    /// If a timer rang, frames may be tried again.
    fn resume(&mut self, data: u32) {
        match data {
            RX_RESUME => self.rx.resume(),
            TX_RESUME => self.tx.resume(),
            _ => {}
        }
    }

    fn watch(&self, ops: &mut EventOps) -> Result<(), event_manager::Error> {
        self.rx.watch(ops, RX_RESUME)?;
        self.tx.watch(ops, TX_RESUME)
    }

    fn ignore(&self, ops: &mut EventOps) {
        self.rx.ignore(ops);
        self.tx.ignore(ops);
    }
}

impl Service {
    fn serve(&mut self, cable: &mut Cable, limits: &mut Limits, events: Events) -> Result<(), QueueError> {
        let writable = events.event_set().contains(EventSet::OUT);
        match events.data() {
            RX_DOORBELL | RX_RESUME => self.rx.serve(cable, &mut limits.rx, &self.notifier)?,
            TX_DOORBELL | TX_RESUME => self.tx.serve(cable, &mut limits.tx, &self.notifier)?,
            GATE => self.tx.serve_after_flush(cable, &mut limits.tx, &self.notifier)?,
            MMDS => cable.mmds.iter_mut().for_each(mmds::Endpoint::go_on),
            _ => {
                if writable {
                    self.tx.serve_after_flush(cable, &mut limits.tx, &self.notifier)?;
                }
                self.rx.serve(cable, &mut limits.rx, &self.notifier)?;
            }
        }
        if cable.mmds.as_ref().is_some_and(mmds::Endpoint::has_next) {
            self.rx.serve(cable, &mut limits.rx, &self.notifier)?;
        }
        Ok(())
    }
}

impl VirtioDevice for Net {
    fn device_type(&self) -> u32 {
        virtio_bindings::virtio_ids::VIRTIO_ID_NET
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn config(&self) -> ConfigSpace {
        self.config.clone()
    }

    fn start(&mut self, mut started: StartedQueues) -> Result<(), DeviceError> {
        self.cable.tap.accept_features(started.features)?;
        let [rx, tx] = started.take_queues();
        let mergeable = has_feature(started.features, VIRTIO_NET_F_MRG_RXBUF);
        self.service = Some(Service {
            notifier: started.notifier,
            rx: Receiver::new(rx, mergeable, self.counters.clone()),
            tx: Transmitter::new(tx, self.counters.clone()),
        });
        Ok(())
    }

    fn stop(&mut self) -> Vec<Queue> {
        match self.service.take() {
            Some(service) => vec![service.rx.into_queue(), service.tx.into_queue()],
            None => Vec::new(),
        }
    }
}

impl MutEventSubscriber for Net {
    fn process(&mut self, events: Events, ops: &mut EventOps) {
        self.limits.resume(events.data());
        let Some(service) = &mut self.service else {
            return;
        };
        if events.data() == ANNOUNCE {
            self.announcer.rang(&mut self.cable.gate);
            return;
        }
        let served = service.serve(&mut self.cable, &mut self.limits, events);
        let mut served = served.map_err(Failure::from);
        if self.cable.gate.needs_room() {
            served = served.and(self.cable.tap.watch_again(ops, TAP).map_err(Failure::from));
        }
        if let Err(failure) = served {
            service.notifier.fail(failure);
            service.rx.queue().ignore_doorbell(ops);
            service.tx.queue().ignore_doorbell(ops);
            self.cable.tap.ignore(ops);
            self.limits.ignore(ops);
            self.announcer.ignore(ops);
            self.cable.gate.ignore(ops);
            self.cable.mmds.iter().for_each(|mmds| mmds.ignore(ops));
        }
    }

    fn init(&mut self, ops: &mut EventOps) {
        let Some(service) = &self.service else {
            return;
        };
        let watched = service
            .rx
            .queue()
            .watch_doorbell(ops, RX_DOORBELL)
            .and_then(|()| service.tx.queue().watch_doorbell(ops, TX_DOORBELL))
            .and_then(|()| self.cable.tap.watch(ops, TAP))
            .and_then(|()| self.limits.watch(ops))
            .and_then(|()| self.announcer.watch(ops, ANNOUNCE))
            .and_then(|()| self.cable.gate.watch(ops, GATE))
            .and_then(|()| self.cable.mmds.iter().try_for_each(|mmds| mmds.watch(ops, MMDS)));
        if let Err(error) = watched {
            service.notifier.fail(error);
        }
    }
}

/// Makes up a unicast address, marked as given by an administrator rather than a manufacturer.
///
/// # Errors
/// The operating system has no random numbers.
pub fn random_mac() -> Result<MacAddr, DeviceError> {
    let mut bytes = [0; 6];
    // So few bytes come in one piece (getrandom(2)).
    getrandom(&mut bytes, GetRandomFlags::empty()).map_err(DeviceError::system("make up a MAC address"))?;
    bytes[0] = bytes[0] & !1 | 2;
    Ok(MacAddr(bytes))
}
