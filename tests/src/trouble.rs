//! [`Trouble`]: what a group on two sites survives, one after the other.

use crate::Group;

/// One thing that happens to a group.
#[derive(Clone, Copy, Debug)]
pub enum Trouble {
    /// The monitor of a member is killed.
    Monitor(usize),
    /// All standbys of a site are killed.
    Standbys(usize),
    /// The coordinator is killed, and started again.
    Coordinator,
    /// A site loses its power, and is back when the others have gone on.
    Power(usize),
    /// The same with its network: what runs there goes on, alone.
    Link(usize),
    /// The monitor of a member is killed, and the coordinator at once, before the group has recovered from that.
    MonitorAndCoordinator(usize),
    /// The monitor of a member is killed, and at once that of another.
    TwoMonitors(usize, usize),
}

impl Trouble {
    /// As many different ones as wanted, in an order that is always the same.
    pub fn number(number: usize, members: usize) -> Self {
        let (site, member) = (number / 7 % 2, number % members);
        match number % 7 {
            0 => Self::Monitor(member),
            1 => Self::Coordinator,
            2 => Self::Power(site),
            3 => Self::TwoMonitors(member, (member + 1) % members),
            4 => Self::Standbys(site),
            5 => Self::MonitorAndCoordinator(member),
            _ => Self::Link(site),
        }
    }

    /// Happens to `group`. On return all of it goes on, and is protected again.
    #[track_caller]
    pub fn befall(self, group: &mut Group) {
        match self {
            Self::Monitor(member) => group.lose_monitors(&[member], |group| group.kill_monitor(member)),
            Self::Coordinator => restart_coordinator(group),
            Self::Standbys(site) => {
                // There are none while all members are there themselves.
                if group.members_on(site).len() < group.vms.len() {
                    group.sites[site].kill_standbys();
                }
            }
            Self::Power(site) => {
                group.lose_site(site, |group| group.sites[site].cut_power());
                group.sites[site].power_up();
            }
            Self::Link(site) => {
                group.lose_site(site, |group| group.sites[site].cut_link());
                group.sites[site].mend_link();
            }
            Self::MonitorAndCoordinator(member) => group.lose_monitors(&[member], |group| {
                group.kill_monitor(member);
                restart_coordinator(group);
            }),
            Self::TwoMonitors(first, second) => group.lose_monitors(&[first, second], |group| {
                group.kill_monitor(first);
                group.kill_monitor(second);
            }),
        }
        group.wait_until_protected();
    }
}

#[track_caller]
fn restart_coordinator(group: &mut Group) {
    group.kill_coordinator();
    group.start_coordinator();
}
