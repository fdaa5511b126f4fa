//! `cutover group restore`: all VMs of a group from a checkpoint that is kept, started paused by the agents of their hosts,
//! and running from when all are there.
//!
//! ```text
//!  the manifest ─► POST /v1/groups, with snapshots ─► all have joined ─► POST …/resume ─┬─► protected again
//!                                                                                       └─► DELETE: each on its own
//! ```

// Documentation here is help text, in which brackets mean a default.
#![allow(rustdoc::broken_intra_doc_links)]

use std::io::{self, Write};
use std::path::{self, Path, PathBuf};
use std::time::Instant;

use clap::Args;
use cutover_cluster::checkpoint::Manifest;
use cutover_migration::transport::Endpoint;
use hyper::Method;
use serde_json::json;
use tokio::time::sleep;

use super::client::{
    ANSWER_MAX, CommandError, LOOK_EVERY, PaceArgs, TELL_AFTER, group, member, path, status, wait_until_protected,
};
use crate::client::Vm;
use crate::server::groups::types::{GroupMemberV1, GroupStateV1, GroupStatusV1, MemberStateV1};
use crate::text::escaped;

/// Arguments of `cutover group restore`.
#[derive(Debug, Args)]
pub struct RestoreArgs {
    /// Directory of the group in that of checkpoints
    #[arg(value_name = "DIR/GROUP")]
    dir: PathBuf,

    /// Which checkpoint [default: the last one]
    #[arg(long, value_name = "NAME")]
    at: Option<String>,

    /// Where each VM of the group is to run, by where `cutover backup` listens there: vm1=tls://host1:7200
    #[arg(long = "member", value_name = "VM=HOST", value_parser = member, required = true)]
    members: Vec<GroupMemberV1>,

    /// Where `cutover backup` listens on a host that may keep standbys; without any, the VMs are not protected
    #[arg(long = "backup", value_name = "HOST")]
    backups: Vec<Endpoint>,

    #[command(flatten)]
    pace: PaceArgs,

    /// Return when the VMs run, without waiting until they are protected
    #[arg(long)]
    no_wait: bool,
}

/// Shown with `cutover group restore --help`.
pub const HELP: &str = "\
For when nothing of the group runs any more. The agents of the hosts start each VM from its snapshot,
under its name, with its taps and addresses and its disks in the agent's --disks; they wait until all are
there, and then run from the same cut on. What was sent to the outside since is sent again, or not: it is
as if the time from the checkpoint on had not been.

DIR has to be the same on all these hosts. Nobody may run the VMs elsewhere: make sure of that first.

Examples:
  Two VMs, each protected by the other's host again:
    cutover group restore /mnt/checkpoints/shop --member web=tls://host3:7200 --member db=tls://host4:7200 \\
        --backup tls://host3:7200 --backup tls://host4:7200

  As they were at a certain checkpoint, on one host and not protected:
    cutover group checkpoints /mnt/checkpoints/shop
    cutover group restore /mnt/checkpoints/shop --at before-update \\
        --member web=tls://host3:7200 --member db=tls://host3:7200";

/// Starts the group; how it is doing then, if it still is one.
///
/// # Errors
/// There is no such checkpoint, or a host refuses.
pub async fn run(args: &RestoreArgs, coordinator: &Vm) -> Result<Option<GroupStatusV1>, CommandError> {
    let dir = path::absolute(&args.dir).map_err(|error| CommandError::Directory(args.dir.clone(), error))?;
    let manifest = find(&dir, args.at.as_deref())?;
    let members = members(&dir, &manifest, &args.members)?;
    let name = &manifest.group;
    let body = group(name, members, &args.backups, &args.pace);
    coordinator.tell(Method::POST, "/v1/groups", &body, ANSWER_MAX).await?;
    wait_until_joined(coordinator, name).await?;
    let resume = format!("{}/resume", path(name));
    coordinator.tell(Method::POST, &resume, &json!({}), ANSWER_MAX).await?;
    if args.backups.is_empty() {
        coordinator.delete(&path(name), ANSWER_MAX).await?;
        // Nobody reads it where there is no standard error.
        let _ = writeln!(
            io::stderr(),
            "cutover: the VMs of '{name}' run, and are not protected: `cutover group create` does that"
        );
        return Ok(None);
    }
    match args.no_wait {
        true => status(coordinator, name).await.map(Some),
        false => wait_until_protected(coordinator, name).await.map(Some),
    }
}

