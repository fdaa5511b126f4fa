//! [`ParallelJob`]: a [parallel job](cutover_guest::parallel) of several guests, as somebody outside of them sees it.

use std::io::{BufRead, BufReader};
use std::net::{Ipv4Addr, SocketAddrV4, TcpStream};

use crate::Vm;
use crate::environment::poll_until;

/// Where ranks talk to each other.
const MESH_PORT: u16 = 6000;
/// Where the first of them reports.
const REPORT_PORT: u16 = 6001;

/// A job that is under way, and the connection on which its results come.
pub struct ParallelJob {
    results: BufReader<TcpStream>,
    passes: u32,
    /// Passes whose results have come.
    done: u32,
    first: Option<String>,
}

impl ParallelJob {
    /// Has `members`, guests and their addresses, compute `kernel` ("ep", "is") of `class` ("S", "W") so many times over.
    #[track_caller]
    pub fn begin(members: &[(&Vm, Ipv4Addr)], kernel: &str, class: &str, passes: u32) -> Self {
        let addresses: Vec<String> = members
            .iter()
            .map(|(_, address)| format!("{address}:{MESH_PORT}"))
            .collect();
        for (rank, (vm, _)) in members.iter().enumerate() {
            vm.check(&format!(
                "parallel-job {kernel} {class} {passes} {rank} {REPORT_PORT} {} </dev/null >/run/job.log 2>&1 &",
                addresses.join(" ")
            ));
        }
        let report = SocketAddrV4::new(members[0].1, REPORT_PORT);
        let connection = poll_until("the job reports", || TcpStream::connect(report).ok());
        Self {
            results: BufReader::new(connection),
            passes,
            done: 0,
            first: None,
        }
    }

    /// Waits for the result of the next pass, which has to be the published one and that of all passes before.
    #[track_caller]
    pub fn check_next(&mut self) {
        let mut line = String::new();
        self.results.read_line(&mut line).expect("the connection stays open");
        self.done += 1;
        let outcome = line.strip_prefix(&format!("pass {} ", self.done));
        let outcome = outcome.unwrap_or_else(|| panic!("after {} passes came: {line:?}", self.done - 1));
        assert!(outcome.contains(" verified "), "{line}");
        assert_eq!(outcome, self.first.get_or_insert_with(|| outcome.to_owned()));
    }

    /// Waits for all that are left, and for the end, after which nothing comes.
    #[track_caller]
    pub fn check_rest(mut self) {
        while self.done < self.passes {
            self.check_next();
        }
        let mut line = String::new();
        let rest = self
            .results
            .read_line(&mut line)
            .expect("the connection ends as it should");
        assert_eq!((rest, line.as_str()), (0, ""), "after the last pass");
    }
}
