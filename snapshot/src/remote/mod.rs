//! Stores that are not on this host: buckets of S3 and what speaks its protocol.
//!
//! ```text
//!  s3://BUCKET/PATH/NAME/manifest.json, state.bin, …      the files of a directory, each an object
//!
//!  caller's threads          "store-io" threads             endpoints
//!  read_at ──► task ───────► request, time limit ─────────► A   lost, slow or broken:
//!          ◄── bytes ◄──────                  └───────────► B   go on with the next, and stay with it
//! ```
//!
//! Outside, everything blocks, and a calling thread makes no system call but to wait; the threads of an asynchronous
//! runtime do the talking. What is read is verified as what comes from files is: nothing here is trusted.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fmt;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use object_store::path::Path as Key;

use crate::error::Error;
use crate::store::check_name;

mod cluster;
mod object;
mod source;
mod upload;

pub(crate) use cluster::Failure;
pub(crate) use source::RemoteDir;
pub use upload::{Uploaded, upload_chain, upload_merged};

/// What a path begins with that is a place in a bucket.
const SCHEME: &str = "s3://";
/// How long one request for reading may take until the next endpoint is asked.
const REQUEST_LIMIT: Duration = Duration::from_secs(10);
/// How often all endpoints are asked before reading has failed.
const ROUNDS: u32 = 5;

/// How stores are reached that are not on this host.
#[derive(Clone, PartialEq, Eq)]
pub struct Access {
    /// What the environment says, by the names of the variables: `AWS_ACCESS_KEY_ID`, `AWS_REGION` and so on.
    pub variables: BTreeMap<String, String>,
    /// URLs of servers that all have the same content, instead of those in `AWS_ENDPOINT_URL`, where commas are between
    /// them. Without any, Amazon's servers are asked.
    pub endpoints: Vec<String>,
    /// How long one request for reading may take until the next endpoint is asked.
    pub request_limit: Duration,
    /// How often all endpoints are asked, at growing intervals, before reading has failed; at least once.
    pub rounds: u32,
}

/// What every variable begins with that counts.
const VARIABLES: &str = "AWS_";
/// What variables begin with that name endpoints.
const ENDPOINT_VARIABLES: &str = "AWS_ENDPOINT";

/// Some variables are secret: their values do not get into logs.
impl fmt::Debug for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Access")
            .field("variables", &self.variables.keys())
            .field("endpoints", &self.endpoints)
            .field("request_limit", &self.request_limit)
            .field("rounds", &self.rounds)
            .finish()
    }
}

impl Access {
    /// As the environment says.
    pub fn from_env() -> Self {
        let variables = std::env::vars_os().filter_map(|(name, value)| {
            let name = name.into_string().ok().filter(|name| name.starts_with(VARIABLES))?;
            Some((name, value.into_string().ok()?))
        });
        Self::new(variables.collect())
    }

    /// As these variables of an environment say.
    pub fn new(variables: BTreeMap<String, String>) -> Self {
        Self {
            variables,
            endpoints: Vec::new(),
            request_limit: REQUEST_LIMIT,
            rounds: ROUNDS,
        }
    }

    /// The endpoints that are to be asked.
    fn endpoints(&self) -> Vec<String> {
        if !self.endpoints.is_empty() {
            return self.endpoints.clone();
        }
        let named = ["AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"];
        let value = named.iter().find_map(|name| self.variables.get(*name));
        let urls = value.into_iter().flat_map(|value| value.split(','));
        urls.map(|url| url.trim().to_owned())
            .filter(|url| !url.is_empty())
            .collect()
    }
}

/// Whether `path` is a place in a bucket: whether it begins with `s3://`.
pub fn is_remote(path: &Path) -> bool {
    Url::parse(path).is_some()
}

/// A place in a bucket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Url {
    bucket: String,
    key: Key,
}

impl Url {
    /// What `path` says, if it is a place in a bucket.
    pub fn parse(path: &Path) -> Option<Result<Self, Error>> {
        let rest = path.as_os_str().as_bytes().strip_prefix(SCHEME.as_bytes())?;
        let invalid = || Error::invalid(path, "is not of the form s3://BUCKET/PATH");
        let parsed = OsStr::from_bytes(rest).to_str().ok_or_else(invalid).and_then(|rest| {
            let (bucket, key) = rest.split_once('/').unwrap_or((rest, ""));
            let key = Key::parse(key).map_err(|_| invalid())?;
            if bucket.is_empty()
                || !bucket
                    .bytes()
                    .all(|byte| byte.is_ascii_alphanumeric() || b".-_".contains(&byte))
            {
                return Err(invalid());
            }
            Ok(Self {
                bucket: bucket.to_owned(),
                key,
            })
        });
        Some(parsed)
    }

    /// The place above this one, and the name of this one there.
    pub fn split(&self) -> Result<(Self, String), Error> {
        let mut parts: Vec<_> = self.key.parts().collect();
        let name = parts.pop().map(|name| name.as_ref().to_owned());
        let name = name.ok_or_else(|| Error::invalid(&self.path(), "names a bucket and no snapshot in it"))?;
        check_name(&name)?;
        let above = Self {
            bucket: self.bucket.clone(),
            key: parts.into_iter().collect(),
        };
        Ok((above, name))
    }

    /// What messages call it.
    pub fn path(&self) -> PathBuf {
        format!("{SCHEME}{}/{}", self.bucket, self.key).into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_has_a_bucket_and_perhaps_a_path() {
        let parse = |text: &str| Url::parse(Path::new(text));
        assert!(parse("snapshots/monday").is_none());
        assert!(parse("s3:/bucket/x").is_none());
        let (store, name) = parse("s3://bucket/a/b/monday")
            .expect("a URL")
            .expect("valid")
            .split()
            .expect("a name");
        assert_eq!((store.path(), &name[..]), ("s3://bucket/a/b".into(), "monday"));
        let (store, name) = parse("s3://bucket/monday")
            .expect("a URL")
            .expect("valid")
            .split()
            .expect("a name");
        assert_eq!((store.path(), &name[..]), ("s3://bucket/".into(), "monday"));
        for wrong in ["s3://", "s3:///x", "s3://a b/x", "s3://bucket/a//b", "s3://bucket/../x"] {
            let error = parse(wrong).expect("a URL").expect_err(wrong).to_string();
            assert!(error.contains("s3://BUCKET/PATH"), "{error}");
        }
        for wrong in ["s3://bucket", "s3://bucket/a/.partial-x"] {
            parse(wrong).expect("a URL").expect("valid").split().expect_err(wrong);
        }
    }

    #[test]
    fn secrets_are_not_shown() {
        let access = Access::new([("AWS_SECRET_ACCESS_KEY".to_owned(), "hush".to_owned())].into());
        let shown = format!("{access:?}");
        assert!(
            shown.contains("AWS_SECRET_ACCESS_KEY") && !shown.contains("hush"),
            "{shown}"
        );
    }

    #[test]
    fn endpoints_come_from_the_environment_unless_they_are_given() {
        let environment = |name: &str, value: &str| Access::new([(name.to_owned(), value.to_owned())].into());
        assert_eq!(environment("AWS_REGION", "x").endpoints(), [""; 0]);
        let mut access = environment("AWS_ENDPOINT_URL", "http://a:1, https://b,");
        assert_eq!(access.endpoints(), ["http://a:1", "https://b"]);
        access.endpoints = vec!["http://c".to_owned()];
        assert_eq!(access.endpoints(), ["http://c"]);
    }
}
