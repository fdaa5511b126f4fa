//! Snapshots in two files, as Firecracker's clients make and load them.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;

use cutover_tests::{Api, Exit, ManagedVm, PageServer, Shelf, Vm};
use serde_json::{Value, json};

fn create(managed: &ManagedVm, shelf: &Shelf, kind: &str, name: &str) {
    managed.api.put(
        "/snapshot/create",
        &json!({
            "snapshot_type": kind,
            "snapshot_path": shelf.path(&format!("{name}.state")),
            "mem_file_path": shelf.path(&format!("{name}.memory")),
        }),
    );
}

/// A monitor that has loaded what `body` says.
fn load(shelf: &Shelf, body: &Value) -> (Vm, Api) {
    let api = Api::new(&shelf.path("restored.api"));
    let mut command = cutover_tests::Monitor::command();
    command.arg("vmm").arg("--api-sock").arg(api.socket());
    let vm = Vm::start_restored(command);
    api.wait_ready();
    api.put("/snapshot/load", body);
    (vm, api)
}

#[test]
fn a_full_one_and_a_difference_over_it_make_the_guest_that_was_saved() {
    let shelf = Shelf::new();
    let (managed, _disk) = ManagedVm::busy();
    managed.vm.write_chunk(0);
    managed.pause();
    create(&managed, &shelf, "Full", "base");
    managed.resume();
    managed.vm.write_chunk(1);
    managed.vm.check_pages();
    managed.pause();
    create(&managed, &shelf, "Diff", "next");
    drop(managed);

    // As its clients do: what the difference has replaces what was there.
    let difference = fs::File::open(shelf.path("next.memory")).expect("memory");
    let base = fs::OpenOptions::new()
        .write(true)
        .open(shelf.path("base.memory"))
        .expect("memory");
    let mut at = 0;
    while let Ok(data) = rustix::fs::seek(&difference, rustix::fs::SeekFrom::Data(at)) {
        let hole = rustix::fs::seek(&difference, rustix::fs::SeekFrom::Hole(data)).expect("there is an end");
        let mut piece = vec![0; usize::try_from(hole - data).expect("less than memory")];
        difference.read_exact_at(&mut piece, data).expect("within the file");
        base.write_all_at(&piece, data).expect("the file can be written");
        at = hole;
    }
    let body = json!({
        "snapshot_path": shelf.path("next.state"),
        "mem_backend": { "backend_type": "File", "backend_path": shelf.path("base.memory") },
        "resume_vm": true,
    });
    let (vm, api) = load(&shelf, &body);
    vm.check_pages();
    vm.check_chunks(2);
    assert_eq!(api.get("/")["state"], "Running");
}

#[test]
fn a_snapshot_is_made_of_a_paused_guest_only_and_loaded_before_anything_is_configured() {
    let shelf = Shelf::new();
    let (managed, _disk) = ManagedVm::busy();
    let body = json!({ "snapshot_path": shelf.path("state"), "mem_file_path": shelf.path("memory") });
    managed.api.request("PUT", "/snapshot/create", Some(&body)).fault();
    assert!(!shelf.path("state").exists());
    let body = json!({ "snapshot_path": shelf.path("state"), "mem_file_path": shelf.path("memory") });
    managed.api.request("PUT", "/snapshot/load", Some(&body)).fault();
    managed.vm.check_pages();
}

#[test]
fn memory_that_another_process_serves_is_what_was_saved_and_that_process_dying_ends_the_vm() {
    let shelf = Shelf::new();
    let (managed, _disk) = ManagedVm::busy();
    managed.pause();
    create(&managed, &shelf, "Full", "base");
    drop(managed);
    let body = |socket: &Path| {
        json!({
            "snapshot_path": shelf.path("base.state"),
            "mem_backend": { "backend_type": "Uffd", "backend_path": socket },
            "resume_vm": true,
        })
    };

    let socket = shelf.path("lasting");
    let server = PageServer::start(&socket, &shelf.path("base.memory"), None);
    let (vm, api) = load(&shelf, &body(&socket));
    vm.check_pages();
    vm.check_pages();
    drop(vm);
    assert!(server.wait() > 0);
    fs::remove_file(api.socket()).expect("the socket of a killed monitor stays");

    let socket = shelf.path("dying");
    let server = PageServer::start(&socket, &shelf.path("base.memory"), Some(20));
    let (vm, _api) = load(&shelf, &body(&socket));
    assert_eq!(server.wait(), 20);
    assert_eq!(vm.wait(), Exit::Error);
    assert!(vm.log().contains("has gone away"), "{}", vm.log());
}
