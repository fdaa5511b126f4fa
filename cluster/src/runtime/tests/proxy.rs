//! A way to somewhere that can be cut.

use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::{io, thread};

/// What is open; none when the way is cut.
type Open = Arc<Mutex<Option<Vec<UnixStream>>>>;

/// A socket that leads to another one.
pub struct Proxy {
    open: Open,
}

impl Proxy {
    /// From a new socket at `from` to that at `to`.
    pub fn start(from: &Path, to: PathBuf) -> Self {
        let listener = UnixListener::bind(from).expect("a free path");
        let open = Open::new(Mutex::new(Some(Vec::new())));
        let connections = Arc::clone(&open);
        thread::spawn(move || {
            for near in listener.incoming().map_while(Result::ok) {
                let Ok(far) = UnixStream::connect(&to) else { continue };
                let mut open = connections.lock().expect("nobody panics with it");
                let Some(streams) = open.as_mut() else { return };
                for (from, to) in [(&near, &far), (&far, &near)] {
                    let copy = (from.try_clone(), to.try_clone());
                    let (Ok(mut from), Ok(mut to)) = copy else { continue };
                    thread::spawn(move || {
                        // However it ends, both are over.
                        let _ = io::copy(&mut from, &mut to);
                        let _ = to.shutdown(Shutdown::Both);
                        let _ = from.shutdown(Shutdown::Both);
                    });
                }
                streams.extend([near, far]);
            }
        });
        Self { open }
    }

    /// From now on nothing goes through, nor comes.
    pub fn cut(&self) {
        let streams = self.open.lock().expect("nobody panics with it").take();
        for stream in streams.into_iter().flatten() {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}
