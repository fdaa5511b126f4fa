//! What whoever asks for a migration may want of it.

use std::time::Duration;

/// Most page streams beside the control link.
pub const STREAMS_MAX: u8 = 16;

/// Least bytes in each second that can be asked for, so that on all streams something always moves.
pub const BANDWIDTH_MIN: u64 = 64 << 10;

/// How a migration is to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// How long the guest may stand still. A goal: it is stopped when it is expected to be met.
    pub downtime: Duration,
    /// Most bytes sent in each second while the guest runs, at least [`BANDWIDTH_MIN`]; the last pages are sent as fast as
    /// they can be.
    pub bandwidth: Option<u64>,
    /// Connections that pages are sent on, 1 to [`STREAMS_MAX`].
    pub streams: u8,
    /// Whether the guest may run at the destination before all of its memory is there.
    pub post_copy: PostCopy,
    /// Slow the vCPUs down if the guest writes faster than pages can be sent.
    pub throttle: bool,
    /// How pages are encoded.
    pub compression: Compression,
    /// Most rounds of sending pages while the guest runs.
    pub rounds: u32,
}

/// Whether the guest may run at the destination before all of its memory is there: from then on the VM is lost if
/// either side is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PostCopy {
    /// It may not.
    #[default]
    Never,
    /// It may if nothing else has an end.
    LastResort,
    /// It does after the first round.
    Always,
}

/// How pages are encoded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Compression {
    /// As it is fastest on this link.
    #[default]
    Auto,
    /// Zero pages apart, not at all.
    Never,
    /// Always, also where that costs more than it gains.
    Always,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            downtime: Duration::from_millis(30),
            bandwidth: None,
            streams: 1,
            post_copy: PostCopy::Never,
            throttle: true,
            compression: Compression::Auto,
            rounds: 30,
        }
    }
}