/// The checkpoint called `at` in `dir`, or the last one there.
fn find(dir: &Path, at: Option<&str>) -> Result<Manifest, CommandError> {
    match at {
        Some(name) => Ok(Manifest::read(dir, name)?),
        None => Manifest::list(dir)?
            .pop()
            .ok_or_else(|| CommandError::NoCheckpoint(dir.to_owned())),
    }
}

/// The members of the checkpoint, where they are to run.
fn members(dir: &Path, manifest: &Manifest, hosts: &[GroupMemberV1]) -> Result<Vec<GroupMemberV1>, CommandError> {
    let is_in = |host: &&GroupMemberV1| manifest.members.iter().any(|member| member.vm == host.name);
    if let Some(other) = hosts.iter().find(|host| !is_in(host)) {
        let (dir, vm) = (dir.to_owned(), other.name.clone());
        return Err(CommandError::NoMember { dir, vm });
    }
    let located = manifest.members.iter().map(|member| {
        let host = hosts.iter().find(|host| host.name == member.vm);
        let host = host.ok_or_else(|| CommandError::NoHost {
            dir: dir.to_owned(),
            vm: member.vm.clone(),
        })?;
        let snapshot = Manifest::snapshot_path(dir, member);
        Ok(GroupMemberV1 {
            restore: Some(snapshot.display().to_string()),
            ..host.clone()
        })
    });
    located.collect()
}

async fn wait_until_joined(coordinator: &Vm, name: &str) -> Result<(), CommandError> {
    let began = Instant::now();
    let mut told = None;
    loop {
        let status = status(coordinator, name).await?;
        if status.state == GroupStateV1::Dissolved {
            let reason = status.reason.unwrap_or_else(|| "it was stopped".to_owned());
            return Err(CommandError::NotProtected {
                group: status.name,
                reason,
            });
        }
        let mut waited_for = status
            .members
            .iter()
            .filter(|member| member.state == MemberStateV1::Expected);
        let Some(missing) = waited_for.next() else {
            return Ok(());
        };
        // What is refused is tried again: whoever asked may mend it meanwhile, or give up.
        if began.elapsed() > TELL_AFTER && status.reason != told {
            let reason = status.reason.as_deref().unwrap_or("it is being started");
            let (vm, reason) = (escaped(&missing.name), escaped(reason));
            let _ = writeln!(io::stderr(), "cutover: waiting for '{vm}' of group '{name}': {reason}");
            told = status.reason;
        }
        sleep(LOOK_EVERY).await;
    }
}

#[cfg(test)]
mod tests {
    use cutover_cluster::checkpoint::{StoredMember, StoredSnapshot};
    use cutover_cluster::id::Generation;

    use super::*;

    fn manifest() -> Manifest {
        let member = |vm: &str| StoredMember {
            vm: vm.to_owned(),
            snapshot: StoredSnapshot {
                id: Default::default(),
                name: "monday.1".to_owned(),
                parent: None,
                file_bytes: 0,
                pause_ns: 0,
            },
        };
        Manifest {
            version: 1,
            group: "shop".to_owned(),
            name: "monday".to_owned(),
            created: 0,
            cut: 1,
            generation: Generation(1),
            members: vec![member("web"), member("db")],
        }
    }

    fn host(text: &str) -> GroupMemberV1 {
        member(text).expect("valid")
    }

    #[test]
    fn each_member_is_started_from_its_snapshot_where_it_is_to_run() {
        let hosts = [host("db=unix:/b"), host("web=unix:/a")];
        let found = members(Path::new("/c/shop"), &manifest(), &hosts).expect("all are there");
        let found: Vec<_> = found
            .iter()
            .map(|member| (&*member.host, member.restore.as_deref()))
            .collect();
        assert_eq!(
            found,
            [
                ("unix:/a", Some("/c/shop/vms/web/monday.1")),
                ("unix:/b", Some("/c/shop/vms/db/monday.1"))
            ]
        );
    }

    #[test]
    fn a_group_is_restored_whole_or_not_at_all() {
        let dir = Path::new("/c/shop");
        let error = members(dir, &manifest(), &[host("web=unix:/a")]).expect_err("db is missing");
        assert!(error.to_string().contains("say where 'db' is to run"), "{error}");
        let hosts = [host("web=unix:/a"), host("db=unix:/b"), host("other=unix:/b")];
        let error = members(dir, &manifest(), &hosts).expect_err("there is no such member");
        assert!(error.to_string().contains("no member 'other'"), "{error}");
    }
}
