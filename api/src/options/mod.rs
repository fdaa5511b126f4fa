//! Option values that have a grammar of their own: `path=disk.img,readonly`, `tap=tap0,mac=…`, `file=console.log`.

mod balloon;
mod disk;
mod key_value;
mod mmds;
mod net;
mod pair;
mod rate;
mod serial;
mod shared_file;
mod vsock;

pub use balloon::balloon;
pub use disk::disk;
pub use key_value::OptionError;
pub use mmds::mmds;
pub use net::net;
pub use pair::{Twice, file_of, pair, tap_of, unique};
pub use serial::serial;
pub use shared_file::{resource_limits, shared_file};
pub use vsock::{vsock, vsock_uds};
