//! What can be asked of a coordinator: to have groups, how they are doing, and to have them no more.

use std::collections::BTreeSet;
use std::time::{SystemTime, UNIX_EPOCH};

use cutover_migration::transport::Endpoint;

use super::{Desk, Running};
use crate::Error;
use crate::checkpoint::{Manifest, StoreRequest, StoredCut};
use crate::engine::{Engine, Event, GroupStatus, Record, Request, RequestId};
use crate::id::{GroupId, MemberId, Seat};
use crate::runtime::recovery::Recovery;
use crate::spec::GroupSpec;

/// Most groups of a coordinator.
pub const GROUPS_MAX: usize = 1024;

/// The way of an answer; called on the coordinator's thread, it must not wait.
pub type Reply<T> = Box<dyn FnOnce(Result<T, Error>) + Send>;

/// What can be asked of a coordinator.
pub enum Ask {
    /// Have there be a group. Answered when the journal has it.
    Create(GroupSpec, Reply<()>),
    /// How are the groups doing that are not dissolved?
    Groups(Reply<Vec<GroupView>>),
    /// How is this one?
    Group(String, Reply<GroupView>),
    /// Be a group no more. Answered when the journal says so.
    Dissolve(String, Reply<()>),
    /// Have this member of it fail. Answered when the group has recovered.
    Failover {
        /// Which group.
        group: String,
        /// The name of the member.
        member: String,
        /// Where the answer goes.
        reply: Reply<()>,
    },
    /// Have a checkpoint of it be stored. Answered when all members have their snapshots of it: what is left is to
    /// [write](Manifest::write) the manifest.
    Store {
        /// Which group.
        group: String,
        /// What is to be stored.
        request: StoreRequest,
        /// Where the answer goes.
        reply: Reply<Manifest>,
    },
    /// How far is the checkpoint that is being stored? Bytes copied, and to be copied.
    StoreProgress(String, Reply<Option<(u64, u64)>>),
    /// Give it up.
    CancelStore(String, Reply<()>),
    /// Have VMs run that were started paused, from snapshots. Answered when their hosts are told.
    Resume(String, Reply<()>),
}

/// Somebody who waits for what was asked of a group.
pub(super) enum Asked {
    Plain(Reply<()>),
    Store(StoreRequest, Reply<Manifest>),
}

impl Asked {
    /// It is done, or why not.
    pub fn answer(self, group: &str, result: Result<(), String>) {
        let not_now = |action, reason| Error::NotNow {
            group: group.to_owned(),
            action,
            reason,
        };
        match (self, result) {
            (Self::Plain(reply), Ok(())) => reply(Ok(())),
            (asked @ Self::Plain(_), Err(reason)) => asked.fail(not_now("do that", reason)),
            (asked @ Self::Store(..), Err(reason)) => asked.fail(not_now("be stored", reason)),
            // That is answered by what was stored.
            (Self::Store(..), Ok(())) => {}
        }
    }

    /// It is not known what comes of it: nothing is decided here any more.
    pub fn refuse(self, reason: &str) {
        self.fail(not_deciding(reason));
    }

    /// Nothing comes of it.
    fn fail(self, error: Error) {
        match self {
            Self::Plain(reply) => reply(Err(error)),
            Self::Store(_, reply) => reply(Err(error)),
        }
    }

    /// All members of the group of `record` have their snapshots of `cut`.
    pub fn answer_stored(self, record: &Record, cut: StoredCut) {
        if let Self::Store(request, reply) = self {
            let names: Vec<_> = record.spec.members.iter().map(|member| member.name.as_str()).collect();
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
            reply(Ok(Manifest::new(
                &request,
                &record.spec.name,
                &names,
                cut,
                now.as_secs(),
            )));
        }
    }
}

/// A group, as whoever asks sees it.
#[derive(Clone, Debug)]
pub struct GroupView {
    /// How it is doing.
    pub status: GroupStatus,
    /// Members and standbys that there is a link to.
    pub connected: BTreeSet<Seat>,
    /// Why a VM could not join, or have a standby, when that was last tried.
    pub refusal: Option<String>,
    /// Its last recovery, since this coordinator has it.
    pub last_recovery: Option<Recovery>,
}

impl Ask {
    /// Answers that nothing is decided here.
    pub(super) fn refuse(self, reason: &str) {
        let error = not_deciding(reason);
        match self {
            Self::Groups(reply) => reply(Err(error)),
            Self::Group(_, reply) => reply(Err(error)),
            Self::Store { reply, .. } => reply(Err(error)),
            Self::StoreProgress(_, reply) => reply(Err(error)),
            Self::Create(_, reply)
            | Self::Dissolve(_, reply)
            | Self::Failover { reply, .. }
            | Self::CancelStore(_, reply)
            | Self::Resume(_, reply) => reply(Err(error)),
        }
    }
}

fn not_deciding(reason: &str) -> Error {
    Error::NotDeciding {
        reason: reason.to_owned(),
    }
}

