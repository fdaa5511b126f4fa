//! Distribution kernels: fetched as packages, unpacked without being installed, and taken apart.
//!
//! Two are used. Guests run the *cloud* kernel (small, and what people run on virtual machines); nested hosts run the
//! full one, because it alone has the 9p file system.

use std::fs;
use std::io::{Seek, Write};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use tempfile::TempDir;

use crate::setup::{self, Distribution};
use crate::workspace::{Workspace, text};
use crate::{process, ui};

/// What the names of kernel packages begin with; the kernel's release follows.
const IMAGE_PREFIX: &str = "linux-image-";

/// What a kernel is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Use {
    /// It runs in guests.
    Guest,
    /// It runs the nested host in which guests are started.
    NestedHost,
}

/// A kernel package, unpacked.
#[derive(Debug)]
pub struct Kernel {
    /// `NAME_VERSION` of the package: what changes when the distribution updates it.
    pub package: String,
    /// What `uname -r` says.
    pub release: String,
    tree: PathBuf,
}

impl Kernel {
    /// The newest kernel the machine's package sources have; it may not have been fetched yet.
    pub fn newest(workspace: &Workspace, purpose: Use) -> Result<Self> {
        let metapackage = match (Distribution::detect()?, purpose) {
            (Distribution::Debian, Use::Guest) => "linux-image-cloud-amd64",
            (Distribution::Debian, Use::NestedHost) => "linux-image-amd64",
            (Distribution::Ubuntu, Use::Guest) => "linux-image-virtual",
            (Distribution::Ubuntu, Use::NestedHost) => "linux-image-generic",
        };
        let record = setup::with_package_lists(|| {
            process::read(Command::new("apt-cache").args(["show", "--no-all-versions", metapackage]))
        })?;
        let (image, version) =
            image_and_version(&record).with_context(|| format!("{metapackage} depends on no kernel package"))?;
        let package = format!("{image}_{version}");
        Ok(Self {
            release: image.trim_start_matches(IMAGE_PREFIX).to_owned(),
            tree: workspace.cache().join(&package),
            package,
        })
    }

    /// The newest kernel, fetched and unpacked unless that was done before.
    pub fn fetch(workspace: &Workspace, purpose: Use) -> Result<Self> {
        let kernel = Self::newest(workspace, purpose)?;
        if !kernel.tree.exists() {
            let prefixes: &[&str] = match Distribution::detect()? {
                Distribution::Debian => &["linux-image"],
                Distribution::Ubuntu => &["linux-image", "linux-modules", "linux-modules-extra"],
            };
            let packages: Vec<String> = prefixes
                .iter()
                .map(|prefix| format!("{prefix}-{}", kernel.release))
                .collect();
            ui::step(format_args!("fetching {}", kernel.package), || kernel.unpack(&packages))?;
        }
        Ok(kernel)
    }

    fn unpack(&self, packages: &[String]) -> Result<()> {
        let parent = self.tree.parent().context("the kernel cache has no parent directory")?;
        fs::create_dir_all(parent).with_context(|| format!("cannot create {}", parent.display()))?;
        let work = TempDir::new_in(parent)?;
        setup::download(packages, work.path())?;
        let tree = work.path().join("tree");
        for entry in fs::read_dir(work.path())? {
            let deb = entry?.path();
            if deb.extension().is_some_and(|extension| extension == "deb") {
                process::run(Command::new("dpkg").arg("-x").arg(&deb).arg(&tree))?;
            }
        }
        if !tree.join("lib").exists() {
            std::os::unix::fs::symlink("usr/lib", tree.join("lib"))?;
        }
        process::run(Command::new("depmod").arg("-b").arg(&tree).arg(&self.release))?;
        fs::rename(&tree, &self.tree).with_context(|| format!("cannot create {}", self.tree.display()))
    }

    /// The bzImage.
    pub fn image(&self) -> PathBuf {
        self.tree.join("boot").join(format!("vmlinuz-{}", self.release))
    }

    /// The folder that is `/lib/modules/RELEASE` where this kernel runs.
    pub fn modules_directory(&self) -> PathBuf {
        self.tree.join("lib/modules").join(&self.release)
    }

