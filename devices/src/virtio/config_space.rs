//! A device's configuration space (virtio 1.2 §2.5): shared by the device, which may change it, and the transport,
//! which shows it to the driver without asking the device.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The fields a driver reads. Cheap to clone: all clones are the same space.
#[derive(Clone, Debug, Default)]
pub struct ConfigSpace {
    contents: Arc<Mutex<Contents>>,
}

#[derive(Debug, Default)]
struct Contents {
    bytes: Vec<u8>,
    /// Counts changes. A driver that reads the same number before and after fields longer than one access has read
    /// them as they were together.
    generation: u32,
}

impl ConfigSpace {
    /// A space with these bytes.
    pub fn new(bytes: Vec<u8>) -> Self {
        Self {
            contents: Arc::new(Mutex::new(Contents { bytes, generation: 0 })),
        }
    }

    /// Changes all fields in one step. The driver has to be told; see [`Notifier::config_changed`](super::Notifier).
    pub fn replace(&self, bytes: Vec<u8>) {
        let mut contents = self.lock();
        contents.bytes = bytes;
        contents.generation = contents.generation.wrapping_add(1);
    }

    /// Fills `data` with the bytes from `start` on, and with zeroes past the end.
    pub fn read(&self, start: usize, data: &mut [u8]) {
        data.fill(0);
        let contents = self.lock();
        let known = contents.bytes.get(start..).unwrap_or_default();
        let len = known.len().min(data.len());
        data[..len].copy_from_slice(&known[..len]);
    }

    /// All fields.
    pub fn bytes(&self) -> Vec<u8> {
        self.lock().bytes.clone()
    }

    /// Takes the place of a space that had reached `generation`, and may differ from it.
    pub fn follow(&self, generation: u32) {
        self.lock().generation = generation.wrapping_add(1);
    }

    /// `ConfigGeneration`.
    pub fn generation(&self) -> u32 {
        self.lock().generation
    }

    fn lock(&self) -> MutexGuard<'_, Contents> {
        self.contents.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_shows_in_every_clone_with_a_new_generation() {
        let space = ConfigSpace::new(vec![1, 2, 3]);
        let other = space.clone();
        let generation = other.generation();
        space.replace(vec![4, 5, 6]);
        let mut data = [0xff; 4];
        other.read(1, &mut data);
        assert_eq!(data, [5, 6, 0, 0]);
        assert_ne!(other.generation(), generation);
        other.read(usize::MAX, &mut data);
        assert_eq!(data, [0; 4]);
    }
}