impl Desk {
    pub(super) fn serve(&mut self, ask: Ask) -> Result<(), Error> {
        match ask {
            Ask::Create(spec, reply) => return self.create(spec, reply),
            Ask::Groups(reply) => {
                let groups = self.groups.values().filter(|running| !running.is_over());
                reply(Ok(groups.map(Running::view).collect()));
            }
            Ask::Group(name, reply) => reply(self.find(&name).map(|id| self.groups[&id].view())),
            Ask::Dissolve(name, reply) => match self.find(&name) {
                Ok(id) => return self.request(id, Request::Dissolve, Asked::Plain(reply)),
                Err(error) => reply(Err(error)),
            },
            Ask::Store { group, request, reply } => match self.find_to_store(&group, &request) {
                Ok(id) => return self.request(id, Request::Store(request.clone()), Asked::Store(request, reply)),
                Err(error) => reply(Err(error)),
            },
            Ask::StoreProgress(name, reply) => {
                reply(self.find(&name).map(|id| self.groups[&id].engine.store_progress()));
            }
            Ask::Resume(name, reply) => match self.find(&name) {
                Ok(id) => return self.request(id, Request::Resume, Asked::Plain(reply)),
                Err(error) => reply(Err(error)),
            },
            Ask::CancelStore(name, reply) => match self.find(&name) {
                Ok(id) => return self.request(id, Request::CancelStore, Asked::Plain(reply)),
                Err(error) => reply(Err(error)),
            },
            Ask::Failover { group, member, reply } => match self.find_member(&group, &member) {
                Ok((id, member)) => return self.request(id, Request::Failover(member), Asked::Plain(reply)),
                Err(error) => reply(Err(error)),
            },
        }
        Ok(())
    }

    fn create(&mut self, spec: GroupSpec, reply: Reply<()>) -> Result<(), Error> {
        if self.groups.len() >= GROUPS_MAX {
            self.forget_dissolved()?;
        }
        let group = GroupId(uuid::Uuid::new_v4());
        let created = self
            .check_new(&spec)
            .and_then(|()| Engine::create(group, spec, self.now()));
        match created {
            Ok((engine, actions)) => {
                // A journal that fails ends the coordinator, and with it the way of the answer.
                self.add(group, engine, actions)?;
                reply(Ok(()));
            }
            Err(error) => reply(Err(error)),
        }
        Ok(())
    }

    /// Groups that are dissolved are known for as long as there is room: somebody may still have to be told.
    fn forget_dissolved(&mut self) -> Result<(), Error> {
        let is_over = |running: &Running| {
            let mut links = running.links.values();
            running.is_over() && links.all(|(_, link)| link.is_over())
        };
        let over = self.groups.iter().filter(|(_, running)| is_over(running));
        for group in over.map(|(id, _)| *id).collect::<Vec<_>>() {
            self.journal.forget(group)?;
            self.groups.remove(&group);
        }
        Ok(())
    }

    /// Whether there may be one more group, of this spec.
    fn check_new(&self, spec: &GroupSpec) -> Result<(), Error> {
        let refused = |reason: String| Error::Spec {
            group: spec.name.clone(),
            reason,
        };
        if self.groups.len() >= GROUPS_MAX {
            return Err(refused(format!("this coordinator has {GROUPS_MAX} groups already")));
        }
        if self.find(&spec.name).is_ok() {
            return Err(refused("there is one of that name".to_owned()));
        }
        for host in spec.members.iter().map(|member| &member.host).chain(&spec.backups) {
            let endpoint = host.0.parse::<Endpoint>().map_err(|error| refused(error.to_string()))?;
            if matches!(endpoint, Endpoint::Tls(_)) && self.security.identity.is_none() {
                return Err(refused(format!(
                    "{endpoint} takes a certificate, which this coordinator has not"
                )));
            }
        }
        Ok(())
    }

    fn request(&mut self, group: GroupId, request: Request, asked: Asked) -> Result<(), Error> {
        self.next_request += 1;
        let id = RequestId(self.next_request);
        self.requests.insert(id, asked);
        self.hear(group, Event::Asked(id, request))
    }

    /// The group of this name that is not over.
    fn find(&self, name: &str) -> Result<GroupId, Error> {
        let is_it = |running: &Running| running.engine.record().spec.name == name && !running.is_over();
        let found = self.groups.iter().find(|(_, running)| is_it(running));
        found.map(|(id, _)| *id).ok_or_else(|| Error::NoGroup(name.to_owned()))
    }

    fn find_to_store(&self, group: &str, request: &StoreRequest) -> Result<GroupId, Error> {
        let id = self.find(group)?;
        let refused = |reason| Error::NotNow {
            group: group.to_owned(),
            action: "be stored",
            reason,
        };
        request.validate().map_err(refused)?;
        Ok(id)
    }

    fn find_member(&self, group: &str, member: &str) -> Result<(GroupId, MemberId), Error> {
        let id = self.find(group)?;
        let members = &self.groups[&id].engine.record().spec.members;
        let found = (0..).map(MemberId).zip(members).find(|(_, spec)| spec.name == member);
        let found = found.ok_or_else(|| Error::NotNow {
            group: group.to_owned(),
            action: "lose a member",
            reason: format!("it has none called '{member}'"),
        });
        Ok((id, found?.0))
    }
}
