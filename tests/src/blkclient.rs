//! A vhost-user-blk client of our own: a virtio driver and a front end in one process, without a VM.
//!
//! It does what a guest and its VMM do together: rings in shared memory, kicks and calls through eventfds, and it connects again,
//! with the same memory and the same rings, when the target went away. Requests that are in flight then stay so: it is the target's task to
//! answer each of them, once.

use anyhow::{Context, Result, bail, ensure};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::memfd::{MFdFlags, memfd_create};
use std::fs::File;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};
use vhost::vhost_user::message::{VhostUserConfigFlags, VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
    MmapRegion,
};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

const QUEUE_SIZE: u16 = 256;
/// Descriptors of one request: header, data, status.
const CHAIN: u16 = 3;
/// Requests in flight on one queue at most.
pub const MAX_DEPTH: u16 = QUEUE_SIZE / CHAIN;
/// Where a queue's parts are within its memory.
const AVAIL: u64 = 0x1000;
const USED: u64 = 0x2000;
const HEADERS: u64 = 0x3000;
const STATUSES: u64 = 0x5000;
const DATA: u64 = 0x6000;

/// How a client works.
#[derive(Clone, Debug)]
pub struct Options {
    /// Queues.
    pub queues: u16,
    /// Requests in flight on each, at most [`MAX_DEPTH`].
    pub depth: u16,
    /// Data of a request in bytes at most.
    pub buffer: u32,
    /// How long a request may take, the target's absences included.
    pub patience: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self { queues: 1, depth: 32, buffer: 64 << 10, patience: Duration::from_secs(30) }
    }
}

/// What to do. Offsets and lengths in bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Op {
    /// Read.
    Read {
        /// Where.
        offset: u64,
        /// How much.
        len: u32,
    },
    /// Write.
    Write {
        /// Where.
        offset: u64,
        /// What.
        data: Vec<u8>,
    },
    /// Flush.
    Flush,
    /// Discard.
    Discard {
        /// Where.
        offset: u64,
        /// How much.
        len: u64,
    },
    /// Write zeroes.
    WriteZeroes {
        /// Where.
        offset: u64,
        /// How much.
        len: u64,
    },
    /// Ask for the serial number.
    Serial,
}

/// A request that was answered.
#[derive(Clone, Debug)]
pub struct Done {
    /// The tag given with it.
    pub tag: u64,
    /// Its status byte: 0 is success.
    pub status: u8,
    /// What was read.
    pub data: Vec<u8>,
    /// From submission to answer.
    pub latency: Duration,
}

struct Pending {
    tag: u64,
    read: u32,
    since: Instant,
}

struct Queue {
    base: u64,
    kick: EventFd,
    call: EventFd,
    avail: u16,
    used: u16,
    slots: Vec<Option<Pending>>,
}

/// See the module.
pub struct BlkClient {
    socket: PathBuf,
    options: Options,
    memory: GuestMemoryMmap,
    queues: Vec<Queue>,
    front_end: Frontend,
    reconnects: u32,
}

impl BlkClient {
    /// Connects and starts the queues.
    pub fn connect(socket: &Path, options: Options) -> Result<Self> {
        ensure!((1..=MAX_DEPTH).contains(&options.depth), "depth {}", options.depth);
        let queue_bytes =
            (DATA + u64::from(options.depth) * u64::from(options.buffer)).next_multiple_of(4096);
        let total = queue_bytes * u64::from(options.queues);
        let file = File::from(memfd_create("blkclient", MFdFlags::MFD_CLOEXEC)?);
        file.set_len(total)?;
        let region = MmapRegion::from_file(FileOffset::new(file, 0), total as usize)?;
        let region = GuestRegionMmap::new(region, GuestAddress(0)).context("memory region")?;
        let memory = GuestMemoryMmap::from_regions(vec![region])?;
        let queues = (0..u64::from(options.queues)).map(|index| {
            Ok(Queue {
                base: index * queue_bytes,
                kick: EventFd::new(EFD_NONBLOCK)?,
                call: EventFd::new(EFD_NONBLOCK)?,
                avail: 0,
                used: 0,
                slots: (0..options.depth).map(|_| None).collect(),
            })
        });
        let queues = queues.collect::<Result<Vec<_>>>()?;
        let front_end = start(socket, &memory, &queues)?;
        Ok(Self { socket: socket.to_owned(), options, memory, queues, front_end, reconnects: 0 })
    }

    /// How often it had to connect again.
    pub fn reconnects(&self) -> u32 {
        self.reconnects
    }

