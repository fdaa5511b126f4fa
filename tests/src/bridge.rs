//! [`Bridge`]: a Unix socket for clients that only speak TCP.

use std::io;
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread;

/// Forwards every connection to a port of the loopback interface to a Unix socket, for as long as the test runs.
#[derive(Debug)]
pub struct Bridge {
    address: SocketAddr,
}

impl Bridge {
    /// A bridge to `socket`.
    #[track_caller]
    pub fn to(socket: &Path) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("the loopback interface has a free port");
        let address = listener.local_addr().expect("a bound socket has an address");
        let socket = socket.to_owned();
        thread::spawn(move || {
            listener
                .incoming()
                .flatten()
                .for_each(|client| forward(client, socket.clone()))
        });
        Self { address }
    }

    /// Where clients connect.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

/// Carries one connection, on threads of its own.
fn forward(client: TcpStream, socket: PathBuf) {
    thread::spawn(move || {
        // Either end may be gone at any time, which the other end then is told.
        let _ = UnixStream::connect(socket).and_then(|server| {
            let (mut from_client, mut to_server) = (client.try_clone()?, server.try_clone()?);
            let requests = thread::spawn(move || {
                let _ = io::copy(&mut from_client, &mut to_server);
                to_server.shutdown(Shutdown::Write)
            });
            let copied = io::copy(&mut &server, &mut &client);
            client.shutdown(Shutdown::Both)?;
            // It ends with the connection.
            let _ = requests.join();
            copied
        });
    });
}
