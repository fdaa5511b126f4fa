//! [`HugePages`]: a share of the host's pool of huge pages.

use std::fs;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// How many huge pages the pool has, of the default size, 2 MiB.
const POOL: &str = "/proc/sys/vm/nr_hugepages";

/// There is one pool, and tests run in parallel.
static POOL_IN_USE: Mutex<()> = Mutex::new(());

/// Huge pages in the host's pool, which is as before when dropped.
pub struct HugePages {
    before: String,
    _in_use: MutexGuard<'static, ()>,
}

impl HugePages {
    /// Sets the pool to `count` pages, once no other test uses it.
    #[track_caller]
    pub fn reserve(count: usize) -> Self {
        let in_use = POOL_IN_USE.lock().unwrap_or_else(PoisonError::into_inner);
        let before = fs::read_to_string(POOL).expect("the host's kernel has huge pages");
        fs::write(POOL, count.to_string()).expect("the tests may set the size of the pool");
        let pages = Self {
            before,
            _in_use: in_use,
        };
        let reserved = fs::read_to_string(POOL).expect("it was read before");
        assert_eq!(
            reserved.trim(),
            count.to_string(),
            "the host's memory is too fragmented for so many huge pages"
        );
        pages
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        // A pool that stays larger than before only takes memory.
        let _ = fs::write(POOL, self.before.trim());
    }
}
