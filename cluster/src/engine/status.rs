//! How a group is doing, for whoever asks.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::group::{Group, Phase, Report};
use super::record::{Located, Place};
use crate::id::{Epoch, Generation, Seat};
use crate::message::Stage;
use crate::vm::{CutReport, MemberStatus};

/// How a group is doing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GroupStatus {
    /// Its name.
    pub name: String,
    /// The generation it is in.
    pub generation: Generation,
    /// What it is at.
    pub state: State,
    /// Why it is not protected, if it is not.
    pub reason: Option<String>,
    /// The cut that all would go back to.
    pub permanent: Option<Epoch>,
    /// From the begin of one cut to that of the next, as it is now.
    pub interval: Duration,
    /// What the last cut took.
    pub last_cut: CutReport,
    /// Cuts that became permanent, since this coordinator has the group.
    pub cuts: u64,
    /// Those that did not.
    pub invalid: u64,
    /// Times that the group went back to a cut.
    pub recoveries: u64,
    /// Its members.
    pub members: Vec<MemberState>,
}

/// What a group is at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// No member may fail: standbys are missing, or have no image yet.
    Unprotected,
    /// All members have standbys; the first cut is on its way.
    Protecting,
    /// A member may fail.
    Protected,
    /// Somebody failed, and who else has is being found out; or the coordinator is new.
    Judging,
    /// All go back to a cut.
    Recovering,
    /// It is a group no more.
    Dissolved,
}

/// How a member is doing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemberState {
    /// The name of its VM.
    pub name: String,
    /// What has become of it.
    pub place: Place,
    /// Where it stands, if it has said so.
    pub stage: Option<Stage>,
    /// How its VM is doing, as of its last heartbeat.
    pub status: MemberStatus,
}

/// What has been reported.
#[derive(Clone, Debug, Default)]
pub(super) struct Totals {
    cuts: u64,
    invalid: u64,
    recoveries: u64,
    last_cut: CutReport,
    reason: Option<String>,
}

impl Totals {
    pub fn note(&mut self, report: &Report) {
        match report {
            Report::Permanent { cost, .. } => {
                self.cuts += 1;
                self.last_cut = *cost;
            }
            Report::Invalid { .. } => self.invalid += 1,
            Report::Recovered { .. } => self.recoveries += 1,
            Report::Unprotected { reason } => self.reason = Some(reason.clone()),
            Report::Protected => self.reason = None,
            Report::RollingBack { .. }
            | Report::Failed { .. }
            | Report::Lost { .. }
            | Report::Ended { .. }
            | Report::Refused { .. } => {}
        }
    }
}

/// The status of `group`.
pub(super) fn of(
    group: &Group,
    statuses: &BTreeMap<Seat, MemberStatus>,
    totals: &Totals,
    interval: Duration,
) -> GroupStatus {
    let record = group.record();
    let members = record.spec.members.iter().zip(&record.members).map(|(spec, place)| {
        let seat = match place {
            Place::In {
                primary: Located { seat, .. },
                ..
            } => Some(*seat),
            Place::Expected | Place::Ended | Place::Lost { .. } => None,
        };
        let known = seat.and_then(|seat| group.known.get(&seat));
        MemberState {
            name: spec.name.clone(),
            place: place.clone(),
            stage: known.map(|known| known.standing.stage),
            status: seat.and_then(|seat| statuses.get(&seat)).copied().unwrap_or_default(),
        }
    });
    GroupStatus {
        name: record.spec.name.clone(),
        generation: record.generation,
        state: state(group),
        reason: totals.reason.clone(),
        permanent: record.permanent(),
        interval,
        last_cut: totals.last_cut,
        cuts: totals.cuts,
        invalid: totals.invalid,
        recoveries: totals.recoveries,
        members: members.collect(),
    }
}

fn state(group: &Group) -> State {
    match (&group.phase, group.record().permanent()) {
        (Phase::Judging { .. }, _) => State::Judging,
        (Phase::Alone { .. }, _) => State::Unprotected,
        (Phase::Idle | Phase::Cutting(_), Some(_)) => State::Protected,
        (Phase::Idle | Phase::Cutting(_), None) => State::Protecting,
        (Phase::RollingBack { .. }, _) => State::Recovering,
        (Phase::Over, _) => State::Dissolved,
    }
}
