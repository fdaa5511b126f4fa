//! `cargo xtask lint`: what can be checked without running anything.

use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::workspace::{Package, Workspace, cargo};
use crate::{process, ui};

/// Which crates of the workspace each crate may use. One direction, no cycles.
const EDGES: [(&str, &[&str]); 11] = [
    // For its tests.
    ("cutover-snapshot", &["cutover-bucket"]),
    ("cutover-devices", &["cutover-snapshot"]),
    ("cutover-migration", &["cutover-snapshot"]),
    ("cutover-cluster", &["cutover-snapshot", "cutover-migration"]),
    (
        "cutover-vmm",
        &["cutover-snapshot", "cutover-devices", "cutover-migration"],
    ),
    ("cutover-jail", &[]),
    (
        "cutover-api",
        &[
            "cutover-snapshot",
            "cutover-devices",
            "cutover-migration",
            "cutover-cluster",
            "cutover-vmm",
            "cutover-jail",
        ],
    ),
    ("cutover-guest", &[]),
    ("cutover-bucket", &[]),
    ("cutover-tests", &["cutover-bucket", "cutover-guest", "cutover-jail"]),
    ("xtask", &[]),
];

/// A longer file holds more than one idea.
const FILE_LINES_MAX: usize = 600;

/// The documentation is for those who change the code: it shows what is private, and may link to it.
const RUSTDOC_FLAGS: &str = "-D warnings -A rustdoc::private_intra_doc_links";

/// Runs all checks; the first that fails ends it.
pub fn lint(workspace: &Workspace) -> Result<()> {
    let root = &workspace.root;
    ui::step("dependency edges", || report(edge_violations(&workspace.packages)))?;
    ui::step("file form", || report(form_violations(root)?))?;
    ui::say("format");
    process::show(cargo().args(["fmt", "--all", "--check"]).current_dir(root))?;
    ui::say("clippy");
    process::show(
        cargo()
            .args(["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"])
            .current_dir(root),
    )?;
    ui::say("documentation");
    process::show(
        cargo()
            .args(["doc", "--workspace", "--no-deps", "--document-private-items"])
            .env("RUSTDOCFLAGS", RUSTDOC_FLAGS)
            .current_dir(root),
    )?;
    deny(root)
}

/// Licences, bans and sources of dependencies, where cargo-deny is installed; advisories where they can be fetched.
fn deny(root: &Path) -> Result<()> {
    let installed = cargo()
        .args(["deny", "--version"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success());
    if !installed {
        ui::say("cargo-deny is not installed: licences, bans and sources are not checked");
        return Ok(());
    }
    ui::say("licences, bans, sources");
    process::show(
        cargo()
            .args(["deny", "check", "bans", "licenses", "sources"])
            .current_dir(root),
    )?;
    if let Err(error) = process::run(cargo().args(["deny", "fetch", "db"]).current_dir(root)) {
        ui::say(format_args!(
            "advisories are not checked, they cannot be fetched: {error}"
        ));
        return Ok(());
    }
    ui::say("advisories");
    process::show(
        cargo()
            .args(["deny", "check", "--disable-fetch", "advisories"])
            .current_dir(root),
    )
}

fn report(violations: Vec<String>) -> Result<()> {
    if violations.is_empty() {
        return Ok(());
    }
    bail!("{}", violations.join("\n"));
}

/// Uses of one crate of the workspace by another that [`EDGES`] does not allow.
fn edge_violations(packages: &[Package]) -> Vec<String> {
    let mut violations = Vec::new();
    for package in packages {
        let Some((_, allowed)) = EDGES.iter().find(|(name, _)| *name == package.name) else {
            violations.push(format!("{} is not in the table of dependency edges", package.name));
            continue;
        };
        for dependency in package
            .dependencies
            .iter()
            .filter(|dependency| dependency.path.is_some())
        {
            if !allowed.contains(&dependency.name.as_str()) {
                violations.push(format!("{} must not depend on {}", package.name, dependency.name));
            }
        }
    }
    violations
}

/// Source files that are too long or do not say what they are.
fn form_violations(root: &Path) -> Result<Vec<String>> {
    let files = process::read(
        Command::new("git")
            .args(["ls-files", "--cached", "--others", "--exclude-standard", "*.rs"])
            .current_dir(root),
    )?;
    let mut violations = Vec::new();
    for file in files.lines().filter(|file| root.join(file).exists()) {
        let source = std::fs::read_to_string(root.join(file)).with_context(|| format!("cannot read {file}"))?;
        violations.extend(form_violation(&source).map(|violation| format!("{file}: {violation}")));
    }
    Ok(violations)
}

fn form_violation(source: &str) -> Option<String> {
    let lines = source.lines().count();
    if !source.starts_with("//! ") {
        Some("does not open with a //! line that says what it is".to_owned())
    } else if lines > FILE_LINES_MAX {
        Some(format!(
            "has {lines} lines, more than {FILE_LINES_MAX}: split it by idea"
        ))
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;
    use crate::workspace::Dependency;

    fn package(name: &str, uses: &[(&str, bool)]) -> Package {
        Package {
            name: name.to_owned(),
            dependencies: uses
                .iter()
                .map(|(name, local)| Dependency {
                    name: (*name).to_owned(),
                    path: local.then(|| PathBuf::from("/somewhere")),
                })
                .collect(),
        }
    }

    #[test]
    fn allowed_edges_and_crates_from_outside_pass() {
        let vmm = package("cutover-vmm", &[("cutover-devices", true), ("kvm-ioctls", false)]);
        assert_eq!(edge_violations(&[vmm]), Vec::<String>::new());
    }

    #[test]
    fn an_edge_against_the_direction_is_named() {
        let devices = package("cutover-devices", &[("cutover-vmm", true)]);
        assert_eq!(
            edge_violations(&[devices]),
            ["cutover-devices must not depend on cutover-vmm"]
        );
    }

    #[test]
    fn a_crate_nobody_placed_is_named() {
        let violations = edge_violations(&[package("cutover-new", &[])]);
        assert_eq!(violations, ["cutover-new is not in the table of dependency edges"]);
    }

    #[test]
    fn a_file_must_say_what_it_is_and_stay_short() {
        assert_eq!(form_violation("//! What it is.\n"), None);
        assert!(form_violation("fn main() {}\n").is_some());
        let long = format!("//! Long.\n{}", "\n".repeat(FILE_LINES_MAX));
        assert!(form_violation(&long).is_some());
    }
}
