//! What can go wrong with a group, each with what to do about it.

use std::path::PathBuf;

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
    /// Another coordinator has the journal now.
    #[error("journal {journal}: {by} has taken over")]
    Superseded {
        /// Where the journal is.
        journal: String,
        /// Who it is.
        by: String,
    },
    /// This coordinator does not decide, and knows nothing of groups.
    #[error("this coordinator does not decide: {reason}")]
    NotDeciding {
        /// Why not.
        reason: String,
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
    /// A checkpoint that is stored, or a directory of them, cannot be used.
    #[error("{}: cannot {action}: {reason}", .path.display())]
    Checkpoint {
        /// Its manifest, or the directory.
        path: PathBuf,
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

/// What went wrong, with the reasons behind it, unless the sentence has them already.
pub(crate) fn in_full(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let reason = error.to_string();
        if !text.contains(&reason) {
            text.push_str(": ");
            text.push_str(&reason);
        }
        cause = error.source();
    }
    text
}
