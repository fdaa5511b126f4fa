//! Letting go of privileges: user, groups, capabilities, and every way back to them.

use caps::errors::CapsError;
use caps::{CapSet, Capability};
use rustix::process::{DumpableBehavior, Gid, Uid, set_dumpable_behavior};
use rustix::thread::{set_no_new_privs, set_thread_groups, set_thread_res_gid, set_thread_res_uid};

use crate::{Error, User};

/// The calling thread, which must be the only one, becomes `user`, of no other group, without a way back.
pub(crate) fn become_user(user: User) -> Result<(), Error> {
    // The bounding set comes first: later there is no capability left to change it with.
    caps::clear(None, CapSet::Bounding).map_err(capabilities)?;
    let (uid, gid) = (Uid::from_raw(user.uid), Gid::from_raw(user.gid));
    set_thread_groups(&[]).map_err(Error::step("leave all groups", "CAP_SETGID"))?;
    set_thread_res_gid(gid, gid, gid).map_err(Error::step("change the group", "CAP_SETGID"))?;
    set_thread_res_uid(uid, uid, uid).map_err(Error::step("change the user", "CAP_SETUID"))?;
    give_up_capabilities()?;
    // Changing users closed a process's own part of /proc to itself, where it finds which of its memory is in use.
    set_dumpable_behavior(DumpableBehavior::Dumpable).map_err(Error::step("open /proc/self", "Linux"))
}

/// Gives up all capabilities there are, and that of ever gaining some by executing a program.
pub(crate) fn give_up_capabilities() -> Result<(), Error> {
    // Without this capability the set cannot be changed, and without privileges from executed programs it has no meaning.
    if caps::has_cap(None, CapSet::Effective, Capability::CAP_SETPCAP).map_err(capabilities)? {
        caps::clear(None, CapSet::Bounding).map_err(capabilities)?;
    }
    for set in [CapSet::Ambient, CapSet::Inheritable, CapSet::Permitted] {
        caps::clear(None, set).map_err(capabilities)?;
    }
    set_no_new_privs(true).map_err(Error::step("do without new privileges", "Linux 3.5"))
}

fn capabilities(error: CapsError) -> Error {
    Error::step("give up capabilities", "CAP_SETPCAP")(std::io::Error::other(error))
}
