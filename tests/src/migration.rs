//! Guests that move: a monitor that takes one in, and a running VM that is told to go there.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::process::Command;
use std::sync::atomic::{AtomicU8, Ordering};

use serde_json::{Value, json};

use crate::environment::{poll_until, scratch};
use crate::{Answer, Api, Connection, Exit, ManagedVm, Monitor, Vm};

/// Every receiver listens at an address of its own, so that none needs to look for a free port.
const PORT: u16 = 7000;

/// How long a guest may stand still when a test does not care: an emulated host takes long for anything.
const PATIENT_MS: u32 = 5_000;

/// A monitor under `cutover receive`, which waits for a guest.
pub struct Receiver {
    /// The VM it will have, and its API.
    pub managed: ManagedVm,
    address: SocketAddr,
}

impl Receiver {
    /// One that takes any guest from anybody.
    #[track_caller]
    pub fn start() -> Self {
        Self::start_with::<&str>([])
    }

    /// The same with further arguments.
    #[track_caller]
    pub fn start_with<S: AsRef<OsStr>>(arguments: impl IntoIterator<Item = S>) -> Self {
        let arguments: Vec<OsString> = arguments.into_iter().map(|word| word.as_ref().to_owned()).collect();
        Self::start_at(free_address(), Monitor::command(), &arguments)
    }

    #[track_caller]
    fn start_at(address: SocketAddr, mut command: Command, arguments: &[OsString]) -> Self {
        command.args(["receive", "--insecure", "--listen", &format!("tcp://{address}")]);
        command.args(arguments);
        let managed = start_receiving(command);
        wait_for_listener(address, || fs::read_to_string("/proc/net/tcp").expect("Linux has it"));
        Self { managed, address }
    }

    /// One that cannot have more than `bytes` of memory in all.
    #[track_caller]
    pub fn limited_to_memory(bytes: u64) -> Self {
        let address = free_address();
        let mut command = Command::new("prlimit");
        command
            .arg(format!("--as={bytes}"))
            .arg(Monitor::command().get_program());
        Self::start_at(address, command, &[])
    }

    /// Checks that it has given up, and the guest never ran there.
    #[track_caller]
    pub fn check_given_up(&self) {
        assert_eq!(self.managed.vm.wait(), Exit::Error, "{}", self.managed.vm.log());
        assert_eq!(self.managed.vm.console().text(), "", "the guest has run there");
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

/// Starts `command`, a `cutover receive` that has no API yet.
#[track_caller]
pub fn start_receiving(mut command: Command) -> ManagedVm {
    let directory = scratch();
    let api = Api::new(&directory.path().join("api"));
    command.arg("--api-sock").arg(api.socket());
    ManagedVm::new(Vm::start_restored(command), api, directory)
}

/// An address of the loopback interface that nobody else in this process has.
#[track_caller]
pub fn free_address() -> SocketAddr {
    static COUNT: AtomicU8 = AtomicU8::new(1);
    let number = COUNT.fetch_add(1, Ordering::Relaxed);
    assert!(number < u8::MAX, "one test process has at most 254 receivers");
    SocketAddrV4::new(Ipv4Addr::new(127, 1, 0, number), PORT).into()
}

/// `/proc/net/tcp` of this host.
pub fn listeners() -> String {
    fs::read_to_string("/proc/net/tcp").expect("Linux has it")
}

/// Waits until somebody listens at `address`, by `table`, which is `/proc/net/tcp` of that host. A connection would be
/// noticed.
#[track_caller]
pub fn wait_for_listener(address: SocketAddr, table: impl Fn() -> String) {
    /// `TCP_LISTEN`, as the table has it.
    const LISTENING: &str = "0A";
    let SocketAddr::V4(v4) = address else {
        panic!("{address} is in another table");
    };
    // The address as the processor reads it from memory.
    let local = format!("{:08X}:{:04X}", u32::from_ne_bytes(v4.ip().octets()), v4.port());
    poll_until("the receiver listens", || {
        let listens = |line: &str| {
            let mut fields = line.split_whitespace().skip(1);
            fields.next() == Some(local.as_str()) && fields.nth(1) == Some(LISTENING)
        };
        table().lines().any(listens).then_some(())
    });
}

impl ManagedVm {
    /// Asks for the guest to be moved to `address`, as `options` want it. The answer comes when it is there, or is not to
    /// be.
    #[track_caller]
    pub fn begin_to_migrate(&self, address: SocketAddr, options: &Value) -> Connection {
        let mut body = json!({ "to": format!("tcp://{address}"), "insecure": true, "downtime_ms": PATIENT_MS });
        let fields = options.as_object().expect("options are an object");
        let body_fields = body.as_object_mut().expect("the body is an object");
        body_fields.extend(fields.clone());
        let mut connection = self.api.connect();
        connection.ask("POST", "/v1/migration", Some(&body));
        connection
    }

    /// Has the guest moved to `address`, as `options` want it.
    #[track_caller]
    pub fn migrate(&self, address: SocketAddr, options: &Value) -> Answer {
        self.begin_to_migrate(address, options).answer()
    }

    /// How far the migration is.
    #[track_caller]
    pub fn migration(&self) -> Value {
        self.api.get("/v1/migration")
    }

    /// Has the guest moved to `receiver`, where it must go on with all its memory, and this monitor end by itself.
    #[track_caller]
    pub fn move_to(self, receiver: Receiver, options: &Value) -> (ManagedVm, Value) {
        let report = self.migrate(receiver.address, options).success().json();
        assert_eq!(self.vm.wait(), Exit::Shutdown, "{}", self.vm.log());
        receiver.managed.check_goes_on();
        (receiver.managed, report)
    }

    /// Checks that the guest's memory is as it should be, and that its program goes on.
    #[track_caller]
    pub fn check_goes_on(&self) {
        let first = self.vm.check_pages();
        let second = self.vm.check_pages();
        assert!(second.pages > first.pages, "{first} and then {second}");
    }
}
