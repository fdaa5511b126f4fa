//! What a program finds that has confined itself without privileges.

use std::fs::{self, Permissions};
use std::io;
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::Command;
use std::thread;

use cutover_jail::{Access, Error, Limits, Sandbox, SharedFile};
use rustix::process::{Gid, Uid, geteuid};
use rustix::thread::{set_thread_groups, set_thread_res_gid, set_thread_res_uid};

const NOBODY: u32 = 65_534;

/// Does `work` in a thread that is, if root runs the tests, nobody; Landlock restricts threads, too.
fn unprivileged<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    let as_nobody = || {
        if geteuid().is_root() {
            let (uid, gid) = (Uid::from_raw(NOBODY), Gid::from_raw(NOBODY));
            set_thread_groups(&[]).expect("root may");
            set_thread_res_gid(gid, gid, gid).expect("root may");
            set_thread_res_uid(uid, uid, uid).expect("root may");
        }
        work()
    };
    thread::scope(|scope| scope.spawn(as_nobody).join()).expect("no panic")
}

fn refusal<T>(result: io::Result<T>) -> String {
    result.map_or_else(|error| error.to_string(), |_| "done".to_owned())
}

fn given(path: &Path, access: Access) -> SharedFile {
    SharedFile {
        path: path.to_owned(),
        at: path.to_owned(),
        access,
    }
}

#[test]
fn only_the_files_given_can_be_opened_and_nothing_executed() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let (kernel, disk, other, work) = (path("kernel"), path("disk"), path("other"), path("work"));
    fs::create_dir(&work).unwrap();
    for file in [&kernel, &disk, &other] {
        fs::write(file, "contents").unwrap();
    }
    for path in [folder.path(), &kernel, &disk, &other, &work] {
        fs::set_permissions(path, Permissions::from_mode(0o755)).unwrap();
        if geteuid().is_root() {
            chown(path, Some(NOBODY), Some(NOBODY)).unwrap();
        }
    }
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let sandbox = Sandbox {
        files: vec![
            given(&kernel, Access::Read),
            given(&disk, Access::Write),
            given(&work, Access::Write),
            given(Path::new("/bin/true"), Access::Read),
        ],
        tcp: false,
        limits: Limits::default(),
    };
    let mut found = Vec::new();
    let mut told = Vec::new();
    let code = unprivileged(|| {
        sandbox.run(None, |unrestricted| {
            told = unrestricted.to_vec();
            found = vec![
                refusal(fs::read(&kernel)),
                refusal(fs::write(&kernel, "changed")),
                refusal(fs::write(&disk, "changed")),
                refusal(fs::write(work.join("log"), "new")),
                refusal(fs::remove_file(work.join("log"))),
                refusal(UnixListener::bind(work.join("api.sock"))),
                refusal(fs::read(&other)),
                refusal(fs::remove_file(&other)),
                refusal(fs::read("/etc/passwd")),
                refusal(fs::write(path("new"), "")),
                refusal(Command::new("/bin/true").status()),
                refusal(TcpStream::connect(address)),
            ];
            let status = fs::read_to_string("/proc/thread-self/status").expect("readable");
            let fields = status
                .lines()
                .filter(|line| line.starts_with("NoNewPrivs") || line.starts_with("CapEff"));
            found.extend(fields.map(|line| line.replace('\t', " ")));
            7
        })
    });
    if matches!(code, Err(Error::NoLandlock(_))) {
        assert!(found.is_empty(), "it ran without being confined");
        return;
    }
    assert_eq!(code.unwrap(), 7);
    let denied = "Permission denied (os error 13)";
    let tcp = match told.iter().any(|what| what.starts_with("TCP")) {
        true => "done",
        false => denied,
    };
    assert_eq!(
        found,
        [
            "done",
            denied,
            "done",
            "done",
            "done",
            "done",
            denied,
            denied,
            denied,
            denied,
            denied,
            tcp,
            "CapEff: 0000000000000000",
            "NoNewPrivs: 1",
        ]
    );
    assert_eq!(fs::read_to_string(&disk).unwrap(), "changed");
}

#[test]
fn a_file_that_is_not_there_is_named_and_nothing_runs() {
    let sandbox = Sandbox {
        files: vec![given(Path::new("/srv/none"), Access::Write)],
        tcp: false,
        limits: Limits::default(),
    };
    let error = unprivileged(|| sandbox.run(None, |_| unreachable!("it is not confined"))).unwrap_err();
    assert!(matches!(error, Error::File { .. }));
    assert_eq!(error.to_string(), "cannot allow /srv/none");
}
