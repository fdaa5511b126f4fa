//! The VM of a process as a member of a group: joined by its coordinator's word, told of.
//!
//! ```text
//!  PUT ── join_group ──► state driver: Protection ──► thread "member", confined ──► Seat: its threads, the coordinator
//! ```

use std::path::PathBuf;
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::thread;

use axum::http::StatusCode;
use cutover_cluster::id::{Host, Identity};
use cutover_cluster::message::Ending;
use cutover_cluster::runtime::seat::{Seat, SeatOptions, SeatView, SharedView};
use cutover_migration::transport::{Endpoint, Security};
use cutover_vmm::Controller;
use cutover_vmm::protection::{Notice, Protection};
use cutover_vmm::seccomp::{self, ThreadKind};
use tokio::sync::oneshot;

use super::{Instance, lock};
use crate::group_command::security;
use crate::member::{self, Member};
use crate::server::firecracker::rejection::Rejection;
use crate::server::firecracker::setup::Needs;
use crate::server::http::{Failure, Outcome};

/// As whom a VM is to join which group.
#[derive(Clone, Debug)]
pub struct JoinRequest {
    /// As whom.
    pub who: Identity,
    /// What the coordinator calls this host.
    pub host: Host,
    /// Where it listens.
    pub coordinator: Endpoint,
    /// Allow `tcp://`.
    pub insecure: bool,
    /// Where this host's certificate is.
    pub tls_dir: Option<PathBuf>,
}

/// What is known of the VM's membership. Clones are of the same VM.
#[derive(Clone, Debug, Default)]
pub struct Membership(Arc<Mutex<Option<SharedView>>>);

impl Membership {
    /// How the VM does as a member, if it is one.
    pub fn view(&self) -> Option<SeatView> {
        self.shared().as_ref().map(SharedView::get)
    }

    fn shared(&self) -> Option<SharedView> {
        lock(&self.0).clone()
    }

    /// The VM is a member, as this shows.
    pub fn begin(&self, view: SharedView) {
        *lock(&self.0) = Some(view);
    }

    /// It is one no more.
    pub fn end(&self) {
        *lock(&self.0) = None;
    }
}

impl Instance {
    /// This VM, as a member that `membership` shows.
    #[must_use]
    pub fn with_membership(self, membership: Membership) -> Self {
        Self { membership, ..self }
    }

    /// How the VM does as a member of a group, if it is one.
    pub fn membership(&self) -> Option<SeatView> {
        self.membership.view()
    }

    /// Has the VM join a group. One that is that member already looks for the coordinator there from then on, too.
    ///
    /// # Errors
    /// It has not been started, is a member of another group, or cannot be protected.
    pub async fn join_group(&self, request: JoinRequest) -> Outcome {
        self.check(Needs::Started)?;
        match self.membership.shared() {
            Some(view) if view.get().who == request.who => {
                view.learn(request.coordinator);
                return Ok(StatusCode::NO_CONTENT);
            }
            Some(view) => return Err(Rejection::MemberAlready(view.get().who.group.to_string()).into()),
            None => {}
        }
        let vm = self.controller.get().cloned().ok_or(Failure::Ended)?;
        let tls_dir = request.tls_dir.as_deref();
        let security = security(tls_dir, request.insecure).map_err(cutover_vmm::Error::from)?;
        let (answer, answered) = oneshot::channel();
        let (notices, told) = channel();
        let membership = self.membership.clone();
        let joining = Joining {
            request,
            security,
            notices: told,
            vm: vm.clone(),
            membership,
        };
        // Called by the state driver, which may start threads; this one may not.
        vm.protect_then(notices, move |protection| joining.begin(protection, answer));
        answered.await.map_err(|_| Failure::Ended)??;
        Ok(StatusCode::NO_CONTENT)
    }
}

/// A VM that is about to be a member.
struct Joining {
    request: JoinRequest,
    security: Security,
    notices: Receiver<Notice>,
    vm: Controller,
    membership: Membership,
}

impl Joining {
    /// Has the VM be a member by `protection`, from a thread of its own, and says what came of it.
    fn begin(self, protection: Result<Protection, cutover_vmm::Error>, answer: oneshot::Sender<Result<(), Failure>>) {
        let protection = match protection {
            Ok(protection) => protection,
            Err(error) => {
                // A client that is gone is not told, here and below.
                let _ = answer.send(Err(error.into()));
                return;
            }
        };
        let started = thread::Builder::new().name("member".to_owned()).spawn(move || {
            seccomp::confine_or_abort(ThreadKind::Migration);
            self.take_part(protection, answer);
        });
        if let Err(error) = started {
            tracing::error!(%error, "the VM cannot be a member of a group: there is no thread to be had");
        }
    }

    fn take_part(self, protection: Protection, answer: oneshot::Sender<Result<(), Failure>>) {
        let Self {
            request,
            security,
            notices,
            vm,
            membership,
        } = self;
        let seat = Seat::default();
        let told = seat.notices();
        let member = Member::new(protection, request.insecure, request.tls_dir);
        let options = SeatOptions {
            who: request.who,
            host: request.host,
            coordinator: request.coordinator,
            security,
        };
        let (begun, has_begun) = channel::<()>();
        let over = membership.clone();
        let joined = seat.join(member, &options, move |ending| {
            // What has not begun has no end.
            let _ = has_begun.recv();
            over.end();
            obey(ending, &vm);
        });
        match joined {
            Ok(view) => {
                membership.begin(view);
                drop(begun);
                let _ = answer.send(Ok(()));
                member::pass_on(&notices, &told);
            }
            Err(error) => drop(answer.send(Err(error.into()))),
        }
    }
}

/// What the end of a membership means to the VM.
pub fn obey(ending: Ending, vm: &Controller) {
    match ending {
        Ending::Released => tracing::info!("the VM goes on on its own"),
        Ending::Replaced => {
            tracing::warn!("another is in this VM's place: it ends");
            // One that has ended meanwhile is as wanted.
            let _ = vm.destroy();
        }
    }
}
