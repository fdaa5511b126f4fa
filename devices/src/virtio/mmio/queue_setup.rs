//! A virtqueue as the driver describes it through the transport's registers, before a device serves it.

use virtio_queue::{Queue, QueueState, QueueT};

use crate::GuestMemory;

/// What the driver wrote about one queue; checked only when it is put into service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QueueSetup {
    size_max: u16,
    /// `QueueNum`: number of descriptors.
    pub size: u32,
    /// `QueueReady`.
    pub ready: bool,
    /// Guest address of the descriptor table.
    pub descriptor_table: u64,
    /// Guest address of the available ring ("driver area").
    pub available_ring: u64,
    /// Guest address of the used ring ("device area").
    pub used_ring: u64,
}

impl QueueSetup {
    /// A queue nobody has set up, of at most `size_max` descriptors.
    pub fn new(size_max: u16) -> Self {
        Self {
            size_max,
            size: size_max.into(),
            ready: false,
            descriptor_table: 0,
            available_ring: 0,
            used_ring: 0,
        }
    }

    /// `QueueNumMax`: most descriptors.
    pub fn size_max(&self) -> u16 {
        self.size_max
    }

    /// The queue at its beginning.
    ///
    /// # Errors
    /// What is wrong with the set-up: size, alignment, or rings that are not in guest memory.
    pub fn to_queue(&self, event_index: bool, memory: &GuestMemory) -> Result<Queue, String> {
        if !self.ready {
            return Err("the driver did not make it ready".to_owned());
        }
        let size =
            u16::try_from(self.size).map_err(|_| format!("its size {} is above {}", self.size, self.size_max))?;
        let queue = Queue::try_from(QueueState {
            max_size: self.size_max,
            next_avail: 0,
            next_used: 0,
            event_idx_enabled: event_index,
            size,
            ready: true,
            desc_table: self.descriptor_table,
            avail_ring: self.available_ring,
            used_ring: self.used_ring,
        })
        .map_err(|error| format!("{error} ({self:x?})"))?;
        if !queue.is_valid(memory) {
            return Err(format!("its rings are not in guest memory ({self:x?})"));
        }
        Ok(queue)
    }
}