    /// Size of the device in bytes.
    pub fn size(&mut self) -> Result<u64> {
        let config = self.config()?;
        Ok(u64::from_le_bytes(config[..8].try_into()?) * 512)
    }

    /// The device's configuration space.
    pub fn config(&mut self) -> Result<[u8; 60]> {
        let (_, bytes) = self.front_end.get_config(0, 60, VhostUserConfigFlags::WRITABLE, &[0; 60])?;
        Ok(bytes.as_slice().try_into()?)
    }

    /// Stops the queues in order, as a VMM does when the guest resets the device, and starts them anew.
    pub fn restart_queues(&mut self) -> Result<()> {
        for (index, queue) in self.queues.iter_mut().enumerate() {
            self.front_end.get_vring_base(index)?;
            (queue.avail, queue.used) = (0, 0);
            self.memory.write_slice(&[0; 0x2000], GuestAddress(queue.base + AVAIL))?;
        }
        start_queues(&mut self.front_end, &self.memory, &self.queues)
    }

    /// Requests in flight on a queue.
    pub fn in_flight(&self, queue: usize) -> usize {
        self.queues[queue].slots.iter().flatten().count()
    }

    /// Gives a request to the target; the queue must have room.
    pub fn submit(&mut self, queue: usize, tag: u64, op: &Op) -> Result<()> {
        let buffer = u64::from(self.options.buffer);
        let memory = &self.memory;
        let queue = &mut self.queues[queue];
        let slot = queue.slots.iter().position(Option::is_none).context("the queue is full")?;
        let data_at = queue.base + DATA + slot as u64 * buffer;
        let (kind, sector, payload, read) = match op {
            Op::Read { offset, len } => (0u32, offset / 512, Vec::new(), *len),
            Op::Write { offset, data } => (1, offset / 512, data.clone(), 0),
            Op::Flush => (4, 0, Vec::new(), 0),
            Op::Serial => (8, 0, Vec::new(), 20),
            Op::Discard { offset, len } => (11, 0, range(*offset, *len), 0),
            Op::WriteZeroes { offset, len } => (13, 0, range(*offset, *len), 0),
        };
        ensure!(payload.len() as u64 <= buffer && u64::from(read) <= buffer, "larger than the buffer");
        let header_at = queue.base + HEADERS + slot as u64 * 16;
        let status_at = queue.base + STATUSES + slot as u64;
        let mut header = [0; 16];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..].copy_from_slice(&sector.to_le_bytes());
        memory.write_slice(&header, GuestAddress(header_at))?;
        memory.write_slice(&payload, GuestAddress(data_at))?;
        memory.write_slice(&[0xff], GuestAddress(status_at))?;
        let head = slot as u16 * CHAIN;
        let mut chain = vec![(header_at, 16, 0)];
        if read > 0 || !payload.is_empty() {
            chain.push((data_at, read.max(payload.len() as u32), if read > 0 { 2 } else { 0 }));
        }
        chain.push((status_at, 1, 2));
        for (i, (address, len, flags)) in chain.iter().enumerate() {
            let last = i + 1 == chain.len();
            let mut descriptor = [0; 16];
            descriptor[..8].copy_from_slice(&address.to_le_bytes());
            descriptor[8..12].copy_from_slice(&u32::to_le_bytes(*len));
            descriptor[12..14].copy_from_slice(&(flags | u16::from(!last)).to_le_bytes());
            descriptor[14..].copy_from_slice(&(head + i as u16 + 1).to_le_bytes());
            memory.write_slice(&descriptor, GuestAddress(queue.base + u64::from(head + i as u16) * 16))?;
        }
        let entry = queue.base + AVAIL + 4 + u64::from(queue.avail % QUEUE_SIZE) * 2;
        memory.write_obj(head, GuestAddress(entry))?;
        let old = queue.avail;
        queue.avail = old.wrapping_add(1);
        memory.store(queue.avail, GuestAddress(queue.base + AVAIL + 2), Ordering::SeqCst)?;
        queue.slots[slot] = Some(Pending { tag, read, since: Instant::now() });
        // Kick when the target asked to be told of this entry.
        std::sync::atomic::fence(Ordering::SeqCst);
        let event_at = queue.base + USED + 4 + u64::from(QUEUE_SIZE) * 8;
        let event: u16 = memory.load(GuestAddress(event_at), Ordering::SeqCst)?;
        if event == old {
            queue.kick.write(1)?;
        }
        Ok(())
    }

    /// Takes the answers that are there.
    pub fn reap(&mut self, queue: usize) -> Result<Vec<Done>> {
        let buffer = u64::from(self.options.buffer);
        let memory = &self.memory;
        let queue = &mut self.queues[queue];
        let mut out = Vec::new();
        loop {
            let used: u16 = memory.load(GuestAddress(queue.base + USED + 2), Ordering::SeqCst)?;
            while queue.used != used {
                let at = queue.base + USED + 4 + u64::from(queue.used % QUEUE_SIZE) * 8;
                let id: u32 = memory.read_obj(GuestAddress(at))?;
                queue.used = queue.used.wrapping_add(1);
                let slot = id as usize / usize::from(CHAIN);
                let pending = queue.slots.get_mut(slot).and_then(Option::take);
                let pending = pending.with_context(|| format!("answer to {id}, which is not in flight"))?;
                let mut data = vec![0; pending.read as usize];
                memory.read_slice(&mut data, GuestAddress(queue.base + DATA + slot as u64 * buffer))?;
                let status = memory.read_obj(GuestAddress(queue.base + STATUSES + slot as u64))?;
                out.push(Done { tag: pending.tag, status, data, latency: pending.since.elapsed() });
            }
            // Ask for a call at the next answer, and look once more: it may have come before.
            let event_at = queue.base + AVAIL + 4 + u64::from(QUEUE_SIZE) * 2;
            memory.store(queue.used, GuestAddress(event_at), Ordering::SeqCst)?;
            std::sync::atomic::fence(Ordering::SeqCst);
            let now: u16 = memory.load(GuestAddress(queue.base + USED + 2), Ordering::SeqCst)?;
            if now == queue.used {
                return Ok(out);
            }
        }
    }

    /// Waits for an answer on any queue; connects again when the target has gone.
    pub fn wait(&mut self, limit: Duration) -> Result<()> {
        let gone = {
            // SAFETY: the front end owns this descriptor and outlives the call.
            let socket = unsafe { BorrowedFd::borrow_raw(self.front_end.as_raw_fd()) };
            let mut fds = vec![PollFd::new(socket, PollFlags::POLLIN)];
            for queue in &self.queues {
                // SAFETY: the queue owns this descriptor and outlives the call.
                let call = unsafe { BorrowedFd::borrow_raw(queue.call.as_raw_fd()) };
                fds.push(PollFd::new(call, PollFlags::POLLIN));
            }
            poll(&mut fds, PollTimeout::try_from(limit).unwrap_or(PollTimeout::MAX))?;
            fds[0].any().unwrap_or(true)
        };
        for queue in &self.queues {
            // An empty counter is no error: another queue was called.
            let _ = queue.call.read();
        }
        if gone { self.reconnect() } else { Ok(()) }
    }

    fn reconnect(&mut self) -> Result<()> {
        let deadline = Instant::now() + self.options.patience;
        loop {
            match start(&self.socket, &self.memory, &self.queues) {
                Ok(front_end) => {
                    self.front_end = front_end;
                    self.reconnects += 1;
                    return Ok(());
                }
                Err(error) if Instant::now() > deadline => return Err(error.context("the target stays away")),
                Err(_) => thread::sleep(Duration::from_millis(10)),
            }
        }
    }

    /// Does one request and waits for its answer.
    pub fn call(&mut self, op: &Op) -> Result<Done> {
        let deadline = Instant::now() + self.options.patience;
        ensure!(self.in_flight(0) == 0, "other requests are in flight");
        self.submit(0, 0, op)?;
        loop {
            if let Some(done) = self.reap(0)?.pop() {
                return Ok(done);
            }
            ensure!(Instant::now() < deadline, "no answer to {op:?} within {:?}", self.options.patience);
            self.wait(Duration::from_millis(100))?;
        }
    }

    /// Reads.
    pub fn read(&mut self, offset: u64, len: u32) -> Result<Vec<u8>> {
        let done = self.call(&Op::Read { offset, len })?;
        ensure!(done.status == 0, "read at {offset}: status {}", done.status);
        Ok(done.data)
    }

    /// Writes.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> Result<()> {
        self.expect_ok(&Op::Write { offset, data: data.to_vec() })
    }

    /// Flushes.
    pub fn flush(&mut self) -> Result<()> {
        self.expect_ok(&Op::Flush)
    }

    /// Does a request that must succeed.
    pub fn expect_ok(&mut self, op: &Op) -> Result<()> {
        match self.call(op)?.status {
            0 => Ok(()),
            status => bail!("{op:?}: status {status}"),
        }
    }

    /// Runs a load: keeps `depth` requests of `next` in flight on each queue until it returns `None`, and hands the answers to `check`.
    pub fn load(
        &mut self,
        mut next: impl FnMut() -> Option<(u64, Op)>,
        mut check: impl FnMut(Done) -> Result<()>,
    ) -> Result<LoadReport> {
        let started = Instant::now();
        let mut last = started;
        let mut report = LoadReport::default();
        let mut more = true;
        loop {
            for queue in 0..self.queues.len() {
                for done in self.reap(queue)? {
                    let now = Instant::now();
                    report.longest_gap = report.longest_gap.max(now - last);
                    last = now;
                    report.latencies.push(done.latency);
                    check(done)?;
                }
                while more && self.in_flight(queue) < usize::from(self.options.depth) {
                    match next() {
                        Some((tag, op)) => self.submit(queue, tag, &op)?,
                        None => more = false,
                    }
                }
            }
            if !more && (0..self.queues.len()).all(|queue| self.in_flight(queue) == 0) {
                break;
            }
            ensure!(last.elapsed() < self.options.patience, "no answer for {:?}", last.elapsed());
            self.wait(Duration::from_millis(50))?;
        }
        report.elapsed = started.elapsed();
        report.latencies.sort_unstable();
        Ok(report)
    }
}

