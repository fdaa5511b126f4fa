//! Files of the host that a monitor is given, and where it finds them.

use std::path::{Component, Path, PathBuf};

use crate::Error;

/// What a jail has at these places itself.
const TAKEN: [&str; 5] = ["/dev/kvm", "/dev/net", "/dev/userfaultfd", "/proc", "/run"];

/// What a monitor may do with a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Read it; of a folder, all that is in it.
    Read,
    /// Write it, too; in a folder, also make, remove and rename files.
    Write,
}

/// A file, folder or device of the host that a monitor is given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SharedFile {
    /// What it is called outside.
    pub path: PathBuf,
    /// What it is called in a jail.
    pub at: PathBuf,
    /// What may be done with it.
    pub access: Access,
}

/// Checks that the places of all `files` are different ones, none within another or within what a jail has itself.
pub(crate) fn check_places(files: &[SharedFile]) -> Result<(), Error> {
    for (index, file) in files.iter().enumerate() {
        let refused = |reason: String| Error::Place {
            path: file.path.clone(),
            at: file.at.clone(),
            reason,
        };
        if !is_plain(&file.at) {
            return Err(refused("it is no absolute path without '.' and '..'".to_owned()));
        }
        let others = files[..index].iter().map(|other| other.at.as_path());
        for other in TAKEN.iter().map(Path::new).chain(others) {
            if file.at.starts_with(other) || other.starts_with(&file.at) {
                return Err(refused(format!("{} is there", other.display())));
            }
        }
    }
    Ok(())
}

/// Whether `path` is absolute, names something below the root, and has nothing but names in it.
fn is_plain(path: &Path) -> bool {
    let mut components = path.components();
    components.next() == Some(Component::RootDir) && names(components.as_path()).is_some_and(|names| !names.is_empty())
}

/// The names that make up the relative `path`, if it has nothing else in it.
pub(crate) fn names(path: &Path) -> Option<Vec<&Path>> {
    let name = |component| match component {
        Component::Normal(name) => Some(Path::new(name)),
        _ => None,
    };
    path.components().map(name).collect()
}

/// Checks that `name` is one component of a path.
pub(crate) fn check_name(name: &str) -> Result<&Path, Error> {
    match names(Path::new(name)).as_deref() {
        Some([only]) if only.as_os_str() == name => Ok(only),
        _ => Err(Error::Name(name.to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(at: &str) -> SharedFile {
        SharedFile {
            path: "/srv/disk".into(),
            at: at.into(),
            access: Access::Read,
        }
    }

    fn refusal(places: &[&str]) -> String {
        let files: Vec<_> = places.iter().map(|at| file(at)).collect();
        check_places(&files).map_or_else(|error| error.to_string(), |()| String::new())
    }

    #[test]
    fn files_are_beside_each_other() {
        assert_eq!(refusal(&["/disk", "/disk2", "/srv/a/disk", "/dev/vg/disk"]), "");
    }

    #[test]
    fn no_file_is_within_another_or_over_what_a_jail_has() {
        for places in [
            ["/srv", "/srv/disk"],
            ["/srv/disk", "/srv"],
            ["/disk", "/disk"],
            ["/a", "/run/disk"],
            ["/a", "/dev/kvm"],
            ["/a", "/dev"],
            ["/a", "/proc/self"],
        ] {
            assert!(
                refusal(&places).contains("is there; choose another place with at=PATH"),
                "{places:?}"
            );
        }
    }

    #[test]
    fn places_are_plain_paths() {
        for at in ["/", "", "disk", "/srv/../etc", "../disk"] {
            assert!(refusal(&[at]).contains("no absolute path"), "{at}");
        }
    }

    #[test]
    fn names_lead_nowhere_else() {
        assert!(check_name("web-1").is_ok());
        for name in ["", ".", "..", "a/b", "/a", "a/", "../a", "./a"] {
            assert!(check_name(name).is_err(), "{name}");
        }
    }
}
