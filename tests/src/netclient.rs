//! A vhost-user-net front end without a VM: sends and receives raw frames at a port of the overlay, as a guest's driver
//! would. For tests, and under a TAP device for benchmarks.
//!
//! Guest memory is a memfd of which each queue has a part: the ring, then one buffer for each descriptor. A frame
//! uses one descriptor to send, and as many as it needs to receive.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_net::VIRTIO_NET_F_MRG_RXBUF;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Length of the virtio-net header before each frame.
pub const VNET_HEADER: usize = 12;
/// Room for the largest super-frame with its header, in whole pages.
pub const SUPER_FRAME_BUFFER: usize = 68 << 10;

const RX: usize = 0;
const TX: usize = 1;
const PAGE: u64 = 4096;
const DESCRIPTOR_WRITE: u16 = 2;
const NO_NOTIFY: u16 = 1;

/// What the client is as a device driver.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// Virtio features to take, of those offered. Version 1 is always taken.
    pub features: u64,
    /// Descriptors in each ring: a power of two.
    pub queue_size: u16,
    /// Bytes of each receive buffer. Without mergeable buffers a frame has to fit into one.
    pub rx_buffer: usize,
}

/// Makes a feature mask of feature numbers.
pub fn features(numbers: &[u32]) -> u64 {
    numbers.iter().fold(0, |mask, number| mask | 1 << number)
}

/// A connected client.
pub struct NetClient {
    /// What the guest sends through.
    pub tx: Sender,
    /// What the guest receives through.
    pub rx: Receiver,
    features: u64,
    connection: Frontend,
}

/// A frame with its virtio-net header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// As it lay in the ring; `num_buffers` included.
    pub header: [u8; VNET_HEADER],
    /// The Ethernet frame.
    pub data: Vec<u8>,
}

impl Frame {
    /// A frame in which nothing is left to do.
    pub fn plain(data: Vec<u8>) -> Self {
        Self { header: [0; VNET_HEADER], data }
    }
}

impl NetClient {
    /// Connects to a port's socket and starts the rings.
    pub fn connect(socket: &Path, options: Options) -> Result<Self> {
        let mut connection = Frontend::connect(socket, 2)
            .map_err(|error| anyhow!("cannot connect to {}: {error}", socket.display()))?;
        let step = |what: &'static str| move |error| anyhow!("{what}: {error}");
        connection.set_owner().map_err(step("SET_OWNER"))?;
        let offered = connection.get_features().map_err(step("GET_FEATURES"))?;
        let protocol = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        ensure!(offered & protocol != 0, "the port has no protocol features");
        let features = offered & (options.features | 1 << VIRTIO_F_VERSION_1);
        connection.get_protocol_features().map_err(|e| anyhow!("GET_PROTOCOL_FEATURES: {e}"))?;
        connection
            .set_protocol_features(VhostUserProtocolFeatures::empty())
            .map_err(|e| anyhow!("SET_PROTOCOL_FEATURES: {e}"))?;
        connection.set_features(features | protocol).map_err(step("SET_FEATURES"))?;

        let rx_layout = Layout::new(0, options.queue_size, options.rx_buffer);
        let tx_layout = Layout::new(rx_layout.end(), options.queue_size, SUPER_FRAME_BUFFER);
        let memory = share_memory(&connection, tx_layout.end())?;
        let event_idx = features & 1 << VIRTIO_RING_F_EVENT_IDX != 0;
        let rx = Queue::start(&mut connection, RX, &memory, rx_layout, event_idx)?;
        let tx = Queue::start(&mut connection, TX, &memory, tx_layout, event_idx)?;
        let mergeable = features & 1 << VIRTIO_NET_F_MRG_RXBUF != 0;
        let mut rx = Receiver { queue: rx, mergeable };
        for index in 0..options.queue_size {
            rx.queue.describe(index, options.rx_buffer as u32, DESCRIPTOR_WRITE)?;
            rx.queue.offer(index)?;
        }
        rx.queue.kick()?;
        let free = (0..options.queue_size).collect();
        Ok(Self { tx: Sender { queue: tx, free }, rx, features, connection })
    }

