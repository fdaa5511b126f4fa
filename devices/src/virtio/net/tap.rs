//! The tap device: how it is opened or created, and its receiving side. What is sent goes through the
//! [`gate`](super::gate) alone.

use std::ffi::{c_int, c_short, c_uint};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;

use cutover_snapshot::spec::{NetSpec, TapSpec};
use event_manager::{EventOps, Events};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::io::fcntl_dupfd_cloexec;
use virtio_bindings::virtio_net::*;
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ref, ioctl_with_val};

use super::gate::Gate;
use super::interface::{Interface, NAME_LEN_MAX, check, name_in, request_for};
use super::{DeviceError, HEADER_LEN, has_feature};
use crate::stats::NetCounters;
use crate::virtio::buffers::GuestBuffers;

/// The kernel puts the lowest free number in place of `%d`.
const NAME_PATTERN: &str = "cutover%d";
/// Most frames that are dropped at once: more than a tap device queues (`txqueuelen`, by default 1000).
const DROPPED_FRAMES_MAX: usize = 4096;
/// Ethernet frames, without a protocol header, with a virtio header.
const FLAGS: c_int = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
/// What the guest accepts, and what the tap may then leave undone.
const GUEST_OFFLOADS: [(u32, c_uint); 4] = [
    (VIRTIO_NET_F_GUEST_CSUM, libc::TUN_F_CSUM),
    (VIRTIO_NET_F_GUEST_TSO4, libc::TUN_F_TSO4),
    (VIRTIO_NET_F_GUEST_TSO6, libc::TUN_F_TSO6),
    (VIRTIO_NET_F_GUEST_ECN, libc::TUN_F_TSO_ECN),
];
/// What the guest may leave undone: whatever has a virtio header, the kernel can finish.
const HOST_OFFLOADS: [u32; 4] = [
    VIRTIO_NET_F_CSUM,
    VIRTIO_NET_F_HOST_TSO4,
    VIRTIO_NET_F_HOST_TSO6,
    VIRTIO_NET_F_HOST_ECN,
];

/// An open tap device. Frames carry a header of [`HEADER_LEN`] bytes.
pub struct Tap {
    fd: OwnedFd,
    name: String,
    /// Whether it finishes checksums and segments on demand.
    offloads: bool,
}

impl Tap {
    /// Opens or creates the tap device of `spec`, and configures what `spec` says of the host's end.
    pub fn open(spec: &NetSpec) -> Result<Self, DeviceError> {
        let (tap, created) = match &spec.tap {
            TapSpec::Create => (Self::attach(NAME_PATTERN)?, true),
            TapSpec::Name(name) => {
                check_name(name)?;
                let interface = Interface::new(name).map_err(DeviceError::system("open a socket"))?;
                let created = !interface.exists();
                (Self::attach(name)?, created)
            }
            TapSpec::Fd(fd) => (Self::inherit(*fd)?, false),
        };
        tap.configure(spec, created)?;
        Ok(tap)
    }

    /// A socket that keeps message boundaries, in place of a tap device.
    #[cfg(test)]
    pub fn over_socket(fd: OwnedFd) -> Self {
        Self {
            fd,
            name: "socket".to_owned(),
            offloads: false,
        }
    }

    /// The same device for another process.
    pub fn share(&self) -> Result<OwnedFd, DeviceError> {
        self.fd.try_clone().map_err(self.error("duplicate the descriptor of"))
    }

    /// Feature bits it makes possible.
    pub fn features(&self) -> u64 {
        let guest = GUEST_OFFLOADS.map(|(feature, _)| feature);
        let possible: &[&[u32]] = if self.offloads { &[&HOST_OFFLOADS, &guest] } else { &[] };
        possible
            .iter()
            .copied()
            .flatten()
            .fold(0, |features, bit| features | 1 << bit)
    }

    /// From now on leaves to the guest what it accepted with `features`.
    pub fn accept_features(&self, features: u64) -> Result<(), DeviceError> {
        if !self.offloads {
            return Ok(());
        }
        let accepted = GUEST_OFFLOADS
            .iter()
            .filter(|(feature, _)| has_feature(features, *feature));
        let offloads = accepted.fold(0, |offloads, (_, offload)| offloads | offload);
        self.set_offloads(offloads).map_err(self.error("set the offloads of"))
    }

    /// The way out, which counts what the host does not take in `counters`.
    pub fn gate(&self, counters: Arc<NetCounters>) -> Result<Gate, DeviceError> {
        Gate::new(self.share()?, &self.name, counters)
    }

    /// Reads one frame with its header; what does not fit into `space` is lost.
    pub fn receive(&self, space: &GuestBuffers) -> io::Result<usize> {
        space.read_from(self.fd.as_fd())
    }

    /// Drops frames that wait to be received, at most [`DROPPED_FRAMES_MAX`]; returns how many.
    pub fn drop_received(&self) -> usize {
        // What does not fit is lost, as it is to be; a header has to fit.
        let mut beginning = [0; 256];
        let received = || rustix::io::retry_on_intr(|| rustix::io::read(&self.fd, &mut beginning)).is_ok();
        std::iter::repeat_with(received)
            .take(DROPPED_FRAMES_MAX)
            .take_while(|received| *received)
            .count()
    }

    /// Has the event loop report, with `data`, that there are frames or that there is room for frames.
    ///
    /// Edge-triggered: nothing has to be switched off while the guest has no buffers or nothing to send.
    pub fn watch(&self, ops: &mut EventOps, data: u32) -> Result<(), event_manager::Error> {
        ops.add(self.events(data))
    }

