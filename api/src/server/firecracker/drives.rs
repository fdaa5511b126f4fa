//! `/drives/{drive_id}`: disks, and what is behind them while the VM runs.

use std::sync::Arc;

use axum::extract::State;
use cutover_snapshot::spec::{DiskIo, DiskSpec};
use cutover_vmm::DiskUpdate;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::rate_limiter::{RateLimiter, limiter, limits};
use super::rejection::Rejection;
use super::setup::{Change, check_id};
use crate::server::http::{Changed, Id, Json, Outcome};
use crate::server::instance::Instance;

/// Most characters of a partition's UUID, with an offset behind it.
const PARTUUID_MAX: usize = 64;

/// Body of `PUT /drives/{drive_id}`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Drive {
    /// The id, as in the path.
    #[schema(pattern = "^[A-Za-z0-9_]{1,64}$")]
    pub drive_id: String,
    /// Image file or block device. Opened at the start.
    #[schema(required = true, value_type = String)]
    #[serde(default)]
    pub path_on_host: Option<String>,
    /// Whether it is the root device: it becomes the first disk, and the kernel is told `root=`.
    pub is_root_device: bool,
    /// Of the root device: the partition to mount, by its UUID, instead of the whole disk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(pattern = "^[A-Za-z0-9/=-]{1,64}$")]
    pub partuuid: Option<String>,
    /// The guest may not write.
    #[serde(default)]
    pub is_read_only: Option<bool>,
    /// Whether flushes of the guest may be ignored. They never are.
    #[serde(default)]
    pub cache_type: CacheType,
    /// Limits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_limiter: Option<RateLimiter>,
    /// How requests reach the host; the best way there is if not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub io_engine: Option<IoEngine>,
    /// vhost-user back end: not supported.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(ignore)]
    pub socket: Option<String>,
}

/// Body of `PATCH /drives/{drive_id}`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct DrivePatch {
    /// The id, as in the path.
    #[schema(pattern = "^[A-Za-z0-9_]{1,64}$")]
    pub drive_id: String,
    /// Another image file or block device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path_on_host: Option<String>,
    /// Other limits; a bucket that is not given stays as it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_limiter: Option<RateLimiter>,
}

/// What becomes of a guest's flushes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub enum CacheType {
    /// They may be ignored.
    #[default]
    Unsafe,
    /// They reach the disk.
    Writeback,
}

/// How requests reach the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub enum IoEngine {
    /// Threads.
    Sync,
    /// io_uring, or the start fails.
    Async,
}

impl Drive {
    /// Whether there can be such a drive.
    ///
    /// # Errors
    /// Something is missing, malformed or not supported.
    pub fn check(&self) -> Result<(), Rejection> {
        check_id("disk", &self.drive_id)?;
        if self.socket.is_some() {
            return Err(Rejection::Unsupported("socket, a vhost-user back end of a drive"));
        }
        if self.path_on_host.is_none() {
            return Err(Rejection::Missing("path_on_host"));
        }
        let is_allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"-/=".contains(&byte);
        match &self.partuuid {
            Some(uuid) if !(1..=PARTUUID_MAX).contains(&uuid.len()) || !uuid.bytes().all(is_allowed) => {
                Err(Rejection::PartUuid(uuid.clone()))
            }
            _ => Ok(()),
        }
    }

    /// What the kernel is told of this drive as its root device.
    pub fn root_arguments(&self) -> String {
        let access = if self.is_read_only() { "ro" } else { "rw" };
        match &self.partuuid {
            Some(uuid) => format!("root=PARTUUID={uuid} {access}"),
            None => format!("root=/dev/vda {access}"),
        }
    }

    fn is_read_only(&self) -> bool {
        self.is_read_only.unwrap_or(false)
    }

    /// The disk of this drive.
    pub fn spec(&self) -> DiskSpec {
        DiskSpec {
            id: Some(self.drive_id.clone()),
            path: self.path_on_host.clone().unwrap_or_default().into(),
            readonly: self.is_read_only(),
            serial: None,
            io: match self.io_engine {
                None => DiskIo::Auto,
                Some(IoEngine::Sync) => DiskIo::Threads,
                Some(IoEngine::Async) => DiskIo::IoUring,
            },
            rate_limiter: limits(self.rate_limiter),
        }
    }

    /// The drive of the disk that is the `index`-th of its VM.
    pub fn of(disk: &DiskSpec, index: usize) -> Self {
        Self {
            drive_id: disk.id_at(index),
            path_on_host: Some(disk.path.display().to_string()),
            is_root_device: false,
            partuuid: None,
            is_read_only: Some(disk.readonly),
            cache_type: CacheType::Writeback,
            rate_limiter: limiter(disk.rate_limiter),
            io_engine: match disk.io {
                DiskIo::Auto => None,
                DiskIo::Threads => Some(IoEngine::Sync),
                DiskIo::IoUring => Some(IoEngine::Async),
            },
            socket: None,
        }
    }

    /// Takes over what a PATCH has changed.
    pub fn apply(&mut self, patch: &DrivePatch) {
        if patch.path_on_host.is_some() {
            self.path_on_host.clone_from(&patch.path_on_host);
        }
        if let Some(change) = patch.rate_limiter {
            self.rate_limiter = limiter(limits(self.rate_limiter).updated(change.into()));
        }
    }
}

