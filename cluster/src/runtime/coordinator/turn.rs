//! Whose turn it is to decide.
//!
//! ```text
//!  claims: it is another's ──┐            ┌── renews in time
//!        ▲                   ▼            ▼
//!        └───────────── waiting ──────► deciding ── the end: gives it up, so that another need not wait
//!                            ▲  granted   │
//!                            └────────────┘ another has it, or the journal fails: knows nothing any more
//! ```
//! Members get leases from who decides. That one looks whether its own still runs before it hears anything, so whoever
//! comes after it may count on it that what it granted is over as soon as its lease and one of a member's are.

use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::{Desk, Mail};
use crate::Error;
use crate::lease::{Nanos, nanos};
use crate::runtime::coordinators::CoordinatorSays;
use crate::runtime::journal::{Claim, uptime};
use crate::runtime::link::lock;

/// How often one that waits asks whether it is its turn.
const CLAIM_EVERY: Duration = Duration::from_millis(100);

/// Why a coordinator does not decide; nothing if it does.
#[derive(Clone, Debug, Default)]
pub(super) struct Role(Arc<Mutex<Option<String>>>);

impl Role {
    /// Why it does not decide, if so.
    pub fn waits_because(&self) -> Option<String> {
        lock(&self.0).clone()
    }

    /// Takes note of it; says whether that is news.
    fn set(&self, reason: Option<String>) -> bool {
        let mut role = lock(&self.0);
        let is_news = *role != reason;
        *role = reason;
        is_news
    }
}

/// The right to decide.
#[derive(Debug, Default)]
pub(super) struct Right {
    /// When it is asked for again, by [`uptime`]: before it is over.
    renew_at: Nanos,
    /// Who waits for it, as endpoints.
    waiting: Vec<String>,
}

impl Desk {
    /// Decides whenever it is this coordinator's turn, as it may be already, until it is told to end.
    pub(super) fn work(&mut self, mut is_granted: bool, mailbox: &Receiver<Mail>) {
        while std::mem::take(&mut is_granted) || self.wait_for_turn(mailbox) {
            match self.take_over().and_then(|()| self.run(mailbox)) {
                Ok(()) => break,
                Err(error) => self.step_back(&error),
            }
        }
        if let Err(error) = self.journal.release() {
            tracing::debug!(%error, "others wait until the right to decide is over");
        }
    }

    /// Asks whether it is this coordinator's turn.
    pub(super) fn claim(&mut self) -> Result<bool, Error> {
        let asked_at = uptime();
        let reason = match self.journal.claim()? {
            Claim::Granted => {
                self.right.renew_at = asked_at.saturating_add(nanos(self.journal.lease()) / 3);
                return Ok(true);
            }
            Claim::Held { by } => format!("{by} does, and this one waits"),
        };
        if self.role.set(Some(reason.clone())) {
            tracing::info!(reason, "this coordinator does not decide");
        }
        Ok(false)
    }

    /// Returns when it is this coordinator's turn; or false when it is told to end.
    fn wait_for_turn(&mut self, mailbox: &Receiver<Mail>) -> bool {
        loop {
            match self.claim() {
                Ok(true) => return true,
                Ok(false) => {}
                Err(error) => self.step_back(&error),
            }
            let until = Instant::now() + CLAIM_EVERY;
            loop {
                match mailbox.recv_timeout(until.saturating_duration_since(Instant::now())) {
                    Ok(Mail::End) | Err(RecvTimeoutError::Disconnected) => return false,
                    Ok(Mail::Ask(ask)) => ask.refuse(&self.role.waits_because().unwrap_or_default()),
                    // Whoever called is told by the end of the link.
                    Ok(_) => {}
                    Err(RecvTimeoutError::Timeout) => break,
                }
            }
        }
    }

    /// From here on it decides.
    pub(super) fn begin(&mut self) {
        self.role.set(None);
        tracing::info!(groups = self.groups.len(), "this coordinator decides");
    }

    /// It decides nothing any more, and knows nothing: what is true is decided elsewhere.
    fn step_back(&mut self, error: &Error) {
        self.groups.clear();
        self.agents.clear();
        let reason = error.to_string();
        for asked in std::mem::take(&mut self.requests).into_values() {
            asked.refuse(&reason);
        }
        if self.role.set(Some(reason)) {
            tracing::error!(%error, "THIS COORDINATOR DOES NOT DECIDE");
        }
    }

    /// When [`keep_right`](Self::keep_right) is to be called at the latest, from now.
    pub(super) fn until_renewal(&self) -> Duration {
        Duration::from_nanos(self.right.renew_at.saturating_sub(uptime()))
    }

    /// Makes sure that the right to decide is still this coordinator's.
    pub(super) fn keep_right(&mut self) -> Result<(), Error> {
        let now = uptime();
        if now < self.right.renew_at {
            return Ok(());
        }
        let waiting = self.journal.renew()?;
        self.right.renew_at = now.saturating_add(nanos(self.journal.lease()) / 3);
        if self.right.waiting != waiting {
            tracing::info!(?waiting, "these coordinators wait");
            self.right.waiting = waiting;
            let says = self.coordinators();
            for (_, link) in self.groups.values().flat_map(|running| running.links.values()) {
                link.send(says.clone());
            }
        }
        Ok(())
    }

    /// Who may decide next, for those that will have to find it.
    pub(super) fn coordinators(&self) -> CoordinatorSays {
        CoordinatorSays::Coordinators(self.right.waiting.clone())
    }
}
