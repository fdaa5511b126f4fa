//! What a group is to be: its members, the hosts that may back them up, and how often and how patiently.

use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::error::Error;
use crate::id::Host;

/// Most members of a group.
pub const MEMBERS_MAX: usize = 1024;
/// Most hosts that back a group up.
pub const BACKUPS_MAX: usize = 1024;
/// The shortest interval between cuts.
pub const INTERVAL_MIN: Duration = Duration::from_millis(10);
/// The longest.
pub const INTERVAL_MAX: Duration = Duration::from_secs(60);
/// Most bytes of a name.
const NAME_BYTES_MAX: usize = 64;

/// A group, as somebody wants it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GroupSpec {
    /// Its name.
    pub name: String,
    /// VMs that fail and recover together.
    pub members: Vec<MemberSpec>,
    /// Hosts that may keep standbys, those to be preferred first.
    pub backups: Vec<Host>,
    /// How often a cut is taken.
    #[serde(default)]
    pub interval: Interval,
    /// How long everything may take.
    #[serde(default)]
    pub timing: Timing,
}

/// A VM that is to be a member.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemberSpec {
    /// The name of the VM, on its host.
    pub name: String,
    /// Where it runs when it joins.
    pub host: Host,
    /// The snapshot that it is started from there, paused, if it does not run yet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub restore: Option<PathBuf>,
}

/// How often a cut is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Interval {
    /// From the begin of one to the begin of the next; later only if that one is not permanent yet.
    Fixed(Duration),
    /// As short as the cost of pauses allows, and no longer than this.
    Adaptive {
        /// The longest.
        max: Duration,
    },
}

/// How long everything may take. On hosts that are emulated, all of it is seconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Timing {
    /// How often each process says that it is there.
    pub heartbeat: Duration,
    /// How long a VM may run after it said so, if that was answered.
    pub lease: Duration,
    /// How long nothing is heard of a process until it is taken for dead. Longer than a lease, so that it stands still
    /// by then.
    pub suspicion: Duration,
    /// How long it may take from asking for a cut until all have taken it.
    pub cut: Duration,
    /// How long it may take to send an epoch until its standby is given up.
    pub ship: Duration,
    /// How long a member may take to stand at a cut that the group goes back to until it is given up.
    pub roll_back: Duration,
}

impl Default for Interval {
    fn default() -> Self {
        Self::Adaptive {
            max: Duration::from_millis(100),
        }
    }
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            heartbeat: Duration::from_millis(50),
            lease: Duration::from_millis(200),
            suspicion: Duration::from_millis(250),
            cut: Duration::from_secs(2),
            ship: Duration::from_secs(10),
            roll_back: Duration::from_secs(30),
        }
    }
}

impl GroupSpec {
    /// Whether there can be such a group.
    ///
    /// # Errors
    /// It cannot: what is wrong with it.
    pub fn validate(&self) -> Result<(), Error> {
        let invalid = |reason: String| Error::Spec {
            group: self.name.clone(),
            reason,
        };
        let names = self.members.iter().map(|member| &member.name);
        let hosts = self.backups.iter().map(|host| &host.0);
        for name in std::iter::once(&self.name).chain(names.clone()).chain(hosts) {
            if name.is_empty() || name.len() > NAME_BYTES_MAX {
                return Err(invalid(format!(
                    "the name '{name}' has not 1 to {NAME_BYTES_MAX} bytes"
                )));
            }
        }
        if self.members.is_empty() || self.members.len() > MEMBERS_MAX {
            let count = self.members.len();
            return Err(invalid(format!("{count} members are not 1 to {MEMBERS_MAX}")));
        }
        if self.backups.len() > BACKUPS_MAX {
            let count = self.backups.len();
            return Err(invalid(format!("{count} backup hosts are more than {BACKUPS_MAX}")));
        }
        let mut sorted: Vec<_> = names.collect();
        sorted.sort_unstable();
        if let Some(twice) = sorted.windows(2).find(|pair| pair[0] == pair[1]) {
            return Err(invalid(format!("'{}' is a member twice", twice[0])));
        }
        self.interval.validate().map_err(invalid)?;
        self.timing.validate().map_err(invalid)
    }
}

