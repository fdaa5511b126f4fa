//! The guest's end of a checked TCP transfer: `tcp-stream send ADDRESS:PORT SEED BYTES` or
//! `tcp-stream receive ADDRESS:PORT`.
//!
//! Connects, so that the harness, which listens before it asks for the transfer, need not wait for anything. Prints
//! the number of bytes and their SHA-256 when the transfer is over.
#![forbid(unsafe_code)]

use std::error::Error;
use std::net::TcpStream;
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
        ["receive", address] => Ok(stream::receive(&mut TcpStream::connect(address)?)?),
        _ => Err("usage: tcp-stream send ADDRESS:PORT SEED BYTES | tcp-stream receive ADDRESS:PORT".into()),
    }
}
