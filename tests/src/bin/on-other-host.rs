//! Runs a program on another nested host as if it ran here: standard input, output and error, the exit code, and that it
//! is killed when this one is.
//!
//! ```text
//!  on-other-host run ADDRESS PROGRAM ARGUMENT…      on-other-host serve
//!     the command ────── a frame ─────────────────►   starts it
//!     standard input ─── frames, an empty one last ►    its standard input
//!     output, errors, the end ◄── frames ──────────     [what: 1][length: 4, little-endian][bytes]
//! ```
//! So tests that drive a monitor here can drive one there. It is for hosts that are made for tests: anyone who can connect
//! can run anything.

use std::ffi::OsString;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitCode, Stdio};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use rustix::net::sockopt;
use rustix::process::{Pid, Signal, kill_process};

/// Where a host listens.
const PORT: u16 = 7077;
/// How long a host may take to answer. One that starts again does not know of earlier attempts, which TCP repeats less
/// and less often.
const CONNECT: Duration = Duration::from_secs(3);
/// Most bytes in a frame.
const FRAME: usize = 64 << 10;

/// What a frame has: the words of the command, each with a zero byte after it,
const COMMAND: u8 = 0;
/// input,
const INPUT: u8 = 1;
/// output,
const OUTPUT: u8 = 2;
/// errors,
const ERRORS: u8 = 3;
/// or the exit code, of a signal 128 and its number.
const END: u8 = 4;

fn main() -> Result<ExitCode> {
    let arguments: Vec<OsString> = std::env::args_os().skip(1).collect();
    match &arguments[..] {
        [what] if what == "serve" => serve(),
        [what, host, command @ ..] if what == "run" && !command.is_empty() => {
            let host = host.to_str().context("an address is text")?;
            run(host.parse().context("not an address")?, command)
        }
        _ => bail!("usage: on-other-host serve | on-other-host run ADDRESS PROGRAM [ARGUMENT…]"),
    }
}

/// Serves whoever connects, each on threads of its own.
fn serve() -> Result<ExitCode> {
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, PORT)).context("cannot listen")?;
    println!("this host runs programs for the others");
    for client in listener.incoming() {
        let client = client.context("cannot accept connections")?;
        thread::spawn(move || {
            if let Err(error) = carry_out(&client) {
                eprintln!("on-other-host: {error:#}");
            }
            // The client sees by itself that there was no end.
            let _ = client.shutdown(Shutdown::Both);
        });
    }
    Ok(ExitCode::SUCCESS)
}

/// Starts what a client asks for, and tells how it went.
fn carry_out(client: &TcpStream) -> Result<()> {
    client.set_nodelay(true)?;
    let (kind, command) = receive(client)?.context("the client said nothing")?;
    ensure!(kind == COMMAND, "the client began with a frame of kind {kind}");
    let words: Vec<OsString> = command
        .strip_suffix(b"\0")
        .context("a command that does not end")?
        .split(|&byte| byte == 0)
        .map(|word| OsString::from_vec(word.to_vec()))
        .collect();
    let (program, arguments) = words.split_first().context("there is no program to run")?;
    let mut child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot run {}", program.display()))?;
    let process = Pid::from_child(&child);
    let (mut input, output, errors) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
    let answers = Mutex::new(client);
    thread::scope(|scope| {
        let streams = [
            scope.spawn(|| send_all(&answers, OUTPUT, output)),
            scope.spawn(|| send_all(&answers, ERRORS, errors)),
        ];
        scope.spawn(|| {
            while let Ok(Some((INPUT, bytes))) = receive(client) {
                // The program need not read, and an empty frame is the end.
                if bytes.is_empty() || input.as_mut().is_none_or(|input| input.write_all(&bytes).is_err()) {
                    input = None;
                }
            }
            // The client is gone, and the program is to go with it, if it has not ended by itself.
            let _ = kill_process(process, Signal::KILL);
        });
        // Whatever comes of it, the client's end of the connection wakes the thread above.
        let ended = streams
            .into_iter()
            .try_for_each(|stream| stream.join().unwrap_or(Ok(())));
        let status = child.wait()?;
        let code = status.code().unwrap_or(128 + status.signal().unwrap_or(0));
        let told = ended.and_then(|()| send(&answers, END, &code.to_le_bytes()));
        // A client that was killed is gone already, and what it was killed for needs no report.
        let _ = client.shutdown(Shutdown::Both);
        Ok(told?)
    })
}

