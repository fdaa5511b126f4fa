//! Throughput of a network interface: iperf3 between the guest and its host, over a tap, in both directions.

use std::io::{BufRead, BufReader};
use std::net::Ipv4Addr;
use std::process::{Child, Command, Stdio};
use std::rc::Rc;

use anyhow::{Context, Result, bail, ensure};

use super::{Contestant, Values, peers, tools};
use crate::{Disk, Guest, Network, Vm};

/// Length of one transfer.
const SECONDS: u32 = 1;

/// The metrics, and what makes iperf3's client, which is in the guest, measure them.
const DIRECTIONS: [(&str, &str); 2] = [("guest_to_host_mib_s", ""), ("host_to_guest_mib_s", "--reverse")];

/// Cutover, and QEMU with frames passing through its own process and through the kernel.
pub fn contestants() -> Vec<Contestant<'static>> {
    let root = Rc::new(Disk::debian_root());
    let mut contestants = vec![cutover(root.clone()), qemu("QEMU", root.clone(), "off")];
    let has_vhost = Command::new("modprobe").args(["--quiet", "vhost_net"]).status();
    if has_vhost.is_ok_and(|status| status.success()) {
        contestants.push(qemu("QEMU, vhost", root, "on"));
    }
    contestants
}

fn cutover(root: Rc<Disk>) -> Contestant<'static> {
    let measure = move || {
        let network = Network::new();
        let guest = Guest::micro().memory(&format!("{}M", tools::MEMORY_MIB));
        let vm = guest.disk_with(&root, &tools::disk_options()).net(&network).boot();
        transfers(&vm, &network)
    };
    Contestant {
        name: "Cutover",
        measure: Box::new(measure),
    }
}

fn qemu(name: &'static str, root: Rc<Disk>, vhost: &'static str) -> Contestant<'static> {
    let measure = move || {
        let network = Network::new();
        // Made before and removed after QEMU, which does not give it an address.
        let _tap = network.make_tap();
        let mut command = tools::qemu(&root);
        let netdev = format!(
            "tap,id=net,ifname={},script=no,downscript=no,vhost={vhost}",
            network.tap()
        );
        command.args(["-netdev", &netdev, "-device", "virtio-net-device,netdev=net"]);
        let vm = peers::boot(command);
        transfers(&vm, &network)
    };
    Contestant {
        name,
        measure: Box::new(measure),
    }
}

/// Both directions, in a guest that has booted.
fn transfers(vm: &Vm, network: &Network) -> Result<Values> {
    tools::mount(vm);
    vm.check(&network.guest_setup());
    DIRECTIONS
        .iter()
        .map(|(metric, direction)| Ok((*metric, transfer(vm, network.host(), direction)?)))
        .collect()
}

/// Transfers for [`SECONDS`] and returns what the receiver got, in MiB/s.
fn transfer(vm: &Vm, host: Ipv4Addr, direction: &str) -> Result<f64> {
    let server = Server::start(host)?;
    let report = tools::run_json(
        vm,
        &format!("iperf3 --client {host} --time {SECONDS} --json {direction}"),
    )?;
    server.finish()?;
    let bits = report["end"]["sum_received"]["bits_per_second"].as_f64();
    let bits = bits.with_context(|| format!("iperf3 reported no rate: {report}"))?;
    Ok(bits / 8.0 / f64::from(1 << 20))
}

/// iperf3's server on the host, for one client.
struct Server(Child);

impl Server {
    /// Starts it and waits until it listens.
    fn start(address: Ipv4Addr) -> Result<Self> {
        let mut child = Command::new("iperf3")
            .args(["--server", "--one-off", "--forceflush", "--bind", &address.to_string()])
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot run iperf3 (package iperf3)")?;
        let output = child.stdout.take().context("iperf3 is started with a pipe")?;
        let server = Self(child);
        let mut lines = BufReader::new(output).lines();
        loop {
            let Some(line) = lines.next() else {
                bail!("iperf3's server on {address} ended before it listened")
            };
            if line?.contains("listening") {
                break;
            }
        }
        // What it has to say about the transfer goes nowhere, but must not fill the pipe.
        std::thread::spawn(move || lines.for_each(drop));
        Ok(server)
    }

    /// Waits until it has served its client.
    fn finish(mut self) -> Result<()> {
        let status = self.0.wait()?;
        ensure!(status.success(), "iperf3's server failed: {status}");
        Ok(())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Neither fails but for a process that is gone already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
