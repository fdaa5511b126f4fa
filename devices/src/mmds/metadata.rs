//! What the host has put there for the guest: one JSON document of bounded size.

use std::sync::{Mutex, MutexGuard, PoisonError};

use cutover_snapshot::error::SectionError;
use cutover_snapshot::section::{Payload, Section};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// Most bytes of the document, written without blanks, unless told otherwise: as in Firecracker.
pub const SIZE_LIMIT: usize = 51200;

/// The document of a VM, if it has one: shared by those who change it and the interfaces at which it is read.
#[derive(Debug)]
pub struct Metadata {
    limit: usize,
    document: Mutex<Option<Value>>,
}

/// Why a document is not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MetadataError {
    /// It would be larger than allowed.
    #[error("the metadata would take {size} bytes, of {limit} that they may have")]
    TooLarge {
        /// Bytes it takes.
        size: usize,
        /// Most that it may.
        limit: usize,
    },
    /// Only what is there can be patched.
    #[error("there are no metadata to be patched: PUT some first")]
    Nothing,
}

/// A document as it goes with its VM. Not to be trusted when it is read back.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MetadataState {
    /// As JSON.
    document: String,
}

impl Section for MetadataState {
    const VERSION: u16 = 1;

    fn read(payload: &Payload<'_>) -> Result<Self, SectionError> {
        match payload.version {
            1 => payload.decode(),
            _ => Err(payload.unknown_version::<Self>()),
        }
    }
}

impl Default for Metadata {
    fn default() -> Self {
        Self::with_limit(SIZE_LIMIT)
    }
}

impl Metadata {
    /// Room for a document of at most `limit` bytes.
    pub fn with_limit(limit: usize) -> Self {
        Self {
            limit,
            document: Mutex::new(None),
        }
    }

    /// Has `document` take the place of what is there.
    ///
    /// # Errors
    /// It is too large; what is there stays.
    pub fn put(&self, document: Value) -> Result<(), MetadataError> {
        self.check(&document)?;
        *self.document() = Some(document);
        Ok(())
    }

    /// Changes what is there by a JSON merge patch (RFC 7396).
    ///
    /// # Errors
    /// There is nothing, or it would be too large; what is there stays.
    pub fn patch(&self, patch: Value) -> Result<(), MetadataError> {
        let mut document = self.document();
        let mut patched = document.clone().ok_or(MetadataError::Nothing)?;
        merge(&mut patched, patch);
        self.check(&patched)?;
        *document = Some(patched);
        Ok(())
    }

    /// The document; `null` if there is none.
    pub fn get(&self) -> Value {
        self.document().clone().unwrap_or_default()
    }

    /// What `read` makes of the part at `pointer` (RFC 6901), if there is one.
    pub(super) fn look_up<T>(&self, pointer: &str, read: impl FnOnce(&Value) -> T) -> Option<T> {
        self.document().as_ref()?.pointer(pointer).map(read)
    }

    /// The document for a VM that goes on elsewhere; none if there is none.
    pub fn save(&self) -> Option<MetadataState> {
        let document = self.document();
        document.as_ref().map(|document| MetadataState {
            document: document.to_string(),
        })
    }

    /// Takes over the document that came with a VM, unless somebody has put one here: that is the newer.
    ///
    /// # Errors
    /// It is no JSON.
    pub fn adopt(&self, saved: &MetadataState) -> Result<(), serde_json::Error> {
        let arrived = serde_json::from_str(&saved.document)?;
        // A limit is for what is put here: that of another monitor may have been higher.
        self.document().get_or_insert(arrived);
        Ok(())
    }

    fn check(&self, document: &Value) -> Result<(), MetadataError> {
        let (size, limit) = (document.to_string().len(), self.limit);
        if size > limit {
            return Err(MetadataError::TooLarge { size, limit });
        }
        Ok(())
    }

    fn document(&self) -> MutexGuard<'_, Option<Value>> {
        self.document.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Changes `target` by `patch`. How deep that goes is bounded by how deep JSON is read.
fn merge(target: &mut Value, patch: Value) {
    let Value::Object(changes) = patch else {
        *target = patch;
        return;
    };
    if !target.is_object() {
        *target = Value::Object(Map::new());
    }
    let Value::Object(members) = target else {
        return;
    };
    for (name, change) in changes {
        if change.is_null() {
            members.remove(&name);
        } else {
            merge(members.entry(name).or_insert(Value::Null), change);
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn metadata(document: Value) -> Metadata {
        let metadata = Metadata::default();
        metadata.put(document).unwrap();
        metadata
    }

    #[test]
    fn patches_are_those_of_the_rfc() {
        // RFC 7396, appendix A.
        for (before, patch, after) in [
            (json!({"a": "b"}), json!({"a": "c"}), json!({"a": "c"})),
            (json!({"a": "b"}), json!({"b": "c"}), json!({"a": "b", "b": "c"})),
            (json!({"a": "b", "b": "c"}), json!({"a": null}), json!({"b": "c"})),
            (json!({"a": ["b"]}), json!({"a": "c"}), json!({"a": "c"})),
            (
                json!({"a": {"b": "c"}}),
                json!({"a": {"b": "d", "c": null}}),
                json!({"a": {"b": "d"}}),
            ),
            (json!(["a", "b"]), json!(["c", "d"]), json!(["c", "d"])),
            (json!({"a": "foo"}), json!("bar"), json!("bar")),
            (json!({"e": null}), json!({"a": 1}), json!({"e": null, "a": 1})),
            (json!([1, 2]), json!({"a": "b", "c": null}), json!({"a": "b"})),
            (json!({}), json!({"a": {"bb": {"ccc": null}}}), json!({"a": {"bb": {}}})),
        ] {
            let metadata = metadata(before);
            metadata.patch(patch).unwrap();
            assert_eq!(metadata.get(), after);
        }
    }

    #[test]
    fn what_is_too_large_is_refused_and_changes_nothing() {
        let metadata = Metadata::with_limit(13);
        assert_eq!(metadata.get(), Value::Null);
        assert_eq!(metadata.patch(json!({})), Err(MetadataError::Nothing));
        metadata.put(json!({"a": "12345"})).unwrap();
        let too_large = Err(MetadataError::TooLarge { size: 14, limit: 13 });
        assert_eq!(metadata.put(json!({"a": "123456"})), too_large);
        assert_eq!(metadata.patch(json!({"a": "123456"})), too_large);
        assert_eq!(metadata.get(), json!({"a": "12345"}));
    }

    #[test]
    fn a_document_goes_with_its_vm_to_where_none_was_put() {
        assert_eq!(Metadata::default().save(), None);
        let saved = metadata(json!({"a": [1, null]})).save().unwrap();
        let elsewhere = Metadata::with_limit(1);
        elsewhere.adopt(&saved).unwrap();
        assert_eq!(elsewhere.get(), json!({"a": [1, null]}));
        let newer = metadata(json!("newer"));
        newer.adopt(&saved).unwrap();
        assert_eq!(newer.get(), json!("newer"));
        let wrong = MetadataState {
            document: "{".to_owned(),
        };
        assert!(Metadata::default().adopt(&wrong).is_err());
    }
}
