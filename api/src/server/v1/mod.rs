//! Our own part of the API, under `/v1`.

pub mod types;
