//! Links between two ends in one process, over every transport.

use std::sync::mpsc::{Receiver, channel};

use cutover_migration::transport::tls::{self, Identity};
use tempfile::TempDir;

use super::*;
use crate::runtime::contact::{Contact, Keeper};

/// Longer than anything takes, however slow the machine.
const PATIENCE: Duration = Duration::from_secs(60);

type ServerLink = ControlLink<String>;

/// An acceptor at `at`, with the links that come to it and what these bring.
fn accept(at: &Endpoint, security: &Security) -> (Endpoint, Reception, Receiver<(u32, ServerLink)>, Receiver<String>) {
    let listener = Listener::bind(at, security).expect("a free place");
    let endpoint = listener.endpoint().clone();
    let (links, opened) = channel();
    let (texts, heard) = channel();
    let check = |hello: &u32| match hello {
        13 => Err("nobody is called 13".to_owned()),
        _ => Ok(()),
    };
    let reception = Reception::open(listener, check, move |called: Called<u32>| {
        let hello = called.hello;
        let (link, ears) = called.answer::<String, String>().expect("threads");
        let texts = texts.clone();
        ears.listen(move |incoming| {
            let text = match incoming {
                Incoming::Says(text) => text,
                Incoming::Over(error) => format!("over: {error}"),
            };
            // Nobody is left to hear it when a test has ended.
            let _ = texts.send(text);
        })
        .expect("threads");
        let _ = links.send((hello, link));
    });
    (endpoint, reception.expect("threads"), opened, heard)
}

fn local(folder: &TempDir) -> Endpoint {
    Endpoint::Unix(folder.path().join("link"))
}

fn both_ways(at: &Endpoint, security: &Security) {
    let (endpoint, _reception, opened, heard) = accept(at, security);
    let (link, ears) = open::<u32, String, String>(&endpoint, security, 7).expect("somebody listens");
    let (texts, answers) = channel();
    ears.listen(move |incoming| {
        if let Incoming::Says(text) = incoming {
            let _ = texts.send(text);
        }
    })
    .expect("threads");
    let (hello, other) = opened.recv_timeout(PATIENCE).expect("it was opened");
    assert_eq!(hello, 7);
    for number in 0..100 {
        link.send(format!("there {number}"));
        other.send(format!("back {number}"));
    }
    for number in 0..100 {
        assert_eq!(heard.recv_timeout(PATIENCE), Ok(format!("there {number}")));
        assert_eq!(answers.recv_timeout(PATIENCE), Ok(format!("back {number}")));
    }
    drop(link);
    let over = heard.recv_timeout(PATIENCE).expect("the other end hears of it");
    assert!(over.starts_with("over: "), "{over}");
    assert!(other.is_over());
}

#[test]
fn messages_go_both_ways_in_order_until_one_end_is_dropped() {
    let folder = tempfile::tempdir().unwrap();
    both_ways(&local(&folder), &Security::default());
    let insecure = Security {
        insecure: true,
        identity: None,
    };
    both_ways(&"tcp://127.0.0.1:0".parse().unwrap(), &insecure);
    tls::init(folder.path(), &["127.0.0.1".to_owned()]).unwrap();
    let secure = Security {
        insecure: false,
        identity: Some(Identity::read(folder.path()).unwrap()),
    };
    both_ways(&"tls://127.0.0.1:0".parse().unwrap(), &secure);
}

#[test]
fn whoever_is_not_wanted_is_told_why() {
    let folder = tempfile::tempdir().unwrap();
    let (endpoint, _reception, _opened, _heard) = accept(&local(&folder), &Security::default());
    let error = open::<u32, String, String>(&endpoint, &Security::default(), 13).expect_err("13 is refused");
    assert!(error.to_string().contains("nobody is called 13"), "{error}");
}

#[test]
fn strangers_who_say_nothing_do_not_keep_others_out() {
    let folder = tempfile::tempdir().unwrap();
    let (endpoint, _reception, opened, _heard) = accept(&local(&folder), &Security::default());
    let silent: Vec<_> = (1..GREETERS)
        .map(|_| transport::connect(&endpoint, &Security::default()).unwrap())
        .collect();
    let (_link, _ears) = open::<u32, String, String>(&endpoint, &Security::default(), 1).expect("one greeter is left");
    assert_eq!(opened.recv_timeout(PATIENCE).expect("it was opened").0, 1);
    drop(silent);
}

#[test]
fn a_link_that_is_kept_opens_again_when_the_other_end_comes_back() {
    let folder = tempfile::tempdir().unwrap();
    let at = local(&folder);
    let (told, contacts) = channel();
    let tell = move |contact: Contact<String, String>| {
        let _ = told.send(contact);
    };
    let keeper = Keeper::start(at.clone(), Security::default(), || Some(5u32), tell).unwrap();
    let next = || contacts.recv_timeout(PATIENCE).expect("the keeper is there");
    assert!(matches!(next(), Contact::Down(_)), "nobody listens yet");
    for _ in 0..2 {
        let (_, reception, opened, heard) = accept(&at, &Security::default());
        let Contact::Up(link) = next() else {
            panic!("it opens");
        };
        let (_, other) = opened.recv_timeout(PATIENCE).unwrap();
        other.send("hello".to_owned());
        link.send("hello there".to_owned());
        assert!(matches!(next(), Contact::Says(text) if text == "hello"));
        assert_eq!(heard.recv_timeout(PATIENCE), Ok("hello there".to_owned()));
        drop((reception, other));
        assert!(matches!(next(), Contact::Down(_)), "the other end is gone");
    }
    drop(keeper);
}
