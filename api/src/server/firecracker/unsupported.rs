//! The paths of Firecracker's API that this one does not have: refused by name, so that a client knows why.

/// Beginnings of paths, and what they are about.
const PATHS: [(&str, &str); 4] = [
    ("/balloon/hinting", "free page hinting: only reporting"),
    ("/cpu-config", "CPU configurations"),
    ("/hotplug", "memory hotplug"),
    ("/pmem", "pmem devices"),
];

/// What `path` is about, if it is one of Firecracker's that this API does not have.
pub fn feature(path: &str) -> Option<&'static str> {
    let is_at = |root: &str| {
        path.strip_prefix(root)
            .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
    };
    PATHS.iter().find(|(root, _)| is_at(root)).map(|&(_, feature)| feature)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn firecrackers_other_paths_are_known_by_what_they_are_about() {
        for (path, about) in [
            ("/pmem", Some("pmem devices")),
            ("/hotplug/memory", Some("memory hotplug")),
            ("/balloon/hinting/start", Some("free page hinting: only reporting")),
            ("/pmemx", None),
            ("/drives/pmem", None),
            ("/balloon", None),
        ] {
            assert_eq!(feature(path), about, "{path}");
        }
    }
}
