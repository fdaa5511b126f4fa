//! One rank of a [parallel job](cutover_guest::parallel):
//! `parallel-job ep|is S|W PASSES RANK REPORT-PORT ADDRESS:PORT…`, the addresses being those of all ranks in order.
//!
//! Rank 0 waits for somebody to connect to its report port, and sends a line about each pass there: what is outside of
//! the group sees the job through that connection alone.
#![forbid(unsafe_code)]

use std::error::Error;
use std::fmt::Display;
use std::io::Write;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::process::ExitCode;

use cutover_guest::parallel::mesh::Mesh;
use cutover_guest::parallel::{Kernel, ep, is};

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match run(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("parallel-job: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &[String]) -> Result<(), Box<dyn Error>> {
    let [kernel, class, passes, rank, report, addresses @ ..] = arguments else {
        return Err("usage: parallel-job ep|is S|W PASSES RANK REPORT-PORT ADDRESS:PORT…".into());
    };
    let (kernel, class) = (kernel.parse()?, class.parse()?);
    let (passes, rank): (u64, usize) = (passes.parse()?, rank.parse()?);
    let addresses = addresses
        .iter()
        .map(|address| address.parse())
        .collect::<Result<Vec<SocketAddr>, _>>()?;
    let mut report: Box<dyn Write> = match rank {
        0 => {
            let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, report.parse()?))?;
            let (connection, _) = listener.accept()?;
            connection.set_nodelay(true)?;
            Box::new(connection)
        }
        _ => Box::new(std::io::sink()),
    };
    let mut mesh = Mesh::join(rank, &addresses)?;
    for pass in 1..=passes {
        let outcome: Box<dyn Display> = match kernel {
            Kernel::Ep => Box::new(ep::run(class, &mut mesh)?),
            Kernel::Is => Box::new(is::run(class, &mut mesh)?),
        };
        report.write_all(format!("pass {pass} {outcome}\n").as_bytes())?;
    }
    Ok(())
}
