//! What the first round need not send, because the destination has it: see [`crate::disk`].

use std::time::Duration;

use super::Session;
use crate::disk;
use crate::error::Error;
use crate::message::{ToDestination, ToSource};
use crate::pages::PageBits;
use crate::vm::SourceVm;

/// How long the destination may take to read the chunks of one message.
const COMPARE_MAX: Duration = Duration::from_secs(60);

impl Session<'_> {
    /// Has `pages`, which the first round is to send, be those that the destination does not have: of images it has an
    /// older copy of all that differ, which may be more than those that are not zero, or fewer.
    pub(super) fn leave_out_older(&mut self, vm: &dyn SourceVm, pages: &mut [PageBits]) -> Result<(), Error> {
        let images = vm.images();
        for index in self.older.clone() {
            let number = usize::from(index);
            let (Some(image), Some(pages)) = (images.get(number), pages.get_mut(number)) else {
                return Err(Error::Invalid {
                    what: "an answer to the reservation",
                    reason: format!("it has an older copy of image {index} of {}", images.len()),
                });
            };
            *pages = PageBits::full(image.pages());
            let mut chunk = 0;
            while chunk < disk::chunks(image.as_ref()) {
                self.check_wanted()?;
                let question = ToDestination::Compare { image: index, chunk };
                let theirs = match self.ask(&question, "Checksums", COMPARE_MAX)? {
                    ToSource::Checksums { checksums } => checksums,
                    other => return Err(Error::unexpected("Checksums", &other)),
                };
                disk::leave_out(image.as_ref(), chunk, &theirs, pages)
                    .map_err(|source| Error::vm("compare a disk with the destination's copy")(source.into()))?;
                chunk += disk::CHUNKS_MAX;
            }
        }
        Ok(())
    }
}
