//! I/O through io_uring.
//!
//! Two rings. On one, guests' requests are started under a short lock by whoever has them, and completions are announced by an eventfd that a task on the
//! caller's runtime waits for: no thread in between. The other belongs to whoever blocks (the applier): it puts many requests to the disk at the same time.
//!
//! Invariants: a buffer that the kernel knows is owned by [`Flights`] until its completion was seen, also when the device is dropped; of a request's
//! parts all are waited for before it ends.

use super::buffer::AlignedBuf;
use super::{Device, Done, Finished, Request};
use io_uring::{IoUring, opcode, squeue, types};
use parking_lot::Mutex;
use std::collections::{HashMap, VecDeque};
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Weak};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// Entries of a ring, and requests to the disk at the same time.
const DEPTH: u32 = 256;
/// Before the kernel is asked again.
const RETRY: std::time::Duration = std::time::Duration::from_millis(1);

/// A request with the kernel.
struct Flight {
    request: Request,
    done: Done,
    /// Entries that have no completion yet.
    open: u32,
    error: Option<io::Error>,
}

impl Flight {
    fn end(self) -> (Done, Finished) {
        let finished = match (self.error, self.request) {
            (Some(error), _) => Err(error),
            (None, Request::Read(_, buf)) => Ok(Some(buf)),
            (None, _) => Ok(None),
        };
        (self.done, finished)
    }
}

/// Gives the kernel what is in the submission queue, and waits for so many completions. The kernel may be short of something for a while; what it
/// has or may have of our memory can be told by completions only, so there is no giving up.
fn enter(ring: &IoUring, wait_for: usize) {
    while let Err(error) = ring.submit_and_wait(wait_for) {
        if error.kind() != io::ErrorKind::Interrupted {
            tracing::warn!(%error, "io_uring takes no entries, trying again");
            std::thread::sleep(RETRY);
        }
    }
}

struct Flights {
    ring: IoUring,
    flights: HashMap<u32, Flight>,
    next: u32,
    /// Entries with the kernel.
    entries: u32,
    /// Requests of which the ring took no part.
    refused: Vec<Flight>,
    /// For which there was no room.
    waiting: VecDeque<(Request, Done)>,
}

struct Shared {
    file: File,
    event: EventFd,
    flights: Mutex<Flights>,
}

/// See the module.
pub(super) struct UringDevice {
    shared: Arc<Shared>,
    blocking: Mutex<IoUring>,
    size: u64,
}

/// The lengths of a request's entries, by which a short one is known.
fn lengths(request: &Request) -> Vec<usize> {
    match request {
        Request::Write(_, data) => vec![data.len()],
        Request::Read(pieces, _) => pieces.iter().map(|(_, piece)| piece.len()).collect(),
        Request::Sync => vec![0],
    }
}

impl Flights {
    /// Gives a request to the kernel.
    fn submit(&mut self, file: &File, request: Request, done: Done) {
        let id = self.next;
        self.next = self.next.wrapping_add(1);
        let fd = types::Fd(file.as_raw_fd());
        let lengths = lengths(&request);
        let flight = self.flights.entry(id).or_insert(Flight { request, done, open: 0, error: None });
        for (part, length) in lengths.iter().enumerate() {
            let entry = match &mut flight.request {
                Request::Write(offset, data) => {
                    opcode::Write::new(fd, data.as_ptr(), *length as u32).offset(*offset).build()
                }
                Request::Read(pieces, buf) => {
                    let (offset, piece) = &pieces[part];
                    let to = buf[piece.clone()].as_mut_ptr();
                    opcode::Read::new(fd, to, *length as u32).offset(*offset).build()
                }
                Request::Sync => opcode::Fsync::new(fd).flags(types::FsyncFlags::DATASYNC).build(),
            };
            let entry = entry.user_data(u64::from(id) << 32 | part as u64);
            // SAFETY: the entry's memory is owned by the flight, which stays until all its completions were seen (also in drop), and
            // no other entry uses the same part of it.
            let mut pushed = unsafe { self.ring.submission().push(&entry) }.is_ok();
            if !pushed {
                enter(&self.ring, 0);
                // SAFETY: as above.
                pushed = unsafe { self.ring.submission().push(&entry) }.is_ok();
            }
            if pushed {
                flight.open += 1;
                self.entries += 1;
            } else {
                flight.error.get_or_insert_with(|| io::Error::other("io_uring has no room"));
            }
        }
        if flight.open == 0 {
            self.refused.extend(self.flights.remove(&id));
        }
        enter(&self.ring, 0);
    }

    /// Takes completions, and the requests that ended with them.
    fn reap(&mut self) -> Vec<(Done, Finished)> {
        let mut ended = Vec::new();
        let Self { ring, flights, entries, refused, .. } = self;
        ended.extend(refused.drain(..).map(Flight::end));
        for completion in ring.completion() {
            *entries -= 1;
            let (id, part) = ((completion.user_data() >> 32) as u32, completion.user_data() as u32 as usize);
            let Some(flight) = flights.get_mut(&id) else { continue };
            flight.open -= 1;
            let wanted = lengths(&flight.request).get(part).copied().unwrap_or_default();
            if let Err(error) = outcome(completion.result(), wanted) {
                flight.error.get_or_insert(error);
            }
            if flight.open == 0 {
                ended.extend(flights.remove(&id).map(Flight::end));
            }
        }
        ended
    }
}

