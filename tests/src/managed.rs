//! [`ManagedVm`]: a guest that is configured, started and steered over its monitor's API.

use serde_json::json;
use tempfile::TempDir;

use crate::environment::scratch;
use crate::guest::Guest;
use crate::vm::Vm;
use crate::{Api, Monitor};

/// A guest under `cutover vmm`, killed when dropped.
pub struct ManagedVm {
    /// The guest.
    pub vm: Vm,
    /// The API of its monitor.
    pub api: Api,
    _directory: TempDir,
}

impl ManagedVm {
    pub(crate) fn new(vm: Vm, api: Api, directory: TempDir) -> Self {
        Self {
            vm,
            api,
            _directory: directory,
        }
    }

    /// Pauses the guest.
    #[track_caller]
    pub fn pause(&self) {
        self.api.patch("/vm", &json!({ "state": "Paused" }));
    }

    /// Lets the paused guest go on.
    #[track_caller]
    pub fn resume(&self) {
        self.api.patch("/vm", &json!({ "state": "Resumed" }));
    }
}

impl Guest {
    /// Boots this kernel, initrd, vCPUs and memory through the API, after `configure` has described the devices, and
    /// waits until the guest takes commands.
    #[track_caller]
    pub fn boot_managed(&self, configure: impl FnOnce(&Api)) -> ManagedVm {
        let directory = scratch();
        let api = Api::new(&directory.path().join("api"));
        let mut command = Monitor::command();
        command.arg("vmm").arg("--api-sock").arg(api.socket());
        let vm = Vm::start(command);
        api.wait_ready();
        api.put(
            "/boot-source",
            &json!({ "kernel_image_path": self.kernel, "initrd_path": self.initrd, "boot_args": self.cmdline }),
        );
        let memory_mib = self.memory.strip_suffix('M').and_then(|mib| mib.parse::<u32>().ok());
        api.put(
            "/machine-config",
            &json!({ "vcpu_count": self.cpus, "mem_size_mib": memory_mib.expect("memory is given in MiB") }),
        );
        configure(&api);
        api.put("/actions", &json!({ "action_type": "InstanceStart" }));
        vm.wait_agent();
        ManagedVm::new(vm, api, directory)
    }
}
