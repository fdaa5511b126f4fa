//! The `cutover` program as scripts and people meet it: exit codes, and what goes to which stream. Needs no KVM.

use std::fs;
use std::process::{Command, Output, Stdio};

fn cutover(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_cutover"))
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .expect("the program was built for this test")
}

/// The standard error of a call that must end with `code` and print nothing else.
fn refused(arguments: &[&str], code: i32) -> String {
    let output = cutover(arguments);
    assert_eq!(output.status.code(), Some(code), "{arguments:?}: {output:?}");
    assert_eq!(output.stdout, b"", "{arguments:?}");
    String::from_utf8(output.stderr).expect("messages are text")
}

#[test]
fn what_clap_does_not_understand_is_wrong_usage() {
    for (arguments, part) in [
        (&["walk"][..], "unrecognized subcommand 'walk'"),
        (&["run", "--kernal", "k"], "unexpected argument '--kernal'"),
        (&["run", "--kernel", "k", "--memory", "lots"], "'lots' is not a size"),
        (&["run", "--kernel", "k", "--disk", "readonly"], "path=… is missing"),
        (
            &["run", "--kernel", "k", "--net", "mac=x"],
            "'x' is not a unicast MAC address",
        ),
    ] {
        let message = refused(arguments, 2);
        assert!(message.contains(part), "{message}");
    }
}

#[test]
fn a_description_of_no_vm_is_wrong_usage_told_in_one_line() {
    let folder = tempfile::tempdir().expect("folder");
    let config = folder.path().join("vm.json");
    fs::write(
        &config,
        r#"{ "cpus": 1, "memory": { "size": "1M" }, "boot": { "kernel": "k" } }"#,
    )
    .expect("write");
    let config = config.to_str().expect("temporary paths are text");
    for (arguments, message) in [
        (&["run"][..], "no kernel to boot: give --kernel FILE, or --config FILE"),
        (
            &["run", "--kernel", "k", "--cpus", "33"],
            "cpus: 33 is out of range: a VM has 1 to 32 vCPUs",
        ),
        (
            &["run", "--config", config],
            "memory: 1M is out of range: a VM has 32M to 4T of memory",
        ),
        (
            &["run", "--kernel", "k", "--disk", "path=a", "--disk", "path=a"],
            "disk a: given more than once: only a disk that is read-only each time can be",
        ),
        (
            &["run", "--config", "/nonexistent/vm.json"],
            "cannot read the configuration file /nonexistent/vm.json: No such file or directory (os error 2)",
        ),
    ] {
        assert_eq!(refused(arguments, 2), format!("cutover: error: {message}\n"));
    }
}

#[test]
fn a_configuration_file_that_is_no_json_is_named_with_the_place() {
    let folder = tempfile::tempdir().expect("folder");
    let config = folder.path().join("vm.json");
    fs::write(&config, "{\n  cpus: 1\n}").expect("write");
    let config = config.to_str().expect("temporary paths are text");
    let message = refused(&["run", "--config", config], 2);
    assert!(
        message.contains(config) && message.contains("line 2 column 3"),
        "{message}"
    );
}

#[test]
fn check_says_the_same_in_text_in_json_and_in_its_exit_code() {
    let (text, json) = (cutover(&["check"]), cutover(&["check", "--json"]));
    assert_eq!(text.status.code(), json.status.code());
    let report: serde_json::Value = serde_json::from_slice(&json.stdout).expect("it is JSON");
    let can = report["can_run_guests"].as_bool().expect("a yes or no");
    assert_eq!(text.status.success(), can);
    let text = String::from_utf8(text.stdout).expect("it is text");
    let verdict = if can {
        "This machine can run guests.\n"
    } else {
        "This machine cannot run guests.\n"
    };
    assert!(text.ends_with(verdict), "{text}");
}

#[test]
fn a_confined_command_says_what_it_says_and_ends_as_it_ends() {
    let plain = cutover(&["completions", "bash"]);
    let confined = cutover(&["jail", "--landlock", "--", "completions", "bash"]);
    assert_eq!((confined.status.code(), confined.stdout), (Some(0), plain.stdout));
    for (arguments, part) in [
        (&["jail", "--landlock", "--", "run"][..], "no kernel to boot"),
        (&["jail", "--landlock", "--", "walk"], "unrecognized subcommand 'walk'"),
        (&["jail", "--landlock"], "required arguments were not provided"),
        (
            &["jail", "--landlock", "--", "jail", "--", "run"],
            "does not run itself",
        ),
        (
            &["jail", "--landlock", "--uid", "3000", "--", "run"],
            "--uid takes root",
        ),
        (&["jail", "--id", "../web", "--", "run"], "'../web' is not a VM's name"),
        (&["jail", "--cgroup", "cgroup.procs=1", "--", "run"], "write FILE=VALUE"),
    ] {
        let message = refused(arguments, 2);
        assert!(message.contains(part), "{message}");
    }
    let none = "/nonexistent/disk";
    let message = refused(
        &["jail", "--landlock", "--file", &format!("path={none}"), "--", "run"],
        1,
    );
    assert!(
        message.contains(&format!("cannot allow {none}: No such file")),
        "{message}"
    );
}

#[test]
fn completion_scripts_go_to_the_standard_output() {
    for (shell, sign) in [
        ("bash", "complete -F _cutover"),
        ("zsh", "#compdef cutover"),
        ("fish", "complete -c cutover"),
    ] {
        let output = cutover(&["completions", shell]);
        assert!(output.status.success(), "{shell}");
        assert!(String::from_utf8_lossy(&output.stdout).contains(sign), "{shell}");
    }
}

#[test]
fn help_and_version_go_to_the_standard_output() {
    let help = cutover(&["run", "--help"]);
    assert!(help.status.success());
    let help = String::from_utf8(help.stdout).expect("help is text");
    for part in ["Examples:", "Exit codes:", "Ctrl-A x", "--memory-shared"] {
        assert!(help.contains(part), "{part}");
    }
    let version = cutover(&["--version"]);
    assert_eq!(
        version.stdout,
        format!("cutover {}\n", env!("CARGO_PKG_VERSION")).as_bytes()
    );
}