    /// The files of the named modules and of those they need, in load order; what is built in is left out.
    pub fn modules<'a>(&self, names: impl Iterator<Item = &'a str>) -> Result<Vec<PathBuf>> {
        let mut files = Vec::new();
        for name in names {
            let listing = process::read(
                Command::new("modprobe")
                    .args(["--show-depends", "--set-version", &self.release, "--dirname"])
                    .args([self.tree.as_os_str(), name.as_ref()]),
            )?;
            for file in loaded_files(&listing) {
                if !files.contains(&file) {
                    files.push(file);
                }
            }
        }
        Ok(files)
    }

    /// A module's path as the guest will know it (`lib/modules/…/NAME.ko`) and its uncompressed contents.
    pub fn read_module(&self, file: &Path) -> Result<(String, Vec<u8>)> {
        let contents = fs::read(file).with_context(|| format!("cannot read the module {}", file.display()))?;
        let inside = file
            .strip_prefix(&self.tree)
            .with_context(|| format!("{} is not one of {}'s modules", file.display(), self.package))?;
        let inside = text(inside)?;
        match inside.rsplit_once(".ko.") {
            None => Ok((inside.to_owned(), contents)),
            Some((stem, _)) => Ok((format!("{stem}.ko"), Compression::of(&contents)?.decompress(&contents)?)),
        }
    }

    /// Writes the ELF kernel that is packed in the bzImage to `vmlinux`.
    pub fn extract_vmlinux(&self, vmlinux: &Path) -> Result<()> {
        let image = fs::read(self.image()).with_context(|| format!("cannot read {}", self.image().display()))?;
        let payload = payload(&image).with_context(|| format!("in {}", self.image().display()))?;
        let compression = Compression::of(payload)?;
        let elf = compression.decompress(compression.without_appended_size(payload))?;
        ensure!(
            elf.starts_with(b"\x7fELF"),
            "the payload of {} is not an ELF file",
            self.image().display()
        );
        fs::write(vmlinux, elf).with_context(|| format!("cannot write {}", vmlinux.display()))
    }
}

/// The name of the kernel's package, and the version, in apt's record of the package that depends on the newest one.
fn image_and_version(record: &str) -> Option<(&str, &str)> {
    let field = |name: &str| record.lines().find_map(|line| line.strip_prefix(name));
    let image = field("Depends: ")?
        .split([' ', ','])
        .find(|word| word.starts_with(IMAGE_PREFIX))?;
    Some((image, field("Version: ")?))
}

/// The files in the output of `modprobe --show-depends`.
fn loaded_files(listing: &str) -> impl Iterator<Item = PathBuf> {
    listing
        .lines()
        .filter_map(|line| line.strip_prefix("insmod "))
        .filter_map(|line| line.split_whitespace().next())
        .map(PathBuf::from)
}

/// The compressed kernel inside a bzImage (Linux x86 boot protocol: `setup_sects`, `payload_offset`, `payload_length`).
fn payload(image: &[u8]) -> Result<&[u8]> {
    const SETUP_SECTS: usize = 0x1f1;
    const MAGIC: usize = 0x202;
    const VERSION: usize = 0x206;
    const PAYLOAD_OFFSET: usize = 0x248;
    const PAYLOAD_LENGTH: usize = 0x24c;
    const FIRST_VERSION_WITH_PAYLOAD: u32 = 0x208;
    const SECTOR: usize = 512;
    let word = |at: usize| -> Result<u32> {
        let bytes = image.get(at..at + 4).context("too short for a bzImage")?;
        Ok(u32::from_le_bytes(bytes.try_into()?))
    };
    ensure!(image.get(MAGIC..MAGIC + 4) == Some(b"HdrS"), "not a bzImage");
    ensure!(
        word(VERSION)? & 0xffff >= FIRST_VERSION_WITH_PAYLOAD,
        "the boot protocol is older than 2.08"
    );
    let setup_sectors = match image[SETUP_SECTS] {
        0 => 4,
        sectors => usize::from(sectors),
    };
    let start = (setup_sectors + 1) * SECTOR + usize::try_from(word(PAYLOAD_OFFSET)?)?;
    let length = usize::try_from(word(PAYLOAD_LENGTH)?)?;
    start
        .checked_add(length)
        .and_then(|end| image.get(start..end))
        .context("the payload lies outside the file")
}

/// How a kernel or module is packed; unpacked with the distribution's tools.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Compression {
    Gzip,
    Xz,
    Zstd,
    Lz4,
}

