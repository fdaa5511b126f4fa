//! A guest's memory that is rewritten all the time, and tells when it is not what it should be (see
//! [`cutover_guest::pages`]).

use cutover_guest::pages::Verdict;

use crate::Vm;

impl Vm {
    /// Has the guest rewrite so many MiB of its memory from now on: as fast as it can, or so many pages a second.
    #[track_caller]
    pub fn start_page_writer(&self, mib: u32, pages_per_second: Option<u32>) {
        let rate = pages_per_second.map_or_else(String::new, |rate| rate.to_string());
        self.check(&format!("page-writer start {mib} {rate}"));
    }

    /// What the writer has seen so far, with every page checked now. Nothing may have been wrong: no page stale,
    /// misplaced or damaged, no clock gone back.
    #[track_caller]
    pub fn check_pages(&self) -> Verdict {
        let answer = self.check("page-writer verdict");
        let verdict: Verdict = answer.parse().expect("the guest program's own form");
        assert!(
            verdict.is_good(),
            "{verdict}\n{}",
            self.check("head -c 4000 /run/page-writer.log")
        );
        verdict
    }
}
