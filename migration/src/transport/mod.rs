//! What messages and pages travel on: TCP, TLS over TCP, Unix sockets.

mod endpoint;

pub use endpoint::{Endpoint, HostPort, NotAnEndpoint};
