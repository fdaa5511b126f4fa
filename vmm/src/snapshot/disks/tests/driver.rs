//! The least driver there can be of a disk: one request at a time, through real rings and registers (virtio 1.2 §2.7,
//! §4.2.2, §5.2.6).

use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::{Arc, Mutex};

use cutover_devices::GuestMemory;
use cutover_devices::bus::BusDevice;
use cutover_devices::event_loop::EventLoop;
use cutover_devices::virtio::block::Block;
use cutover_devices::virtio::mmio::MmioTransport;
use rustix::event::{PollFd, PollFlags, poll};
use vm_memory::{Bytes, GuestAddress};

const DRIVER_FEATURES: u64 = 0x20;
const DRIVER_FEATURES_SELECT: u64 = 0x24;
const QUEUE_SIZE: u64 = 0x38;
const QUEUE_READY: u64 = 0x44;
const QUEUE_NOTIFY: u64 = 0x50;
const STATUS: u64 = 0x70;
const QUEUE_DESCRIPTORS: u64 = 0x80;
const QUEUE_DRIVER: u64 = 0x90;
const QUEUE_DEVICE: u64 = 0xa0;

/// Rings of this many descriptors, and where what a request is made of lies in guest memory.
const SIZE: u16 = 4;
const DESCRIPTORS: u64 = 0x1000;
const AVAILABLE: u64 = 0x2000;
const USED: u64 = 0x3000;
const HEADER: u64 = 0x4000;
const STATUS_BYTE: u64 = 0x4100;
const DATA: u64 = 0x5000;

const NEXT: u16 = 1;
const DEVICE_WRITES: u16 = 2;
const READ: u32 = 0;
const WRITE: u32 = 1;

/// See the module. The disk is started when it is made.
pub struct Driver {
    memory: GuestMemory,
    pub transport: MmioTransport,
    /// Requests made.
    requests: u16,
    _event_loop: EventLoop,
}

impl Driver {
    pub fn start(block: &Arc<Mutex<Block>>) -> Self {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        let event_loop = EventLoop::spawn("test-devices", || {}).unwrap();
        let (name, handle) = ("virtio-blk0".to_owned(), event_loop.handle());
        let transport = MmioTransport::new(name, block.clone(), memory.clone(), handle, Arc::new(|_| {}));
        let mut driver = Self {
            memory,
            transport: transport.unwrap(),
            requests: 0,
            _event_loop: event_loop,
        };
        for status in [1, 3] {
            driver.register(STATUS, status);
        }
        // Of all features, only that this is no legacy device.
        driver.register(DRIVER_FEATURES_SELECT, 1);
        driver.register(DRIVER_FEATURES, 1);
        driver.register(STATUS, 11);
        driver.register(QUEUE_SIZE, SIZE.into());
        for (register, address) in [
            (QUEUE_DESCRIPTORS, DESCRIPTORS),
            (QUEUE_DRIVER, AVAILABLE),
            (QUEUE_DEVICE, USED),
        ] {
            driver.register(register, u32::try_from(address).unwrap());
        }
        driver.register(QUEUE_READY, 1);
        driver.register(STATUS, 15);
        driver
    }

    pub fn read(&mut self, sector: u64, bytes: &mut [u8]) {
        self.request(READ, sector, bytes.len());
        self.memory.read_slice(bytes, GuestAddress(DATA)).unwrap();
    }

    pub fn write(&mut self, sector: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(DATA)).unwrap();
        self.request(WRITE, sector, bytes.len());
    }

    /// Makes a request, waits for the answer, and checks it.
    fn request(&mut self, kind: u32, sector: u64, len: usize) {
        let header = [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat();
        self.memory.write_slice(&header, GuestAddress(HEADER)).unwrap();
        self.memory.write_obj(0xee_u8, GuestAddress(STATUS_BYTE)).unwrap();
        let data = if kind == READ { NEXT | DEVICE_WRITES } else { NEXT };
        let len = u32::try_from(len).unwrap();
        self.descriptor(0, HEADER, 16, NEXT);
        self.descriptor(1, DATA, len, data);
        self.descriptor(2, STATUS_BYTE, 1, DEVICE_WRITES);
        let slot = AVAILABLE + 4 + 2 * u64::from(self.requests % SIZE);
        self.memory.write_obj(0_u16, GuestAddress(slot)).unwrap();
        self.requests += 1;
        self.memory
            .write_obj(self.requests, GuestAddress(AVAILABLE + 2))
            .unwrap();
        self.register(QUEUE_NOTIFY, 0);
        while self.memory.read_obj::<u16>(GuestAddress(USED + 2)).unwrap() != self.requests {
            self.wait_for_interrupt();
        }
        assert_eq!(self.memory.read_obj::<u8>(GuestAddress(STATUS_BYTE)).unwrap(), 0);
    }

    fn descriptor(&self, index: u16, address: u64, len: u32, flags: u16) {
        let [address, len] = [address.to_le_bytes().to_vec(), len.to_le_bytes().to_vec()];
        let rest = [flags.to_le_bytes(), (index + 1).to_le_bytes()].concat();
        let at = GuestAddress(DESCRIPTORS + 16 * u64::from(index));
        self.memory.write_slice(&[address, len, rest].concat(), at).unwrap();
    }

    fn register(&mut self, register: u64, value: u32) {
        self.transport.write(register, &value.to_le_bytes());
    }

    fn wait_for_interrupt(&self) {
        let interrupt = self.transport.interrupt();
        // SAFETY: the transport owns the descriptor and outlives the borrow.
        let descriptor = unsafe { BorrowedFd::borrow_raw(interrupt.as_raw_fd()) };
        poll(&mut [PollFd::from_borrowed_fd(descriptor, PollFlags::IN)], None).unwrap();
        interrupt.read().unwrap();
    }
}
