//! Hosts that talk to each other, and those that are turned away.

use std::io::{Read, Write};
use std::thread;

use super::*;

fn identity(names: &[&str], authority: Option<&Path>) -> (tempfile::TempDir, Identity) {
    let directory = tempfile::tempdir().unwrap();
    if let Some(other) = authority {
        for file in [tls::CA_FILE, tls::CA_KEY_FILE] {
            fs::copy(other.join(file), directory.path().join(file)).unwrap();
        }
    }
    let names: Vec<String> = names.iter().map(|&name| name.to_owned()).collect();
    tls::init(directory.path(), &names).unwrap();
    let identity = Identity::read(directory.path()).unwrap();
    (directory, identity)
}

fn with(identity: &Identity) -> Security {
    Security {
        insecure: false,
        identity: Some(identity.clone()),
    }
}

/// Sends a few bytes each way; the error is the source's.
fn talk(endpoint: &str, source: &Security, destination: &Security) -> Result<(), Error> {
    let listener = Listener::bind(&endpoint.parse().unwrap(), destination).unwrap();
    let to = listener.endpoint().clone();
    thread::scope(|scope| {
        let accepting = scope.spawn(|| {
            let connection = listener.accept(None, &AtomicBool::new(false));
            if let Ok(Some(mut connection)) = connection {
                let mut question = [0; 5];
                let answered = connection
                    .read_exact(&mut question)
                    .and_then(|()| connection.write_all(&question));
                answered.and_then(|()| connection.flush()).ok();
            }
        });
        let mut connection = connect(&to, source)?;
        let mut answer = [0; 5];
        connection
            .write_all(b"hello")
            .and_then(|()| connection.read_exact(&mut answer))
            .map_err(link_error("ask", "an answer"))?;
        assert_eq!(&answer, b"hello");
        accepting.join().unwrap();
        Ok(())
    })
}

#[test]
fn hosts_of_one_authority_talk_over_tls() {
    let (directory, one) = identity(&["localhost", "127.0.0.1"], None);
    let (_, other) = identity(&["host2"], Some(directory.path()));
    talk("tls://127.0.0.1:0", &with(&other), &with(&one)).unwrap();
    talk("tls://localhost:0", &with(&other), &with(&one)).unwrap();
}

#[test]
fn a_host_of_another_authority_or_name_is_not_talked_to() {
    let (directory, one) = identity(&["127.0.0.1"], None);
    let (_, stranger) = identity(&["127.0.0.1"], None);
    let (_, other_name) = identity(&["host2"], Some(directory.path()));
    for (source, destination) in [(&stranger, &one), (&one, &stranger), (&one, &other_name)] {
        talk("tls://127.0.0.1:0", &with(source), &with(destination)).expect_err("not trusted");
    }
}

#[test]
fn plain_tcp_is_used_only_where_it_is_said_to_do() {
    let insecure = Security {
        insecure: true,
        identity: None,
    };
    talk("tcp://127.0.0.1:0", &insecure, &insecure).unwrap();
    let endpoint: Endpoint = "tcp://127.0.0.1:1".parse().unwrap();
    let refused = connect(&endpoint, &Security::default()).expect_err("it is not said");
    assert!(matches!(refused, Error::Insecure(_)));
    let refused = Listener::bind(&endpoint, &Security::default()).expect_err("it is not said");
    assert!(matches!(refused, Error::Insecure(_)));
}

#[test]
fn a_unix_socket_nobody_listens_at_is_replaced_and_one_in_use_is_not() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    drop(UnixListener::bind(&path).unwrap());
    let endpoint = Endpoint::Unix(path.clone());
    talk(&endpoint.to_string(), &Security::default(), &Security::default()).unwrap();
    assert!(!path.exists(), "it goes with its listener");
    let _listener = Listener::bind(&endpoint, &Security::default()).unwrap();
    let mode = fs::metadata(&path).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600, "nobody else may hand over a VM");
    Listener::bind(&endpoint, &Security::default()).expect_err("somebody listens there");
}

#[test]
fn certificates_are_never_overwritten_and_keys_are_for_their_owner_alone() {
    let (directory, _) = identity(&["a"], None);
    let mode = |file| fs::metadata(directory.path().join(file)).unwrap().permissions().mode() & 0o777;
    assert_eq!([tls::CA_KEY_FILE, tls::HOST_KEY_FILE].map(mode), [0o600; 2]);
    let before = fs::read(directory.path().join(tls::HOST_FILE)).unwrap();
    let error = tls::init(directory.path(), &["b".to_owned()]).expect_err("there are certificates");
    assert!(error.to_string().contains(tls::HOST_FILE), "{error}");
    assert_eq!(fs::read(directory.path().join(tls::HOST_FILE)).unwrap(), before);
}

#[test]
fn what_is_wrong_with_a_file_of_an_identity_is_said_with_its_name() {
    for file in [tls::CA_FILE, tls::HOST_FILE, tls::HOST_KEY_FILE] {
        let (directory, _) = identity(&["a"], None);
        fs::write(directory.path().join(file), "nothing").unwrap();
        let error = Identity::read(directory.path()).expect_err("no PEM");
        assert!(error.to_string().contains(file), "{error}");
    }
}
