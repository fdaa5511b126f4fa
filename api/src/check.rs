//! `cutover check`: what the facts about this machine mean for someone who wants to run guests on it.

use std::fmt::Write;
use std::io;

use cutover_snapshot::size::ByteSize;
use cutover_snapshot::spec::MEMORY_MIN;
use cutover_vmm::host::{self, CpuExtension, HostFacts, KVM_API_VERSION, KvmFacts};
use serde::Serialize;

use crate::cli::CheckArgs;
use crate::exit::{ExitStatus, after_printing, report};

/// How much a finding matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// As it should be.
    Ok,
    /// Guests run, with something missing.
    Warn,
    /// Guests do not run.
    Fail,
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What.
    pub subject: &'static str,
    /// How it is.
    pub status: Status,
    /// What was found.
    pub detail: String,
    /// What to do about it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub advice: Option<&'static str>,
}

#[derive(Serialize)]
struct Report<'a> {
    can_run_guests: bool,
    findings: &'a [Finding],
}

/// Looks this machine over and prints what it finds; succeeds if guests can run.
pub fn check(args: &CheckArgs) -> ExitStatus {
    let findings = findings(&host::probe());
    let text = if args.json {
        json(&findings)
    } else {
        Ok(text(&findings))
    };
    let printed = match text {
        Ok(text) => after_printing(text.as_bytes(), &mut io::stdout()),
        Err(error) => {
            report(&error);
            ExitStatus::Failure
        }
    };
    if can_run_guests(&findings) {
        printed
    } else {
        ExitStatus::Failure
    }
}

fn can_run_guests(findings: &[Finding]) -> bool {
    findings.iter().all(|finding| finding.status != Status::Fail)
}

/// What `facts` mean.
pub fn findings(facts: &HostFacts) -> Vec<Finding> {
    let mut findings = kvm(&facts.kvm);
    findings.push(extension(&facts.extension));
    findings.push(optional(
        "/dev/net/tun",
        &facts.tun,
        "virtual network interfaces can be made",
        "network interfaces need it: load the tun module and give this user access to /dev/net/tun",
    ));
    findings.push(optional(
        "io_uring",
        &facts.io_uring,
        "disks use it",
        "disks use a pool of threads instead; see /proc/sys/kernel/io_uring_disabled",
    ));
    findings.push(optional(
        "userfaultfd",
        &facts.userfaultfd,
        "guest memory can be loaded on demand",
        "guest memory cannot be loaded on demand; see /proc/sys/vm/unprivileged_userfaultfd",
    ));
    findings.push(memory(&facts.memory_available));
    findings
}

/// What to do where the kernel tells nothing of the machine.
const NO_PROC: &str = "mount /proc; a jail has none of the machine, and needs none";

fn kvm(kvm: &io::Result<KvmFacts>) -> Vec<Finding> {
    let facts = match kvm {
        Ok(facts) => facts,
        Err(error) => {
            return vec![fail(
                "/dev/kvm",
                format!("cannot be opened: {error}"),
                kvm_advice(error),
            )];
        }
    };
    let version = match facts.version {
        KVM_API_VERSION => ok(
            "/dev/kvm",
            format!("API version {KVM_API_VERSION}, up to {} vCPUs", facts.cpus_max),
        ),
        other => fail(
            "/dev/kvm",
            format!("API version {other}, {KVM_API_VERSION} is needed"),
            "use a kernel newer than Linux 2.6.22",
        ),
    };
    let capabilities = if facts.missing.is_empty() {
        ok("KVM capabilities", "all that are needed".to_owned())
    } else {
        fail(
            "KVM capabilities",
            format!("missing: {}", facts.missing.join(", ")),
            "use a kernel with x86 KVM of Linux 5.10 or newer",
        )
    };
    vec![version, capabilities]
}

