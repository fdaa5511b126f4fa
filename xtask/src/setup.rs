//! Making a fresh Debian or Ubuntu machine ready: which packages are needed, and how they get there.
//!
//! Idempotent: where everything is installed, nothing happens and no privilege is asked for.

use std::io::IsTerminal;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::{process, ui};

/// Everything the tasks need beyond Rust itself.
const PACKAGES: [&str; 23] = [
    // building
    "gcc",
    "libc6-dev",
    // unpacking kernels, packing images
    "busybox-static",
    "ca-certificates",
    "cpio",
    "e2fsprogs",
    "fakeroot",
    "gzip",
    "kmod",
    "lz4",
    "mmdebstrap",
    "uidmap",
    "xz-utils",
    "zstd",
    // testing the journal of groups
    "etcd-client",
    "etcd-server",
    // running and reaching guests
    "iperf3",
    "iproute2",
    "mount",
    "openssh-client",
    "qemu-system-x86",
    "qemu-utils",
    "tar",
];

/// The distributions whose packages are known here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Distribution {
    /// Debian.
    Debian,
    /// Ubuntu.
    Ubuntu,
}

impl Distribution {
    /// Reads `/etc/os-release`.
    pub fn detect() -> Result<Self> {
        let release = std::fs::read_to_string("/etc/os-release").context("cannot read /etc/os-release")?;
        Self::from_os_release(&release).with_context(|| {
            format!(
                "set-up knows Debian and Ubuntu only; elsewhere, run this in a Debian container or machine. \
                 The Debian packages needed are: {}",
                PACKAGES.join(" ")
            )
        })
    }

    fn from_os_release(release: &str) -> Option<Self> {
        let id = release.lines().find_map(|line| line.strip_prefix("ID="))?;
        match id.trim_matches('"') {
            "debian" => Some(Self::Debian),
            "ubuntu" => Some(Self::Ubuntu),
            _ => None,
        }
    }
}

/// Installs what is missing; without the right to do so, says exactly what to run and stops.
pub fn ensure_packages() -> Result<()> {
    Distribution::detect()?;
    ensure_installed(&PACKAGES)
}

/// The same for packages whose names are known only later.
pub fn ensure_installed(packages: &[&str]) -> Result<()> {
    let missing = missing_packages(packages)?;
    if missing.is_empty() {
        return Ok(());
    }
    let install = ["apt-get", "install", "--yes", "--no-install-recommends"];
    let Some(privilege) = privilege() else {
        bail!(
            "these packages are missing, and installing them needs root:\n  sudo {} {}",
            install.join(" "),
            missing.join(" ")
        );
    };
    ui::say(format_args!("installing {}", missing.join(" ")));
    with_package_lists(|| {
        process::show(
            privileged(privilege, &install)
                .args(&missing)
                .env("DEBIAN_FRONTEND", "noninteractive")
                .stdin(Stdio::null()),
        )
    })
}

/// Downloads the newest version of `packages` into `directory`, installing nothing.
pub fn download(packages: &[String], directory: &Path) -> Result<()> {
    with_package_lists(|| {
        process::run(
            Command::new("apt-get")
                .args(["--quiet", "download"])
                .args(packages)
                .current_dir(directory),
        )
    })
}

/// Does something that needs apt's package lists; if it fails, refreshes them (they may be old or absent) and does it
/// again.
pub fn with_package_lists<T>(action: impl Fn() -> Result<T>) -> Result<T> {
    let error = match action() {
        Ok(result) => return Ok(result),
        Err(error) => error,
    };
    let Some(privilege) = privilege() else {
        return Err(error.context("apt's package lists may be out of date: run 'sudo apt-get update'"));
    };
    ui::step("refreshing the package lists", || {
        process::run(&mut privileged(privilege, &["apt-get", "--quiet", "update"]))
    })?;
    action()
}

/// Where this machine gets its distribution's packages from, in the form mmdebstrap takes.
pub struct PackageSources {
    /// The release's code name.
    pub suite: String,
    /// Lines of a `sources.list`.
    pub list: String,
    /// Options of apt that reach those sources (proxies and the like).
    pub options: Vec<String>,
}

