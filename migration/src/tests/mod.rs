//! Whole migrations of made-up VMs over real sockets.

mod cuts;
mod made_up;
mod proxy;
mod whole;
