//! The VM that a command line, with or without a configuration file, describes.

use std::error::Error;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use cutover_devices::mmds::Metadata;
use cutover_snapshot::size::ByteSize;
use cutover_snapshot::spec::{BootProtocol, BootSpec, DEFAULT_CMDLINE, MemorySpec, SerialSpec, SpecError, VmSpec};
use serde::de::DeserializeOwned;

use crate::cli::RunArgs;

/// vCPUs of a VM for which no number is given.
const DEFAULT_CPUS: u8 = 1;
/// Memory of a VM for which no size is given.
const DEFAULT_MEMORY: ByteSize = ByteSize::from_mib(512);

/// Why the arguments describe no VM.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The configuration file cannot be read.
    #[error("cannot read the configuration file {}", .path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The configuration file is no JSON, or not that of a VM.
    #[error("the configuration file {} does not describe a VM", .path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// What is wrong, and where.
        source: serde_json::Error,
    },
    /// Nothing to boot.
    #[error("no kernel to boot: give --kernel FILE, or --config FILE")]
    NoKernel,
    /// The metadata file cannot be read, or has no metadata in it.
    #[error("the metadata file {} cannot be used", .path.display())]
    Metadata {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: Box<dyn Error + Send + Sync>,
    },
    /// What is described is beyond some limit.
    #[error(transparent)]
    Spec(#[from] SpecError),
}

/// The VM that `args` describe: that of the configuration file or one with default values, changed by the options.
///
/// # Errors
/// The configuration file is unusable, there is no kernel, or the result is no VM.
pub fn vm_spec(args: &RunArgs) -> Result<VmSpec, ConfigError> {
    let mut spec = match (&args.config, &args.kernel) {
        (Some(path), _) => read(path)?,
        (None, Some(kernel)) => default_vm(kernel),
        (None, None) => return Err(ConfigError::NoKernel),
    };
    apply(args, &mut spec);
    spec.check()?;
    Ok(spec)
}

/// What the configuration file at `path` describes.
///
/// # Errors
/// It cannot be read, or describes something else.
pub fn read<T: DeserializeOwned>(path: &Path) -> Result<T, ConfigError> {
    let json = fs::read_to_string(path).map_err(|source| ConfigError::Read {
        path: path.to_owned(),
        source,
    })?;
    serde_json::from_str(&json).map_err(|source| ConfigError::Parse {
        path: path.to_owned(),
        source,
    })
}

/// Metadata of at most `limit` bytes: those of the file at `path`, if one is given.
///
/// # Errors
/// It cannot be read, or has other things in it.
pub fn metadata(path: Option<&Path>, limit: usize) -> Result<Arc<Metadata>, ConfigError> {
    let metadata = Arc::new(Metadata::with_limit(limit));
    let Some(path) = path else {
        return Ok(metadata);
    };
    let failed = |source| ConfigError::Metadata {
        path: path.to_owned(),
        source,
    };
    let json = fs::read(path).map_err(|error| failed(error.into()))?;
    let document = serde_json::from_slice(&json).map_err(|error| failed(error.into()))?;
    metadata.put(document).map_err(|error| failed(error.into()))?;
    Ok(metadata)
}

fn default_vm(kernel: &Path) -> VmSpec {
    VmSpec {
        name: None,
        cpus: DEFAULT_CPUS,
        memory: MemorySpec {
            size: DEFAULT_MEMORY,
            shared: false,
            hugepages: false,
        },
        boot: BootSpec {
            kernel: kernel.to_owned(),
            initrd: None,
            protocol: BootProtocol::Auto,
            cmdline: DEFAULT_CMDLINE.to_owned(),
        },
        disks: Vec::new(),
        nets: Vec::new(),
        rng: None,
        vsock: None,
        mmds: None,
        balloon: None,
        serial: SerialSpec::Stdio,
    }
}