impl Interval {
    /// The longest it can become.
    pub fn max(self) -> Duration {
        match self {
            Self::Fixed(interval) | Self::Adaptive { max: interval } => interval,
        }
    }

    fn validate(self) -> Result<(), String> {
        let longest = self.max();
        if (INTERVAL_MIN..=INTERVAL_MAX).contains(&longest) {
            return Ok(());
        }
        Err(format!(
            "an interval of {longest:?} is not {INTERVAL_MIN:?} to {INTERVAL_MAX:?}"
        ))
    }
}

impl Timing {
    /// All of it `factor` times as long, for hosts that are slower by that.
    #[must_use]
    pub fn scaled(self, factor: u32) -> Self {
        let times = |duration: Duration| duration.saturating_mul(factor);
        Self {
            heartbeat: times(self.heartbeat),
            lease: times(self.lease),
            suspicion: times(self.suspicion),
            cut: times(self.cut),
            ship: times(self.ship),
            roll_back: times(self.roll_back),
        }
    }

    fn validate(self) -> Result<(), String> {
        let Self {
            heartbeat,
            lease,
            suspicion,
            ..
        } = self;
        if heartbeat.is_zero() || [self.cut, self.ship, self.roll_back].contains(&Duration::ZERO) {
            return Err("nothing can be done in no time at all".to_owned());
        }
        if lease < heartbeat * 2 {
            return Err(format!(
                "a lease of {lease:?} does not outlast the loss of one heartbeat, each {heartbeat:?}"
            ));
        }
        if suspicion <= lease {
            return Err(format!(
                "who is silent for {suspicion:?} may still run on a lease of {lease:?}: suspicion must come later"
            ));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec() -> GroupSpec {
        let member = |name: &str| MemberSpec {
            name: name.to_owned(),
            host: Host("a".to_owned()),
            restore: None,
        };
        GroupSpec {
            name: "g".to_owned(),
            members: vec![member("vm1"), member("vm2")],
            backups: vec![Host("b".to_owned())],
            interval: Interval::default(),
            timing: Timing::default(),
        }
    }

    #[test]
    fn what_cannot_be_is_refused_with_the_reason() {
        spec().validate().expect("a group as it should be");
        let refused = |change: fn(&mut GroupSpec), reason: &str| {
            let mut spec = spec();
            change(&mut spec);
            let error = spec.validate().expect_err(reason).to_string();
            assert!(error.contains(reason), "{error}");
        };
        refused(|spec| spec.name.clear(), "has not 1 to 64 bytes");
        refused(|spec| spec.members.clear(), "0 members");
        refused(
            |spec| spec.members[1].name = "vm1".to_owned(),
            "'vm1' is a member twice",
        );
        refused(|spec| spec.backups[0].0 = "b".repeat(65), "has not 1 to 64 bytes");
        refused(
            |spec| spec.interval = Interval::Fixed(Duration::from_millis(9)),
            "9ms is not",
        );
        refused(
            |spec| spec.timing.suspicion = spec.timing.lease,
            "suspicion must come later",
        );
        refused(
            |spec| spec.timing.lease = spec.timing.heartbeat,
            "the loss of one heartbeat",
        );
        refused(|spec| spec.timing.cut = Duration::ZERO, "in no time at all");
    }

    #[test]
    fn a_group_is_written_as_json_with_defaults_for_what_is_not_said() {
        let text = r#"{"name":"g","members":[{"name":"vm1","host":"a"}],"backups":["b"]}"#;
        let read: GroupSpec = serde_json::from_str(text).expect("a group");
        assert_eq!(read.interval, Interval::default());
        assert_eq!(read.timing, Timing::default());
        assert!(serde_json::from_str::<GroupSpec>(&text.replace("backups", "backup")).is_err());
    }
}
