//! What the probe says of back ends that are exact, and of those that are not.

use super::super::kvm_log::KvmLog;
use super::super::{DirtySource, Report};
use super::*;
use crate::testing::has_kvm;

/// A page that the guest writes.
const PAGE: u64 = FIRST_PAGE + 6 * PAGE_SIZE;

/// KVM's bitmap, of which something comes out wrong.
struct Faulty {
    log: KvmLog,
    fault: Fault,
}

#[derive(Clone, Copy)]
enum Fault {
    /// [`PAGE`] is never reported.
    Loses,
    /// It is reported each time.
    MakesUp,
}

impl DirtySource for Faulty {
    fn start(&mut self) -> Result<(), Error> {
        self.log.start()
    }

    fn stop(&mut self) -> Result<(), Error> {
        self.log.stop()
    }

    fn collect(&mut self, report: Report<'_>) -> Result<(), Error> {
        let number = PAGE / PAGE_SIZE;
        let (faulty, bit) = (usize::try_from(number / 64).unwrap_or(usize::MAX), 1 << (number % 64));
        let fault = self.fault;
        if matches!(fault, Fault::MakesUp) {
            report(faulty, bit);
        }
        self.log.collect(&mut |word, bits| match fault {
            Fault::Loses if word == faulty => report(word, bits & !bit),
            Fault::Loses | Fault::MakesUp => report(word, bits),
        })
    }
}

/// Tries a bitmap with this fault.
fn probe_faulty(fault: Fault) -> Error {
    let faulty = |vm: &KvmVm| {
        let slots = &vm.memory_slots;
        let layout = Arc::new(Layout::of(&slots.memory));
        let log = KvmLog::new(slots, &layout)?;
        Ok(Tracker::of(layout, vec![Box::new(Faulty { log, fault })]))
    };
    let guest = Guest::create(BackEnd::Bitmap, faulty).unwrap();
    guest.try_all().unwrap_err()
}

#[test]
fn the_bitmap_is_exact_on_every_kvm() {
    if has_kvm() {
        assert_eq!(probe(BackEnd::Bitmap).unwrap(), BackEnd::Bitmap);
    }
}

#[test]
fn a_back_end_that_loses_a_page_is_refused() {
    if has_kvm() {
        let error = probe_faulty(Fault::Loses);
        let (lost, written) = match &error {
            Error::DirtyLog {
                reason: Unfit::Lost { lost, written },
                ..
            } => (*lost, *written),
            other => panic!("{other}"),
        };
        assert_eq!((lost, written), (1, FEW.pages as u64), "{error}");
    }
}

#[test]
fn a_back_end_that_reports_what_nobody_wrote_is_refused() {
    if has_kvm() {
        let error = probe_faulty(Fault::MakesUp);
        assert!(
            matches!(
                error,
                Error::DirtyLog {
                    reason: Unfit::Stale { pages: 1 },
                    ..
                }
            ),
            "{error}"
        );
    }
}

#[test]
fn a_back_end_is_exact_on_this_host_or_it_is_said_what_it_does_wrong() {
    if !has_kvm() {
        return;
    }
    for back_end in [BackEnd::Ring, BackEnd::Scan] {
        match probe(back_end) {
            Ok(exact) => assert_eq!(exact, back_end),
            Err(Error::DirtyLog { log, .. }) => assert_eq!(log, back_end),
            Err(other) => panic!("{other}"),
        }
    }
}
