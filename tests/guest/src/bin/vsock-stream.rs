//! The guest's end of checked transfers over its socket device.
//!
//! ```text
//!  vsock-stream send PORT SEED BYTES   connects to the host's PORT, and sends
//!  vsock-stream receive PORT           connects to it, and receives
//!  vsock-stream serve PORT             listens; takes each client's stream to its end, and answers with what it was
//! ```
//! The first two print the number of bytes and their SHA-256 when the transfer is over.
#![forbid(unsafe_code)]

use std::error::Error;
use std::io::Write;
use std::process::ExitCode;

use cutover_guest::stream;
use vsock::{VMADDR_CID_ANY, VMADDR_CID_HOST, VsockListener, VsockStream};

const USAGE: &str = "usage: vsock-stream send PORT SEED BYTES | vsock-stream receive PORT | vsock-stream serve PORT";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match run(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("vsock-stream: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &[String]) -> Result<(), Box<dyn Error>> {
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments[..] {
        ["send", port, seed, bytes] => {
            let mut connection = connect(port)?;
            println!("{}", stream::send(&mut connection, seed.parse()?, bytes.parse()?)?);
        }
        ["receive", port] => println!("{}", stream::receive(&mut connect(port)?)?),
        ["serve", port] => serve(port.parse()?)?,
        _ => return Err(USAGE.into()),
    }
    Ok(())
}

fn connect(port: &str) -> Result<VsockStream, Box<dyn Error>> {
    Ok(VsockStream::connect_with_cid_port(VMADDR_CID_HOST, port.parse()?)?)
}

fn serve(port: u32) -> Result<(), Box<dyn Error>> {
    let listener = VsockListener::bind_with_cid_port(VMADDR_CID_ANY, port)?;
    println!("listening");
    loop {
        let (mut client, _) = listener.accept()?;
        let answer = match stream::receive(&mut client) {
            Ok(summary) => writeln!(client, "{summary}"),
            Err(error) => Err(error),
        };
        if let Err(error) = answer {
            eprintln!("vsock-stream: {error}");
        }
    }
}
