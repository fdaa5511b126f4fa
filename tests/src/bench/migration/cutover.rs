//! Cutover, told over its API.

use anyhow::{Context, Result};
use serde_json::json;
use tempfile::TempDir;

use super::{Case, DOWNTIME_GOAL_MS, MEMORY_MIB, Manner, Moved, Subject};
use crate::bench::peers::CMDLINE;
use crate::bench::stage::Stage;
use crate::{Api, Vm, scratch};

/// Where the destination listens; nobody else does in a host made for the bench.
const ADDRESS: &str = "tcp://127.0.0.1:4445";

/// Two monitors.
pub struct Cutover<'a> {
    stage: &'a Stage,
    source: Api,
    destination: Api,
    directory: TempDir,
}

impl<'a> Cutover<'a> {
    pub fn new(stage: &'a Stage) -> Self {
        let directory = scratch();
        Self {
            stage,
            source: Api::new(&directory.path().join("source")),
            destination: Api::new(&directory.path().join("destination")),
            directory,
        }
    }

    /// Where to go.
    fn address(&self, case: &Case) -> String {
        match case.manner {
            Manner::HandedOver => format!("unix:{}", self.directory.path().join("receive").display()),
            Manner::PreCopy | Manner::PostCopy => ADDRESS.to_owned(),
        }
    }
}

impl Subject for Cutover<'_> {
    fn can(&self, _case: &Case) -> bool {
        true
    }

    fn boot(&mut self, case: &Case) -> Result<Vm> {
        let mut command = self.stage.command(&self.stage.cutover)?;
        let memory = format!("{MEMORY_MIB}M");
        command.args([
            "run",
            "--cpus",
            "1",
            "--memory",
            &memory,
            "--cmdline",
            CMDLINE,
            "--kernel",
        ]);
        command.arg(&self.stage.kernel).arg("--initrd").arg(&self.stage.initrd);
        command.arg("--api-sock").arg(self.source.socket());
        if case.manner == Manner::HandedOver {
            // Only memory that is a file can be given to another process.
            command.arg("--memory-shared");
        }
        let vm = Vm::start(command);
        vm.wait_agent();
        Ok(vm)
    }

    fn receiver(&mut self, case: &Case) -> Result<Vm> {
        let mut command = self.stage.command(&self.stage.cutover)?;
        command.args(["receive", "--insecure", "--listen", &self.address(case), "--api-sock"]);
        command.arg(self.destination.socket());
        let vm = Vm::start_restored(command);
        self.destination.wait_ready();
        Ok(vm)
    }

    fn migrate(&mut self, case: &Case) -> Result<Option<Moved>> {
        let body = json!({
            "to": self.address(case),
            "insecure": true,
            "downtime_ms": DOWNTIME_GOAL_MS,
            "bandwidth": case.cap_mib.map(|mib| mib << 20),
            "post_copy": if case.manner == Manner::PostCopy { "now" } else { "never" },
        });
        let report = self
            .source
            .request("POST", "/v1/migration", Some(&body))
            .success()
            .json();
        let number = |key: &str| -> Result<f64> {
            let value = report.pointer(key).and_then(serde_json::Value::as_f64);
            value.with_context(|| format!("{key} in {report}"))
        };
        Ok(Some(Moved {
            total_ms: number("/total_ns")? / 1e6,
            downtime_ms: number("/downtime/total_ns")? / 1e6,
            sent_mib: number("/wire_bytes")? / f64::from(1 << 20),
        }))
    }
}
