//! How snapshots are reached that are not on this host.

use clap::Args;
use cutover_snapshot::remote::Access;

/// Options of commands that can read from buckets.
#[derive(Debug, Default, Args)]
pub struct AccessArgs {
    /// For s3://…: a server to ask, as http:// or https://; of several with the same content, the next one when one is
    /// lost [default: those in AWS_ENDPOINT_URL]
    #[arg(long = "endpoint", value_name = "URL", value_delimiter = ',')]
    endpoints: Vec<String>,
}

impl AccessArgs {
    /// The servers that the options name.
    pub fn endpoints(&self) -> Vec<String> {
        self.endpoints.clone()
    }

    /// As the environment and the options say.
    pub fn access(&self) -> Access {
        Access {
            endpoints: self.endpoints(),
            ..Access::from_env()
        }
    }
}
