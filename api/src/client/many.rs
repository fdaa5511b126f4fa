//! The same thing asked of many VMs at once.

use std::io::{self, Write};
use std::sync::Arc;

use anstream::AutoStream;
use serde::Serialize;
use serde_json::{Value, json};
use tokio::sync::Semaphore;

use super::args::{Targets, VmRef};
use super::error::ClientError;
use super::http::Vm;
use crate::exit::{ExitStatus, report, with_causes};
use crate::runtime_dir::{RuntimeDir, RuntimeDirError};

/// Most VMs that are asked at the same time; the others wait for their turn.
pub const AT_ONCE_MAX: usize = 64;

/// What a VM did not do, and why.
#[derive(Debug, thiserror::Error)]
#[error("{name}")]
struct Failure {
    name: String,
    source: ClientError,
}

/// How many VMs did as asked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Did.
    pub succeeded: usize,
    /// Did not.
    pub failed: usize,
}

impl From<Tally> for ExitStatus {
    fn from(tally: Tally) -> Self {
        match tally {
            Tally { failed: 0, .. } => Self::Success,
            Tally { succeeded: 0, .. } => Self::Failure,
            _ => Self::Partly,
        }
    }
}

/// The VMs that `targets` name, each once, in the order given.
///
/// # Errors
/// The runtime directory cannot be used.
pub fn resolve(targets: &Targets, directory: &RuntimeDir) -> Result<Vec<Vm>, RuntimeDirError> {
    if targets.all {
        return all(directory);
    }
    let mut vms: Vec<Vm> = Vec::new();
    for vm in targets.vms.iter().map(|vm| one(vm, directory)) {
        if !vms.iter().any(|other| other.socket == vm.socket) {
            vms.push(vm);
        }
    }
    Ok(vms)
}

/// The VMs that listen in `directory`.
///
/// # Errors
/// It cannot be used.
pub fn all(directory: &RuntimeDir) -> Result<Vec<Vm>, RuntimeDirError> {
    let vms = directory.vms()?.into_iter();
    let vm = |(name, socket): (crate::runtime_dir::VmName, _)| Vm {
        name: name.to_string(),
        socket,
    };
    Ok(vms.map(vm).collect())
}

/// The VM that `reference` names.
pub fn one(reference: &VmRef, directory: &RuntimeDir) -> Vm {
    match reference {
        VmRef::Name(name) => Vm {
            name: name.to_string(),
            socket: directory.socket(name),
        },
        VmRef::Socket(socket) => Vm {
            name: socket.display().to_string(),
            socket: socket.clone(),
        },
    }
}

/// Asks all `vms` at once, and hands what each answered to `show`, in their order and as soon as that is known.
///
/// # Errors
/// Those of `show`.
pub async fn ask_each<T, F>(
    vms: Vec<Vm>,
    ask: impl Fn(Vm) -> F,
    mut show: impl FnMut(&Vm, Result<T, ClientError>) -> io::Result<()>,
) -> io::Result<()>
where
    T: Send + 'static,
    F: Future<Output = Result<T, ClientError>> + Send + 'static,
{
    let turns = Arc::new(Semaphore::new(AT_ONCE_MAX));
    let asked: Vec<_> = vms
        .into_iter()
        .map(|vm| {
            let (turns, answer) = (turns.clone(), ask(vm.clone()));
            let task = tokio::spawn(async move {
                // The semaphore is never closed.
                let _turn = turns.acquire().await;
                answer.await
            });
            (vm, task)
        })
        .collect();
    for (vm, task) in asked {
        let answer = task.await.map_err(io::Error::other)?;
        show(&vm, answer)?;
    }
    Ok(())
}

/// Where answers are shown: the standard output, without colours unless it is a terminal.
pub struct Screen {
    output: AutoStream<io::Stdout>,
    json: bool,
    tally: Tally,
}

impl Screen {
    /// Shows JSON objects, or text.
    pub fn new(json: bool) -> Self {
        Self {
            output: AutoStream::auto(io::stdout()),
            json,
            tally: Tally::default(),
        }
    }

    /// Shows what came of asking `vm`: `text` of an answer, or as JSON all of it. What went wrong is told on the
    /// standard error, or as JSON in its place.
    ///
    /// # Errors
    /// The output cannot be written.
    pub fn result<T: Serialize>(
        &mut self,
        vm: &Vm,
        result: Result<T, ClientError>,
        text: impl FnOnce(&T) -> String,
    ) -> io::Result<()> {
        let answer = match result {
            Ok(answer) => answer,
            Err(error) => return self.failure(vm, error),
        };
        self.count(true);
        if self.json {
            self.object(&vm.name, true, "result", serde_json::to_value(&answer)?)
        } else {
            self.text(&text(&answer))
        }
    }

    /// Tells that `vm` did not do as asked.
    ///
    /// # Errors
    /// The output cannot be written.
    pub fn failure(&mut self, vm: &Vm, error: ClientError) -> io::Result<()> {
        self.count(false);
        if self.json {
            return self.object(&vm.name, false, "error", with_causes(&error).into());
        }
        report(&Failure {
            name: vm.name.clone(),
            source: error,
        });
        Ok(())
    }

    /// Counts a VM that did as asked, or did not.
    pub fn count(&mut self, did: bool) {
        *(if did {
            &mut self.tally.succeeded
        } else {
            &mut self.tally.failed
        }) += 1;
    }

    /// Shows what a VM answered, or why not.
    ///
    /// # Errors
    /// The output cannot be written.
    pub fn object(&mut self, name: &str, ok: bool, key: &str, value: Value) -> io::Result<()> {
        let object = json!({ "vm": name, "ok": ok, key: value });
        self.text(&format!("{object}\n"))
    }

    /// Whether JSON is shown.
    pub fn is_json(&self) -> bool {
        self.json
    }

    /// Writes `text`, all of it at once.
    ///
    /// # Errors
    /// The output cannot be written.
    pub fn text(&mut self, text: &str) -> io::Result<()> {
        self.output.write_all(text.as_bytes())?;
        self.output.flush()
    }

    /// How many VMs did as asked.
    pub fn tally(&self) -> Tally {
        self.tally
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_exit_code_tells_all_none_and_some_apart() {
        for (succeeded, failed, status) in [
            (0, 0, ExitStatus::Success),
            (3, 0, ExitStatus::Success),
            (0, 2, ExitStatus::Failure),
            (1, 1, ExitStatus::Partly),
        ] {
            assert_eq!(ExitStatus::from(Tally { succeeded, failed }), status);
        }
    }

    #[test]
    fn a_vm_that_is_named_twice_is_asked_once() {
        let directory = RuntimeDir::at("/run/vms".into());
        let vms = ["web", "/run/vms/web.sock", "db", "web"].map(|text| text.parse().expect(text));
        let targets = Targets {
            vms: vms.to_vec(),
            all: false,
        };
        let names: Vec<_> = resolve(&targets, &directory)
            .expect("nothing is looked at")
            .into_iter()
            .map(|vm| vm.name)
            .collect();
        assert_eq!(names, ["web", "db"]);
    }
}
