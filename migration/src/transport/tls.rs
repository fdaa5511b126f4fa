//! TLS 1.3 with both sides authenticated: each has a certificate of the one authority that both trust.
//!
//! ```text
//!  ca.pem  ── signs ──► host.pem, of this host's name and addresses
//!  ca.key                host.key
//!  (kept apart)          both on this host alone, with ca.pem: what an Identity is read from
//! ```
//! Whoever has a certificate of that authority may take in and hand over VMs; the source also checks that the
//! destination's certificate is of the name it connects to.

use std::fs::{self, DirBuilder, OpenOptions};
use std::io::{self, Write};
use std::net::TcpStream;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use rcgen::{BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair};
use rcgen::{Issuer, KeyUsagePurpose};
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::WebPkiClientVerifier;
use rustls::version::TLS13;
use rustls::{ClientConfig, ClientConnection, ConnectionCommon, RootCertStore, ServerConfig, ServerConnection};
use rustls::{SideData, StreamOwned};

use super::CONNECT_MAX;
use super::connection::{Connection, prepare_tcp};
use crate::error::Error;

/// Certificate of the authority.
pub const CA_FILE: &str = "ca.pem";
/// Its key: whoever has it can make certificates.
pub const CA_KEY_FILE: &str = "ca.key";
/// Certificate of this host.
pub const HOST_FILE: &str = "host.pem";
/// Its key.
pub const HOST_KEY_FILE: &str = "host.key";

/// Who this host is, and whom it trusts.
#[derive(Clone, Debug)]
pub struct Identity {
    as_client: Arc<ClientConfig>,
    as_server: Arc<ServerConfig>,
}

impl Identity {
    /// Reads [`CA_FILE`], [`HOST_FILE`] and [`HOST_KEY_FILE`] of `directory`.
    ///
    /// # Errors
    /// A file is missing or does not hold what it should, or the key is not that of the certificate.
    pub fn read(directory: &Path) -> Result<Self, Error> {
        let mut roots = RootCertStore::empty();
        for authority in certificates(&directory.join(CA_FILE))? {
            let added = roots.add(authority);
            added.map_err(|error| unusable(&directory.join(CA_FILE), error))?;
        }
        let roots = Arc::new(roots);
        let chain = certificates(&directory.join(HOST_FILE))?;
        let key_path = directory.join(HOST_KEY_FILE);
        let key = PrivateKeyDer::from_pem_slice(&read(&key_path)?).map_err(|error| unusable(&key_path, error))?;
        let provider = Arc::new(ring::default_provider());
        Self::of(&roots, chain, key, &provider).map_err(|error| unusable(directory, error))
    }

    fn of(
        roots: &Arc<RootCertStore>,
        chain: Vec<CertificateDer<'static>>,
        key: PrivateKeyDer<'static>,
        provider: &Arc<CryptoProvider>,
    ) -> Result<Self, rustls::Error> {
        let as_client = ClientConfig::builder_with_provider(Arc::clone(provider))
            .with_protocol_versions(&[&TLS13])?
            .with_root_certificates(Arc::clone(roots))
            .with_client_auth_cert(chain.clone(), key.clone_key())?;
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::clone(roots), Arc::clone(provider))
            .build()
            .map_err(|error| rustls::Error::General(error.to_string()))?;
        let as_server = ServerConfig::builder_with_provider(Arc::clone(provider))
            .with_protocol_versions(&[&TLS13])?
            .with_client_cert_verifier(verifier)
            .with_single_cert(chain, key)?;
        Ok(Self {
            as_client: Arc::new(as_client),
            as_server: Arc::new(as_server),
        })
    }

    /// Makes `stream` a connection to whoever is called `host`.
    ///
    /// # Errors
    /// The peer is somebody else, or does not trust this host.
    pub(super) fn connect(&self, stream: TcpStream, host: &str) -> io::Result<Connection> {
        let name = ServerName::try_from(host.to_owned()).map_err(io::Error::other)?;
        let client = ClientConnection::new(Arc::clone(&self.as_client), name).map_err(io::Error::other)?;
        let stream = shake_hands(client, stream)?;
        Ok(Connection::tls(Box::new(stream)))
    }

    /// Makes `stream` a connection to somebody with a certificate of the authority.
    ///
    /// # Errors
    /// The peer has none, or does not trust this host.
    pub(super) fn accept(&self, stream: TcpStream) -> io::Result<Connection> {
        let server = ServerConnection::new(Arc::clone(&self.as_server)).map_err(io::Error::other)?;
        let stream = shake_hands(server, stream)?;
        Ok(Connection::tls(Box::new(stream)))
    }
}

