//! The tracker against what it is to do: by a model here, with guests of KVM in `guests`.

mod guests;
mod model;
