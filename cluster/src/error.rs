//! What can go wrong with a group, each with what to do about it.

use crate::id::{Generation, GroupId};
use crate::vm::VmError;

/// Why something could not be done for a group.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There cannot be such a group.
    #[error("group '{group}' cannot be: {reason}")]
    Spec {
        /// Its name.
        group: String,
        /// What is wrong with it.
        reason: String,
    },
    /// There is no such group.
    #[error("there is no group '{0}'")]
    NoGroup(String),
    /// What is asked for cannot be done now.
    #[error("group '{group}' cannot {action}: {reason}")]
    NotNow {
        /// Its name.
        group: String,
        /// What was asked for.
        action: &'static str,
        /// Why not.
        reason: String,
    },
    /// Another coordinator decides about the group.
    #[error("group {group}: another coordinator has it, which is in generation {theirs} where this one is in {ours}")]
    Superseded {
        /// The group.
        group: GroupId,
        /// The journal's generation.
        theirs: Generation,
        /// This coordinator's.
        ours: Generation,
    },
    /// Another coordinator holds the journal.
    #[error("the journal is {owner}'s, for {left_ms} ms more at least")]
    Held {
        /// Who has it.
        owner: String,
        /// For how long at least.
        left_ms: u64,
    },
    /// A decision could not be made durable, or read.
    #[error("journal {journal}: cannot {action}: {reason}")]
    Journal {
        /// Where the journal is.
        journal: String,
        /// What was tried.
        action: &'static str,
        /// Why it failed.
        reason: String,
    },
    /// What a peer said cannot be.
    #[error("the peer sent {what} that cannot be: {reason}")]
    Invalid {
        /// What it is.
        what: &'static str,
        /// Why it cannot be.
        reason: String,
    },
    /// A link failed.
    #[error(transparent)]
    Link(#[from] cutover_migration::Error),
    /// A VM could not do its part.
    #[error("cannot {action}")]
    Vm {
        /// What was tried.
        action: &'static str,
        /// Why it failed.
        source: VmError,
    },
}