fn shake_hands<C, D: SideData>(mut side: C, mut stream: TcpStream) -> io::Result<StreamOwned<C, TcpStream>>
where
    C: std::ops::DerefMut<Target = ConnectionCommon<D>>,
{
    prepare_tcp(&stream)?;
    let until = Instant::now() + CONNECT_MAX;
    while side.is_handshaking() {
        match side.complete_io(&mut stream) {
            Err(error) if error.kind() != io::ErrorKind::WouldBlock => return Err(error),
            _ if Instant::now() >= until => return Err(io::ErrorKind::TimedOut.into()),
            _ => (),
        }
    }
    Ok(StreamOwned::new(side, stream))
}

/// Makes certificates in `directory` for a first try: an authority unless this has made one, and one for this host with
/// `names`, which are DNS names and addresses. Keys are readable by their owner alone, and nothing is overwritten.
///
/// For a second host, copy [`CA_FILE`] and [`CA_KEY_FILE`] to an empty directory and do the same; migrating takes the
/// other three files, so that the authority's key can then be kept apart.
///
/// # Errors
/// A name is not one, or a file cannot be written, perhaps as it exists.
pub fn init(directory: &Path, names: &[String]) -> Result<(), Error> {
    let directory_made = DirBuilder::new().recursive(true).mode(0o700).create(directory);
    directory_made.map_err(file_error("create it", directory))?;
    for file in [HOST_FILE, HOST_KEY_FILE] {
        let path = directory.join(file);
        if path.exists() {
            return Err(file_error("make it anew", &path)(io::ErrorKind::AlreadyExists.into()));
        }
    }
    let made = |error: rcgen::Error| unusable(directory, error);
    if !directory.join(CA_FILE).exists() {
        let key = KeyPair::generate().map_err(made)?;
        let authority = authority_params().self_signed(&key).map_err(made)?;
        write_new(&directory.join(CA_KEY_FILE), &key.serialize_pem(), 0o600)?;
        write_new(&directory.join(CA_FILE), &authority.pem(), 0o644)?;
    }
    let issuer = Issuer::new(authority_params(), read_key(&directory.join(CA_KEY_FILE))?);
    let key = KeyPair::generate().map_err(made)?;
    let host = host_params(names).and_then(|params| params.signed_by(&key, &issuer));
    write_new(&directory.join(HOST_KEY_FILE), &key.serialize_pem(), 0o600)?;
    write_new(&directory.join(HOST_FILE), &host.map_err(made)?.pem(), 0o644)
}

/// The authority that [`init`] makes: its name is always the same, so that its key is all that is needed to sign.
fn authority_params() -> CertificateParams {
    let mut params = CertificateParams::default();
    params
        .distinguished_name
        .push(DnType::CommonName, "Cutover migration authority");
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params
}

fn read_key(path: &Path) -> Result<KeyPair, Error> {
    let text = fs::read_to_string(path).map_err(file_error("read it", path))?;
    KeyPair::from_pem(&text).map_err(|error| unusable(path, error))
}

fn host_params(names: &[String]) -> Result<CertificateParams, rcgen::Error> {
    let mut params = CertificateParams::new(names)?;
    params
        .distinguished_name
        .push(DnType::CommonName, names.first().map_or("Cutover host", String::as_str));
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    Ok(params)
}

fn write_new(path: &Path, text: &str, mode: u32) -> Result<(), Error> {
    let file = OpenOptions::new().write(true).create_new(true).mode(mode).open(path);
    let written = file.and_then(|mut file| file.write_all(text.as_bytes()).and_then(|()| file.sync_all()));
    written.map_err(file_error("write it", path))
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, Error> {
    let all: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&read(path)?).collect();
    match all {
        Ok(all) if all.is_empty() => Err(unusable(path, "has no certificate in PEM form")),
        Ok(all) => Ok(all),
        Err(error) => Err(unusable(path, error)),
    }
}

fn read(path: &Path) -> Result<Vec<u8>, Error> {
    fs::read(path).map_err(file_error("read it", path))
}

fn file_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::File { action, path, source }
}

fn unusable(path: &Path, reason: impl ToString) -> Error {
    Error::Certificate {
        path: path.to_owned(),
        reason: reason.to_string(),
    }
}