/// The figures of a load.
#[derive(Clone, Debug, Default)]
pub struct LoadReport {
    /// How long it ran.
    pub elapsed: Duration,
    /// Latency of each request, ascending.
    pub latencies: Vec<Duration>,
    /// The longest time without any answer.
    pub longest_gap: Duration,
}

impl LoadReport {
    /// Requests per second.
    pub fn rate(&self) -> f64 {
        self.latencies.len() as f64 / self.elapsed.as_secs_f64()
    }

    /// The mean latency.
    pub fn mean(&self) -> Duration {
        self.latencies.iter().sum::<Duration>() / self.latencies.len().max(1) as u32
    }

    /// The latency that a share of the requests (0 to 1) did not exceed.
    pub fn percentile(&self, share: f64) -> Duration {
        let at = (self.latencies.len() as f64 * share) as usize;
        self.latencies.get(at.min(self.latencies.len().saturating_sub(1))).copied().unwrap_or_default()
    }
}

/// The payload of a discard or write-zeroes.
fn range(offset: u64, len: u64) -> Vec<u8> {
    let mut out = (offset / 512).to_le_bytes().to_vec();
    out.extend_from_slice(&((len / 512) as u32).to_le_bytes());
    out.extend_from_slice(&[0; 4]);
    out
}

