//! A virtqueue while a device serves it, and the descriptor chains taken from it.
//!
//! The available ring is virtio-queue's. What is added: a chain is taken apart strictly (that crate ends a malformed one
//! silently), into buffers ready for I/O; and used buffers are published several at a time (that crate does it one by
//! one).

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use event_manager::{EventOps, Events};
use virtio_bindings::virtio_ring::{VRING_AVAIL_F_NO_INTERRUPT, VRING_DESC_F_NEXT};
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryError, Le64};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

use super::buffers::{BuffersError, GuestBuffers, SEGMENTS_MAX};
use super::notifier::Notifier;
use crate::GuestMemory;

/// Offsets inside both rings (virtio 1.2 §2.7.6, §2.7.8). The rings lie inside guest memory: checked before service.
const FLAGS_OFFSET: u64 = 0;
const INDEX_OFFSET: u64 = 2;
const AVAILABLE_RING_OFFSET: u64 = 4;
const USED_RING_OFFSET: u64 = 4;
const USED_ELEMENT_SIZE: u64 = 8;

/// A queue in service.
pub struct ServedQueue {
    queue: Queue,
    doorbell: Arc<EventFd>,
    memory: Arc<GuestMemory>,
    /// The used index up to which the driver was told.
    notified_used: u16,
}

