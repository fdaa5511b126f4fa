//! A [`Group`] that is kept in files, lost whole, and started again from these.

use std::path::Path;

use super::{Group, LIMITS, NAME, Protection, name};
use crate::environment::scratch;
use crate::{Exit, Site, cli};

impl Group {
    /// Keeps a checkpoint of the group in the directory `store`.
    #[track_caller]
    pub fn store(&self, store: &Path) {
        let mut command = self.command("checkpoint", NAME);
        command.arg("--store").arg(store);
        let stored = cli::finish(command);
        assert_eq!(stored.exit, Exit::Shutdown, "{stored:?}\n{}", self.report());
    }

    /// Has all hosts lose their power at once, and the coordinator with its journal: then there are hosts again, empty, and
    /// a coordinator that knows nothing.
    #[track_caller]
    pub fn lose_everything(&mut self) {
        self.sites.iter_mut().for_each(Site::cut_power);
        self.kill_coordinator();
        self.protected.clear();
        self.directory = scratch();
        self.sites.iter_mut().for_each(Site::power_up);
        self.start_coordinator();
    }

    /// Starts all members from the last checkpoint in `store`, each on the site it is on; on return they are protected again.
    #[track_caller]
    pub fn restore(&mut self, store: &Path) {
        let mut command = self.command("restore", &store.join(NAME).display().to_string());
        for (member, place) in self.places.iter().enumerate() {
            let agent = self.sites[*place].agent_endpoint();
            command.args(["--member", &format!("{}={agent}", name(member))]);
        }
        for site in &self.sites {
            command.args(["--backup", &site.agent_endpoint()]);
        }
        command.args(["--interval", Protection::PATIENT.interval]);
        command.args(Protection::PATIENT.suspicion).args(LIMITS);
        let restored = cli::finish(command);
        assert_eq!(restored.exit, Exit::Shutdown, "{restored:?}\n{}", self.report());
        self.protected.push(NAME.to_owned());
        for (member, place) in self.places.clone().into_iter().enumerate() {
            self.go_on_at(member, place);
        }
    }
}
