//! Where a destination listens, written as an address.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

/// Where a destination listens.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Endpoint {
    /// `tcp://host:port`: neither encrypted nor authenticated.
    Tcp(HostPort),
    /// `tls://host:port`: TLS 1.3, both sides authenticated.
    Tls(HostPort),
    /// `unix:PATH`: a socket on this host.
    Unix(PathBuf),
}

impl Endpoint {
    /// Whether only a process of this host can be there.
    pub fn is_on_this_host(&self) -> bool {
        matches!(self, Self::Unix(_))
    }
}

/// A host and a port.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct HostPort {
    /// Name or address; of IPv6 without its brackets.
    pub host: String,
    /// Port, 0 for any that is free (only to listen at).
    pub port: u16,
}

/// Not an endpoint.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' is not an endpoint: write tls://host:port, tcp://host:port or unix:PATH")]
pub struct NotAnEndpoint(String);

impl FromStr for Endpoint {
    type Err = NotAnEndpoint;

    fn from_str(text: &str) -> Result<Self, NotAnEndpoint> {
        let endpoint = if let Some(path) = text.strip_prefix("unix:") {
            // `unix:///path` is a URL with an empty host.
            let path = path.strip_prefix("//").unwrap_or(path);
            (!path.is_empty()).then(|| Self::Unix(path.into()))
        } else if let Some(rest) = text.strip_prefix("tcp://") {
            rest.parse().ok().map(Self::Tcp)
        } else if let Some(rest) = text.strip_prefix("tls://") {
            rest.parse().ok().map(Self::Tls)
        } else {
            None
        };
        endpoint.ok_or_else(|| NotAnEndpoint(text.to_owned()))
    }
}

impl FromStr for HostPort {
    type Err = NotAnEndpoint;

    fn from_str(text: &str) -> Result<Self, NotAnEndpoint> {
        let error = || NotAnEndpoint(text.to_owned());
        let (host, port) = text.rsplit_once(':').ok_or_else(error)?;
        let bracketed = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
        // A colon in a host without brackets is the middle of an IPv6 address, not the end of a name.
        let host = match bracketed {
            Some(address) => address,
            None if host.contains(':') => return Err(error()),
            None => host,
        };
        if host.is_empty() || host.contains(['/', '[', ']', ' ']) {
            return Err(error());
        }
        Ok(Self {
            host: host.to_owned(),
            port: port.parse().map_err(|_| error())?,
        })
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(at) => write!(f, "tcp://{at}"),
            Self::Tls(at) => write!(f, "tls://{at}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

impl fmt::Display for HostPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { host, port } = self;
        if host.contains(':') {
            write!(f, "[{host}]:{port}")
        } else {
            write!(f, "{host}:{port}")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints_are_read_and_printed_alike() {
        for text in [
            "tls://host2:7000",
            "tcp://127.0.0.1:0",
            "tls://[fe80::1]:7000",
            "unix:/run/a b.sock",
            "unix:here.sock",
        ] {
            assert_eq!(text.parse::<Endpoint>().expect(text).to_string(), text);
        }
        let url = "unix:///run/vm.sock".parse::<Endpoint>();
        assert_eq!(url, Ok(Endpoint::Unix("/run/vm.sock".into())));
    }

    #[test]
    fn what_is_no_endpoint_is_refused_with_what_would_be_one() {
        for text in [
            "",
            "host:7000",
            "tls:host:7000",
            "tls://host",
            "tls://:7000",
            "tls://host:70000",
            "tls://host:7000/",
            "tls://fe80::1:7000",
            "tls://[fe80::1:7000",
            "http://host:1",
            "unix:",
            "unix://",
        ] {
            assert_eq!(text.parse::<Endpoint>(), Err(NotAnEndpoint(text.to_owned())), "{text}");
        }
    }
}
