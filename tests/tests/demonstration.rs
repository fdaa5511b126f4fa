//! What `cargo xtask demo group` shows: a group of guests that goes on when one of its two hosts loses its power.
#![expect(clippy::unwrap_used, reason = "in a test, what cannot be unwrapped is a failure")]

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::time::Instant;

use cutover_guest::stream;
use cutover_tests::{Group, Guest, ParallelJob, Vm};

/// Passes of the parallel job: before, and after the loss.
const PASSES: u32 = 6;
/// Bytes of the file that the web server has.
const FILE: u64 = 24 << 20;

/// A download that somebody outside of the group has begun.
struct Download {
    connection: TcpStream,
    /// What the server says its checksum is.
    sha256: String,
    received: Vec<u8>,
}

impl Download {
    /// Has `vm`, which is at `address`, serve a file, and begins to read it.
    fn begin(vm: &Vm, address: Ipv4Addr) -> Self {
        vm.check(&format!(
            "mkdir /tmp/www && head -c {FILE} /dev/urandom > /tmp/www/file"
        ));
        let sha256 = vm.check("sha256sum /tmp/www/file | cut -d ' ' -f 1").trim().to_owned();
        vm.check("busybox httpd -h /tmp/www");
        let mut connection = TcpStream::connect((address, 80)).unwrap();
        connection.write_all(b"GET /file HTTP/1.0\r\n\r\n").unwrap();
        let mut download = Self {
            connection,
            sha256,
            received: Vec::new(),
        };
        download.read(FILE / 8);
        download
    }

    fn read(&mut self, bytes: u64) {
        (&self.connection).take(bytes).read_to_end(&mut self.received).unwrap();
    }

    /// Reads the rest, which has to be what the server had.
    fn finish(mut self) -> String {
        self.read(u64::MAX);
        let end_of_header = self.received.windows(4).position(|bytes| bytes == b"\r\n\r\n").unwrap();
        let summary = stream::receive(&mut &self.received[end_of_header + 4..]).unwrap();
        assert_eq!((summary.bytes, &summary.sha256), (FILE, &self.sha256));
        summary.sha256
    }
}

#[test]
fn a_group_goes_on_between_hosts_when_one_loses_its_power() {
    let started = Instant::now();
    let say = |what: &str| println!("[{:6.1} s] {what}", started.elapsed().as_secs_f64());

    say("booting four guests on two hosts: member0 and member1 here, member2 and member3 there");
    let mut group = Group::boot_between_hosts(&[0, 0, 1, 1], Guest::micro);
    say("they begin to sort integers together (IS-compatible, class S), and member3 to serve a file");
    let members = group.members();
    let download = Download::begin(members[3].0, members[3].1);
    let mut job = ParallelJob::begin(&members, "is", "S", 2 * PASSES);
    job.check_next();

    say("cutover group create: each guest gets a standby on the other host");
    group.protect();
    say(&format!("protected: {}", group.summary()));
    (1..PASSES).for_each(|_| job.check_next());
    say("half of the job is done, every result as published; an eighth of the file is read");

    say("cutting the power of the host of member2 and member3");
    group.lose(&[2, 3], 0, |group| group.sites[1].cut_power());
    say(&format!(
        "all four run here, from the last permanent cut: {}",
        group.summary()
    ));
    job.check_rest();
    say("the job is finished: every result as published, none lost, none twice");
    let sha256 = download.finish();
    say(&format!(
        "the file is read over the same connection, SHA-256 as the server says: {sha256}"
    ));
}
