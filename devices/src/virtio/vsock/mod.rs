//! The socket device (virtio 1.2 §5.10): stream sockets between programs of the guest and Unix sockets of the host.
//!
//! ```text
//!  guest's queues      packet       headers                    table         every connection, and what waits for the guest
//!   rx ◄───────────────────────────────────────────────────────  ├ connection ◄──► a Unix socket      credit: flow control
//!   tx ────────────────────────────────────────────────────────► └ host        ◄── clients; ──► listeners, port by port
//!   event ◄── "all connections are gone"
//! ```
//! Everything happens on the event loop and nothing waits: sockets do not block, and what the guest has no room for stays in
//! them.
//!
//! Connections live through a pause. They are those of one process: a device that goes on with queues that another one had
//! served, as after a restore, a migration, or a way back to a checkpoint, has none, and tells the guest so
//! (`VIRTIO_VSOCK_EVENT_TRANSPORT_RESET`). So nothing of them is saved. A driver that sets the device up anew knows of
//! none either: they are closed.
//!
//! Output commit is not for this device: what a protected guest sends here is seen at once, while its
//! [frames](crate::virtio::net) are held. It reaches programs of this host alone, which lose their connections when the
//! guest goes on elsewhere or from a checkpoint.

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;

use cutover_snapshot::spec::VsockSpec;
use event_manager::{EventOps, Events, MutEventSubscriber};
use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;
use virtio_queue::Queue;
use vmm_sys_util::epoll::EventSet;

use self::host::{BACKLOG, Host};
use self::packet::{HEADER_LEN, Header};
use self::table::Table;
use super::log_limit::LogLimit;
use super::queue::{Chain, QueueError};
use super::{ConfigSpace, DeviceError, Notifier, ServedQueue, StartedQueues, VirtioDevice};
use crate::stats::VsockCounters;

mod connection;
mod credit;
mod host;
mod packet;
mod table;
#[cfg(test)]
mod tests;

/// Descriptors of the receive, the transmit and the event queue.
const QUEUE_SIZES: [u16; 3] = [256, 256, 64];
/// Packets moved in one direction before the event loop's other work gets its turn.
const PACKETS_PER_TURN: u16 = 64;
/// `VIRTIO_VSOCK_EVENT_TRANSPORT_RESET`, as the bytes of `struct virtio_vsock_event`.
const TRANSPORT_RESET: [u8; 4] = [0; 4];

const RX_DOORBELL: u32 = 0;
const TX_DOORBELL: u32 = 1;
const EVENT_DOORBELL: u32 = 2;
const LISTENER: u32 = 3;
/// Data of events of connections: this and more.
const CONNECTIONS: u32 = 4;

/// A virtio socket device.
pub struct Vsock {
    host: Host,
    table: Table,
    config: ConfigSpace,
    counters: Arc<VsockCounters>,
    /// Whether the driver's connections are those in the table: it has been served here before.
    is_known: bool,
    service: Option<Service>,
    errors_logged: LogLimit,
}

/// What there is between start and stop.
struct Service {
    notifier: Notifier,
    rx: ServedQueue,
    tx: ServedQueue,
    event: ServedQueue,
    chain: Chain,
    /// Whether the guest still has to be told that all its connections are gone.
    reset_is_due: bool,
    /// Whether packets of the guest wait until it has taken some itself.
    tx_waits: bool,
}

impl Vsock {
    /// The device that `spec` describes. Nobody [listens](Self::listen) for clients yet.
    pub fn new(spec: &VsockSpec) -> Self {
        let counters = Arc::<VsockCounters>::default();
        Self {
            host: Host::new(&spec.uds),
            table: Table::new(spec.cid.into(), CONNECTIONS, counters.clone()),
            // `struct virtio_vsock_config`.
            config: ConfigSpace::new(u64::from(spec.cid).to_le_bytes().to_vec()),
            counters,
            is_known: false,
            service: None,
            errors_logged: LogLimit::default(),
        }
    }

    /// Listens for clients of the host, if it does not already. The device is stopped.
    ///
    /// # Errors
    /// Somebody else listens at its path, or nobody can.
    pub fn listen(&mut self) -> Result<(), DeviceError> {
        Ok(self.host.listen()?)
    }

    /// Lets another process listen. The device is stopped; its connections stay.
    pub fn stop_listening(&mut self) {
        self.host.stop_listening();
    }

    /// What it has done.
    pub fn counters(&self) -> &Arc<VsockCounters> {
        &self.counters
    }

    /// Takes in clients.
    fn accept(&mut self, ops: &mut EventOps) {
        let Some(listener) = self.host.listener() else {
            return;
        };
        for _ in 0..BACKLOG {
            match listener.accept() {
                Ok(client) => self.table.admit(client, ops),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) => {
                    if self.errors_logged.allows() {
                        tracing::warn!(path = %listener.path().display(), %error, "cannot accept a vsock client");
                    }
                    return;
                }
            }
        }
        // There may be more, of which the event loop reports again.
        if let Err(error) = ops.modify(clients(listener)) {
            tracing::error!(%error, "the event loop refused the vsock listener");
        }
    }

    /// Has the event loop report everything.
    fn watch(&mut self, ops: &mut EventOps) -> Result<(), event_manager::Error> {
        let Some(service) = &self.service else {
            return Ok(());
        };
        service.rx.watch_doorbell(ops, RX_DOORBELL)?;
        service.tx.watch_doorbell(ops, TX_DOORBELL)?;
        service.event.watch_doorbell(ops, EVENT_DOORBELL)?;
        if let Some(listener) = self.host.listener() {
            ops.add(clients(listener))?;
        }
        self.table.watch(ops);
        Ok(())
    }

    /// Has the event loop report nothing any more.
    fn ignore(&mut self, ops: &mut EventOps) {
        if let Some(service) = &self.service {
            for queue in [&service.rx, &service.tx, &service.event] {
                queue.ignore_doorbell(ops);
            }
        }
        if let Some(listener) = self.host.listener()
            && let Err(error) = ops.remove(Events::empty(&listener.as_fd()))
        {
            tracing::error!(%error, "cannot take the vsock listener off the event loop");
        }
        self.table.ignore(ops);
        self.table.clear();
    }
}

