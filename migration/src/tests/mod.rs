//! Whole migrations of made-up VMs over real sockets.

mod arriving;
mod cuts;
mod golden;
mod hostile;
pub mod made_up;
mod model;
pub mod proxy;
mod whole;
