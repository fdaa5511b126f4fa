//! What must never be, whatever fails.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use super::vm::Guest;
use crate::id::{Epoch, MemberId, Seat};

/// Something that must not be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation(pub String);

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Nobody has heard of a member what that has not sent.
pub fn no_orphans(guests: &BTreeMap<MemberId, &Guest>) -> Result<(), Violation> {
    for (hearer, guest) in guests {
        for ((from, place), number) in &guest.heard {
            // Of whoever is a member no more, anything may have been heard.
            let Some(sender) = guests.get(from) else { continue };
            if sender.sent.get(*place) != Some(number) {
                let (hearer, from) = (hearer.0, from.0);
                let text = format!("orphan: member {hearer} has heard frame {number} of {from}, which has not sent it");
                return Err(Violation(text));
            }
        }
    }
    Ok(())
}

/// Everybody who went back is what it was at `cut`, which all fits together and with what has left the group.
pub fn is_back_at<'a>(
    cut: Epoch,
    guests: impl Iterator<Item = (Seat, &'a Guest)>,
    taken: &BTreeMap<(MemberId, Epoch), Guest>,
    released: &BTreeMap<MemberId, BTreeSet<u64>>,
) -> Result<(), Violation> {
    let mut all = BTreeMap::new();
    for (seat, guest) in guests {
        if let Some(released) = released.get(&seat.member) {
            output_is_kept(seat.member, guest, released)?;
        }
        if Some(guest) != taken.get(&(seat.member, cut)) {
            return Err(Violation(format!("{seat} is not what it was at cut {cut}")));
        }
        all.insert(seat.member, guest);
    }
    no_orphans(&all)
}

/// What has left the group was sent by guests as they are after a rollback.
fn output_is_kept(member: MemberId, guest: &Guest, released: &BTreeSet<u64>) -> Result<(), Violation> {
    let sent: BTreeSet<_> = guest.outputs.iter().copied().collect();
    match released.difference(&sent).next() {
        None => Ok(()),
        Some(number) => Err(Violation(format!(
            "uncommitted output: frame {number} has left, and member {} goes back to before it sent it",
            member.0
        ))),
    }
}