fn start(socket: &Path, memory: &GuestMemoryMmap, queues: &[Queue]) -> Result<Frontend> {
    let mut front_end = Frontend::connect(socket, queues.len() as u64)?;
    front_end.set_owner()?;
    let offered = front_end.get_features()?;
    let wanted = 1 << VIRTIO_F_VERSION_1
        | 1 << VIRTIO_RING_F_EVENT_IDX
        | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
    ensure!(offered & wanted == wanted, "features {offered:#x}");
    let protocol = front_end.get_protocol_features()?;
    front_end.set_protocol_features(
        protocol & (VhostUserProtocolFeatures::CONFIG | VhostUserProtocolFeatures::MQ),
    )?;
    // All that is offered, as a guest's driver takes all that it knows.
    front_end.set_features(offered)?;
    let regions: Vec<_> =
        memory.iter().map(VhostUserMemoryRegionInfo::from_guest_region).collect::<vhost::Result<_>>()?;
    front_end.set_mem_table(&regions)?;
    start_queues(&mut front_end, memory, queues)?;
    Ok(front_end)
}

fn start_queues(front_end: &mut Frontend, memory: &GuestMemoryMmap, queues: &[Queue]) -> Result<()> {
    let region = memory.iter().next().context("no memory")?;
    let host = region.as_ptr() as u64;
    for (index, queue) in queues.iter().enumerate() {
        front_end.set_vring_num(index, QUEUE_SIZE)?;
        let used: u16 = memory.load(GuestAddress(queue.base + USED + 2), Ordering::SeqCst)?;
        // What a VMM without a record of its own knows; requests in flight lie behind it.
        front_end.set_vring_base(index, used)?;
        front_end.set_vring_addr(
            index,
            &VringConfigData {
                queue_max_size: QUEUE_SIZE,
                queue_size: QUEUE_SIZE,
                flags: 0,
                desc_table_addr: host + queue.base,
                used_ring_addr: host + queue.base + USED,
                avail_ring_addr: host + queue.base + AVAIL,
                log_addr: None,
            },
        )?;
        front_end.set_vring_call(index, &queue.call)?;
        front_end.set_vring_kick(index, &queue.kick)?;
        front_end.set_vring_enable(index, true)?;
    }
    ensure!(region.len() > 0, "empty memory");
    Ok(())
}