/// What a driver may not do with a queue; the device stops over it.
#[derive(Debug, thiserror::Error)]
pub enum QueueError {
    /// The rings make no sense, such as an available index that jumped ahead.
    #[error("malformed ring: {0}")]
    Ring(#[from] virtio_queue::Error),
    /// A chain has no descriptor, does not end, or leads outside its table.
    #[error("descriptor chain {head} has no proper end")]
    Endless {
        /// Index of its first descriptor.
        head: u16,
    },
    /// The device-readable part must come first (virtio 1.2 §2.7.4.2).
    #[error("descriptor chain {head} has a device-readable descriptor after a device-writable one")]
    Order {
        /// Index of its first descriptor.
        head: u16,
    },
    /// A descriptor's buffer cannot be used.
    #[error("descriptor chain {head}: {source}")]
    Buffers {
        /// Index of its first descriptor.
        head: u16,
        /// What is wrong.
        source: BuffersError,
    },
    /// The driver offered a chain again before it got it back.
    #[error("descriptor chain {head} is offered while it is still in use")]
    InUse {
        /// Index of its first descriptor.
        head: u16,
    },
    /// A request that has no room for its answer.
    #[error("descriptor chain {head} has no room for the device's answer")]
    NoAnswer {
        /// Index of its first descriptor.
        head: u16,
    },
    /// Guest memory that was there before is not there now.
    #[error("guest memory cannot be accessed: {0}")]
    Memory(#[from] GuestMemoryError),
}

/// A descriptor chain taken from a queue.
pub struct Chain {
    /// Index of its first descriptor, by which it is given back.
    pub head: u16,
    /// What the driver sends.
    pub readable: GuestBuffers,
    /// Where the device answers.
    pub writable: GuestBuffers,
}

/// A stretch of taking chains; see [`ServedQueue::begin_turn`].
pub struct Turn {
    budget: u16,
}

impl Chain {
    /// An empty chain for [`ServedQueue::pop`] to fill, over and over.
    fn new(memory: &Arc<GuestMemory>) -> Self {
        Self {
            head: 0,
            readable: GuestBuffers::new(memory.clone()),
            writable: GuestBuffers::new(memory.clone()),
        }
    }

    fn fill(&mut self, head: u16, descriptors: impl Iterator<Item = Descriptor>) -> Result<(), QueueError> {
        self.head = head;
        self.readable.clear();
        self.writable.clear();
        let mut ended = false;
        for (index, descriptor) in descriptors.enumerate() {
            // Empty descriptors make no segments, and an indirect table may hold 65535 of them.
            if index == SEGMENTS_MAX {
                return Err(QueueError::Buffers {
                    head,
                    source: BuffersError::TooMany,
                });
            }
            let writable = descriptor.is_write_only();
            if !writable && self.writable.len() > 0 {
                return Err(QueueError::Order { head });
            }
            let buffers = if writable {
                &mut self.writable
            } else {
                &mut self.readable
            };
            let len = usize::try_from(descriptor.len()).expect("u32 fits usize on x86-64");
            buffers
                .push(descriptor.addr(), len)
                .map_err(|source| QueueError::Buffers { head, source })?;
            // The iterator also stops where it cannot go on; only a descriptor without NEXT is an end.
            ended = u32::from(descriptor.flags()) & VRING_DESC_F_NEXT == 0;
        }
        if ended {
            Ok(())
        } else {
            Err(QueueError::Endless { head })
        }
    }
}

impl ServedQueue {
    pub(super) fn new(queue: Queue, doorbell: Arc<EventFd>, memory: Arc<GuestMemory>) -> Self {
        let notified_used = queue.next_used();
        Self {
            queue,
            doorbell,
            memory,
            notified_used,
        }
    }

    /// Number of descriptors: the most chains there can be at once.
    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    /// An empty chain for [`pop`](Self::pop) to fill, over and over.
    pub fn new_chain(&self) -> Chain {
        Chain::new(&self.memory)
    }

    /// Empty buffers of the same guest memory.
    pub fn new_buffers(&self) -> GuestBuffers {
        GuestBuffers::new(self.memory.clone())
    }

    /// The guest memory the queue is in.
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// Begins to take chains, at most about `budget` of them before others get their turn. Until it has taken all, the
    /// driver need not ring the doorbell.
    ///
    /// # Errors
    /// The rings cannot be accessed.
    pub fn begin_turn(&mut self, budget: u16) -> Result<Turn, QueueError> {
        self.queue.disable_notification(&*self.memory)?;
        Ok(Turn { budget })
    }

    /// Takes the next chain the driver offers into `chain`; false ends the turn. Then either there is no chain, and the
    /// driver will ring the doorbell for the next; or the budget is used up, and the doorbell is rung already.
    ///
    /// # Errors
    /// The driver broke the rules.
    pub fn pop(&mut self, turn: &mut Turn, chain: &mut Chain) -> Result<bool, QueueError> {
        while turn.budget > 0 {
            // Looking again costs too: a driver that moves its index to and fro must not keep us here.
            turn.budget -= 1;
            if let Some(descriptors) = self.queue.iter(&*self.memory)?.next() {
                chain.fill(descriptors.head_index(), descriptors)?;
                return Ok(true);
            }
            if !self.queue.enable_notification(&*self.memory)? {
                return Ok(false);
            }
            self.queue.disable_notification(&*self.memory)?;
        }
        self.ring_doorbell();
        Ok(false)
    }

    /// Un-takes the last `count` chains taken, none of which was touched.
    pub fn unpop(&mut self, count: u16) {
        self.queue.set_next_avail(self.queue.next_avail().wrapping_sub(count));
    }

    /// Gives chain `head` back, with `written` bytes of its device-writable part written. The driver sees it with the
    /// next [`publish`](Self::publish).
    ///
    /// # Errors
    /// There is no such descriptor.
    pub fn push_used(&mut self, head: u16, written: usize) -> Result<(), QueueError> {
        if head >= self.queue.size() {
            return Err(virtio_queue::Error::InvalidDescriptorIndex.into());
        }
        let next = self.queue.next_used();
        // `struct virtq_used_elem`: the index, then the length, 32 bits each.
        let element = u64::from(head) | u64::from(u32::try_from(written).unwrap_or(u32::MAX)) << 32;
        let offset = USED_RING_OFFSET + u64::from(next % self.queue.size()) * USED_ELEMENT_SIZE;
        self.memory.write_obj(
            Le64::from(element),
            GuestAddress(self.queue.used_ring()).unchecked_add(offset),
        )?;
        self.queue.set_next_used(next.wrapping_add(1));
        Ok(())
    }

    /// Shows the driver everything given back so far, in one step: it must not find half of a merged frame.
    ///
    /// # Errors
    /// The rings cannot be accessed.
    pub fn publish(&self) -> Result<(), QueueError> {
        let index = GuestAddress(self.queue.used_ring()).unchecked_add(INDEX_OFFSET);
        Ok(self
            .memory
            .store(self.queue.next_used().to_le(), index, Ordering::Release)?)
    }

    /// Publishes, and interrupts the driver if it wants to know of what was given back since the last call.
    ///
    /// # Errors
    /// The rings cannot be accessed.
    pub fn notify(&mut self, notifier: &Notifier) -> Result<(), QueueError> {
        let (old, new) = (self.notified_used, self.queue.next_used());
        if old != new {
            self.publish()?;
            self.notified_used = new;
            if self.driver_wants_interrupt(old, new)? {
                notifier.used_buffers();
            }
        }
        Ok(())
    }

    /// Whether the driver asked to be told when the used index went from `old` to `new` (virtio 1.2 §2.7.7).
    fn driver_wants_interrupt(&self, old: u16, new: u16) -> Result<bool, QueueError> {
        // The driver writes its wish and then looks at the used index; we wrote the index and now look at the wish.
        fence(Ordering::SeqCst);
        let available = GuestAddress(self.queue.avail_ring());
        let load = |offset| {
            self.memory
                .load(available.unchecked_add(offset), Ordering::Relaxed)
                .map(u16::from_le)
        };
        if self.queue.event_idx_enabled() {
            let wanted = load(AVAILABLE_RING_OFFSET + u64::from(self.queue.size()) * size_of::<u16>() as u64)?;
            Ok(new.wrapping_sub(wanted).wrapping_sub(1) < new.wrapping_sub(old))
        } else {
            Ok(u32::from(load(FLAGS_OFFSET)?) & VRING_AVAIL_F_NO_INTERRUPT == 0)
        }
    }

    /// Rings the doorbell ourselves, to go on later and let other devices have their turn.
    pub fn ring_doorbell(&self) {
        if let Err(error) = self.doorbell.write(1) {
            tracing::error!(%error, "cannot ring a doorbell");
        }
    }

    /// Has the event loop report the doorbell with `data`.
    ///
    /// Edge-triggered: each ring is an edge whether or not the counter was read, which saves a system call per ring.
    pub fn watch_doorbell(&self, ops: &mut EventOps, data: u32) -> Result<(), event_manager::Error> {
        ops.add(Events::with_data(
            &*self.doorbell,
            data,
            EventSet::IN | EventSet::EDGE_TRIGGERED,
        ))
    }

    /// Has the event loop report the doorbell no more.
    pub fn ignore_doorbell(&self, ops: &mut EventOps) {
        if let Err(error) = ops.remove(Events::empty(&*self.doorbell)) {
            tracing::error!(%error, "cannot take a doorbell off the event loop");
        }
    }

    /// The queue, to be given back or served again later.
    pub fn into_queue(self) -> Queue {
        self.queue
    }
}
