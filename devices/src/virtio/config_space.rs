//! A device's configuration space (virtio 1.2 §2.5): shared by the device, which may change it, and the transport,
//! which shows it to the driver without asking the device, and takes what the driver may write.

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The fields a driver reads, and of few devices one that it writes. Cheap to clone: all clones are the same space.
#[derive(Clone, Debug, Default)]
pub struct ConfigSpace {
    contents: Arc<Mutex<Contents>>,
}

#[derive(Debug, Default)]
struct Contents {
    bytes: Vec<u8>,
    /// Which of the bytes are the driver's.
    of_driver: Range<usize>,
    /// Counts changes. A driver that reads the same number before and after fields longer than one access has read
    /// them as they were together.
    generation: u32,
}

impl ConfigSpace {
    /// A space with these bytes.
    pub fn new(bytes: Vec<u8>) -> Self {
        Self::with_field_of_driver(bytes, 0..0)
    }

    /// A space with these bytes, of which the driver writes those in `field`; until it does, they are zero.
    pub fn with_field_of_driver(bytes: Vec<u8>, field: Range<usize>) -> Self {
        let mut contents = Contents {
            bytes,
            of_driver: field,
            generation: 0,
        };
        contents.forget();
        Self {
            contents: Arc::new(Mutex::new(contents)),
        }
    }

    /// Changes all fields in one step. The driver has to be told; see [`Notifier::config_changed`](super::Notifier).
    pub fn replace(&self, bytes: Vec<u8>) {
        let mut contents = self.lock();
        contents.bytes = bytes;
        contents.generation = contents.generation.wrapping_add(1);
    }

    /// Changes the bytes from `start` on, as far as there are any, as [`replace`](Self::replace) does all.
    pub fn change(&self, start: usize, data: &[u8]) {
        let mut contents = self.lock();
        let all = 0..contents.bytes.len();
        contents.write(start, data, all);
        contents.generation = contents.generation.wrapping_add(1);
    }

    /// The driver writes `data` from `start` on; what is not its own stays as it is.
    pub fn write(&self, start: usize, data: &[u8]) {
        let mut contents = self.lock();
        let field = contents.of_driver.clone();
        contents.write(start, data, field);
    }

    /// Forgets what the driver wrote, as a reset does.
    pub fn forget(&self) {
        self.lock().forget();
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

    /// Takes the place of a space that had these `bytes` and had reached `generation`, from which it may differ but for
    /// what the driver wrote.
    pub fn follow(&self, bytes: &[u8], generation: u32) {
        let mut contents = self.lock();
        let field = contents.of_driver.clone();
        contents.write(0, bytes, field);
        contents.generation = generation.wrapping_add(1);
    }

    /// `ConfigGeneration`.
    pub fn generation(&self) -> u32 {
        self.lock().generation
    }

    fn lock(&self) -> MutexGuard<'_, Contents> {
        self.contents.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Contents {
    /// Puts `data` from `start` on, as far as that is `within`.
    fn write(&mut self, start: usize, data: &[u8], within: Range<usize>) {
        for (index, byte) in data.iter().enumerate() {
            let offset = start.saturating_add(index);
            if within.contains(&offset)
                && let Some(place) = self.bytes.get_mut(offset)
            {
                *place = *byte;
            }
        }
    }

    fn forget(&mut self) {
        if let Some(field) = self.bytes.get_mut(self.of_driver.clone()) {
            field.fill(0);
        }
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

    #[test]
    fn a_driver_writes_its_own_field_and_nothing_else() {
        let space = ConfigSpace::with_field_of_driver(vec![1, 2, 3, 4, 5], 1..3);
        assert_eq!(space.bytes(), [1, 0, 0, 4, 5]);
        let generation = space.generation();
        space.write(0, &[9; 8]);
        space.write(usize::MAX, &[7; 8]);
        assert_eq!((space.bytes(), space.generation()), (vec![1, 9, 9, 4, 5], generation));
        space.change(4, &[6, 6]);
        assert_eq!(space.bytes(), [1, 9, 9, 4, 6]);
        assert_ne!(space.generation(), generation);
        let other = ConfigSpace::with_field_of_driver(vec![8; 5], 1..3);
        other.follow(&space.bytes(), space.generation());
        assert_eq!(other.bytes(), [8, 9, 9, 8, 8]);
        other.forget();
        assert_eq!(other.bytes(), [8, 0, 0, 8, 8]);
    }
}
