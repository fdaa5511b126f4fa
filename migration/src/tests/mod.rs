//! Whole migrations of made-up VMs over real sockets.

mod cuts;
pub mod made_up;
mod proxy;
mod whole;
