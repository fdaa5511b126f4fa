//! Clients that use a guest's servers from outside while it moves: no answer is missing, wrong, or there twice.

use std::io::{self, BufRead, BufReader, Error, Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

/// Has the guest's servers serve others than itself.
pub const OPEN: &str = r#"
set -e
sed -i 's/^bind .*/bind 0.0.0.0/; s/^protected-mode yes/protected-mode no/' /etc/redis/redis.conf
head -c 64k /dev/urandom >/var/www/html/visited
"#;

/// Clients of the web server.
const READERS: usize = 2;
/// Pages that are read over one connection before there is another.
const PAGES: usize = 20;
/// Commands that are on their way to the database at once.
const PIPELINE: u64 = 16;
/// How long an answer may take: it counts as failed then.
const ANSWER_MAX: Duration = Duration::from_secs(60);

/// Some that read pages, and one that counts in the database.
pub struct Visitors {
    enough: Arc<AtomicBool>,
    threads: Vec<JoinHandle<io::Result<u64>>>,
}

impl Visitors {
    /// Begins to use the servers of `guest`, which has run [`OPEN`].
    pub fn begin(guest: Ipv4Addr) -> Self {
        let enough = Arc::<AtomicBool>::default();
        let visit = |what: fn(Ipv4Addr, &AtomicBool) -> io::Result<u64>| {
            let enough = Arc::clone(&enough);
            thread::spawn(move || what(guest, &enough))
        };
        let mut threads = vec![visit(count)];
        threads.extend([(); READERS].map(|()| visit(read_pages)));
        Self { enough, threads }
    }

    /// Ends, and checks that each of them was served to the last.
    #[track_caller]
    pub fn check_served(self) {
        self.enough.store(true, Ordering::Relaxed);
        for thread in self.threads {
            let answers = thread.join().unwrap();
            assert!(matches!(answers, Ok(1..)), "{answers:?}");
        }
    }
}

fn connect(guest: Ipv4Addr, port: u16) -> io::Result<BufReader<TcpStream>> {
    let connection = TcpStream::connect((guest, port))?;
    connection.set_nodelay(true)?;
    connection.set_read_timeout(Some(ANSWER_MAX))?;
    Ok(BufReader::new(connection))
}

/// Reads a page again and again, which is always what it was the first time.
fn read_pages(guest: Ipv4Addr, enough: &AtomicBool) -> io::Result<u64> {
    let mut first = None;
    let mut answers = 0;
    while !enough.load(Ordering::Relaxed) {
        let mut connection = connect(guest, 80)?;
        for _ in 0..PAGES {
            let page = read_page(&mut connection)?;
            if *first.get_or_insert_with(|| page.clone()) != page {
                return Err(Error::other(format!("answer {answers} is another page")));
            }
            answers += 1;
        }
    }
    Ok(answers)
}

fn read_page(connection: &mut BufReader<TcpStream>) -> io::Result<Vec<u8>> {
    connection
        .get_ref()
        .write_all(b"GET /visited HTTP/1.1\r\nHost: guest\r\n\r\n")?;
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        if connection.read_until(b'\n', &mut head)? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
    let head = String::from_utf8_lossy(&head);
    let length = head.lines().find_map(|line| line.strip_prefix("Content-Length: "));
    let length = length.and_then(|length| length.parse().ok());
    match length.filter(|_| head.starts_with("HTTP/1.1 200 ")) {
        Some(length) => {
            let mut page = vec![0; length];
            connection.read_exact(&mut page)?;
            Ok(page)
        }
        None => Err(Error::other(format!("no page: {head}"))),
    }
}

/// Counts over one connection, many steps at once: each number comes once.
fn count(guest: Ipv4Addr, enough: &AtomicBool) -> io::Result<u64> {
    let mut connection = connect(guest, 6379)?;
    let mut counted = 0;
    while !enough.load(Ordering::Relaxed) {
        let commands = b"INCR visits\r\n".repeat(usize::try_from(PIPELINE).expect("a few"));
        connection.get_ref().write_all(&commands)?;
        for _ in 0..PIPELINE {
            counted += 1;
            let mut answer = String::new();
            connection.read_line(&mut answer)?;
            if answer != format!(":{counted}\r\n") {
                return Err(Error::other(format!("{answer:?} where {counted} was next")));
            }
        }
    }
    Ok(counted)
}