/// The listener's events. Edge-triggered: one that fails to accept, such as for want of descriptors, is not tried over and
/// over.
fn clients(listener: &crate::listener::Listener) -> Events {
    Events::with_data(&listener.as_fd(), LISTENER, EventSet::IN | EventSet::EDGE_TRIGGERED)
}

impl Service {
    fn serve(&mut self, data: u32, table: &mut Table, host: &Host, ops: &mut EventOps) -> Result<(), QueueError> {
        if self.reset_is_due {
            self.tell_of_reset()?;
        }
        // Until the guest knows that its connections are gone, it has no use for others.
        if self.reset_is_due {
            return Ok(());
        }
        if data == TX_DOORBELL {
            self.take_packets(table, host, ops)?;
        }
        self.give_packets(table, ops)?;
        if self.tx_waits && table.has_room() {
            // What it waited for has happened just now.
            self.tx.ring_doorbell();
        }
        Ok(())
    }

    /// Tells the guest that all its connections are gone, if it has a buffer for that.
    fn tell_of_reset(&mut self) -> Result<(), QueueError> {
        let mut turn = self.event.begin_turn(self.event.size())?;
        if self.event.pop(&mut turn, &mut self.chain)? {
            let head = self.chain.head;
            if self.chain.writable.copy_from(0, &TRANSPORT_RESET)? < TRANSPORT_RESET.len() {
                return Err(QueueError::NoAnswer { head });
            }
            self.event.push_used(head, TRANSPORT_RESET.len())?;
            self.reset_is_due = false;
            // What was offered meanwhile was announced, and not looked at.
            self.tx.ring_doorbell();
        }
        self.event.notify(&self.notifier)
    }

    /// Takes what the guest sends.
    fn take_packets(&mut self, table: &mut Table, host: &Host, ops: &mut EventOps) -> Result<(), QueueError> {
        let mut turn = self.tx.begin_turn(PACKETS_PER_TURN)?;
        loop {
            self.tx_waits = !table.has_room();
            if self.tx_waits || !self.tx.pop(&mut turn, &mut self.chain)? {
                break;
            }
            let head = self.chain.head;
            let mut bytes = [0; HEADER_LEN];
            // A packet without a header has no sender to be refused to: it is dropped.
            if self.chain.readable.copy_to(&mut bytes)? == HEADER_LEN {
                let header = Header::read(&bytes);
                self.chain.readable.advance(HEADER_LEN);
                table.receive(&header, &mut self.chain.readable, host, ops)?;
            }
            self.tx.push_used(head, 0)?;
        }
        self.tx.notify(&self.notifier)
    }

    /// Gives the guest what there is for it.
    fn give_packets(&mut self, table: &mut Table, ops: &mut EventOps) -> Result<(), QueueError> {
        if !table.has_something() {
            return Ok(());
        }
        let mut turn = self.rx.begin_turn(PACKETS_PER_TURN)?;
        while table.has_something() && self.rx.pop(&mut turn, &mut self.chain)? {
            let head = self.chain.head;
            if self.chain.writable.len() < HEADER_LEN {
                return Err(QueueError::NoAnswer { head });
            }
            match table.send(&self.chain.writable, ops)? {
                Some(len) => self.rx.push_used(head, len)?,
                None => self.rx.unpop(1),
            }
        }
        self.rx.notify(&self.notifier)
    }
}

impl VirtioDevice for Vsock {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_VSOCK
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    /// None: without any, there are stream sockets (virtio 1.2 §5.10.3).
    fn features(&self) -> u64 {
        0
    }

    fn config(&self) -> ConfigSpace {
        self.config.clone()
    }

    fn start(&mut self, mut started: StartedQueues) -> Result<(), DeviceError> {
        let [rx, tx, event] = started.take_queues();
        if !started.go_on {
            self.table.clear();
        }
        self.service = Some(Service {
            chain: rx.new_chain(),
            notifier: started.notifier,
            rx,
            tx,
            event,
            reset_is_due: started.go_on && !self.is_known,
            tx_waits: false,
        });
        Ok(())
    }

    fn stop(&mut self) -> Vec<Queue> {
        let Some(service) = self.service.take() else {
            return Vec::new();
        };
        self.is_known = !service.reset_is_due;
        [service.rx, service.tx, service.event]
            .map(ServedQueue::into_queue)
            .into()
    }
}

impl MutEventSubscriber for Vsock {
    fn process(&mut self, events: Events, ops: &mut EventOps) {
        if self.service.is_none() {
            return;
        }
        match events.data() {
            LISTENER => self.accept(ops),
            data if data >= CONNECTIONS => self.table.report(data, events.event_set(), ops),
            _ => {}
        }
        if let Some(service) = &mut self.service
            && let Err(failure) = service.serve(events.data(), &mut self.table, &self.host, ops)
        {
            service.notifier.fail(failure);
            self.ignore(ops);
        }
    }

    fn init(&mut self, ops: &mut EventOps) {
        if let Err(error) = self.watch(ops)
            && let Some(service) = &self.service
        {
            service.notifier.fail(error);
        }
    }
}
