//! What `cargo xtask test` tells the tests through the environment, and the limits they all share.

use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use tempfile::TempDir;

/// How long a guest may take for anything before the test fails. Emulated guests on a busy machine are slow, and a
/// working one never comes near it.
pub const PATIENCE: Duration = Duration::from_secs(180);

/// The `cutover` program under test.
pub fn monitor_binary() -> PathBuf {
    variable("CUTOVER_BIN", "the cutover program")
}

/// A file of the guest images, such as `micro/vmlinuz`.
pub fn guest_file(name: &str) -> PathBuf {
    let path = variable("CUTOVER_GUESTS", "the directory of guest images").join(name);
    assert!(
        path.exists(),
        "{} is missing: `cargo xtask guest` builds it",
        path.display()
    );
    path
}

/// A program of the Python environment with foreign clients of the API.
pub(crate) fn client_program(name: &str) -> PathBuf {
    let environment = variable("CUTOVER_CLIENTS", "the Python environment with foreign clients");
    environment.join("bin").join(name)
}

/// The program that runs others on another host.
pub(crate) fn on_other_host() -> PathBuf {
    variable("CUTOVER_ON_OTHER_HOST", "the program on-other-host")
}

/// Where tests leave something for those on a later host, which is not on tmpfs.
pub fn legacy() -> PathBuf {
    variable("CUTOVER_LEGACY", "a directory that later hosts have too")
}

/// A new directory on tmpfs, removed when dropped.
pub fn scratch() -> TempDir {
    let parent = variable("CUTOVER_SCRATCH", "a directory on tmpfs");
    TempDir::new_in(&parent)
        .unwrap_or_else(|error| panic!("cannot create a directory in {}: {error}", parent.display()))
}

fn variable(name: &str, meaning: &str) -> PathBuf {
    std::env::var_os(name)
        .map(PathBuf::from)
        .unwrap_or_else(|| panic!("{name} must name {meaning}: run the tests with `cargo xtask test`"))
}

/// Looks again and again until `find` finds something: for what nobody announces.
#[track_caller]
pub fn poll_until<T>(what: &str, mut find: impl FnMut() -> Option<T>) -> T {
    /// Pause between two looks.
    const PAUSE: Duration = Duration::from_millis(20);
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = find() {
            return found;
        }
        assert!(Instant::now() < deadline, "{what}: not within {PATIENCE:?}");
        thread::sleep(PAUSE);
    }
}