/// Single values replace, lists grow, and switches can only be turned on.
fn apply(args: &RunArgs, spec: &mut VmSpec) {
    fn replace<T: Clone>(value: &mut T, given: Option<&T>) {
        if let Some(given) = given {
            value.clone_from(given);
        }
    }
    replace(&mut spec.boot.kernel, args.kernel.as_ref());
    replace(
        &mut spec.boot.protocol,
        args.boot_protocol.map(BootProtocol::from).as_ref(),
    );
    replace(&mut spec.boot.cmdline, args.cmdline.as_ref());
    replace(&mut spec.cpus, args.cpus.as_ref());
    replace(&mut spec.memory.size, args.memory.as_ref());
    replace(&mut spec.serial, args.monitor.serial.as_ref());
    if args.initrd.is_some() {
        spec.boot.initrd.clone_from(&args.initrd);
    }
    if args.monitor.name.is_some() {
        spec.name.clone_from(&args.monitor.name);
    }
    spec.memory.shared |= args.memory_shared;
    spec.memory.hugepages |= args.hugepages;
    if args.rng {
        spec.rng.get_or_insert_default();
    }
    if args.balloon.is_some() {
        spec.balloon = args.balloon;
    }
    if args.vsock.is_some() {
        spec.vsock.clone_from(&args.vsock);
    }
    if args.mmds.is_some() {
        spec.mmds.clone_from(&args.mmds);
    }
    spec.disks.extend_from_slice(&args.disks);
    spec.nets.extend_from_slice(&args.nets);
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use cutover_snapshot::spec::RngSpec;
    use tempfile::NamedTempFile;

    use super::*;
    use crate::cli::{MonitorArgs, Protocol};
    use crate::options;

    const CONFIG: &str = r#"{
        "name": "file",
        "cpus": 2,
        "memory": { "size": "256M", "shared": true },
        "boot": { "kernel": "file-kernel", "initrd": "file-initrd", "cmdline": "file" },
        "disks": [{ "path": "file.img" }],
        "nets": [{ "tap": { "name": "file0" } }],
        "serial": "null"
    }"#;

    fn file(json: &str) -> NamedTempFile {
        let mut file = NamedTempFile::new().expect("temporary file");
        file.write_all(json.as_bytes()).expect("write");
        file
    }

    fn config(file: &NamedTempFile) -> RunArgs {
        RunArgs {
            config: Some(file.path().to_owned()),
            ..RunArgs::default()
        }
    }

    #[test]
    fn metadata_are_those_of_the_file_if_there_is_one() {
        assert_eq!(
            metadata(None, 0).expect("nothing is needed").get(),
            serde_json::Value::Null
        );
        let good = file(r#"{"a": "b"}"#);
        assert_eq!(metadata(Some(good.path()), 9).expect("9 bytes").get()["a"], "b");
        for (file, limit, reason) in [
            (good, 8, "the metadata would take 9 bytes, of 8"),
            (file("{"), 9, "EOF while parsing"),
        ] {
            let error = metadata(Some(file.path()), limit).expect_err(reason);
            assert!(error.to_string().starts_with("the metadata file "), "{error}");
            let source = error.source().expect("a reason").to_string();
            assert!(source.starts_with(reason), "{source}");
        }
    }

    #[test]
    fn a_kernel_is_enough_for_a_vm() {
        let args = RunArgs {
            kernel: Some("vmlinuz".into()),
            ..RunArgs::default()
        };
        let spec = vm_spec(&args).expect("a VM");
        assert_eq!(spec, default_vm(Path::new("vmlinuz")));
        assert_eq!((spec.cpus, spec.memory.size), (1, ByteSize::from_mib(512)));
        assert_eq!(spec.boot.cmdline, "console=ttyS0 panic=-1");
    }

    #[test]
    fn a_configuration_file_alone_is_the_whole_vm() {
        let file = file(CONFIG);
        let expected: VmSpec = serde_json::from_str(CONFIG).expect("valid");
        assert_eq!(vm_spec(&config(&file)).expect("a VM"), expected);
    }

    #[test]
    fn options_replace_single_values_of_the_file_and_add_to_its_lists() {
        let file = file(CONFIG);
        let args = RunArgs {
            kernel: Some("kernel".into()),
            initrd: Some("initrd".into()),
            boot_protocol: Some(Protocol::Linux),
            cmdline: Some("quiet".to_owned()),
            cpus: Some(8),
            memory: Some(ByteSize::from_mib(1024)),
            hugepages: true,
            disks: vec![options::disk("path=more.img").expect("valid")],
            nets: vec![options::net("tap=more0").expect("valid")],
            rng: true,
            monitor: MonitorArgs {
                serial: Some(SerialSpec::Pty),
                name: Some("options".to_owned()),
                ..MonitorArgs::default()
            },
            ..config(&file)
        };
        let spec = vm_spec(&args).expect("a VM");
        assert_eq!(spec.name.as_deref(), Some("options"));
        assert_eq!(spec.cpus, 8);
        assert_eq!(
            spec.memory,
            MemorySpec {
                size: ByteSize::from_mib(1024),
                shared: true,
                hugepages: true
            }
        );
        let boot = BootSpec {
            kernel: "kernel".into(),
            initrd: Some("initrd".into()),
            protocol: BootProtocol::Linux,
            cmdline: "quiet".to_owned(),
        };
        assert_eq!(spec.boot, boot);
        let disks = ["path=file.img", "path=more.img"].map(|disk| options::disk(disk).expect("valid"));
        assert_eq!(spec.disks, disks);
        assert_eq!(
            spec.nets,
            ["tap=file0", "tap=more0"].map(|net| options::net(net).expect("valid"))
        );
        assert_eq!(spec.rng, Some(RngSpec::default()));
        assert_eq!(spec.serial, SerialSpec::Pty);
    }

    #[test]
    fn without_a_kernel_there_is_no_vm() {
        let error = vm_spec(&RunArgs::default()).expect_err("nothing to boot");
        assert_eq!(
            error.to_string(),
            "no kernel to boot: give --kernel FILE, or --config FILE"
        );
    }

    #[test]
    fn a_file_that_is_not_there_is_named() {
        let args = RunArgs {
            config: Some("/nonexistent/vm.json".into()),
            ..RunArgs::default()
        };
        let error = vm_spec(&args).expect_err("no file");
        assert_eq!(
            error.to_string(),
            "cannot read the configuration file /nonexistent/vm.json"
        );
        assert!(error.source().expect("a cause").to_string().contains("No such file"));
    }

    #[test]
    fn a_fault_in_the_file_is_told_with_its_place() {
        let file = file(&CONFIG.replace("\"cpus\"", "\"cpu\""));
        let error = vm_spec(&config(&file)).expect_err("unknown field");
        assert!(error.to_string().ends_with("does not describe a VM"), "{error}");
        let cause = error.source().expect("a cause").to_string();
        assert!(
            cause.contains("unknown field `cpu`") && cause.contains("line 3"),
            "{cause}"
        );
    }

    #[test]
    fn limits_hold_for_file_and_options_together() {
        let file = file(CONFIG);
        let again = RunArgs {
            disks: vec![options::disk("path=file.img").expect("valid")],
            ..config(&file)
        };
        let error = vm_spec(&again).expect_err("a disk written twice");
        assert!(matches!(error, ConfigError::Spec(SpecError::DiskTwice(_))), "{error}");
    }
}
