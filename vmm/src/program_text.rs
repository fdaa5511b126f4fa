//! Lets go of the program's own pages once it has started.
//!
//! Reading a command line, serving a configuration and building a VM touch most of the program and its libraries; running
//! a VM touches little. Code and constants are the page cache's, so letting go of them costs a minor fault for what is
//! used again, and the rest no longer counts among what a VM has resident.

use std::ffi::{c_int, c_void};
use std::ptr;

/// Unmaps every page of the program and its libraries that is only read or executed, until it is touched again.
pub fn release() {
    advise(libc::MADV_DONTNEED);
}

/// Gives the kernel `advice`, one that keeps contents as they are, on all that is only read or executed.
fn advise(mut advice: c_int) {
    // SAFETY: the callback has the type that is called for, and takes a pointer to the advice, which outlives the call.
    unsafe { libc::dl_iterate_phdr(Some(advise_object), (&raw mut advice).cast()) };
}

/// On one object's segments that are not writable: those that are hold what relocation wrote.
unsafe extern "C" fn advise_object(object: *mut libc::dl_phdr_info, _: usize, advice: *mut c_void) -> c_int {
    // SAFETY: dl_iterate_phdr(3) passes an object that is valid during the call, with so many program headers, and what
    // `advise` gave it.
    let (base, headers, advice) = unsafe {
        let object = &*object;
        let headers = std::slice::from_raw_parts(object.dlpi_phdr, object.dlpi_phnum.into());
        (object.dlpi_addr, headers, *advice.cast::<c_int>())
    };
    let loaded = headers.iter().filter(|header| header.p_type == libc::PT_LOAD);
    for segment in loaded.filter(|segment| segment.p_flags & libc::PF_W == 0) {
        if let Some((start, len)) = pages(base.wrapping_add(segment.p_vaddr), segment.p_memsz) {
            // SAFETY: the range is a mapping of a file that nothing has written to (the objects have no relocations in
            // segments that are not writable), so what is read from it later is what was read before. That the kernel
            // may refuse does no harm.
            unsafe { libc::madvise(start, len, advice) };
        }
    }
    0
}

/// The whole pages within `size` bytes from `start`.
fn pages(start: u64, size: u64) -> Option<(*mut c_void, usize)> {
    const PAGE: usize = 4096;
    let start = usize::try_from(start).ok()?;
    let end = start.checked_add(usize::try_from(size).ok()?)? & !(PAGE - 1);
    let start = start.next_multiple_of(PAGE);
    let len = end.checked_sub(start).filter(|&len| len > 0)?;
    Some((ptr::with_exposed_provenance_mut(start), len))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Resident bytes of this program's code.
    fn resident_code() -> u64 {
        let program = std::env::current_exe().unwrap();
        let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let mut is_code = false;
        let mut sum = 0;
        for line in smaps.lines() {
            if let Some(kib) = line.strip_prefix("Rss:").filter(|_| is_code) {
                sum += kib.trim().strip_suffix(" kB").unwrap().parse::<u64>().unwrap() << 10;
            } else if line.contains(" r-xp ") || line.contains(" rw-p ") || line.contains(" r--p ") {
                is_code = line.contains(" r-xp ") && line.ends_with(program.to_str().unwrap());
            }
        }
        sum
    }

    #[test]
    fn code_that_is_let_go_of_runs_on_and_is_no_longer_resident() {
        if std::env::var_os("CUTOVER_TEST_RELEASE").is_none() {
            // Alone in a process: other tests touch code all the time.
            let output = std::process::Command::new(std::env::current_exe().unwrap())
                .args(["--exact", "--nocapture"])
                .arg("program_text::tests::code_that_is_let_go_of_runs_on_and_is_no_longer_resident")
                .env("CUTOVER_TEST_RELEASE", "1")
                .output()
                .unwrap();
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            return;
        }
        advise(libc::MADV_POPULATE_READ);
        let before = resident_code();
        release();
        let after = resident_code();
        assert!(after < before / 2, "{before} bytes before, {after} after");
    }
}
