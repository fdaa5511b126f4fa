//! Confinement that takes no privileges: Landlock (Linux userspace-api/landlock).
//!
//! The process stays who and where it is, but of all files it can open only those that it is given, and nothing can be
//! executed. What of this the running kernel cannot do is told.

use std::fs;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use landlock::{
    ABI, Access as _, AccessFs, AccessNet, BitFlags, LandlockStatus, PathBeneath, PathFd, Ruleset, RulesetAttr,
    RulesetCreated, RulesetCreatedAttr, RulesetError, RulesetStatus, Scope, make_bitflags,
};

use crate::told::Teller;
use crate::{Access, Error, Limits, SharedFile, background, privileges};

/// The version of Landlock that is made use of; of older ones, what they have.
const ABI_KNOWN: ABI = ABI::V6;

/// What every monitor uses, where the host has it.
const DEVICES: [&str; 3] = ["/dev/kvm", "/dev/net/tun", "/dev/userfaultfd"];
/// Where a monitor reads which of its memory is in use. Of other processes' parts, Landlock keeps memory and environment
/// closed, since it may not trace them.
const PROC: &str = "/proc";

/// What kernels could not restrict before they had some version of Landlock.
const SINCE: [(ABI, &str); 4] = [
    (ABI::V3, "truncating files of the same user (Linux 6.2)"),
    (ABI::V4, "TCP (Linux 6.7)"),
    (ABI::V5, "controlling devices of the same user (Linux 6.10)"),
    (
        ABI::V6,
        "abstract Unix sockets, and signals to processes of the same user (Linux 6.12)",
    ),
];

/// What confines a monitor where there is nobody who could make a jail.
#[derive(Clone, Debug)]
pub struct Sandbox {
    /// Files that it is given, where they are.
    pub files: Vec<SharedFile>,
    /// Whether it may use TCP.
    pub tcp: bool,
    /// Its resource limits.
    pub limits: Limits,
}

impl Sandbox {
    /// Confines this process, and goes on with `program`, which is told what the kernel cannot restrict. With `started`, which
    /// is told as soon as it is confined, it goes on without the standard streams.
    ///
    /// # Errors
    /// The process could not be confined.
    pub fn run(&self, started: Option<Teller>, program: impl FnOnce(&[&'static str]) -> u8) -> Result<u8, Error> {
        let entered = match &started {
            None => self.enter(),
            Some(_) => background::let_go_of_standard_streams().and_then(|()| self.enter()),
        };
        let (outcome, unrestricted) = match entered {
            Ok(unrestricted) => (Ok(()), unrestricted),
            Err(error) => (Err(error), Vec::new()),
        };
        if let Some(started) = started {
            started.tell(&outcome);
        }
        outcome.map(|()| program(&unrestricted))
    }

    /// Confines this process for good; returns what the kernel cannot restrict.
    ///
    /// # Errors
    /// The kernel has no Landlock, or a file is not there.
    fn enter(&self) -> Result<Vec<&'static str>, Error> {
        self.limits.apply()?;
        privileges::give_up_capabilities()?;
        let status = self.rules()?.restrict_self().map_err(refused)?;
        match (status.ruleset, status.landlock) {
            (RulesetStatus::NotEnforced, LandlockStatus::NotEnabled) => Err(Error::NoLandlock(
                "this kernel has it switched off (add landlock to lsm= on its command line)",
            )),
            (RulesetStatus::NotEnforced, _) => Err(Error::NoLandlock("this kernel has none (it came with Linux 5.13)")),
            (_, LandlockStatus::Available { effective_abi, .. }) => Ok(self.unrestricted(effective_abi)),
            _ => Err(Error::NoLandlock("this kernel does not say what it restricts")),
        }
    }

    /// What a process may do, of all that Landlock restricts.
    fn rules(&self) -> Result<RulesetCreated, Error> {
        let all = Ruleset::default().handle_access(AccessFs::from_all(ABI_KNOWN));
        let all = all.and_then(|rules| rules.scope(Scope::from_all(ABI_KNOWN)));
        let all = all.and_then(|rules| match self.tcp {
            true => Ok(rules),
            false => rules.handle_access(AccessNet::from_all(ABI_KNOWN)),
        });
        let mut rules = all.and_then(Ruleset::create).map_err(refused)?;
        for device in DEVICES.into_iter().map(Path::new).filter(|device| device.exists()) {
            rules = allow(rules, device, Access::Write)?;
        }
        rules = allow(rules, Path::new(PROC), Access::Read)?;
        for file in &self.files {
            rules = allow(rules, &file.path, file.access)?;
        }
        Ok(rules)
    }

    /// What Landlock of the version `abi` does not restrict.
    fn unrestricted(&self, abi: ABI) -> Vec<&'static str> {
        let newer = SINCE.into_iter().filter(|(since, _)| abi < *since);
        let restricted = newer.filter(|(since, _)| !(self.tcp && *since == ABI::V4));
        restricted.map(|(_, what)| what).collect()
    }
}

/// Adds to `rules` that `path`, and what is in it, may be accessed.
fn allow(rules: RulesetCreated, path: &Path, access: Access) -> Result<RulesetCreated, Error> {
    let kind = fs::metadata(path).map_err(Error::file("allow", path))?.file_type();
    let mut rights = rights(access);
    if kind.is_block_device() || kind.is_char_device() {
        rights |= AccessFs::IoctlDev;
    }
    if !kind.is_dir() {
        rights &= AccessFs::from_file(ABI_KNOWN);
    }
    let file = PathFd::new(path).map_err(|error| Error::file("allow", path)(std::io::Error::other(error)))?;
    rules.add_rule(PathBeneath::new(file, rights)).map_err(refused)
}

/// Execution is in neither; device nodes cannot be made without privileges.
fn rights(access: Access) -> BitFlags<AccessFs> {
    match access {
        Access::Read => make_bitflags!(AccessFs::{ReadFile | ReadDir}),
        Access::Write => make_bitflags!(AccessFs::{
            ReadFile | ReadDir | WriteFile | Truncate | RemoveDir | RemoveFile | MakeDir | MakeReg | MakeSock | MakeFifo
                | MakeSym | Refer
        }),
    }
}

fn refused(error: RulesetError) -> Error {
    Error::step("put Landlock's rules in force", "Linux 5.13")(std::io::Error::other(error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_kernel_cannot_restrict_is_told_unless_it_is_allowed_anyway() {
        let sandbox = |tcp| Sandbox {
            files: Vec::new(),
            tcp,
            limits: Limits::default(),
        };
        assert_eq!(sandbox(false).unrestricted(ABI::V6), [""; 0]);
        assert_eq!(sandbox(false).unrestricted(ABI::V2), SINCE.map(|(_, what)| what));
        assert_eq!(sandbox(true).unrestricted(ABI::V3), [SINCE[2].1, SINCE[3].1]);
    }
}
