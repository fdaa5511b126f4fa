//! Reading snapshots of a bucket.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use object_store::path::Path as Key;
use object_store::{ObjectStore, ObjectStoreExt};

use super::cluster::{Cluster, Failure};
use super::object::Object;
use super::{Access, Url};
use crate::blob::Blob;
use crate::error::Error;
use crate::source::Source;
use crate::store::{SNAPSHOTS_MAX, check_name};

/// Lengths of the objects of a snapshot, by name.
type Objects = BTreeMap<String, u64>;

/// What there is at a place.
#[derive(Default)]
struct Listing {
    objects: Objects,
    /// Names of places below.
    places: BTreeSet<String>,
}

/// A place in a bucket, under which there are snapshots.
#[derive(Debug)]
pub(crate) struct RemoteDir {
    cluster: Arc<Cluster>,
    url: Url,
    path: PathBuf,
    /// What is known of snapshots; objects are never changed.
    known: Mutex<HashMap<String, Arc<Objects>>>,
}

impl RemoteDir {
    /// The place at `url`. Nothing is asked for yet.
    pub fn new(url: Url, access: &Access) -> Result<Self, Error> {
        let path = url.path();
        let cluster = Cluster::new(access, &url.bucket).map_err(Error::remote("set up access to it", &path))?;
        Ok(Self {
            cluster: Arc::new(cluster),
            url,
            path,
            known: Mutex::default(),
        })
    }

    /// The endpoints.
    pub(super) fn cluster(&self) -> &Arc<Cluster> {
        &self.cluster
    }

    /// The key of a file of the snapshot called `name`.
    pub(super) fn key_of(&self, name: &str, file: &str) -> Key {
        self.url.key.clone().join(name).join(file)
    }

    /// The object that is called as a snapshot would be, if there is any: a snapshot in a single file.
    pub fn file(&self, name: &str) -> Result<Option<Arc<dyn Blob>>, Error> {
        let path = self.path_of(name);
        let key = self.url.key.clone().join(name);
        let wanted = key.clone();
        let found = self.cluster.ask(move |store| {
            let wanted = wanted.clone();
            async move { store.head(&wanted).await }
        });
        match found {
            Ok(meta) => Ok(Some(Arc::new(Object::new(&self.cluster, key, path, meta.size)))),
            Err(Failure::NotFound) => Ok(None),
            Err(failure) => Err(Error::remote("examine it", &path)(failure)),
        }
    }

    /// What there is at the place `under`, which messages call `path`.
    fn list(&self, under: Key, path: &Path) -> Result<Listing, Error> {
        let wanted = under.clone();
        let listed = self.cluster.ask(move |store| {
            let wanted = wanted.clone();
            async move { store.list_with_delimiter(Some(&wanted)).await }
        });
        let listed = listed.map_err(Error::remote("list it", path))?;
        let mut listing = Listing::default();
        let objects = listed
            .objects
            .iter()
            .map(|object| (&object.location, Some(object.size)));
        let places = listed.common_prefixes.iter().map(|prefix| (prefix, None));
        for (key, bytes) in objects.chain(places) {
            let mut parts = key.prefix_match(&under).into_iter().flatten();
            let Some(first) = parts.next() else {
                continue;
            };
            let name = first.as_ref().to_owned();
            match (bytes, parts.next()) {
                (Some(bytes), None) => drop(listing.objects.insert(name, bytes)),
                // Some servers list all objects, also those that are further below.
                _ => drop(listing.places.insert(name)),
            }
        }
        Ok(listing)
    }

    /// The objects of the snapshot called `name`.
    fn objects(&self, name: &str) -> Result<Arc<Objects>, Error> {
        let lock = || self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = lock().get(name) {
            return Ok(known.clone());
        }
        let listing = self.list(self.url.key.clone().join(name), &self.path_of(name))?;
        let objects = Arc::new(listing.objects);
        // What is not there yet may be there later.
        if !objects.is_empty() {
            lock().insert(name.to_owned(), objects.clone());
        }
        Ok(objects)
    }
}

impl Source for RemoteDir {
    fn path(&self) -> &Path {
        &self.path
    }

    fn path_of(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    fn names(&self) -> Result<Vec<String>, Error> {
        let listing = self.list(self.url.key.clone(), &self.path)?;
        let names: Vec<String> = listing
            .places
            .into_iter()
            .filter(|name| check_name(name).is_ok())
            .collect();
        if names.len() > SNAPSHOTS_MAX {
            let reason = format!("has more than {SNAPSHOTS_MAX} snapshots");
            return Err(Error::invalid(&self.path, reason));
        }
        Ok(names)
    }

    fn open(&self, name: &str, file: &str) -> Result<Option<Arc<dyn Blob>>, Error> {
        check_name(name)?;
        let objects = self.objects(name)?;
        Ok(objects.get(file).map(|bytes| {
            let path = self.path_of(name).join(file);
            Arc::new(Object::new(&self.cluster, self.key_of(name, file), path, *bytes)) as Arc<dyn Blob>
        }))
    }
}