    /// The features that are in force.
    pub fn features(&self) -> u64 {
        self.features
    }

    /// Sends a frame.
    pub fn send(&mut self, frame: &Frame) -> Result<()> {
        self.tx.send(frame)
    }

    /// Receives the next frame; none within `timeout`.
    pub fn receive(&mut self, timeout: Duration) -> Result<Option<Frame>> {
        self.rx.receive(timeout)
    }

    /// Takes the client apart, to send and receive on two threads. The port is connected while the connection lives.
    pub fn split(self) -> (Sender, Receiver, impl Send) {
        (self.tx, self.rx, self.connection)
    }
}

/// A memfd of zeroes, shared with the port.
fn share_memory(connection: &Frontend, size: u64) -> Result<Arc<GuestMemoryMmap>> {
    let file = nix::sys::memfd::memfd_create(c"guest", nix::sys::memfd::MFdFlags::MFD_CLOEXEC)?;
    let file = File::from(file);
    file.set_len(size)?;
    let fd = file.as_raw_fd();
    let range = (GuestAddress(0), usize::try_from(size)?, Some(FileOffset::new(file, 0)));
    let memory: GuestMemoryMmap = GuestMemoryMmap::from_ranges_with_files([range])?;
    let region = VhostUserMemoryRegionInfo {
        guest_phys_addr: 0,
        memory_size: size,
        userspace_addr: memory.get_host_address(GuestAddress(0))? as u64,
        mmap_offset: 0,
        mmap_handle: fd,
    };
    connection.set_mem_table(&[region]).map_err(|error| anyhow!("SET_MEM_TABLE: {error}"))?;
    Ok(Arc::new(memory))
}

/// Where things are in a queue's part of memory.
#[derive(Clone, Copy)]
struct Layout {
    start: u64,
    size: u16,
    buffer: u64,
}

impl Layout {
    fn new(start: u64, size: u16, buffer: usize) -> Self {
        Self { start, size, buffer: buffer as u64 }
    }

    fn descriptor(&self, index: u16) -> GuestAddress {
        GuestAddress(self.start + 16 * u64::from(index))
    }

    fn avail(&self, offset: u64) -> GuestAddress {
        GuestAddress(self.start + 16 * u64::from(self.size) + offset)
    }

    fn used(&self, offset: u64) -> GuestAddress {
        let end = self.avail(6 + 2 * u64::from(self.size)).0;
        GuestAddress(end.next_multiple_of(4) + offset)
    }

    fn buffer(&self, index: u16) -> GuestAddress {
        let end = self.used(6 + 8 * u64::from(self.size)).0;
        GuestAddress(end.next_multiple_of(PAGE) + self.buffer * u64::from(index))
    }

    fn end(&self) -> u64 {
        self.buffer(self.size).0.next_multiple_of(PAGE)
    }
}

/// The driver's side of a ring.
struct Queue {
    memory: Arc<GuestMemoryMmap>,
    layout: Layout,
    kick: EventFd,
    call: EventFd,
    event_idx: bool,
    offered: u16,
    kicked: u16,
    taken: u16,
}

impl Queue {
    fn start(
        connection: &mut Frontend,
        index: usize,
        memory: &Arc<GuestMemoryMmap>,
        layout: Layout,
        event_idx: bool,
    ) -> Result<Self> {
        let host = |address| memory.get_host_address(address).map(|pointer| pointer as u64);
        let (kick, call) = (EventFd::new(EFD_NONBLOCK)?, EventFd::new(EFD_NONBLOCK)?);
        let config = VringConfigData {
            queue_max_size: layout.size,
            queue_size: layout.size,
            flags: 0,
            desc_table_addr: host(layout.descriptor(0))?,
            used_ring_addr: host(layout.used(0))?,
            avail_ring_addr: host(layout.avail(0))?,
            log_addr: None,
        };
        let step = |what: &'static str| move |error| anyhow!("{what} of queue {index}: {error}");
        connection.set_vring_num(index, layout.size).map_err(step("SET_VRING_NUM"))?;
        connection.set_vring_addr(index, &config).map_err(step("SET_VRING_ADDR"))?;
        connection.set_vring_base(index, 0).map_err(step("SET_VRING_BASE"))?;
        connection.set_vring_call(index, &call).map_err(step("SET_VRING_CALL"))?;
        connection.set_vring_kick(index, &kick).map_err(step("SET_VRING_KICK"))?;
        connection
            .set_vring_enable(index, true)
            .map_err(|error| anyhow!("SET_VRING_ENABLE of queue {index}: {error}"))?;
        let memory = memory.clone();
        Ok(Self { memory, layout, kick, call, event_idx, offered: 0, kicked: 0, taken: 0 })
    }