impl Compression {
    fn of(packed: &[u8]) -> Result<Self> {
        match packed {
            [0x1f, 0x8b, ..] => Ok(Self::Gzip),
            [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => Ok(Self::Xz),
            [0x28, 0xb5, 0x2f, 0xfd, ..] => Ok(Self::Zstd),
            [0x02, 0x21, 0x4c, 0x18, ..] => Ok(Self::Lz4),
            _ => bail!(
                "unknown compression: it starts with {:02x?}",
                &packed[..packed.len().min(6)]
            ),
        }
    }

    fn program(self) -> &'static str {
        match self {
            Self::Gzip => "gzip",
            Self::Xz => "xz",
            Self::Zstd => "zstd",
            Self::Lz4 => "lz4",
        }
    }

    /// `payload` without the unpacked size that the kernel's build appends to every format but gzip, which has its own.
    fn without_appended_size(self, payload: &[u8]) -> &[u8] {
        match self {
            Self::Gzip => payload,
            _ => &payload[..payload.len().saturating_sub(size_of::<u32>())],
        }
    }

    fn decompress(self, packed: &[u8]) -> Result<Vec<u8>> {
        let mut input = tempfile::tempfile()?;
        input.write_all(packed)?;
        input.rewind()?;
        let output = Command::new(self.program())
            .args(["-d", "-c"])
            .stdin(input)
            .output()
            .with_context(|| format!("cannot run {}", self.program()))?;
        ensure!(
            output.status.success(),
            "{} cannot unpack: {}",
            self.program(),
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(output.stdout)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A bzImage with two setup sectors whose payload `packed` lies 16 bytes into the protected-mode part.
    fn synthetic_image(packed: &[u8]) -> Vec<u8> {
        let mut image = vec![0; 3 * 512 + 16];
        image[0x1f1] = 2;
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x206..0x208].copy_from_slice(&0x20f_u16.to_le_bytes());
        image[0x248..0x24c].copy_from_slice(&16_u32.to_le_bytes());
        image[0x24c..0x250].copy_from_slice(&u32::try_from(packed.len()).unwrap().to_le_bytes());
        image.extend_from_slice(packed);
        image
    }

    #[test]
    fn the_payload_is_found_through_the_setup_header() {
        let image = synthetic_image(b"\x1f\x8b packed kernel");
        assert_eq!(payload(&image).unwrap(), b"\x1f\x8b packed kernel");
    }

    #[test]
    fn images_without_a_sound_header_are_refused() {
        let sound = synthetic_image(b"packed kernel");
        assert!(payload(&sound[..sound.len() - 1]).is_err(), "payload cut short");
        assert!(payload(&sound[..0x210]).is_err(), "header cut short");
        let mut other = sound.clone();
        other[0x202] = b'x';
        assert!(payload(&other).is_err(), "wrong magic");
        let mut old = sound;
        old[0x206..0x208].copy_from_slice(&0x207_u16.to_le_bytes());
        assert!(payload(&old).is_err(), "protocol without payload fields");
    }

    #[test]
    fn the_appended_size_is_not_part_of_the_stream() {
        assert_eq!(Compression::Lz4.without_appended_size(b"stream\0\0\0\x01"), b"stream");
        assert_eq!(Compression::Gzip.without_appended_size(b"stream"), b"stream");
    }

    #[test]
    fn modules_keep_their_load_order_and_built_in_ones_are_skipped() {
        let listing = "builtin ext4\ninsmod /t/virtio_ring.ko \ninsmod /t/virtio.ko option=1\n";
        let files: Vec<_> = loaded_files(listing).collect();
        assert_eq!(files, [Path::new("/t/virtio_ring.ko"), Path::new("/t/virtio.ko")]);
    }

    #[test]
    fn the_kernel_package_is_the_image_the_metapackage_depends_on() {
        let record = "Package: linux-image-amd64\nVersion: 6.1.192-2\n\
                      Depends: linux-base (>= 4), linux-image-6.1.0-56-amd64 (= 6.1.192-2)\n";
        assert_eq!(
            image_and_version(record),
            Some(("linux-image-6.1.0-56-amd64", "6.1.192-2"))
        );
        assert_eq!(image_and_version("Package: other\nVersion: 1\nDepends: libc6\n"), None);
    }
}
