"""Drives a VM from boot to shutdown with firecracker-python, in the order of Firecracker's getting-started guide.

Says what it has done and seen, one line each, behind a mark that tells it from what the package prints, and reads a line
wherever it is to wait for the test.
"""

import sys

from firecracker import Api

socket, kernel, initrd, boot_args, root, tap, log = sys.argv[1:]
api = Api(socket)


def tell(line):
    print("drive:", line, flush=True)
    sys.stdin.readline()


def state():
    return api.describe.get().json()["state"]


assert state() == "Not started", state()
assert api.version.get().json()["firecracker_version"]
api.boot.put(kernel_image_path=kernel, initrd_path=initrd, boot_args=boot_args)
api.drive.put(drive_id="rootfs", path_on_host=root, is_root_device=True, is_read_only=False)
api.machine_config.put(vcpu_count=2, mem_size_mib=768)
api.network.put(iface_id="eth0", host_dev_name=tap)
api.actions.put(action_type="InstanceStart")
assert state() == "Running", state()
tell("started")

api.vm.patch(state="Paused")
assert state() == "Paused", state()
tell("paused")

api.vm.patch(state="Resumed")
assert state() == "Running", state()
config = api.vm_config.get().json()
assert config["machine-config"]["vcpu_count"] == 2, config
assert config["drives"][0]["path_on_host"] == root, config
tell("resumed")

api.actions.put(action_type="SendCtrlAltDel")
api.close()
tell("asked to shut down")