fn kvm_advice(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::NotFound => {
            "load the kvm_intel or kvm_amd module, enable virtualization in the firmware, or, in a VM, enable nested \
             virtualization"
        }
        io::ErrorKind::PermissionDenied => {
            "add this user to the group that owns /dev/kvm (sudo usermod -aG kvm $USER) and log in again"
        }
        _ => "see the kernel's log for why KVM is unusable (dmesg | grep -i kvm)",
    }
}

fn extension(extension: &io::Result<Option<CpuExtension>>) -> Finding {
    const SUBJECT: &str = "CPU";
    match extension {
        Ok(Some(CpuExtension::Vmx)) => ok(SUBJECT, "Intel VT-x (vmx)".to_owned()),
        Ok(Some(CpuExtension::Svm)) => ok(SUBJECT, "AMD-V (svm)".to_owned()),
        Err(error) => warn(SUBJECT, format!("unknown: {error}"), NO_PROC),
        Ok(None) => fail(
            SUBJECT,
            "neither vmx nor svm among its flags: a KVM without them emulates the guest instruction by instruction, \
             and a stock Linux kernel dies at the first one the emulator lacks"
                .to_owned(),
            "enable virtualization in the firmware or nested virtualization in the hypervisor, or run guests inside a \
             host that has it",
        ),
    }
}

fn memory(available: &io::Result<ByteSize>) -> Finding {
    const SUBJECT: &str = "memory";
    match available {
        Ok(size) => {
            let detail = format!("{} MiB available", size.bytes() >> 20);
            if *size < MEMORY_MIN {
                warn(
                    SUBJECT,
                    detail,
                    "even the smallest guest needs 32 MiB: end other programs",
                )
            } else {
                ok(SUBJECT, detail)
            }
        }
        Err(error) => warn(SUBJECT, format!("unknown: {error}"), NO_PROC),
    }
}

/// A thing without which guests run all the same.
fn optional(subject: &'static str, found: &io::Result<()>, detail: &str, advice: &'static str) -> Finding {
    match found {
        Ok(()) => ok(subject, detail.to_owned()),
        Err(error) => warn(subject, format!("not usable: {error}"), advice),
    }
}

fn ok(subject: &'static str, detail: String) -> Finding {
    Finding {
        subject,
        status: Status::Ok,
        detail,
        advice: None,
    }
}

fn warn(subject: &'static str, detail: String, advice: &'static str) -> Finding {
    Finding {
        subject,
        status: Status::Warn,
        detail,
        advice: Some(advice),
    }
}

fn fail(subject: &'static str, detail: String, advice: &'static str) -> Finding {
    Finding {
        subject,
        status: Status::Fail,
        detail,
        advice: Some(advice),
    }
}

fn json(findings: &[Finding]) -> serde_json::Result<String> {
    let report = Report {
        can_run_guests: can_run_guests(findings),
        findings,
    };
    serde_json::to_string_pretty(&report).map(|json| json + "\n")
}