    fn describe(&self, index: u16, length: u32, flags: u16) -> Result<()> {
        let at = self.layout.descriptor(index);
        self.memory.write_obj(self.layout.buffer(index).0, at)?;
        self.memory.write_obj(length, GuestAddress(at.0 + 8))?;
        self.memory.write_obj(flags, GuestAddress(at.0 + 12))?;
        Ok(())
    }

    fn offer(&mut self, head: u16) -> Result<()> {
        let slot = u64::from(self.offered % self.layout.size);
        self.memory.write_obj(head, self.layout.avail(4 + 2 * slot))?;
        self.offered = self.offered.wrapping_add(1);
        self.memory.store(self.offered, self.layout.avail(2), Ordering::Release)?;
        Ok(())
    }

    /// Tells the port about what was offered, if it wants to know.
    fn kick(&mut self) -> Result<()> {
        fence(Ordering::SeqCst);
        let wanted = if self.event_idx {
            let at = self.layout.used(4 + 8 * u64::from(self.layout.size));
            let event: u16 = self.memory.load(at, Ordering::Relaxed)?;
            let (new, old) = (self.offered, self.kicked);
            new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            let flags: u16 = self.memory.load(self.layout.used(0), Ordering::Relaxed)?;
            flags & NO_NOTIFY == 0
        };
        self.kicked = self.offered;
        if wanted {
            self.kick.write(1)?;
        }
        Ok(())
    }

    /// Takes what the port gave back next: head and length.
    fn take(&mut self) -> Result<Option<(u16, u32)>> {
        let index: u16 = self.memory.load(self.layout.used(2), Ordering::Acquire)?;
        if index == self.taken {
            return Ok(None);
        }
        let at = self.layout.used(4 + 8 * u64::from(self.taken % self.layout.size));
        let head: u32 = self.memory.read_obj(at)?;
        let length: u32 = self.memory.read_obj(GuestAddress(at.0 + 4))?;
        ensure!(head < u32::from(self.layout.size), "the port gave back descriptor {head}");
        self.taken = self.taken.wrapping_add(1);
        Ok(Some((head as u16, length)))
    }

    /// Waits until the port has given something back; false if it has not by the deadline.
    fn wait(&mut self, deadline: Instant) -> Result<bool> {
        loop {
            let is_there = |queue: &Self| -> Result<bool> {
                Ok(queue.memory.load::<u16>(queue.layout.used(2), Ordering::Acquire)? != queue.taken)
            };
            if is_there(self)? {
                return Ok(true);
            }
            // Ask for an interrupt, then look again: it may have come in between.
            let event = self.layout.avail(4 + 2 * u64::from(self.layout.size));
            self.memory.store(self.taken, event, Ordering::Release)?;
            fence(Ordering::SeqCst);
            if is_there(self)? {
                return Ok(true);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(false);
            }
            let timeout = PollTimeout::try_from(left + Duration::from_millis(1))?;
            // SAFETY: the event is open for as long as `self` is borrowed.
            let call = unsafe { std::os::fd::BorrowedFd::borrow_raw(self.call.as_raw_fd()) };
            poll(&mut [PollFd::new(call.as_fd(), PollFlags::POLLIN)], timeout)?;
            // Nothing to read if the wait timed out.
            let _ = self.call.read();
        }
    }
}

/// The sending half.
pub struct Sender {
    queue: Queue,
    free: Vec<u16>,
}

