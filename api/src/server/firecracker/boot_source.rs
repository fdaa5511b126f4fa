//! `/boot-source`: kernel, initial RAM disk and kernel command line.

use std::sync::Arc;

use axum::extract::State;
use cutover_snapshot::spec::{BootProtocol, BootSpec, CMDLINE_MAX, DEFAULT_CMDLINE, SpecError, VmSpec};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::drives::Drive;
use super::rejection::Rejection;
use super::setup::Change;
use crate::server::http::{Changed, Json, Outcome};
use crate::server::instance::Instance;

/// What separates the kernel's own arguments from those of the first program.
const ARGUMENTS_OF_INIT: &str = " -- ";

/// Body of `PUT /boot-source`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct BootSource {
    /// Kernel: a bzImage or an ELF `vmlinux`. Read at the start.
    pub kernel_image_path: String,
    /// Initial RAM disk. Read at the start.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initrd_path: Option<String>,
    /// Kernel command line; `console=ttyS0 panic=-1` if not given. The root device is added to it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(max_length = 2047)]
    pub boot_args: Option<String>,
}

impl BootSource {
    /// Whether a kernel takes it.
    ///
    /// # Errors
    /// The command line is too long, or has a NUL in it.
    pub fn check(&self) -> Result<(), Rejection> {
        let Some(arguments) = &self.boot_args else {
            return Ok(());
        };
        if arguments.len() > CMDLINE_MAX {
            return Err(SpecError::CmdlineLength(arguments.len()).into());
        }
        match arguments.find('\0') {
            Some(position) => Err(SpecError::CmdlineNul(position).into()),
            None => Ok(()),
        }
    }

    /// What is booted if `root` is the root device.
    ///
    /// # Errors
    /// The command line has no room for the root device.
    pub fn spec(&self, root: Option<&Drive>) -> Result<BootSpec, Rejection> {
        let arguments = self.boot_args.as_deref().unwrap_or(DEFAULT_CMDLINE);
        let cmdline = match root.map(Drive::root_arguments) {
            Some(root) => with_root(arguments, &root),
            None => arguments.to_owned(),
        };
        if cmdline.len() > CMDLINE_MAX {
            return Err(Rejection::BootArgs(cmdline.len()));
        }
        Ok(BootSpec {
            kernel: self.kernel_image_path.clone().into(),
            initrd: self.initrd_path.clone().map(Into::into),
            protocol: BootProtocol::Auto,
            cmdline,
        })
    }
}

impl From<&VmSpec> for BootSource {
    fn from(spec: &VmSpec) -> Self {
        Self {
            kernel_image_path: spec.boot.kernel.display().to_string(),
            initrd_path: spec.boot.initrd.as_ref().map(|path| path.display().to_string()),
            boot_args: Some(spec.boot.cmdline.clone()),
        }
    }
}

/// Adds `root` to the kernel's arguments, of which the last counts, and before those of the first program.
fn with_root(arguments: &str, root: &str) -> String {
    let (kernel, init) = match arguments.find(ARGUMENTS_OF_INIT) {
        Some(position) => arguments.split_at(position),
        None => (arguments, ""),
    };
    let separator = if kernel.is_empty() { "" } else { " " };
    format!("{kernel}{separator}{root}{init}")
}

/// Sets what is booted. Before the start only.
#[utoipa::path(
    put, path = "/boot-source", operation_id = "putGuestBootSource", tag = "firecracker",
    request_body = BootSource, responses(Changed)
)]
pub async fn put(State(instance): State<Arc<Instance>>, Json(body): Json<BootSource>) -> Outcome {
    instance.configure(Change::BootSource(body))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(boot_args: Option<&str>) -> BootSource {
        BootSource {
            kernel_image_path: "vmlinux".to_owned(),
            initrd_path: None,
            boot_args: boot_args.map(str::to_owned),
        }
    }

    fn root() -> Drive {
        serde_json::from_str(r#"{"drive_id":"r","path_on_host":"r.ext4","is_root_device":true,"is_read_only":false}"#)
            .expect("a drive")
    }

    #[test]
    fn a_kernel_without_arguments_gets_those_a_stock_kernel_boots_with() {
        let spec = source(None).spec(None).expect("short");
        assert_eq!(spec.cmdline, "console=ttyS0 panic=-1");
        assert_eq!(
            (spec.kernel, spec.initrd, spec.protocol),
            ("vmlinux".into(), None, BootProtocol::Auto)
        );
    }

    #[test]
    fn the_root_device_is_added_to_the_arguments_of_the_kernel() {
        for (arguments, cmdline) in [
            (Some("quiet"), "quiet root=/dev/vda rw"),
            (Some(""), "root=/dev/vda rw"),
            (Some("quiet -- single"), "quiet root=/dev/vda rw -- single"),
            (None, "console=ttyS0 panic=-1 root=/dev/vda rw"),
        ] {
            assert_eq!(source(arguments).spec(Some(&root())).expect("short").cmdline, cmdline);
        }
    }

    #[test]
    fn arguments_that_no_kernel_takes_are_refused() {
        let long = "x".repeat(CMDLINE_MAX + 1);
        assert_eq!(
            source(Some(&long)).check(),
            Err(SpecError::CmdlineLength(CMDLINE_MAX + 1).into())
        );
        assert_eq!(source(Some("a\0b")).check(), Err(SpecError::CmdlineNul(1).into()));
        let longest = source(Some(&long[1..]));
        assert_eq!(longest.check(), Ok(()));
        assert!(matches!(longest.spec(Some(&root())), Err(Rejection::BootArgs(_))));
    }

    #[test]
    fn a_kernel_is_needed_and_a_null_is_as_good_as_nothing() {
        let error = serde_json::from_str::<BootSource>(r#"{"boot_args":"quiet"}"#).expect_err("no kernel");
        assert!(
            error.to_string().contains("missing field `kernel_image_path`"),
            "{error}"
        );
        let json = r#"{"kernel_image_path":"vmlinux","initrd_path":null,"boot_args":null}"#;
        assert_eq!(serde_json::from_str::<BootSource>(json).expect("valid"), source(None));
    }
}
