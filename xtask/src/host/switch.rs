//! The Ethernet switch between nested hosts: a relay of datagrams, one a frame, between Unix sockets.
//!
//! It needs no privilege and no interface of the machine. A host that dies leaves no trace on the wire: its peers see
//! silence, as after a power failure. Frames for a host that does not take them are dropped, as a switch does.

use std::io;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;

use anyhow::{Context, Result};

/// More than the longest frame: a virtio device may send unsegmented packets of up to 64 KiB.
const FRAME_BYTES_MAX: usize = 80 << 10;

/// The ends of the cable between a host and the switch.
pub struct Link {
    /// The socket QEMU binds.
    pub host: PathBuf,
    /// The socket the switch receives on.
    pub switch: PathBuf,
}

/// Starts a switch with `ports` ports, whose sockets are in `directory`. It ends with the process.
pub fn start(directory: &Path, ports: u8) -> Result<Vec<Link>> {
    let links: Vec<Link> = (1..=ports)
        .map(|port| Link {
            host: directory.join(format!("host{port}")),
            switch: directory.join(format!("port{port}")),
        })
        .collect();
    let hosts: Arc<Vec<PathBuf>> = Arc::new(links.iter().map(|link| link.host.clone()).collect());
    for link in &links {
        let socket =
            UnixDatagram::bind(&link.switch).with_context(|| format!("cannot bind {}", link.switch.display()))?;
        let own = link.host.clone();
        let hosts = hosts.clone();
        thread::Builder::new()
            .name("switch".to_owned())
            .spawn(move || forward(&socket, &own, &hosts))
            .context("cannot start the switch")?;
    }
    Ok(links)
}

/// Sends what arrives from the host `own` to all others.
fn forward(from: &UnixDatagram, own: &Path, hosts: &[PathBuf]) -> io::Error {
    let outgoing = match UnixDatagram::unbound().and_then(|socket| socket.set_nonblocking(true).map(|()| socket)) {
        Ok(socket) => socket,
        Err(error) => return error,
    };
    let mut frame = vec![0; FRAME_BYTES_MAX];
    loop {
        match from.recv(&mut frame) {
            Ok(length) => {
                for host in hosts.iter().filter(|host| *host != own) {
                    // A host that is not up or has no room left loses the frame; Ethernet promises no more.
                    let _ = outgoing.send_to(&frame[..length], host);
                }
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return error,
        }
    }
}