impl DrivePatch {
    /// What is to be changed about the disk.
    ///
    /// # Errors
    /// Nothing is.
    pub fn update(&self) -> Result<DiskUpdate, Rejection> {
        if self.path_on_host.is_none() && self.rate_limiter.is_none() {
            return Err(Rejection::EmptyPatch);
        }
        Ok(DiskUpdate {
            path: self.path_on_host.clone().map(Into::into),
            rate_limiter: self.rate_limiter.map(Into::into),
        })
    }
}

/// Adds a drive, or replaces the one with this id. Before the start only.
#[utoipa::path(
    put, path = "/drives/{drive_id}", operation_id = "putGuestDriveByID", tag = "firecracker",
    params(("drive_id" = String, Path, description = "Id of the drive", pattern = "^[A-Za-z0-9_]{1,64}$")),
    request_body = Drive, responses(Changed)
)]
pub async fn put(State(instance): State<Arc<Instance>>, Id(id): Id, Json(body): Json<Drive>) -> Outcome {
    same_id(id, &body.drive_id)?;
    instance.configure(Change::Drive(body))
}

/// Puts another file behind a drive, or changes its limits. After the start only.
///
/// Requests in flight finish on the old file. The guest is told of the new size.
#[utoipa::path(
    patch, path = "/drives/{drive_id}", operation_id = "patchGuestDriveByID", tag = "firecracker",
    params(("drive_id" = String, Path, description = "Id of the drive", pattern = "^[A-Za-z0-9_]{1,64}$")),
    request_body = DrivePatch, responses(Changed)
)]
pub async fn patch(State(instance): State<Arc<Instance>>, Id(id): Id, Json(body): Json<DrivePatch>) -> Outcome {
    same_id(id, &body.drive_id)?;
    instance.update_drive(body).await
}

/// Whether path and body are about the same device.
///
/// # Errors
/// They are not.
pub fn same_id(path: String, body: &str) -> Result<(), Rejection> {
    if path == body {
        return Ok(());
    }
    Err(Rejection::IdMismatch {
        path,
        body: body.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const FULL: &str = r#"{"drive_id":"rootfs","path_on_host":"root.ext4","is_root_device":true,"partuuid":null,
        "is_read_only":true,"cache_type":"Writeback","io_engine":"Async","socket":null,
        "rate_limiter":{"ops":{"size":10,"refill_time":250}}}"#;

    fn read(json: &str) -> Drive {
        serde_json::from_str(json).expect("Firecracker's form")
    }

    #[test]
    fn every_field_of_firecracker_becomes_part_of_the_disk() {
        let drive = read(FULL);
        assert_eq!(drive.check(), Ok(()));
        let disk = drive.spec();
        assert_eq!(
            (disk.id.as_deref(), disk.readonly, disk.io),
            (Some("rootfs"), true, DiskIo::IoUring)
        );
        assert_eq!(disk.rate_limiter.ops.expect("a limit").size, 10);
        assert_eq!(drive.root_arguments(), "root=/dev/vda ro");
    }

    #[test]
    fn a_root_partition_is_found_by_its_uuid() {
        let drive = read(&FULL.replace("\"partuuid\":null", "\"partuuid\":\"0eaa91a0-01\""));
        assert_eq!(drive.root_arguments(), "root=PARTUUID=0eaa91a0-01 ro");
        let hostile = read(&FULL.replace("\"partuuid\":null", "\"partuuid\":\"x init=/bin/sh\""));
        assert!(matches!(hostile.check(), Err(Rejection::PartUuid(_))));
    }

    #[test]
    fn what_is_no_drive_is_refused_with_the_reason() {
        for (json, reason) in [
            (
                r#"{"drive_id":"a b","path_on_host":"a","is_root_device":false}"#,
                "an id has 1 to 64",
            ),
            (r#"{"drive_id":"a","is_root_device":false}"#, "path_on_host is missing"),
            (r#"{"drive_id":"a","is_root_device":false,"socket":"s"}"#, "vhost-user"),
        ] {
            let error = read(json).check().expect_err(json).to_string();
            assert!(error.contains(reason), "{error}");
        }
        let error = serde_json::from_str::<Drive>(r#"{"drive_id":"a","path_on_host":"a"}"#).expect_err("no root flag");
        assert!(error.to_string().contains("missing field `is_root_device`"), "{error}");
    }

    #[test]
    fn a_patch_changes_what_it_gives_and_must_give_something() {
        let mut drive = read(FULL);
        let patch: DrivePatch = serde_json::from_str(r#"{"drive_id":"rootfs","path_on_host":"b"}"#).expect("valid");
        assert_eq!(patch.update().expect("a change").path, Some("b".into()));
        drive.apply(&patch);
        assert_eq!(drive.path_on_host.as_deref(), Some("b"));
        assert_eq!(drive.rate_limiter, read(FULL).rate_limiter);
        let nothing: DrivePatch = serde_json::from_str(r#"{"drive_id":"rootfs"}"#).expect("valid");
        assert_eq!(nothing.update().expect_err("no change"), Rejection::EmptyPatch);
    }

    #[test]
    fn a_drive_made_of_a_disk_is_that_disk() {
        let disk = DiskSpec {
            serial: None,
            ..read(FULL).spec()
        };
        assert_eq!(Drive::of(&disk, 0).spec(), disk);
    }
}
