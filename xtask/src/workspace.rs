//! Where things are: the workspace's root and target folder, and what cargo builds there.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use serde::Deserialize;

use crate::process;

/// The workspace as cargo describes it.
#[derive(Debug, Deserialize)]
pub struct Workspace {
    /// The folder of the root manifest.
    #[serde(rename = "workspace_root")]
    pub root: PathBuf,
    /// Where builds go; honours `CARGO_TARGET_DIR`.
    #[serde(rename = "target_directory")]
    pub target: PathBuf,
    /// The crates of the workspace.
    pub packages: Vec<Package>,
}

/// One crate of the workspace.
#[derive(Debug, Deserialize)]
pub struct Package {
    /// Its name in `Cargo.toml`.
    pub name: String,
    /// What it depends on, in and out of the workspace.
    pub dependencies: Vec<Dependency>,
}

/// One dependency of a crate.
#[derive(Debug, Deserialize)]
pub struct Dependency {
    /// The name of the crate depended on.
    pub name: String,
    /// Where it is, if it is a local crate.
    pub path: Option<PathBuf>,
}

/// A program that cargo built.
#[derive(Debug, Clone)]
pub struct Executable {
    /// The name of the binary, test or example.
    pub name: String,
    /// Where it is.
    pub path: PathBuf,
    /// Whether it runs tests, rather than being what a crate provides.
    pub is_test: bool,
}

impl Workspace {
    /// Asks cargo for the workspace around the current directory.
    pub fn find() -> Result<Self> {
        let text = process::read(cargo().args(["metadata", "--no-deps", "--format-version=1"]))?;
        serde_json::from_str(&text).context("cargo metadata printed something unexpected")
    }

    /// The folder of guest images and kernels.
    pub fn guests(&self) -> PathBuf {
        self.target.join("guests")
    }

    /// The folder of downloaded and unpacked distribution packages.
    pub fn cache(&self) -> PathBuf {
        self.guests().join("cache")
    }

    /// Runs a cargo build (its progress passed through) and returns the programs it produced.
    pub fn build(&self, build: &mut Command) -> Result<Vec<Executable>> {
        build
            .arg("--message-format=json-render-diagnostics")
            .current_dir(&self.root)
            .stdin(Stdio::null())
            .stderr(Stdio::inherit());
        let output = build.output().with_context(|| format!("cannot run {build:?}"))?;
        if !output.status.success() {
            bail!("{build:?} failed: {}", output.status);
        }
        let messages = String::from_utf8(output.stdout).context("cargo printed something that is not UTF-8")?;
        executables(&messages)
    }
}

/// A cargo command, of the same cargo that runs this program.
pub fn cargo() -> Command {
    Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
}

/// Picks the executables out of cargo's JSON messages.
fn executables(messages: &str) -> Result<Vec<Executable>> {
    #[derive(Deserialize)]
    struct Message {
        target: Option<Target>,
        executable: Option<PathBuf>,
        profile: Option<Profile>,
    }
    #[derive(Deserialize)]
    struct Target {
        name: String,
    }
    #[derive(Deserialize)]
    struct Profile {
        test: bool,
    }
    let mut found = Vec::new();
    for line in messages.lines().filter(|line| line.starts_with('{')) {
        let message: Message = serde_json::from_str(line).context("cargo printed a message of an unknown form")?;
        if let (Some(target), Some(path)) = (message.target, message.executable) {
            found.push(Executable {
                name: target.name,
                path,
                is_test: message.profile.is_some_and(|profile| profile.test),
            });
        }
    }
    Ok(found)
}

/// `path` as text, for programs and formats that take nothing else.
pub fn text(path: &Path) -> Result<&str> {
    path.to_str()
        .with_context(|| format!("the path {} is not UTF-8", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_artifacts_with_an_executable_are_picked_from_cargos_messages() {
        let messages = r#"{"reason":"compiler-artifact","target":{"name":"library"},"executable":null}
{"reason":"compiler-artifact","target":{"name":"guest-init"},"profile":{"test":false},"executable":"/t/guest-init"}
{"reason":"compiler-artifact","target":{"name":"boots"},"profile":{"test":true},"executable":"/t/boots"}
{"reason":"build-finished","success":true}"#;
        let found = executables(messages).unwrap();
        let found: Vec<_> = found
            .iter()
            .map(|program| (program.name.as_str(), program.path.as_path(), program.is_test))
            .collect();
        let expected = [
            ("guest-init", Path::new("/t/guest-init"), false),
            ("boots", Path::new("/t/boots"), true),
        ];
        assert_eq!(found, expected);
    }
}
