//! What a program finds that runs in a jail: it tries all that a monitor could that a guest has taken over.
//!
//! Making a jail takes root and `/dev/kvm`, which is why this is tested where guests run.

use std::fs::{self, File, Permissions};
use std::io::{self, Write};
use std::net::TcpStream;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::{self, Command};
use std::sync::mpsc::channel;
use std::thread;

use cutover_jail::{Access, CgroupSettings, Ended, Error, Jail, Limits, SharedFile, User, in_background};
use rustix::fs::{CWD, FileType, Mode, mknodat};
use rustix::io::{FdFlags, fcntl_setfd};
use rustix::mount::{MountFlags, mount};
use rustix::process::{Pid, Resource, Rlimit, Signal, Uid, chroot, kill_process, setrlimit};
use rustix::thread::{UnshareFlags, gettid, set_thread_res_uid, unshare_unsafe};

const UID: u32 = 61_234;
const GID: u32 = 61_235;

/// A folder for jails, and for what they are given.
struct Host {
    folder: tempfile::TempDir,
}

impl Host {
    fn new() -> Self {
        let folder = tempfile::tempdir().expect("folder");
        fs::set_permissions(folder.path(), Permissions::from_mode(0o755)).expect("open it up");
        Self { folder }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// A file of `uid` that everybody may read.
    fn file(&self, name: &str, uid: u32) -> PathBuf {
        let path = self.path(name);
        fs::write(&path, name).expect("written");
        chown(&path, Some(uid), None).expect("root gives files away");
        path
    }

    fn jail(&self) -> Jail {
        Jail {
            id: "web".to_owned(),
            base: self.path("jails"),
            user: User::new(UID, GID).expect("not root"),
            network: None,
            files: Vec::new(),
            limits: Limits::default(),
            cgroup: None,
        }
    }

    /// What `probe` finds in `jail`.
    fn found_in(&self, jail: &Jail, probe: impl FnOnce() -> Vec<String> + Send) -> Vec<String> {
        let ended = run(jail, || match fs::write("/run/found", probe().join("\n")) {
            Ok(()) => 0,
            Err(_) => 2,
        });
        assert_eq!(ended.expect("the jail is made"), Ended::Exited(0));
        let found = fs::read_to_string(self.path("jails/web/root/run/found")).expect("the probe wrote it");
        found.lines().map(str::to_owned).collect()
    }
}

/// Runs `program` in `jail`, from a thread of its own: the next process that it starts would be in the jail's PID namespace.
fn run(jail: &Jail, program: impl FnOnce() -> u8 + Send) -> Result<Ended, Error> {
    thread::scope(|scope| scope.spawn(|| jail.run(None, program)).join()).expect("no panic")
}

fn given(path: &Path, access: Access) -> SharedFile {
    SharedFile {
        path: path.to_owned(),
        at: path.to_owned(),
        access,
    }
}

/// The error behind a refusal, in the kernel's words.
fn refusal<T, E: Into<io::Error>>(result: Result<T, E>) -> String {
    result.map_or_else(|error| error.into().to_string(), |_| "done".to_owned())
}

fn entries(folder: &str) -> String {
    let entries = fs::read_dir(folder).expect("readable");
    let mut names: Vec<_> = entries
        .map(|entry| entry.expect("readable").file_name().into_string().expect("ASCII"))
        .collect();
    names.sort();
    names.join(" ")
}

fn trace(process: Pid) -> io::Result<()> {
    // SAFETY: the process that is traced is another one, and stops for it.
    match unsafe { libc::ptrace(libc::PTRACE_ATTACH, process.as_raw_pid(), 0, 0) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// The fields of /proc/self/status called `names`.
fn status(names: &[&str]) -> Vec<String> {
    let status = fs::read_to_string("/proc/self/status").expect("readable");
    let field = |name: &&str| {
        let line = status.lines().find(|line| line.starts_with(*name)).expect("there");
        line.split_whitespace().collect::<Vec<_>>().join(" ")
    };
    names.iter().map(field).collect()
}

#[test]
fn of_the_host_only_what_was_given_can_be_reached() {
    let host = Host::new();
    let secret = host.file("secret", UID);
    let (kernel, disk) = (host.file("kernel", 0), host.file("disk", UID));
    let mut jail = host.jail();
    jail.files = vec![
        given(&kernel, Access::Read),
        SharedFile {
            at: "/disk".into(),
            ..given(&disk, Access::Write)
        },
    ];
    let found = host.found_in(&jail, || {
        vec![
            entries("/"),
            entries("/dev/net"),
            entries("/proc"),
            refusal(fs::read("/etc/passwd")),
            refusal(fs::read(&secret)),
            refusal(fs::read("/../../../../etc/passwd")),
            refusal(fs::read(format!("/proc/1/root{}", secret.display()))),
            fs::read_to_string(&kernel).expect("given"),
            refusal(fs::write(&kernel, "changed")),
            refusal(fs::write("/disk", "changed")),
            refusal(fs::write("/new", "")),
            refusal(fs::remove_file("/dev/kvm")),
            refusal(File::open("/dev/kvm")),
        ]
    });
    // The first folder is the one that the kernel is in, by the path it has outside.
    let top = kernel.iter().nth(1).expect("absolute").to_str().expect("ASCII");
    let mut there = ["dev", "disk", "proc", "run", top];
    there.sort_unstable();
    assert_eq!(
        found,
        [
            &*there.join(" "),
            "tun",
            "1 self thread-self",
            "No such file or directory (os error 2)",
            "No such file or directory (os error 2)",
            "No such file or directory (os error 2)",
            "No such file or directory (os error 2)",
            "kernel",
            "Read-only file system (os error 30)",
            "done",
            "Read-only file system (os error 30)",
            "Read-only file system (os error 30)",
            "done",
        ]
    );
    assert_eq!(fs::read_to_string(&disk).unwrap(), "changed");
}

#[test]
fn no_privilege_is_left_and_none_can_be_had() {
    let host = Host::new();
    let mut jail = host.jail();
    jail.files = vec![given(Path::new("/bin/true"), Access::Read)];
    let this = Pid::from_raw(process::id().cast_signed()).expect("there is one");
    let found = host.found_in(&jail, || {
        let mut found = status(&[
            "Uid",
            "Gid",
            "Groups",
            "CapInh",
            "CapPrm",
            "CapEff",
            "CapBnd",
            "CapAmb",
            "NoNewPrivs",
        ]);
        found.extend([
            refusal(set_thread_res_uid(Uid::ROOT, Uid::ROOT, Uid::ROOT)),
            refusal(mount("none", "/run", "tmpfs", MountFlags::empty(), None)),
            refusal(chroot("/run")),
            // A disk of the host, by its number.
            refusal(mknodat(
                CWD,
                "/run/disk",
                FileType::BlockDevice,
                Mode::RUSR,
                rustix::fs::makedev(254, 0),
            )),
            // SAFETY: descriptors stay shared.
            refusal(unsafe { unshare_unsafe(UnshareFlags::NEWNS) }),
            // In a user namespace of its own it would have all capabilities again.
            // SAFETY: as before.
            refusal(unsafe { unshare_unsafe(UnshareFlags::NEWUSER) }),
            refusal(kill_process(this, Signal::KILL)),
            refusal(trace(this)),
            refusal(Command::new("/bin/true").status()),
        ]);
        found
    });
    assert_eq!(
        found,
        [
            "Uid: 61234 61234 61234 61234",
            "Gid: 61235 61235 61235 61235",
            "Groups:",
            "CapInh: 0000000000000000",
            "CapPrm: 0000000000000000",
            "CapEff: 0000000000000000",
            "CapBnd: 0000000000000000",
            "CapAmb: 0000000000000000",
            "NoNewPrivs: 1",
            "Operation not permitted (os error 1)",
            "Operation not permitted (os error 1)",
            "Operation not permitted (os error 1)",
            "Operation not permitted (os error 1)",
            "Operation not permitted (os error 1)",
            "Operation not permitted (os error 1)",
            "No such process (os error 3)",
            "No such process (os error 3)",
            "Permission denied (os error 13)",
        ]
    );
}

#[test]
fn only_the_standard_descriptors_are_open() {
    let host = Host::new();
    // One that execution would not close.
    let inherited = File::open("/etc/passwd").unwrap();
    fcntl_setfd(&inherited, FdFlags::empty()).unwrap();
    assert!(inherited.as_raw_fd() > 2);
    // The last one is what reads the folder.
    assert_eq!(
        host.found_in(&host.jail(), || vec![entries("/proc/self/fd")]),
        ["0 1 2 3"]
    );
}

#[test]
fn the_network_is_the_one_given_or_none() {
    let host = Host::new();
    let of_this = || {
        fs::read_link("/proc/thread-self/ns/net")
            .expect("readable")
            .display()
            .to_string()
    };
    let probe = || {
        let network = fs::read_link("/proc/self/ns/net")
            .expect("readable")
            .display()
            .to_string();
        vec![network, refusal(TcpStream::connect("127.0.0.1:1"))]
    };
    let found = host.found_in(&host.jail(), probe);
    assert_ne!(found[0], of_this());
    assert_eq!(found[1], "Network is unreachable (os error 101)");

    let (tell, told) = channel();
    let (done, wait) = channel::<()>();
    let (network, found) = thread::scope(|scope| {
        scope.spawn(move || {
            // SAFETY: descriptors stay shared.
            unsafe { unshare_unsafe(UnshareFlags::NEWNET) }.expect("root may");
            tell.send((gettid().as_raw_pid(), of_this())).expect("heard");
            // The namespace is there as long as this thread is.
            wait.recv().expect_err("nothing is sent");
        });
        let (task, network) = told.recv().expect("told");
        let mut jail = host.jail();
        jail.network = Some(format!("/proc/{}/task/{task}/ns/net", process::id()).into());
        let found = host.found_in(&jail, probe);
        drop(done);
        (network, found)
    });
    assert_ne!(network, of_this());
    assert_eq!(found[0], network);
}

#[test]
fn limits_are_in_force_and_cannot_be_lifted() {
    let host = Host::new();
    let mut jail = host.jail();
    jail.limits = Limits {
        descriptors: 5,
        file_size: Some(4096),
    };
    let found = host.found_in(&jail, || {
        let raised = Rlimit {
            current: None,
            maximum: None,
        };
        let opened: Vec<_> = (0..3).map(|_| File::open("/dev/kvm")).collect();
        let found = opened.into_iter().map(refusal);
        [Resource::Nofile, Resource::Fsize, Resource::Core]
            .into_iter()
            .map(|resource| refusal(setrlimit(resource, raised)))
            .chain(found)
            .collect()
    });
    let (not_permitted, too_many) = (
        "Operation not permitted (os error 1)",
        "Too many open files (os error 24)",
    );
    assert_eq!(
        found,
        [not_permitted, not_permitted, not_permitted, "done", "done", too_many]
    );
}

#[test]
fn the_exit_code_is_the_programs_and_the_jail_is_gone_afterwards() {
    let host = Host::new();
    assert_eq!(run(&host.jail(), || 42).unwrap(), Ended::Exited(42));
    assert_eq!(entries(host.path("jails").to_str().unwrap()), "");
}

#[test]
fn what_cannot_be_had_is_named_and_nothing_runs() {
    let host = Host::new();
    let error_of = |change: &dyn Fn(&mut Jail)| {
        let mut jail = host.jail();
        change(&mut jail);
        let error = run(&jail, || unreachable!("it is not confined")).expect_err("refused");
        assert!(!host.path("jails/web").exists());
        error.to_string()
    };
    let private = host.file("private", 0);
    fs::set_permissions(&private, Permissions::from_mode(0o600)).unwrap();
    let private = private.display();
    assert_eq!(
        error_of(&|jail| jail.files = vec![given(&host.path("private"), Access::Write)]),
        format!(
            "--file {private}: user 61234 of group 61235 may not read and write it: give it to that user \
             (chown 61234:61235 {private})"
        )
    );
    assert_eq!(
        error_of(&|jail| jail.files = vec![given(Path::new("/srv/none"), Access::Read)]),
        "cannot give the jail /srv/none: No such file or directory (os error 2)"
    );
    assert_eq!(
        error_of(&|jail| jail.network = Some("/run/netns/none".into())),
        "cannot open the network namespace /run/netns/none: No such file or directory (os error 2)"
    );
    let error = error_of(&|jail| {
        jail.cgroup = Some(CgroupSettings {
            parent: "cutover-test".into(),
            settings: vec!["nosuch.max=1".parse().expect("valid")],
        });
    });
    assert!(
        error.contains("'nosuch' is not available") || error.contains("none are mounted"),
        "{error}"
    );
}

#[test]
fn what_goes_on_in_the_background_has_begun_or_is_known_to_have_failed() {
    let host = Host::new();
    let begin = |jail: &Jail| {
        let (mut ended, mut end) = io::pipe().expect("two descriptors");
        in_background(move |started| {
            let is_null = |fd| fs::read_link(format!("/proc/self/fd/{fd}")).is_ok_and(|path| path.ends_with("null"));
            let result = jail.run(Some(started), || u8::from(![0, 1, 2].into_iter().all(is_null)));
            write!(end, "{result:?}").map_or(1, |()| 0)
        })?;
        Ok::<_, Error>(io::read_to_string(&mut ended).expect("a pipe can be read"))
    };
    let mut jail = host.jail();
    assert_eq!(begin(&jail).unwrap(), "Ok(Exited(0))");
    jail.network = Some("/run/netns/none".into());
    let error = begin(&jail).unwrap_err().to_string();
    assert!(
        error.starts_with("cannot open the network namespace /run/netns/none"),
        "{error}"
    );
}
