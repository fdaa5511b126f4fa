//! Both ends of page streams, without the VMs.

use std::io;
use std::ops::Range;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::thread;

use super::{Incoming, Outgoing};
use crate::options::{Compression, Options};
use crate::pages::{PAGE_BYTES, PageBits, WORD_PAGES};
use crate::status::Status;
use crate::transport::Connection;
use crate::vm::{Image, ImageShape, MEMORY_IMAGE};

/// An image that notes which pages are written, in which order.
struct Noted {
    pages: u64,
    written: Mutex<Vec<Range<u64>>>,
}

impl Image for Noted {
    fn pages(&self) -> u64 {
        self.pages
    }

    fn read(&self, pages: Range<u64>, into: &mut [u8]) -> io::Result<()> {
        // No page is like another, nor zero.
        for (page, content) in pages.zip(into.as_chunks_mut::<PAGE_BYTES>().0) {
            content.fill(0);
            content[..8].copy_from_slice(&(page + 1).to_le_bytes());
        }
        Ok(())
    }

    fn write(&self, pages: Range<u64>, _: &[u8]) -> io::Result<()> {
        self.written.lock().unwrap().push(pages);
        Ok(())
    }

    fn zero(&self, _: Range<u64>) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn starts_empty(&self) -> bool {
        true
    }

    fn settle(&self) -> io::Result<()> {
        Ok(())
    }
}

fn connections() -> [Connection; 2] {
    let (near, far) = UnixStream::pair().unwrap();
    [near, far].map(|end| Connection::unix(end).unwrap())
}

#[test]
fn in_the_last_round_streams_take_turns_so_that_none_waits_for_the_end_of_another() {
    // A word of pages for either stream, in batches of a quarter.
    let image = Arc::new(Noted {
        pages: 2 * WORD_PAGES,
        written: Mutex::default(),
    });
    let shapes = [ImageShape {
        name: MEMORY_IMAGE.to_owned(),
        pages: image.pages,
        bytes: image.pages * PAGE_BYTES as u64,
        data: 0,
    }];
    let options = Options {
        streams: 2,
        bandwidth: Some(2 * 10 * WORD_PAGES / 4 * PAGE_BYTES as u64),
        compression: Compression::Never,
        ..Options::default()
    };
    let images = || vec![Arc::clone(&image) as Arc<dyn Image>];
    let mut outgoing = Outgoing::new(images(), &shapes, &options, Arc::new(|| ()));
    let mut incoming = Incoming::new(images(), &shapes, Arc::new(|| ()));
    let ([mut near, mut far], [other_near, other_far]) = (connections(), connections());
    outgoing.attach(other_near);
    incoming.attach(other_far);
    thread::scope(|scope| {
        let all = [PageBits::full(image.pages)];
        let sending = scope.spawn(move || outgoing.send_round(&mut near, 1, &all, &Status::default()).map(|_| ()));
        incoming.receive_round(&mut far, 1, true).unwrap();
        sending.join().unwrap().unwrap();
    });
    let written = image.written.lock().unwrap();
    let mut streams: Vec<u64> = written.iter().map(|pages| pages.start / WORD_PAGES).collect();
    // A batch may be written piece by piece.
    streams.dedup();
    assert_eq!(streams, [0, 1, 0, 1, 0, 1, 0, 1]);
}
