//! The `debian` guest: a whole distribution with systemd, services and workloads, made with mmdebstrap from the package
//! sources of this machine. (On Ubuntu it is an Ubuntu, and keeps the name.)
//!
//! Root logs in on the console without a password, and over ssh with the key beside the image.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use tempfile::TempDir;

use super::kernel::{Kernel, Use};
use super::{Ingredients, build_if_changed};
use crate::initramfs::recipe_lines;
use crate::process;
use crate::setup::{Distribution, package_sources};
use crate::workspace::{Workspace, text};

const PACKAGES: &str = include_str!("../../../resources/guest/debian/packages");
const MASKED_UNITS: &str = include_str!("../../../resources/guest/debian/masked-units");

/// Room for the tests' files; the image is sparse.
const ROOT_SIZE: &str = "1536M";

/// Unpacks the root file system, moves the kernel and initrd out of it and makes an image of the rest. Runs under
/// fakeroot, so that everything keeps its owner. Arguments: the archive, the image's directory, the image's size.
const MAKE_IMAGE: &str = r#"
set -eu
mkdir root
tar --extract --file "$1" --directory root --exclude './dev/*'
: >root/etc/machine-id
mv root/boot/vmlinuz-* "$2/vmlinuz"
mv root/boot/initrd.img-* "$2/initrd"
rm -f "$2/root.ext4"
mke2fs -q -t ext4 -L root -d root "$2/root.ext4" "$3"
"#;

/// Builds the image and returns its directory.
pub fn build(workspace: &Workspace) -> Result<PathBuf> {
    let recipe = workspace.root.join("resources/guest/debian");
    let directory = workspace.guests().join("debian");
    let distribution = Distribution::detect()?;
    let packages: Vec<&str> = recipe_lines(PACKAGES)
        .map(|package| match (distribution, package) {
            (Distribution::Ubuntu, "linux-image-cloud-amd64") => "linux-image-virtual",
            _ => package,
        })
        .collect();
    let mut ingredients = Ingredients::new();
    ingredients.add(&Kernel::newest(workspace, Use::Guest)?.package);
    ingredients.add(&packages.join(" "));
    ingredients.add_contents("masked-units", MASKED_UNITS.as_bytes());
    ingredients.add_contents("image", MAKE_IMAGE.as_bytes());
    ingredients.add_file(&recipe.join("customize"))?;
    for file in files_below(&recipe.join("overlay"))? {
        ingredients.add_file(&file)?;
    }
    build_if_changed(&directory, &ingredients, || {
        let work = TempDir::new_in(workspace.guests())?;
        let overlay = overlay(&recipe, work.path(), &directory)?;
        let archive = work.path().join("root.tar");
        bootstrap(distribution, &packages, &recipe, &overlay, &archive)?;
        process::run(
            Command::new("fakeroot")
                .args(["sh", "-c", MAKE_IMAGE, "make-image"])
                .args([archive.as_os_str(), directory.as_os_str(), ROOT_SIZE.as_ref()])
                .current_dir(work.path()),
        )
    })?;
    Ok(directory)
}

/// The archive of files that go over the packages' own, with the public half of a new ssh key.
fn overlay(recipe: &Path, work: &Path, directory: &Path) -> Result<PathBuf> {
    let files = work.join("overlay");
    process::run(
        Command::new("cp")
            .arg("--recursive")
            .arg(recipe.join("overlay"))
            .arg(&files),
    )?;
    let key = directory.join("id_ed25519");
    if !key.exists() {
        process::run(
            Command::new("ssh-keygen")
                .args(["-q", "-t", "ed25519", "-N", "", "-C", "root@cutover", "-f"])
                .arg(&key),
        )?;
    }
    let ssh = files.join("root/.ssh");
    fs::create_dir_all(&ssh)?;
    fs::copy(key.with_extension("pub"), ssh.join("authorized_keys")).context("cannot copy the public key")?;
    fs::set_permissions(files.join("root"), Permissions::from_mode(0o700))?;
    let archive = work.join("overlay.tar");
    process::run(
        Command::new("tar")
            .args(["--create", "--owner=0", "--group=0", "--mode=go-w", "--file"])
            .arg(&archive)
            .arg("--directory")
            .arg(&files)
            .arg("."),
    )?;
    Ok(archive)
}

/// Makes the archive of the root file system.
fn bootstrap(
    distribution: Distribution,
    packages: &[&str],
    recipe: &Path,
    overlay: &Path,
    archive: &Path,
) -> Result<()> {
    let sources = package_sources(distribution)?;
    let list = archive.with_extension("list");
    fs::write(&list, sources.list).with_context(|| format!("cannot write {}", list.display()))?;
    let overlay = text(overlay)?;
    ensure!(
        !overlay.contains(' '),
        "mmdebstrap cannot use {overlay}: the path has a blank"
    );
    let masked: Vec<&str> = recipe_lines(MASKED_UNITS).collect();
    process::run(
        Command::new("mmdebstrap")
            .args(["--variant=minbase", "--quiet"])
            .arg(format!("--include={}", packages.join(",")))
            .args(sources.options.iter().map(|option| format!("--aptopt={option}")))
            .arg(format!("--essential-hook=tar-in {overlay} /"))
            .arg(format!("--customize-hook={}", text(&recipe.join("customize"))?))
            .arg(sources.suite)
            .args([archive, &list])
            .env("MASKED_UNITS", masked.join(" ")),
    )
}

/// All regular files below `directory`, in a fixed order.
fn files_below(directory: &Path) -> Result<Vec<PathBuf>> {
    let listing = process::read(Command::new("find").arg(directory).args(["-type", "f"]))?;
    let mut files: Vec<PathBuf> = listing.lines().map(PathBuf::from).collect();
    files.sort();
    Ok(files)
}