fn text(findings: &[Finding]) -> String {
    let mut text = String::new();
    for finding in findings {
        let status = match finding.status {
            Status::Ok => "ok  ",
            Status::Warn => "warn",
            Status::Fail => "FAIL",
        };
        // Writing to a String does not fail.
        let _ = writeln!(text, "{status}  {:<16}  {}", finding.subject, finding.detail);
        if let Some(advice) = finding.advice {
            let _ = writeln!(text, "{:24}→ {advice}", "");
        }
    }
    text.push_str(if can_run_guests(findings) {
        "This machine can run guests.\n"
    } else {
        "This machine cannot run guests.\n"
    });
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn good() -> HostFacts {
        HostFacts {
            kvm: Ok(KvmFacts {
                version: KVM_API_VERSION,
                missing: Vec::new(),
                cpus_max: 1024,
            }),
            extension: Ok(Some(CpuExtension::Svm)),
            tun: Ok(()),
            io_uring: Ok(()),
            userfaultfd: Ok(()),
            memory_available: Ok(ByteSize::from_mib(4096)),
        }
    }

    fn error(kind: io::ErrorKind) -> io::Error {
        kind.into()
    }

    /// The finding about `subject`.
    fn about(facts: &HostFacts, subject: &str) -> Finding {
        findings(facts)
            .into_iter()
            .find(|finding| finding.subject == subject)
            .expect(subject)
    }

    #[test]
    fn a_good_machine_has_nothing_to_complain_about() {
        let findings = findings(&good());
        assert!(
            findings
                .iter()
                .all(|finding| finding.status == Status::Ok && finding.advice.is_none())
        );
        assert!(text(&findings).ends_with("This machine can run guests.\n"));
        assert!(text(&findings).contains("/dev/kvm          API version 12, up to 1024 vCPUs\n"));
    }

    #[test]
    fn each_thing_a_guest_cannot_do_without_fails_the_check_with_advice() {
        let kvm = |facts| HostFacts { kvm: facts, ..good() };
        let with = |version, missing| {
            Ok(KvmFacts {
                version,
                missing,
                cpus_max: 1,
            })
        };
        for (facts, subject, detail, advice) in [
            (
                kvm(Err(error(io::ErrorKind::NotFound))),
                "/dev/kvm",
                "cannot be opened",
                "kvm_intel or kvm_amd",
            ),
            (
                kvm(Err(error(io::ErrorKind::PermissionDenied))),
                "/dev/kvm",
                "cannot be opened",
                "usermod -aG kvm",
            ),
            (
                kvm(Err(error(io::ErrorKind::Other))),
                "/dev/kvm",
                "cannot be opened",
                "dmesg",
            ),
            (
                kvm(with(11, vec![])),
                "/dev/kvm",
                "API version 11, 12 is needed",
                "kernel",
            ),
            (
                kvm(with(12, vec!["KVM_CAP_IRQFD"])),
                "KVM capabilities",
                "missing: KVM_CAP_IRQFD",
                "kernel",
            ),
            (
                HostFacts {
                    extension: Ok(None),
                    ..good()
                },
                "CPU",
                "instruction by instruction",
                "nested virtualization",
            ),
        ] {
            let finding = about(&facts, subject);
            assert_eq!(finding.status, Status::Fail);
            assert!(finding.detail.contains(detail), "{finding:?}");
            assert!(finding.advice.is_some_and(|text| text.contains(advice)), "{finding:?}");
            assert!(text(&findings(&facts)).ends_with("This machine cannot run guests.\n"));
        }
    }

    #[test]
    fn what_guests_can_do_without_is_a_warning_with_advice() {
        let refused = || Err(error(io::ErrorKind::PermissionDenied));
        for (facts, subject) in [
            (
                HostFacts {
                    tun: refused(),
                    ..good()
                },
                "/dev/net/tun",
            ),
            (
                HostFacts {
                    io_uring: refused(),
                    ..good()
                },
                "io_uring",
            ),
            (
                HostFacts {
                    userfaultfd: refused(),
                    ..good()
                },
                "userfaultfd",
            ),
            (
                HostFacts {
                    memory_available: Ok(ByteSize::from_mib(31)),
                    ..good()
                },
                "memory",
            ),
            (
                HostFacts {
                    memory_available: Err(error(io::ErrorKind::NotFound)),
                    ..good()
                },
                "memory",
            ),
        ] {
            let finding = about(&facts, subject);
            assert_eq!(finding.status, Status::Warn);
            assert!(finding.advice.is_some());
            assert!(can_run_guests(&findings(&facts)));
        }
    }

    #[test]
    fn the_json_report_says_the_same() {
        let facts = HostFacts {
            extension: Ok(None),
            ..good()
        };
        let report: serde_json::Value =
            serde_json::from_str(&json(&findings(&facts)).expect("written")).expect("it is JSON");
        assert_eq!(report["can_run_guests"], false);
        let cpu = &report["findings"][2];
        assert_eq!((&cpu["subject"], &cpu["status"]), (&"CPU".into(), &"fail".into()));
        assert!(report["findings"][0].get("advice").is_none());
    }
}
