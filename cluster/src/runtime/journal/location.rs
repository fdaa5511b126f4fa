//! Which journal: what `cutover coordinator --journal` takes.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use cutover_migration::transport::HostPort;

/// The port of etcd's clients.
const PORT: u16 = 2379;
/// What keys in etcd begin with, unless something else is said.
const PREFIX: &str = "cutover";
/// Most members of an etcd cluster.
const SERVERS_MAX: usize = 9;

/// Which journal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Location {
    /// A database in this file, for coordinators of this host.
    File(PathBuf),
    /// Keys in etcd, for coordinators of several hosts.
    Etcd(Cluster),
}

/// Which etcd.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cluster {
    /// Its members, or some of them.
    pub servers: Vec<HostPort>,
    /// What all keys begin with.
    pub prefix: String,
    /// How they are reached.
    pub link: Link,
}

/// How servers are reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Link {
    /// With nothing that protects it.
    Plain,
    /// By TLS, both sides authenticated with certificates as `cutover tls init` makes them: in this directory.
    Tls(PathBuf),
}

/// It does not say which journal.
#[derive(Debug, thiserror::Error)]
#[error("{0}: write a path, etcd://HOST[:PORT],…[/PREFIX], or etcd+tls://HOST[:PORT],…[/PREFIX]")]
pub struct NotAJournal(String);

impl FromStr for Location {
    type Err = NotAJournal;

    fn from_str(text: &str) -> Result<Self, NotAJournal> {
        let (rest, link) = match text.split_once("://") {
            Some(("etcd", rest)) => (rest, Link::Plain),
            // Which certificate is said elsewhere.
            Some(("etcd+tls", rest)) => (rest, Link::Tls(PathBuf::new())),
            None if !text.is_empty() => return Ok(Self::File(PathBuf::from(text))),
            _ => return Err(NotAJournal(format!("'{text}' is no journal"))),
        };
        let (servers, prefix) = rest.split_once('/').unwrap_or((rest, PREFIX));
        let servers = servers.split(',').map(server).collect::<Result<Vec<_>, _>>()?;
        if servers.len() > SERVERS_MAX || prefix.is_empty() {
            return Err(NotAJournal(format!(
                "'{text}' has more than {SERVERS_MAX} servers, or no prefix"
            )));
        }
        Ok(Self::Etcd(Cluster {
            servers,
            prefix: prefix.to_owned(),
            link,
        }))
    }
}

fn server(text: &str) -> Result<HostPort, NotAJournal> {
    let has_port = text
        .rsplit_once(':')
        .is_some_and(|(host, _)| !host.contains(':') || host.ends_with(']'));
    let text = if has_port {
        text.to_owned()
    } else {
        format!("{text}:{PORT}")
    };
    text.parse().map_err(|error| NotAJournal(format!("{error}")))
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => path.display().fmt(f),
            Self::Etcd(cluster) => cluster.fmt(f),
        }
    }
}

impl fmt::Display for Cluster {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let servers: Vec<_> = self.servers.iter().map(HostPort::to_string).collect();
        let scheme = match self.link {
            Link::Plain => "etcd",
            Link::Tls(_) => "etcd+tls",
        };
        write!(f, "{scheme}://{}/{}", servers.join(","), self.prefix)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_a_file_and_a_url_is_an_etcd_with_ports_and_a_prefix() {
        let shown = |text: &str| text.parse::<Location>().expect(text).to_string();
        assert_eq!(
            "j.db".parse::<Location>().unwrap(),
            Location::File(PathBuf::from("j.db"))
        );
        assert_eq!(shown("etcd://a"), "etcd://a:2379/cutover");
        assert_eq!(shown("etcd://a:1,b,[::1]:2/x/y"), "etcd://a:1,b:2379,[::1]:2/x/y");
        assert_eq!(shown("etcd+tls://a"), "etcd+tls://a:2379/cutover");
        for wrong in ["", "http://a", "etcd://", "etcd://a/", "etcd://a,,b", "etcd://a:x"] {
            assert!(wrong.parse::<Location>().is_err(), "{wrong}");
        }
    }
}