impl Sender {
    /// Sends a frame; waits up to 5 s for room in the ring.
    pub fn send(&mut self, frame: &Frame) -> Result<()> {
        let length = VNET_HEADER + frame.data.len();
        ensure!(length <= SUPER_FRAME_BUFFER, "a frame of {} bytes does not fit", frame.data.len());
        let slot = self.slot()?;
        let at = self.queue.layout.buffer(slot);
        self.queue.memory.write_slice(&frame.header, at)?;
        self.queue.memory.write_slice(&frame.data, GuestAddress(at.0 + VNET_HEADER as u64))?;
        self.commit(slot, length)
    }

    /// Sends what one `read` of a file returns: header and frame. Returns its length.
    pub fn send_from(&mut self, file: &File) -> Result<usize> {
        let slot = self.slot()?;
        let area = self.queue.memory.get_slice(self.queue.layout.buffer(slot), SUPER_FRAME_BUFFER)?;
        let read = read_once(file, &area);
        match read {
            Ok(length) => {
                self.commit(slot, length)?;
                Ok(length)
            }
            Err(error) => {
                self.free.push(slot);
                Err(error)
            }
        }
    }

    /// A free buffer.
    fn slot(&mut self) -> Result<u16> {
        let deadline = Instant::now() + Duration::from_secs(5);
        loop {
            if let Some(slot) = self.free.pop() {
                return Ok(slot);
            }
            if !self.queue.wait(deadline)? {
                bail!("the port took nothing from the ring for 5 s");
            }
            while let Some((head, _)) = self.queue.take()? {
                self.free.push(head);
            }
        }
    }

    fn commit(&mut self, slot: u16, length: usize) -> Result<()> {
        self.queue.describe(slot, length as u32, 0)?;
        self.queue.offer(slot)?;
        self.queue.kick()
    }
}

/// The receiving half.
pub struct Receiver {
    queue: Queue,
    mergeable: bool,
}

impl Receiver {
    /// Receives the next frame; none within `timeout`.
    pub fn receive(&mut self, timeout: Duration) -> Result<Option<Frame>> {
        if !self.queue.wait(Instant::now() + timeout)? {
            return Ok(None);
        }
        let mut bytes = Vec::new();
        let mut left = 1;
        while left > 0 {
            let (head, length) = self.queue.take()?.context("the port published a part of a frame")?;
            let start = bytes.len();
            bytes.resize(start + length as usize, 0);
            self.queue.memory.read_slice(&mut bytes[start..], self.queue.layout.buffer(head))?;
            if start == 0 && self.mergeable {
                ensure!(bytes.len() >= VNET_HEADER, "the first buffer of a frame holds {length} bytes");
                left = u16::from_le_bytes([bytes[10], bytes[11]]);
            }
            left -= 1;
            self.queue.offer(head)?;
        }
        self.queue.kick()?;
        let (header, data) = bytes.split_first_chunk().context("a frame without a header")?;
        Ok(Some(Frame { header: *header, data: data.to_vec() }))
    }

    /// Gives each frame, header first, to one `write` of a file until there are no more; false if none came in time.
    /// Only without mergeable buffers.
    pub fn receive_into(&mut self, file: &File, timeout: Duration) -> Result<bool> {
        if !self.queue.wait(Instant::now() + timeout)? {
            return Ok(false);
        }
        while let Some((head, length)) = self.queue.take()? {
            if length > 0 {
                let area = self.queue.memory.get_slice(self.queue.layout.buffer(head), length as usize)?;
                write_once(file, &area)?;
            }
            self.queue.offer(head)?;
            self.queue.kick()?;
        }
        Ok(true)
    }
}

type Area<'a> = vm_memory::VolatileSlice<'a>;

fn read_once(mut file: &File, area: &Area<'_>) -> Result<usize> {
    use vm_memory::ReadVolatile;
    Ok(file.read_volatile(&mut area.subslice(0, area.len())?)?)
}

fn write_once(mut file: &File, area: &Area<'_>) -> Result<usize> {
    use vm_memory::WriteVolatile;
    Ok(file.write_volatile(area)?)
}