/// Has `command` run on `host`, and does here what it does there.
fn run(host: Ipv4Addr, command: &[OsString]) -> Result<ExitCode> {
    let server = TcpStream::connect_timeout(&(host, PORT).into(), CONNECT)
        .with_context(|| format!("{host} runs no programs for others"))?;
    server.set_nodelay(true)?;
    notice_loss(&server)?;
    let words = command.iter().flat_map(|word| [word.as_bytes(), b"\0"].concat());
    let requests = Mutex::new(&server);
    send(&requests, COMMAND, &words.collect::<Vec<u8>>())?;
    let input = server.try_clone()?;
    // It ends with the process: whoever feeds it may never end.
    thread::spawn(move || {
        let input = Mutex::new(&input);
        send_all(&input, INPUT, Some(io::stdin())).and_then(|()| send(&input, INPUT, &[]))
    });
    loop {
        match receive(&server)? {
            Some((OUTPUT, bytes)) => write_now(io::stdout(), &bytes)?,
            Some((ERRORS, bytes)) => write_now(io::stderr(), &bytes)?,
            Some((END, bytes)) => {
                let code = bytes.first().copied().context("an end without an exit code")?;
                return Ok(ExitCode::from(code));
            }
            other => bail!("{host} is gone: {other:?}"),
        }
    }
}

/// Has the kernel ask the other side whether it is still there: a host without power does not say that it is gone.
fn notice_loss(server: &TcpStream) -> Result<()> {
    const EVERY: Duration = Duration::from_secs(1);
    /// More than a cable may be out for in a test.
    const TIMES: u32 = 10;
    sockopt::set_socket_keepalive(server, true)?;
    sockopt::set_tcp_keepidle(server, EVERY)?;
    sockopt::set_tcp_keepintvl(server, EVERY)?;
    Ok(sockopt::set_tcp_keepcnt(server, TIMES)?)
}

fn write_now(mut to: impl Write, bytes: &[u8]) -> io::Result<()> {
    to.write_all(bytes)?;
    to.flush()
}

/// Sends all there is to read, as it comes.
fn send_all(to: &Mutex<&TcpStream>, kind: u8, from: Option<impl Read>) -> io::Result<()> {
    let Some(mut from) = from else { return Ok(()) };
    let mut piece = vec![0; FRAME];
    loop {
        match from.read(&mut piece)? {
            0 => return Ok(()),
            length => send(to, kind, &piece[..length])?,
        }
    }
}

fn send(to: &Mutex<&TcpStream>, kind: u8, bytes: &[u8]) -> io::Result<()> {
    let length = u32::try_from(bytes.len()).map_err(io::Error::other)?;
    let frame = [&[kind][..], &length.to_le_bytes(), bytes].concat();
    let mut to: &TcpStream = *to.lock().unwrap_or_else(PoisonError::into_inner);
    to.write_all(&frame)
}

/// The next frame; none if the other side is gone.
fn receive(mut from: &TcpStream) -> Result<Option<(u8, Vec<u8>)>> {
    let mut head = [0; 5];
    if from.read_exact(&mut head).is_err() {
        return Ok(None);
    }
    let [kind, length @ ..] = head;
    let length = usize::try_from(u32::from_le_bytes(length))?;
    ensure!(length <= FRAME, "a frame of {length} bytes");
    let mut bytes = vec![0; length];
    from.read_exact(&mut bytes)?;
    Ok(Some((kind, bytes)))
}
