//! Guests that notice whether a snapshot of them is whole: memory is rewritten all the time (see
//! [`Vm::check_pages`]), and their disk has a chunk more for each snapshot.

use std::thread::sleep;
use std::time::Duration;

use serde_json::json;
use tempfile::TempDir;

use crate::cli::cutover;
use crate::environment::scratch;
use crate::{Disk, Exit, Guest, ManagedVm, Shelf, Signal, Vm};

/// MiB that the guest's program rewrites.
const WRITTEN_MIB: u32 = 64;
/// Bytes of the disk.
const DISK: u64 = 64 << 20;

impl ManagedVm {
    /// A guest with an empty disk called `data`, whose program has begun to rewrite memory.
    #[track_caller]
    pub fn busy() -> (Self, Disk) {
        let disk = Disk::blank(DISK);
        let managed = Guest::micro().memory("256M").boot_managed(|api| {
            api.put(
                "/drives/data",
                &json!({
                    "drive_id": "data",
                    "path_on_host": disk.path(),
                    "is_root_device": false,
                    "is_read_only": false,
                }),
            );
        });
        managed.vm.start_page_writer(WRITTEN_MIB, None);
        (managed, disk)
    }
}

impl Vm {
    /// Has the guest write chunk number `number` of its disk, with content of its own, and permanently.
    #[track_caller]
    pub fn write_chunk(&self, number: u32) {
        self.check(&format!(
            "yes chunk {number} | head -c 65536 | dd of=/dev/vda bs=64k seek={number} conv=notrunc,fsync 2>/dev/null"
        ));
    }

    /// Checks that the disk has what [`write_chunk`](Self::write_chunk) wrote to all chunks below `count`, and nothing
    /// after them.
    #[track_caller]
    pub fn check_chunks(&self, count: u32) {
        let wrong = self.check(&format!(
            r#"
            for number in $(seq 0 $(({count} - 1))); do
                sum=$(dd if=/dev/vda bs=64k skip=$number count=1 2>/dev/null | md5sum)
                [ "$sum" = "$(yes chunk $number | head -c 65536 | md5sum)" ] || echo $number
            done
            "#
        ));
        assert_eq!(wrong, "", "chunks of {count} that are not what was written");
        assert_eq!(
            self.written_of_chunk(count),
            0,
            "chunk {count} was written after the snapshot"
        );
    }

    /// Bytes of chunk number `number` that are not zero.
    #[track_caller]
    pub fn written_of_chunk(&self, number: u32) -> u32 {
        let written = self.check(&format!(
            "dd if=/dev/vda bs=64k skip={number} count=1 2>/dev/null | tr -d '\\0' | wc -c"
        ));
        written.trim().parse().expect("a number of bytes")
    }
}

impl Shelf {
    /// A guest of snapshot `name`, with its disks in a directory of its own, that goes on with its memory as it was.
    #[track_caller]
    pub fn restore_busy(&self, name: &str) -> (ManagedVm, TempDir) {
        let disks = scratch();
        let restored = self
            .restore(name)
            .arguments(["--disks".as_ref(), disks.path().as_os_str()])
            .start();
        let first = restored.vm.check_pages();
        let second = restored.vm.check_pages();
        assert!(second.pages > first.pages, "{name}: {first} and then {second}");
        (restored, disks)
    }

    /// Checks snapshot `name`, made when `chunks` chunks were written: a guest of it has all, and goes on to its end.
    #[track_caller]
    pub fn check_busy(&self, name: &str, chunks: u32) {
        let (restored, _disks) = self.restore_busy(name);
        restored.vm.check_chunks(chunks);
        restored.vm.write_chunk(chunks);
        restored.vm.check_chunks(chunks + 1);
        restored.vm.check_pages();
        restored.vm.power_off();
        assert_eq!(restored.vm.wait(), Exit::Shutdown);
    }

    /// Checks that so many guests of one snapshot at the same time do not see each other.
    #[track_caller]
    pub fn check_clones(&self, count: u32) {
        let (managed, _disk) = ManagedVm::busy();
        managed.vm.write_chunk(0);
        self.full(&managed, "original");
        drop(managed);
        let clones: Vec<_> = (0..count)
            .map(|_| {
                let clone = self.restore_busy("original");
                // Many guests that all write as fast as they can leave none enough of one processor.
                clone.0.vm.check("killall -STOP page-writer");
                clone
            })
            .collect();
        for (number, (clone, _)) in (1..).zip(&clones) {
            clone.vm.write_chunk(number);
        }
        for (number, (clone, _)) in (1..).zip(&clones) {
            clone.vm.check("killall -CONT page-writer");
            clone.vm.check_pages();
            clone.vm.check("killall -STOP page-writer");
            for other in 1..=count {
                let expected = if other == number { 65536 } else { 0 };
                let written = clone.vm.written_of_chunk(other);
                assert_eq!(written, expected, "chunk {other} of clone {number}");
            }
        }
    }

    /// Checks that a monitor which is killed so long after it was asked for a snapshot leaves the older one whole.
    #[track_caller]
    pub fn check_kill(&self, after: Duration) {
        let (managed, _disk) = ManagedVm::busy();
        managed.vm.write_chunk(0);
        self.full(&managed, "before");
        managed.vm.write_chunk(1);
        let body = json!({ "store": self.directory(), "name": "killed", "kind": "incremental" });
        let mut connection = managed.api.connect();
        connection.ask("POST", "/v1/snapshots", Some(&body));
        // Any moment will do.
        sleep(after);
        managed.vm.monitor().signal(Signal::KILL);
        assert!(matches!(managed.vm.wait(), Exit::Signal(_)));
        drop(managed);

        let (before, all) = (self.path("before"), self.directory());
        for arguments in [
            ["verify".as_ref(), before.as_os_str()],
            ["prune".as_ref(), all.as_os_str()],
        ] {
            let finished = cutover(["snapshot".as_ref()].into_iter().chain(arguments));
            assert_eq!(finished.exit, Exit::Shutdown, "{finished:?}");
        }
        self.check_busy("before", 1);
        if self.path("killed").exists() {
            self.check_busy("killed", 2);
        }
    }
}
