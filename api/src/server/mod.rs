//! The REST API of a VM, on a Unix socket: Firecracker's paths, and our own under `/v1`.

pub mod v1;
