//! Clients of the API that nobody here wrote: Python programs from the package index, in an environment of their own.

use std::path::PathBuf;

use anyhow::Result;

use crate::guest::{Ingredients, build_if_changed};
use crate::workspace::Workspace;
use crate::{process, setup};

const REQUIREMENTS: &str = include_str!("../../resources/clients/requirements.txt");

/// The distribution's own interpreter: others on the path may come and go.
const PYTHON: &str = "/usr/bin/python3";

/// Installs the clients unless they are installed, and returns the environment's folder.
pub fn build(workspace: &Workspace) -> Result<PathBuf> {
    setup::ensure_installed(&["python3", "python3-venv"])?;
    let directory = workspace.target.join("clients");
    let mut ingredients = Ingredients::new();
    ingredients.add_contents("requirements.txt", REQUIREMENTS.as_bytes());
    build_if_changed(&directory, &ingredients, || {
        process::run(process::command(PYTHON, ["-m", "venv", "--clear"]).arg(&directory))?;
        process::run(
            process::command(directory.join("bin/pip"), ["install", "--quiet"])
                .args(crate::initramfs::recipe_lines(REQUIREMENTS)),
        )
    })?;
    Ok(directory)
}
