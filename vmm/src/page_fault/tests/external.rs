//! Memory that another process fills. Its part is played by a thread here, which has nothing but the socket.

use std::io::{ErrorKind, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::thread;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use serde_json::Value;
use vm_memory::{Bytes, GuestAddress};

use super::super::space::Area;
use super::super::uffd::Uffd;
use super::super::*;
use super::{SLOT_1, assert_ended, confined, in_another_process, two_slots};
use crate::Error;

/// What a handler is told.
pub(crate) struct Introduction {
    connection: UnixStream,
    uffd: Uffd,
    mappings: Value,
}

fn accept(listener: &UnixListener) -> Introduction {
    let (connection, _) = listener.accept().unwrap();
    let mut text = [0; 4096];
    let mut room = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut room);
    let received = recvmsg(
        &connection,
        &mut [IoSliceMut::new(&mut text)],
        &mut ancillary,
        RecvFlags::empty(),
    );
    let received = received.unwrap();
    let descriptors: Vec<OwnedFd> = ancillary
        .drain()
        .filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(descriptors) => Some(descriptors),
            _ => None,
        })
        .flatten()
        .collect();
    let [uffd] = <[OwnedFd; 1]>::try_from(descriptors).unwrap();
    Introduction {
        connection,
        uffd: Uffd(uffd),
        mappings: serde_json::from_slice(&text[..received.bytes]).unwrap(),
    }
}

impl Introduction {
    fn number(&self, mapping: usize, field: &str) -> u64 {
        self.mappings[mapping][field].as_u64().unwrap()
    }

    /// Puts a page full of `value` at `offset` of the file of memory.
    fn put(&self, offset: u64, value: u8) {
        let mapping = usize::from(offset >= self.number(1, "offset"));
        let start = self.number(mapping, "base_host_virt_addr") + (offset - self.number(mapping, "offset"));
        self.uffd.copy(Area { start, bytes: 4096 }, &[value; 4096]).unwrap();
    }

    /// Puts each page of the only region when it is touched, from `memory`, until the monitor closes the connection.
    pub(crate) fn serve(&self, memory: &[u8]) {
        let base = self.number(0, "base_host_virt_addr");
        loop {
            let mut sources = [
                PollFd::new(&self.uffd, PollFlags::IN),
                PollFd::new(&self.connection, PollFlags::IN),
            ];
            poll(&mut sources, None).unwrap();
            if !sources[1].revents().is_empty() {
                return;
            }
            while let Some(start) = self.uffd.next_fault().unwrap() {
                let offset = usize::try_from(start - base).unwrap();
                match self
                    .uffd
                    .copy(Area { start, bytes: 4096 }, &memory[offset..offset + 4096])
                {
                    Ok(()) => {}
                    // Two who touched it.
                    Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
                    Err(error) => panic!("{error}"),
                }
            }
        }
    }
}

/// What a handler does, which listens at the returned path, as long as the directory is there.
pub(crate) fn handler(serve: impl FnOnce(Introduction) + Send + 'static) -> (tempfile::TempDir, std::path::PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("handler");
    let listener = UnixListener::bind(&path).unwrap();
    thread::spawn(move || serve(accept(&listener)));
    (dir, path)
}

#[test]
fn a_handler_is_told_where_memory_is_and_fills_it() {
    let memory = two_slots();
    let (_dir, path) = handler(|told| {
        let fields =
            |mapping| ["size", "offset", "page_size", "page_size_kib"].map(|field| told.number(mapping, field));
        assert_eq!(fields(0), [300 << 12, 0, 4096, 4096]);
        assert_eq!(fields(1), [77 << 12, 300 << 12, 4096, 4096]);
        (0..377_u64).for_each(|page| told.put(page << 12, page.to_le_bytes()[0]));
    });
    let external = ExternalMemory::start(&memory, &path, confined()).unwrap();
    // This waits until the handler has put it; that it goes away when it has put everything is fine.
    assert_eq!(
        memory.read_obj::<u8>(GuestAddress(SLOT_1 + (76 << 12))).unwrap(),
        376_u64.to_le_bytes()[0]
    );
    assert_eq!(memory.read_obj::<u8>(GuestAddress(0x5000)).unwrap(), 5);
    drop(external);
}

#[test]
fn the_process_ends_when_the_handler_goes_away_while_memory_is_missing() {
    let this_test = "external::the_process_ends_when_the_handler_goes_away_while_memory_is_missing";
    if let Some(output) = in_another_process(this_test) {
        assert_ended(&output, &["page-fault handler at", "has gone away"]);
        return;
    }
    let memory = two_slots();
    let (_dir, path) = handler(|told| {
        told.put(0, 1);
        drop(told.connection);
    });
    let _external = ExternalMemory::start(&memory, &path, confined()).unwrap();
    assert_eq!(memory.read_obj::<u8>(GuestAddress(0)).unwrap(), 1);
    let page: u8 = memory.read_obj(GuestAddress(0x1000)).unwrap();
    unreachable!("a page nobody has put is {page}");
}

#[test]
fn a_handler_that_does_not_listen_is_named() {
    let memory = two_slots();
    let nowhere = tempfile::tempdir().unwrap().path().join("handler");
    let refused = ExternalMemory::start(&memory, &nowhere, confined());
    let Err(Error::PageFaultHandler { path, .. }) = refused else {
        panic!("nobody listens");
    };
    assert_eq!(path, nowhere);
}
