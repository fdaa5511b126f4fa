//! The guest's serial port, wherever it goes.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use cutover_tests::{Console, Exit, Guest, Terminal, Vm, poll_until, scratch};

/// The kernel parameter that makes the guest ask for a reset once it has printed its marker.
const MARKER_AND_RESET: &str = "cutover_mode=bench";
const MARKER: &str = "guest: user space";

#[test]
fn output_goes_to_the_end_of_a_file() {
    let directory = scratch();
    let path = directory.path().join("console");
    fs::write(&path, "what was there before\n").unwrap();
    let serial = format!("file={}", path.display());
    let vm = Guest::micro()
        .cmdline(MARKER_AND_RESET)
        .arguments(["--serial", &serial])
        .start();
    assert_eq!(vm.wait(), Exit::Reboot);
    let console = fs::read_to_string(&path).unwrap();
    assert!(console.starts_with("what was there before\n"), "{console}");
    assert!(console.contains(MARKER), "{console}");
    assert_eq!(vm.console().text(), "");
}

#[test]
fn output_can_be_thrown_away() {
    let vm = Guest::micro()
        .cmdline(MARKER_AND_RESET)
        .arguments(["--serial", "null"])
        .start();
    assert_eq!(vm.wait(), Exit::Reboot);
    assert_eq!(vm.console().text(), "");
}

#[test]
fn a_socket_carries_both_directions_and_takes_the_next_client_when_one_leaves() {
    let directory = scratch();
    let path = directory.path().join("console");
    let mut vm = Guest::micro()
        .arguments(["--serial", &format!("socket={}", path.display())])
        .start();
    let connect = || poll_until("the console's socket", || UnixStream::connect(&path).ok());

    let first = connect();
    assert_eq!(
        fs::metadata(&path).unwrap().permissions().mode() & 0o777,
        0o600,
        "open to others"
    );
    let hang_up = first.try_clone().unwrap();
    vm.use_console(Console::attach(first.try_clone().unwrap(), first));
    vm.wait_agent();
    assert_eq!(vm.check("echo one"), "one\n");

    hang_up.shutdown(std::net::Shutdown::Both).unwrap();
    let second = connect();
    vm.use_console(Console::attach(second.try_clone().unwrap(), second));
    assert_eq!(vm.check("echo two"), "two\n");

    vm.power_off();
    assert_eq!(vm.wait(), Exit::Shutdown);
    assert!(!path.exists(), "the socket was left behind");
}

/// The name of the pseudo-terminal, from the monitor's report.
fn terminal(vm: &Vm) -> PathBuf {
    poll_until("the name of the pseudo-terminal", || {
        let log = vm.log();
        let start = log.find("/dev/pts/")?;
        let (name, _) = log[start..].split_once(|c: char| c.is_whitespace())?;
        Some(PathBuf::from(name))
    })
}

#[test]
fn a_pseudo_terminal_carries_both_directions() {
    let mut vm = Guest::micro().arguments(["--serial", "pty"]).start();
    let terminal = fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(terminal(&vm))
        .unwrap();
    vm.use_console(Console::attach(terminal.try_clone().unwrap(), terminal));
    vm.wait_agent();
    let bytes = vm.check("printf 'no newline is changed\\r\\n'");
    assert_eq!(bytes, "no newline is changed\r\n");
}

#[test]
fn on_a_terminal_the_escape_ends_the_vm_and_the_terminal_is_as_before() {
    let terminal = Terminal::new();
    assert!(!terminal.is_raw());
    let vm = Guest::micro().start_on(&terminal);
    vm.console().wait_for(MARKER);
    assert!(terminal.is_raw());
    vm.console().type_text("\x01x");
    assert_eq!(vm.wait(), Exit::Forced);
    assert!(!terminal.is_raw());
}

#[test]
fn large_output_and_long_commands_pass_the_serial_port_unharmed() {
    let vm = Guest::micro().boot();
    let digits = vm.check("seq 1 4000");
    let expected: String = (1..=4000).map(|number| format!("{number}\n")).collect();
    assert_eq!(digits, expected);
    let word = "x".repeat(3000);
    assert_eq!(vm.check(&format!("printf %s {word}")), word);
}
