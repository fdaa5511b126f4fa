//! What the two sides of every link agree on first: a version, features, and that the VM can be built. The same whether
//! it moves or is replicated; see [`message`](crate::message).

use std::time::Duration;

use cutover_snapshot::manifest::IMAGES_MAX;
use uuid::Uuid;

use crate::error::Error;
use crate::link::{DestinationLink, SourceLink};
use crate::message::{HANDED_MAX, ToDestination, ToSource, VERSION, VERSION_OLDEST};
use crate::options::STREAMS_MAX;
use crate::streams::OnThread;
use crate::transport::SILENCE_MAX;
use crate::vm::{Descriptors, DestinationHost, DestinationVm, Reservation};

/// How long the peer may take to say which version it speaks.
const HELLO_MAX: Duration = Duration::from_secs(10);
/// How long the destination may take to build the VM, as long as it says that it does: it may have to copy what it has
/// of disks already.
const RESERVE_MAX: Duration = Duration::from_secs(300);
/// How long the source may take to say what it wants built.
const NEXT_MAX: Duration = Duration::from_secs(60);

/// What both sides speak.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Agreed {
    /// Made up by the destination.
    pub session: Uuid,
    /// What both sides have.
    pub features: u64,
}

/// What the source wants besides the VM.
#[derive(Debug, Default)]
pub struct Wanted {
    /// Streams that pages will come on.
    pub streams: u8,
    /// Whether there will be one more, for pages that the guest waits for.
    pub pull: bool,
    /// What is handed over by descriptor.
    pub handed: Descriptors,
}

/// A VM that is built, and empty.
pub struct Built<Vm> {
    /// What it was built of.
    pub reservation: Reservation,
    /// The VM.
    pub vm: Vm,
    /// Streams that pages will come on.
    pub streams: u8,
    /// Whether there will be one more.
    pub pull: bool,
}

/// The source's first message: finds a version that both sides speak, and which of `features` the peer has.
///
/// # Errors
/// There is none, or the link broke.
pub fn hello(link: &mut SourceLink, features: u64) -> Result<Agreed, Error> {
    link.send(&ToDestination::Hello {
        oldest: VERSION_OLDEST,
        newest: VERSION,
        features,
    })?;
    match link.receive("Welcome", HELLO_MAX)? {
        ToSource::Welcome {
            version,
            session,
            features: both,
        } if (VERSION_OLDEST..=VERSION).contains(&version) => Ok(Agreed {
            session,
            features: both & features,
        }),
        ToSource::Welcome { version, .. } => Err(no_version(version, version)),
        other => Err(Error::unexpected("Welcome", &other)),
    }
}

/// The destination's answer, which has `features`.
///
/// # Errors
/// There is no version that both sides speak, or the link broke.
pub fn welcome(link: &mut DestinationLink, features: u64) -> Result<Agreed, Error> {
    let (oldest, newest, theirs) = match link.receive("Hello", HELLO_MAX)? {
        ToDestination::Hello {
            oldest,
            newest,
            features,
        } => (oldest, newest, features),
        other => return Err(Error::unexpected("Hello", &other)),
    };
    let version = newest.min(VERSION);
    if version < oldest.max(VERSION_OLDEST) {
        return Err(no_version(oldest, newest));
    }
    let agreed = Agreed {
        session: Uuid::new_v4(),
        features: features & theirs,
    };
    link.send(&ToSource::Welcome {
        version,
        features: agreed.features,
        session: agreed.session,
    })?;
    Ok(agreed)
}

/// Has the destination build the VM of `reservation`. Returns which images are not empty there.
///
/// # Errors
/// It cannot, and says why, or the link broke.
pub fn reserve(link: &mut SourceLink, reservation: &Reservation, wanted: Wanted) -> Result<Vec<u8>, Error> {
    let reservation = serde_json::to_string(reservation).map_err(|error| invalid_reservation(error.to_string()))?;
    let Wanted { streams, pull, handed } = wanted;
    link.send(&ToDestination::Reserve {
        reservation,
        streams,
        pull,
        handed: handed.keys().cloned().collect(),
    })?;
    link.connection().send_descriptors(handed.into_values().collect())?;
    match link.receive_from_busy("Reserved", SILENCE_MAX, RESERVE_MAX)? {
        ToSource::Reserved { older } => Ok(older),
        ToSource::Refused { reasons } => Err(Error::Refused(reasons)),
        other => Err(Error::unexpected("Reserved", &other)),
    }
}

/// Has `host` build what the source wants, or say why not; `on_thread` is what a thread calls first that says meanwhile
/// that this side works.
///
/// # Errors
/// It cannot, nothing that could be built was asked for, or the link broke.
pub fn build<H: DestinationHost>(
    link: &mut DestinationLink,
    host: &mut H,
    on_thread: &OnThread,
    begun: impl FnOnce(),
) -> Result<Built<H::Vm>, Error> {
    let (reservation, streams, pull, handed) = match link.receive("Reserve", NEXT_MAX)? {
        ToDestination::Reserve {
            reservation,
            streams,
            pull,
            handed,
        } => (reservation, streams, pull, handed),
        other => return Err(Error::unexpected("Reserve", &other)),
    };
    begun();
    let reservation = read_reservation(&reservation, streams)?;
    let handed = take_descriptors(link, handed)?;
    match link.alive_during(on_thread, || host.reserve(&reservation, handed, pull))? {
        Ok(vm) => {
            link.send(&ToSource::Reserved { older: older(&vm) })?;
            Ok(Built {
                reservation,
                vm,
                streams,
                pull,
            })
        }
        Err(reasons) => {
            link.send(&ToSource::Refused {
                reasons: reasons.clone(),
            })?;
            Err(Error::Refused(reasons))
        }
    }
}

/// The descriptors that were announced by these names.
fn take_descriptors(link: &mut DestinationLink, names: Vec<String>) -> Result<Descriptors, Error> {
    if names.len() > HANDED_MAX {
        return Err(Error::Invalid {
            what: "Reserve",
            reason: format!("{} descriptors are more than {HANDED_MAX}", names.len()),
        });
    }
    let descriptors = link.connection().receive_descriptors(names.len())?;
    Ok(names.into_iter().zip(descriptors).collect())
}

/// Which of the VM's images are not empty.
fn older(vm: &impl DestinationVm) -> Vec<u8> {
    let images = (0..).zip(vm.images());
    images
        .filter(|(_, image)| !image.starts_empty())
        .map(|(number, _)| number)
        .collect()
}

/// A reservation that can be looked at: its numbers are those of a VM.
fn read_reservation(text: &str, streams: u8) -> Result<Reservation, Error> {
    if !(1..=STREAMS_MAX).contains(&streams) {
        return Err(invalid_reservation(format!(
            "{streams} streams are none or more than {STREAMS_MAX}"
        )));
    }
    let reservation: Reservation =
        serde_json::from_str(text).map_err(|error| invalid_reservation(error.to_string()))?;
    if reservation.images.len() > IMAGES_MAX {
        return Err(invalid_reservation(format!("more than {IMAGES_MAX} images")));
    }
    Ok(reservation)
}

fn no_version(theirs_min: u16, theirs_max: u16) -> Error {
    Error::Version {
        theirs_min,
        theirs_max,
        ours_min: VERSION_OLDEST,
        ours_max: VERSION,
    }
}

fn invalid_reservation(reason: String) -> Error {
    Error::Invalid {
        what: "a reservation",
        reason,
    }
}