/// Reads the machine's sources, less those that are not the distribution's own.
pub fn package_sources(distribution: Distribution) -> Result<PackageSources> {
    let (origin, keyring) = match distribution {
        Distribution::Debian => ("Debian", "/usr/share/keyrings/debian-archive-keyring.gpg"),
        Distribution::Ubuntu => ("Ubuntu", "/usr/share/keyrings/ubuntu-archive-keyring.gpg"),
    };
    let targets = process::read(Command::new("apt-get").args([
        "indextargets",
        "--format",
        "$(REPO_URI) $(RELEASE) $(COMPONENT)",
        "Created-By: Packages",
        &format!("Origin: {origin}"),
    ]))?;
    let list: String = targets
        .lines()
        .map(|target| format!("deb [signed-by={keyring}] {target}\n"))
        .collect();
    if list.is_empty() {
        bail!("apt has no package source of {origin}");
    }
    let release = std::fs::read_to_string("/etc/os-release").context("cannot read /etc/os-release")?;
    let suite = release
        .lines()
        .find_map(|line| line.strip_prefix("VERSION_CODENAME="))
        .context("/etc/os-release names no VERSION_CODENAME")?
        .to_owned();
    let options = process::read(Command::new("apt-config").args(["dump", "--format", "%F \"%v\"\n", "Acquire"]))?;
    let options = options
        .lines()
        .filter(|option| reaches_sources(option))
        .map(str::to_owned)
        .collect();
    Ok(PackageSources { suite, list, options })
}

/// Whether an option of apt says how to reach package sources and when to trust their dates.
fn reaches_sources(option: &str) -> bool {
    ["Acquire::http", "Acquire::https", "Acquire::Check-", "Acquire::Retries"]
        .iter()
        .any(|prefix| option.starts_with(prefix))
        && !option.ends_with("\"\"")
}

fn missing_packages<'a>(packages: &[&'a str]) -> Result<Vec<&'a str>> {
    let query = Command::new("dpkg-query")
        .args(["--show", "--showformat=${db:Status-Status} ${Package}\n"])
        .args(packages)
        .output()
        .context("cannot run dpkg-query")?;
    Ok(not_installed(packages, &String::from_utf8_lossy(&query.stdout)))
}

fn not_installed<'a>(packages: &[&'a str], listing: &str) -> Vec<&'a str> {
    let installed: Vec<&str> = listing
        .lines()
        .filter_map(|line| line.strip_prefix("installed "))
        .collect();
    packages
        .iter()
        .copied()
        .filter(|package| !installed.contains(package))
        .collect()
}

/// How this process may act as root.
#[derive(Clone, Copy)]
enum Privilege {
    Root,
    Sudo,
}

fn privilege() -> Option<Privilege> {
    if rustix::process::geteuid().is_root() {
        return Some(Privilege::Root);
    }
    let sudo_works_silently = Command::new("sudo")
        .args(["--non-interactive", "true"])
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success());
    let can_ask = std::io::stdin().is_terminal() && Path::new("/usr/bin/sudo").exists();
    (sudo_works_silently || can_ask).then_some(Privilege::Sudo)
}

fn privileged(privilege: Privilege, words: &[&str]) -> Command {
    match privilege {
        Privilege::Root => process::command(words[0], &words[1..]),
        Privilege::Sudo => process::command("sudo", words),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_package_removed_or_never_installed_is_missing() {
        let listing: String = PACKAGES
            .iter()
            .filter(|package| **package != "cpio")
            .map(|package| match *package {
                "kmod" => "config-files kmod\n".to_owned(),
                other => format!("installed {other}\n"),
            })
            .collect();
        assert_eq!(not_installed(&PACKAGES, &listing), ["cpio", "kmod"]);
    }

    #[test]
    fn distributions_are_told_apart_by_their_id() {
        assert_eq!(
            Distribution::from_os_release("NAME=\"Debian\"\nVERSION_ID=\"12\"\nID=debian\n"),
            Some(Distribution::Debian)
        );
        assert_eq!(
            Distribution::from_os_release("ID=\"ubuntu\"\n"),
            Some(Distribution::Ubuntu)
        );
        assert_eq!(Distribution::from_os_release("ID=fedora\n"), None);
    }
}
