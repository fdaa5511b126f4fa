//! One end of a checked TCP transfer: `tcp-stream send ADDRESS:PORT SEED BYTES` or `tcp-stream receive PORT`.
//!
//! Prints the number of bytes and their SHA-256 when the transfer is over. `receive` takes one connection and prints
//! `listening` on standard error once it can be reached.
#![forbid(unsafe_code)]

use std::error::Error;
use std::io;
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::process::ExitCode;

use cutover_guest::stream::{self, Summary};

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match run(&arguments) {
        Ok(summary) => {
            println!("{summary}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("tcp-stream: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &[String]) -> Result<Summary, Box<dyn Error>> {
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments[..] {
        ["send", address, seed, bytes] => {
            let mut connection = TcpStream::connect(address)?;
            Ok(stream::send(&mut connection, seed.parse()?, bytes.parse()?)?)
        }
        ["receive", port] => Ok(receive(port.parse()?)?),
        _ => Err("usage: tcp-stream send ADDRESS:PORT SEED BYTES | tcp-stream receive PORT".into()),
    }
}

fn receive(port: u16) -> io::Result<Summary> {
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, port))?;
    eprintln!("listening");
    let (mut connection, _) = listener.accept()?;
    stream::receive(&mut connection)
}
