//! The driver's side of virtqueues, for tests of devices that are served in this process.

use std::time::{Duration, Instant};

use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::device::{Activation, ActiveQueue, Start, VirtioDevice};
use crate::layout::MIB;
use crate::memory::{self, Memory};

const DEADLINE: Duration = Duration::from_secs(20);
const MEMORY: u64 = 16 * MIB;
const FIRST_QUEUE: u64 = MIB;
/// Each queue has its rings and its buffers in a stretch of its own.
const QUEUE_STRIDE: u64 = MIB;
const AVAILABLE_AT: u64 = 0x1000;
const USED_AT: u64 = 0x2000;
const BUFFERS_AT: u64 = 0x3000;
const NEXT: u16 = 1;
const WRITE: u16 = 2;

/// A buffer of a request.
#[derive(Debug, Clone)]
pub(crate) enum Buffer {
    /// The device reads this.
    Readable(Vec<u8>),
    /// The device may write so much.
    Writable(usize),
    /// So much that the device may read, behind the end of memory.
    Outside(usize),
    /// So much that the device may write, at an address of the driver's choice. It is left as it is, and not read.
    At(u64, usize),
}

/// What the device did with a request.
#[derive(Debug)]
pub(crate) struct Used {
    /// How much the device says that it wrote.
    pub(crate) written: u32,
    /// All writable buffers.
    pub(crate) data: Vec<u8>,
}

struct DriverQueue {
    at: u64,
    size: u16,
    next: u16,
    kick: EventFd,
    call: EventFd,
}

/// A driver. It has one request under way at a time on each queue.
pub(crate) struct Driver {
    pub(crate) memory: Memory,
    queues: Vec<DriverQueue>,
}

/// A request that the device has not answered yet.
pub(crate) struct Pending {
    queue: usize,
    writable: Vec<(u64, usize)>,
}

impl Driver {
    /// Sets all queues of the device up and starts it.
    pub(crate) fn start(device: &mut dyn VirtioDevice) -> Self {
        let memory = memory::create(MEMORY).unwrap();
        let event = || EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).unwrap();
        let queues: Vec<_> = (0..)
            .zip(device.queue_sizes())
            .map(|(index, size)| {
                let at = FIRST_QUEUE + index * QUEUE_STRIDE;
                DriverQueue { at, size, next: 0, kick: event(), call: event() }
            })
            .collect();
        let driver = Self { memory, queues };
        driver.activate(device, Start::Fresh);
        driver
    }

    /// Stops the device, as when it is saved, and has another one go on in its rings.
    pub(crate) fn move_to(&self, old: &mut dyn VirtioDevice, new: &mut dyn VirtioDevice) {
        old.reset();
        new.restore(&old.save()).unwrap();
        self.activate(new, Start::Resumed);
    }

    /// Has a device that was stopped go on.
    pub(crate) fn go_on(&self, device: &mut dyn VirtioDevice) {
        self.activate(device, Start::Resumed);
    }

    fn activate(&self, device: &mut dyn VirtioDevice, start: Start) {
        let active = (0..).zip(&self.queues).map(|(index, queue)| ActiveQueue {
            index,
            size: queue.size,
            descriptors: GuestAddress(queue.at),
            available: GuestAddress(queue.at + AVAILABLE_AT),
            used: GuestAddress(queue.at + USED_AT),
            kick: queue.kick.try_clone().unwrap(),
            call: queue.call.try_clone().unwrap(),
        });
        let features = device.features() & !(1 << VIRTIO_RING_F_EVENT_IDX);
        let activation =
            Activation { features, memory: self.memory.clone(), queues: active.collect(), start };
        device.activate(activation).unwrap();
    }

    /// Makes buffers available and waits until the device has used them.
    pub(crate) fn exchange(&mut self, queue: usize, buffers: &[Buffer]) -> Used {
        let pending = self.offer(queue, buffers);
        self.finish(pending).unwrap_or_else(|| panic!("queue {queue}: not used in time: {buffers:?}"))
    }

    /// Makes buffers available.
    pub(crate) fn offer(&mut self, queue: usize, buffers: &[Buffer]) -> Pending {
        let (index, queue) = (queue, &mut self.queues[queue]);
        let mut data_at = queue.at + BUFFERS_AT;
        let mut writable = Vec::new();
        for (number, buffer) in (0u64..).zip(buffers) {
            let (at, len, flag) = match buffer {
                Buffer::Readable(data) => {
                    self.memory.write_slice(data, GuestAddress(data_at)).unwrap();
                    (data_at, data.len(), 0)
                }
                Buffer::Writable(len) => {
                    self.memory.write_slice(&vec![0xee; *len], GuestAddress(data_at)).unwrap();
                    writable.push((data_at, *len));
                    (data_at, *len, WRITE)
                }
                Buffer::Outside(len) => (MEMORY, *len, 0),
                Buffer::At(at, len) => (*at, *len, WRITE),
            };
            data_at += len as u64;
            let more = if number + 1 < buffers.len() as u64 { NEXT } else { 0 };
            let descriptor = GuestAddress(queue.at + number * 16);
            let mut bytes = at.to_le_bytes().to_vec();
            bytes.extend_from_slice(&(len as u32).to_le_bytes());
            bytes.extend_from_slice(&(flag | more).to_le_bytes());
            bytes.extend_from_slice(&(number as u16 + 1).to_le_bytes());
            self.memory.write_slice(&bytes, descriptor).unwrap();
        }
        let slot = u64::from(queue.next % queue.size);
        self.memory.write_obj(0u16, GuestAddress(queue.at + AVAILABLE_AT + 4 + slot * 2)).unwrap();
        queue.next = queue.next.wrapping_add(1);
        self.memory.write_obj(queue.next, GuestAddress(queue.at + AVAILABLE_AT + 2)).unwrap();
        queue.kick.write(1).unwrap();
        Pending { queue: index, writable }
    }

    /// Waits until the device has used these buffers; none when it does not.
    pub(crate) fn finish(&self, pending: Pending) -> Option<Used> {
        let queue = &self.queues[pending.queue];
        let deadline = Instant::now() + DEADLINE;
        while self.memory.read_obj::<u16>(GuestAddress(queue.at + USED_AT + 2)).unwrap() != queue.next {
            if Instant::now() > deadline {
                return None;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        let slot = u64::from(queue.next.wrapping_sub(1) % queue.size);
        let written = self.memory.read_obj(GuestAddress(queue.at + USED_AT + 8 + slot * 8)).unwrap();
        let mut data = Vec::new();
        for (at, len) in pending.writable {
            let mut part = vec![0; len];
            self.memory.read_slice(&mut part, GuestAddress(at)).unwrap();
            data.extend(part);
        }
        Some(Used { written, data })
    }

    /// Whether the device has used everything so far on a queue.
    pub(crate) fn is_used(&self, queue: usize) -> bool {
        let queue = &self.queues[queue];
        self.memory.read_obj::<u16>(GuestAddress(queue.at + USED_AT + 2)).unwrap() == queue.next
    }
}