    /// Has the event loop report room even if there is some by now.
    ///
    /// Needed after a frame was refused: the kernel's driver announces room only to those who asked for it since there
    /// was none, which a refused write does not do.
    pub fn watch_again(&self, ops: &mut EventOps, data: u32) -> Result<(), event_manager::Error> {
        ops.modify(self.events(data))
    }

    fn events(&self, data: u32) -> Events {
        Events::with_data(&self.fd, data, EventSet::IN | EventSet::OUT | EventSet::EDGE_TRIGGERED)
    }

    /// Has the event loop report nothing more.
    pub fn ignore(&self, ops: &mut EventOps) {
        if let Err(error) = ops.remove(Events::empty(&self.fd)) {
            tracing::error!(name = self.name, %error, "cannot take a tap device off the event loop");
        }
    }

    /// Attaches to the tap device called `name`, which is created if there is none.
    fn attach(name: &str) -> Result<Self, DeviceError> {
        let file = open_tun().map_err(|source| DeviceError::OpenTun { source })?;
        let mut request = request_for(name);
        request.ifr_ifru.ifru_flags = c_short::try_from(FLAGS).expect("a constant that fits");
        // SAFETY: the kernel reads and writes no more than an `ifreq`.
        check(unsafe { ioctl_with_mut_ref(&file, libc::TUNSETIFF, &mut request) }).map_err(|source| {
            let name = name.to_owned();
            match source.raw_os_error() {
                Some(libc::EBUSY) => DeviceError::TapBusy(name),
                Some(libc::EPERM) => DeviceError::TapNotPermitted(name),
                Some(libc::EINVAL) => DeviceError::TapKind(name),
                _ => DeviceError::Tap {
                    action: "attach to",
                    name,
                    source,
                },
            }
        })?;
        Self::prepare(file.into(), name_in(&request))
    }

    /// Takes over an open tap device.
    fn inherit(fd: RawFd) -> Result<Self, DeviceError> {
        let wrong = |reason: String| DeviceError::TapFd { fd, reason };
        if fd < 0 {
            return Err(wrong("it is negative".to_owned()));
        }
        // SAFETY: the borrow ends with this call, which fails if there is no such descriptor.
        let own = fcntl_dupfd_cloexec(unsafe { BorrowedFd::borrow_raw(fd) }, 0).map_err(|e| wrong(e.to_string()))?;
        let mut request = request_for("");
        // SAFETY: the kernel writes no more than an `ifreq`.
        check(unsafe { ioctl_with_mut_ref(&own, libc::TUNGETIFF, &mut request) }).map_err(|e| wrong(e.to_string()))?;
        // SAFETY: the kernel just filled in the flags.
        let flags = c_int::from(unsafe { request.ifr_ifru.ifru_flags });
        if flags & FLAGS != FLAGS {
            return Err(wrong(
                "it was not opened with IFF_TAP, IFF_NO_PI and IFF_VNET_HDR".to_owned(),
            ));
        }
        Self::prepare(own, name_in(&request))
    }

    fn prepare(fd: OwnedFd, name: String) -> Result<Self, DeviceError> {
        let mut tap = Self {
            fd,
            name,
            offloads: false,
        };
        let header_len = c_int::try_from(HEADER_LEN).expect("a constant that fits");
        // SAFETY: the kernel reads one integer.
        check(unsafe { ioctl_with_ref(&tap.fd, libc::TUNSETVNETHDRSZ, &header_len) })
            .map_err(tap.error("set the header length of"))?;
        fcntl_getfl(&tap.fd)
            .and_then(|flags| fcntl_setfl(&tap.fd, flags | OFlags::NONBLOCK))
            .map_err(tap.error("make reads not wait on"))?;
        let all = GUEST_OFFLOADS
            .iter()
            .fold(0, |offloads, (_, offload)| offloads | offload);
        // None until a driver accepts some: the trial only shows whether it could.
        tap.offloads = tap.set_offloads(all).and_then(|()| tap.set_offloads(0)).is_ok();
        Ok(tap)
    }

    /// One that was `created` for this VM has nobody else to bring it up.
    fn configure(&self, spec: &NetSpec, created: bool) -> Result<(), DeviceError> {
        if !created && spec.host_ip.is_none() {
            return Ok(());
        }
        let interface = Interface::new(&self.name).map_err(self.error("configure"))?;
        if let Some(mtu) = spec.mtu.filter(|_| created) {
            interface.set_mtu(mtu).map_err(self.error("set the MTU of"))?;
        }
        if let Some(address) = spec.host_ip {
            interface
                .set_address(address)
                .map_err(self.error("set the address of"))?;
        }
        interface.bring_up().map_err(self.error("bring up"))
    }

    fn set_offloads(&self, offloads: c_uint) -> io::Result<()> {
        // SAFETY: the argument is a value.
        check(unsafe { ioctl_with_val(&self.fd, libc::TUNSETOFFLOAD, offloads.into()) })
    }

    fn error<E: Into<io::Error>>(&self, action: &'static str) -> impl FnOnce(E) -> DeviceError {
        let name = self.name.clone();
        move |source| DeviceError::Tap {
            action,
            name,
            source: source.into(),
        }
    }
}

fn open_tun() -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open("/dev/net/tun")
}

fn check_name(name: &str) -> Result<(), DeviceError> {
    let valid = (1..=NAME_LEN_MAX).contains(&name.len())
        && name != "."
        && name != ".."
        && !name
            .bytes()
            .any(|byte| byte == 0 || byte == b'/' || byte == b':' || byte.is_ascii_whitespace());
    if valid {
        Ok(())
    } else {
        Err(DeviceError::TapName(name.to_owned()))
    }
}