fn outcome(result: i32, wanted: usize) -> io::Result<()> {
    match usize::try_from(result) {
        Err(_) => Err(io::Error::from_raw_os_error(-result)),
        Ok(done) if done == wanted => Ok(()),
        Ok(done) => {
            Err(io::Error::new(io::ErrorKind::UnexpectedEof, format!("{done} of {wanted} bytes moved")))
        }
    }
}

impl Shared {
    fn reap(&self) {
        loop {
            let ended = {
                let mut flights = self.flights.lock();
                let ended = flights.reap();
                while flights.entries < DEPTH
                    && let Some((request, done)) = flights.waiting.pop_front()
                {
                    flights.submit(&self.file, request, done);
                }
                ended
            };
            if ended.is_empty() {
                return;
            }
            for (done, finished) in ended {
                done(finished);
            }
        }
    }
}

/// Reaps completions when the eventfd says that there are some, as long as the device lives.
async fn reap(event: EventFd, shared: Weak<Shared>) {
    // SAFETY: the eventfd owns its descriptor and neither closes nor exchanges it while it lives.
    let event = match unsafe { AsyncFd::register_with_interest(event, Interest::READABLE) } {
        Ok(event) => event,
        Err(error) => return tracing::error!(%error, "completions of a disk cannot be waited for"),
    };
    loop {
        match event.readable().await {
            Ok(mut ready) => {
                // What it counts does not matter: all completions are taken.
                let _ = ready.try_io(|event| event.get_ref().read());
            }
            Err(error) => return tracing::error!(%error, "completions of a disk cannot be waited for"),
        }
        let Some(shared) = shared.upgrade() else { return };
        shared.reap();
    }
}

impl UringDevice {
    /// Must be called on the runtime whose tasks start requests; without one only what blocks works.
    pub(super) fn new(file: File, size: u64) -> io::Result<Self> {
        let ring = IoUring::new(DEPTH)?;
        let event = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?;
        ring.submitter().register_eventfd(event.as_raw_fd())?;
        let waited = event.try_clone()?;
        let flights = Flights {
            ring,
            flights: HashMap::new(),
            next: 0,
            entries: 0,
            refused: Vec::new(),
            waiting: VecDeque::new(),
        };
        let shared = Arc::new(Shared { file, event, flights: Mutex::new(flights) });
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(reap(waited, Arc::downgrade(&shared)));
        }
        Ok(Self { shared, blocking: Mutex::new(IoUring::new(DEPTH)?), size })
    }

    /// Puts entries to the disk, as many as fit at the same time, and waits for all. The memory of the entries must stay until the return.
    fn block_on(&self, entries: &mut dyn Iterator<Item = (squeue::Entry, usize)>) -> io::Result<()> {
        let mut ring = self.blocking.lock();
        let mut result = Ok(());
        loop {
            let mut wanted = Vec::new();
            for (entry, length) in entries.take(DEPTH as usize) {
                let entry = entry.user_data(wanted.len() as u64);
                // SAFETY: callers keep the memory until this returns, and this returns after all completions only.
                if unsafe { ring.submission().push(&entry) }.is_ok() {
                    wanted.push(length);
                } else {
                    result = Err(io::Error::other("io_uring has no room"));
                }
            }
            if wanted.is_empty() {
                return result;
            }
            let mut open = wanted.len();
            while open > 0 {
                enter(&ring, 1);
                for completion in ring.completion() {
                    open -= 1;
                    let length = wanted.get(completion.user_data() as usize).copied().unwrap_or_default();
                    result = result.and(outcome(completion.result(), length));
                }
            }
        }
    }

    fn fd(&self) -> types::Fd {
        types::Fd(self.shared.file.as_raw_fd())
    }
}

impl Device for UringDevice {
    fn size(&self) -> u64 {
        self.size
    }

    fn start(&self, request: Request, done: Done) {
        {
            let mut flights = self.shared.flights.lock();
            if flights.entries < DEPTH {
                flights.submit(&self.shared.file, request, done);
            } else {
                flights.waiting.push_back((request, done));
            }
        }
        self.shared.reap();
    }

    fn read(&self, reads: &mut [(u64, AlignedBuf)]) -> io::Result<()> {
        let fd = self.fd();
        let mut entries = reads.iter_mut().map(|(offset, buf)| {
            (opcode::Read::new(fd, buf.as_mut_ptr(), buf.len() as u32).offset(*offset).build(), buf.len())
        });
        self.block_on(&mut entries)
    }

    fn write(&self, writes: &[(u64, &[u8])]) -> io::Result<()> {
        let fd = self.fd();
        let mut entries = writes.iter().map(|(offset, bytes)| {
            (opcode::Write::new(fd, bytes.as_ptr(), bytes.len() as u32).offset(*offset).build(), bytes.len())
        });
        self.block_on(&mut entries)
    }

    fn sync(&self) -> io::Result<()> {
        self.shared.file.sync_data()
    }

    fn quiesce(&self) {
        loop {
            let flights = self.shared.flights.lock();
            if flights.entries == 0 {
                return;
            }
            enter(&flights.ring, 1);
            drop(flights);
            self.shared.reap();
        }
    }
}

impl Drop for UringDevice {
    fn drop(&mut self) {
        // The kernel may still write into buffers of reads under way.
        let mut flights = self.shared.flights.lock();
        while flights.entries > 0 {
            enter(&flights.ring, 1);
            drop(flights.reap());
        }
        flights.waiting.clear();
        // That task may have the file for another moment; whoever opens it next must not see that.
        let _ = self.shared.file.unlock();
        // The task that reaps sees that the device is gone.
        let _ = self.shared.event.write(1);
    }
}
