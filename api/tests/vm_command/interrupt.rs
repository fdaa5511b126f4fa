//! Commands that wait long for a VM, and are interrupted meanwhile.

use std::process::Stdio;
use std::sync::Mutex;
use std::sync::mpsc::channel;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;

use crate::fake::{Machine, taken_apart};

/// Checks that `command`, which begins what it wants of the VM `web` by the request `begin`, cancels that by the request
/// `cancel` when it is interrupted, and still waits for what comes of it.
#[track_caller]
pub fn check_interrupt(command: &[&str], begin: &'static str, cancel: &'static str) {
    let machine = Machine::new();
    let (begun, is_begun) = channel();
    let (cancelled, is_cancelled) = channel();
    let is_cancelled = Mutex::new(is_cancelled);
    let asked = machine.vm("web", move |request, answer| match request.line.as_str() {
        line if line == begin => {
            begun.send(()).expect("the test waits");
            let is_cancelled = is_cancelled.lock().expect("nobody else has it");
            is_cancelled.recv().expect("somebody cancels");
            answer.text(400, &json!({ "fault_message": "cancelled" }).to_string());
        }
        line if line == cancel => {
            answer.done();
            // Once is enough.
            let _ = cancelled.send(());
        }
        line => panic!("nobody should ask {line}"),
    });
    let client = machine
        .program()
        .args(command)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("built for this test");
    is_begun.recv().expect("the VM is asked");
    kill_process(Pid::from_child(&client), Signal::INT).expect("it waits");
    let output = client.wait_with_output().expect("it ends");
    let told = "cutover: error: web: cancelled\n";
    assert_eq!(taken_apart(output), (1, String::new(), told.to_owned()));
    assert_eq!(asked.lines()[..2], [begin, cancel]);
}
