//! `cutover tls init`: a certificate authority and a certificate of a host, for a first try of migrations over TLS.

// Documentation here is help text, in which brackets mean that something can be left out.
#![allow(rustdoc::broken_intra_doc_links)]

use std::io;
use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use cutover_migration::transport::tls;
use rustix::system::uname;

use crate::exit::{ExitStatus, after_printing, report};
use crate::tls_dir;

/// Arguments of `cutover tls`.
#[derive(Debug, Args)]
#[command(subcommand_required = true, arg_required_else_help = true)]
pub struct TlsArgs {
    /// What to do.
    #[command(subcommand)]
    command: TlsCommand,
}

/// What to do with certificates.
#[derive(Debug, Subcommand)]
enum TlsCommand {
    /// Make a certificate of a host, and the authority that signs it if there is none yet
    #[command(after_help = INIT_HELP)]
    Init(InitArgs),
}

/// Arguments of `cutover tls init`.
#[derive(Debug, Args)]
struct InitArgs {
    /// Directory of the files; it is made if there is none
    #[arg(value_name = "DIR")]
    dir: PathBuf,

    /// A name or address that others migrate to this host by; can be given several times [default: the host's name]
    #[arg(long = "host", value_name = "NAME")]
    hosts: Vec<String>,
}

/// Shown with `cutover tls --help`.
pub const HELP: &str = "\
Hosts that exchange VMs over TLS have certificates of one authority, and trust nobody else. Any
authority will do; this makes one.

Examples:
  cutover tls init tls --host host1.example.com --host 192.0.2.1";

/// Shown with `cutover tls init --help`.
const INIT_HELP: &str = "\
The authority is ca.pem with its key ca.key, the host's certificate host.pem with its key host.key.
Where there are ca.pem and ca.key already, only the host's are made, and signed by these. No file is
ever overwritten, and keys are readable by their owner alone.

Examples:
  For the first host:
    cutover tls init host1 --host host1.example.com --host 192.0.2.1

  For another one, by the same authority:
    mkdir -m 700 host2 && cp host1/ca.pem host1/ca.key host2
    cutover tls init host2 --host host2.example.com
    scp host2/ca.pem host2/host.pem host2/host.key host2.example.com:/etc/cutover/tls/

Exit codes:
  0  the files are there
  1  they are not: a name is none, or a file exists already or cannot be written
  2  the command line is wrong";

/// Does what `args` say.
pub fn run(args: &TlsArgs) -> ExitStatus {
    let TlsCommand::Init(args) = &args.command;
    let hosts = if args.hosts.is_empty() {
        vec![uname().nodename().to_string_lossy().into_owned()]
    } else {
        args.hosts.clone()
    };
    match tls::init(&args.dir, &hosts) {
        Ok(()) => after_printing(in_words(&args.dir, &hosts).as_bytes(), &mut io::stdout()),
        Err(error) => {
            report(&error);
            ExitStatus::Failure
        }
    }
}

/// What there is now, and what to do with it.
fn in_words(dir: &Path, hosts: &[String]) -> String {
    let (dir, hosts) = (dir.display(), hosts.join(", "));
    let (ca, ca_key, host, host_key) = (tls::CA_FILE, tls::CA_KEY_FILE, tls::HOST_FILE, tls::HOST_KEY_FILE);
    let place = tls_dir::of_user();
    let place = place.display();
    format!(
        "{dir} has a certificate for {hosts}\n\
         on that host: copy {ca}, {host} and {host_key} to {place}, or use them with --tls-dir\n\
         for another host: copy {ca} and {ca_key} to an empty directory, and make its certificate there in the same way\n\
         keep {ca_key} apart: whoever has it can make certificates that all hosts trust\n"
    )
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::cli::{Cli, Command};

    fn init(line: &str) -> ExitStatus {
        match Cli::try_parse_from(format!("cutover tls init {line}").split(' ')).map(|cli| cli.command) {
            Ok(Command::Tls(args)) => run(&args),
            other => panic!("not about TLS: {other:?}"),
        }
    }

    #[test]
    fn two_hosts_have_certificates_of_one_authority_and_nothing_is_overwritten() {
        let folder = tempfile::tempdir().expect("folder");
        let (first, second) = (folder.path().join("first"), folder.path().join("second"));
        assert_eq!(
            init(&format!("{} --host a.example --host 192.0.2.1", first.display())),
            ExitStatus::Success
        );
        std::fs::create_dir(&second).expect("a free name");
        for file in [tls::CA_FILE, tls::CA_KEY_FILE] {
            std::fs::copy(first.join(file), second.join(file)).expect("it was made");
        }
        assert_eq!(
            init(&format!("{} --host b.example", second.display())),
            ExitStatus::Success
        );
        for directory in [&first, &second] {
            tls::Identity::read(directory).expect("complete");
        }
        let key = std::fs::read(first.join(tls::HOST_KEY_FILE)).expect("it was made");
        assert_eq!(
            init(&format!("{} --host a.example", first.display())),
            ExitStatus::Failure
        );
        assert_eq!(std::fs::read(first.join(tls::HOST_KEY_FILE)).expect("still there"), key);
    }

    #[test]
    fn what_to_copy_where_is_told() {
        let text = in_words(Path::new("tls"), &["a".to_owned(), "192.0.2.1".to_owned()]);
        assert!(text.starts_with("tls has a certificate for a, 192.0.2.1\n"), "{text}");
        assert!(text.contains("copy ca.pem, host.pem and host.key to "), "{text}");
    }
}
