//! Groups as people read them.

use std::fmt::Write;
use std::time::Duration;

use anstyle::{AnsiColor, Style};

use crate::client::{Cell, Side, Table, bytes, milliseconds};
use crate::server::groups::types::{GroupStateV1, GroupStatusV1, MemberStateV1, MemberStatusV1};
use crate::text::escaped;

/// Shown where nothing is known.
const UNKNOWN: &str = "-";

/// The groups of a coordinator, a line each.
pub fn list(groups: &[GroupStatusV1]) -> String {
    let mut table = Table::new(&[
        ("GROUP", Side::Left),
        ("STATE", Side::Left),
        ("MEMBERS", Side::Right),
        ("INTERVAL", Side::Right),
        ("CUTS", Side::Right),
        ("RECOVERIES", Side::Right),
    ]);
    for group in groups {
        table.row([
            (&group.name).into(),
            state(group.state),
            group.members.len().into(),
            format!("{} ms", group.interval_ms).into(),
            group.cuts.into(),
            group.recoveries.into(),
        ]);
    }
    table.render()
}

/// How a group is doing; `rate` are its cuts per second, if they are known.
pub fn status(group: &GroupStatusV1, rate: Option<&str>) -> String {
    let mut text = format!("{}: {}", escaped(&group.name), state_name(group.state));
    // Writing to a String does not fail, here and below.
    if let Some(reason) = group
        .reason
        .as_deref()
        .filter(|_| group.state != GroupStateV1::Protected)
    {
        let _ = write!(text, " ({})", escaped(reason));
    }
    let rate = rate.map(|rate| format!(", {rate}/s")).unwrap_or_default();
    let _ = writeln!(
        text,
        ", generation {}\ncheckpoints: {} every {} ms{rate}, {} came to nothing; the last had guests stand still for {}",
        group.generation,
        group.cuts,
        group.interval_ms,
        group.invalid_cuts,
        milliseconds(group.pause_ns),
    );
    if let Some(recovery) = &group.last_recovery {
        let step = |ns: Option<u64>| ns.map_or_else(|| UNKNOWN.to_owned(), milliseconds);
        let _ = writeln!(
            text,
            "last recovery: lost {}; detected in {}, decided in {}, restored in {}, resumed in {}",
            escaped(&recovery.lost.join(", ")),
            milliseconds(recovery.detect_ns),
            milliseconds(recovery.decide_ns),
            step(recovery.restore_ns),
            step(recovery.resume_ns),
        );
    }
    text + &members(&group.members)
}

fn members(members: &[MemberStatusV1]) -> String {
    let mut table = Table::new(&[
        ("MEMBER", Side::Left),
        ("HOST", Side::Left),
        ("STANDBY", Side::Left),
        ("PAUSE", Side::Right),
        ("PAGES", Side::Right),
        ("HELD", Side::Right),
        ("LAG", Side::Right),
        ("SENT", Side::Right),
    ]);
    for member in members {
        let host = match (member.state, &member.host) {
            (MemberStateV1::Expected, _) => "has not joined".to_owned(),
            (MemberStateV1::Ended, _) => "its guest has ended".to_owned(),
            (MemberStateV1::Lost, _) => format!("LOST: {}", member.reason.as_deref().unwrap_or(UNKNOWN)),
            (MemberStateV1::Member, host) => there(host.as_deref().unwrap_or(UNKNOWN), member.connected),
        };
        let standby = member.standby.as_ref();
        let standby = standby.map_or_else(|| UNKNOWN.to_owned(), |standby| there(&standby.host, standby.connected));
        table.row([
            (&member.name).into(),
            host.into(),
            standby.into(),
            milliseconds(member.pause_ns).into(),
            member.dirty_pages.into(),
            bytes(member.held_bytes).into(),
            member.lag.into(),
            bytes(member.shipped_bytes).into(),
        ]);
    }
    table.render()
}

/// A host, and that nothing is heard from there.
fn there(host: &str, is_connected: bool) -> String {
    match is_connected {
        true => host.to_owned(),
        false => format!("{host} (silent)"),
    }
}

/// How many of `count` there are in a second, if they came in `time`.
pub fn per_second(count: u64, time: Duration) -> String {
    let tenths = u128::from(count) * 10_000 / time.as_millis().max(1);
    format!("{}.{}", tenths / 10, tenths % 10)
}

fn state(state: GroupStateV1) -> Cell {
    let colour = match state {
        GroupStateV1::Protected => AnsiColor::Green.on_default(),
        GroupStateV1::Unprotected | GroupStateV1::Recovering | GroupStateV1::Judging => AnsiColor::Red.on_default(),
        GroupStateV1::Protecting | GroupStateV1::Dissolved => Style::new(),
    };
    Cell::styled(state_name(state), colour)
}

/// Loudly, where no host may be lost.
fn state_name(state: GroupStateV1) -> &'static str {
    match state {
        GroupStateV1::Unprotected => "UNPROTECTED",
        GroupStateV1::Protecting => "protecting",
        GroupStateV1::Protected => "protected",
        GroupStateV1::Judging => "JUDGING",
        GroupStateV1::Recovering => "RECOVERING",
        GroupStateV1::Dissolved => "dissolved",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::server::groups::types::{RecoveryV1, StandbyStatusV1};

    fn group() -> GroupStatusV1 {
        let member = MemberStatusV1 {
            name: "web".to_owned(),
            state: MemberStateV1::Member,
            reason: None,
            host: Some("tls://host1:7200".to_owned()),
            incarnation: Some(0),
            connected: true,
            standby: Some(StandbyStatusV1 {
                host: "tls://host2:7200".to_owned(),
                incarnation: 1,
                connected: false,
            }),
            pause_ns: 1_500_000,
            dirty_pages: 40,
            held_frames: 2,
            held_bytes: 2048,
            lag: 1,
            shipped_bytes: 1 << 20,
        };
        GroupStatusV1 {
            name: "shop".to_owned(),
            state: GroupStateV1::Unprotected,
            reason: Some("a standby failed".to_owned()),
            generation: 3,
            permanent_cut: Some(17),
            interval_ms: 100,
            cuts: 9,
            invalid_cuts: 1,
            recoveries: 1,
            pause_ns: 1_500_000,
            members: vec![member],
            last_recovery: Some(RecoveryV1 {
                cut: 8,
                lost: vec!["db".to_owned()],
                detect_ns: 250_000_000,
                decide_ns: 1_000_000,
                restore_ns: Some(40_000_000),
                resume_ns: None,
            }),
        }
    }

    #[test]
    fn a_group_that_is_not_protected_says_so_loudly_and_why() {
        let text = status(&group(), Some("9.8"));
        for part in [
            "shop: UNPROTECTED (a standby failed), generation 3\n",
            "9 every 100 ms, 9.8/s, 1 came to nothing",
            "lost db; detected in 250",
            "resumed in -",
            "tls://host2:7200 (silent)",
        ] {
            assert!(text.contains(part), "{part}: {text}");
        }
        let protected = GroupStatusV1 {
            state: GroupStateV1::Protected,
            ..group()
        };
        assert!(status(&protected, None).starts_with("shop: protected, generation 3\n"));
    }

    #[test]
    fn rates_have_a_decimal() {
        assert_eq!(per_second(49, Duration::from_secs(5)), "9.8");
        assert_eq!(per_second(0, Duration::ZERO), "0.0");
    }
}
