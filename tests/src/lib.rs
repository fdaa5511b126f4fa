//! The harness: boots real guests under the `cutover` program and talks to them.
//!
//! ```no_run
//! use cutover_tests::{Disk, Exit, Guest};
//!
//! let disk = Disk::blank(64 << 20);
//! let vm = Guest::micro().cpus(2).memory("512M").disk(&disk).boot();
//! assert_eq!(vm.check("nproc"), "2\n");
//! vm.power_off();
//! assert_eq!(vm.wait(), Exit::Shutdown);
//! ```
//! Everything here panics at the caller's line when something is not as it should be: a test is a list of
//! expectations. A VM that is alive while its test fails prints its console and its monitor's log; a VM that goes out
//! of scope is killed. Nothing is ever skipped: what is missing on the machine makes the test fail and is named.
//!
//! As many guests run in parallel as there are test threads.

mod agent;
mod api;
pub mod bench;
mod bridge;
mod busy;
mod certificates;
pub mod cli;
mod console;
mod disk;
mod environment;
mod foreign;
mod group;
mod guest;
mod huge_pages;
mod jail;
mod lan;
mod link;
mod managed;
mod memory;
mod migration;
mod monitor;
mod network;
mod other_host;
mod page_server;
mod page_writer;
mod parallel;
mod shelf;
mod site;
mod small_file_system;
mod ssh;
mod tampering;
mod terminal;
mod trouble;
mod vm;

pub use api::{Answer, Api, Connection, Event, Events};
pub use bridge::Bridge;
pub use certificates::Authority;
pub use console::Console;
pub use disk::Disk;
pub use environment::{guest_file, legacy, monitor_binary, poll_until, scratch};
pub use foreign::foreign_client;
pub use group::{Group, Protection};
pub use guest::Guest;
pub use huge_pages::HugePages;
pub use jail::Jail;
pub use lan::Lan;
pub use link::{Fault, Link, Message, Toward};
pub use managed::ManagedVm;
pub use memory::{GuestMemory, PAGE_SIZE};
pub use migration::{Receiver, free_address, listeners, start_receiving, wait_for_listener};
pub use monitor::{Exit, Monitor};
pub use network::{Network, Tap};
pub use other_host::OtherHost;
pub use page_server::PageServer;
pub use parallel::ParallelJob;
pub use rustix::process::Signal;
pub use shelf::{Restore, Shelf};
pub use site::Site;
pub use small_file_system::SmallFileSystem;
pub use ssh::Ssh;
pub use tampering::tamper_with_reservation;
pub use terminal::Terminal;
pub use trouble::Trouble;
pub use vm::{Output, Vm};
