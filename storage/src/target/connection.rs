//! One connection of a front end: what the vhost-user crate calls, and the queues.
//!
//! Each connection has a backend, queues and one worker thread of the crate's, so that nothing of a broken one is left to the next. The
//! worker sees each ring start, then takes its kicks out of its own epoll set: from there on they go to the queue's task on the device's
//! runtime. The worker ends when the connection does: `handle_event` returns an error then, and only then (it is the crate's way to
//! end a worker).

use super::inflight::InflightRecord;
use super::queue::{Queue, Ring};
use super::request::SERIAL_LEN;
use super::{Access, geometry};
use crate::device::BlockDevice;
use crate::poll::BusyPoll;
use netfabric::dirty_log::{self, DirtyLog, LoggedMemory};
use parking_lot::{Condvar, Mutex};
use std::cell::RefCell;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};
use tokio::runtime::Handle;
use tokio::task::AbortHandle;
use vhost::vhost_user::message::VhostUserProtocolFeatures;
use vhost_user_backend::{ShutdownHandle, VhostUserBackend, VhostUserDaemon, VringEpollHandler, VringT};
use vm_memory::{
    Address, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryBackend, GuestMemoryLoadGuard,
    GuestMemoryRegion,
};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier};

/// How long a front end that stops a ring is kept waiting for its requests.
const DRAIN_LIMIT: Duration = Duration::from_secs(20);

/// Counts what may still touch the rings or the device: requests in the device's hands, workers at work.
#[derive(Default)]
pub(super) struct Outstanding {
    count: Mutex<usize>,
    none: Condvar,
}

impl Outstanding {
    pub(super) fn enter(&self) {
        *self.count.lock() += 1;
    }

    pub(super) fn leave(&self) {
        let mut count = self.count.lock();
        *count -= 1;
        if *count == 0 {
            self.none.notify_all();
        }
    }

    /// Waits until there is none; tells how many there are at the end.
    pub(super) fn wait(&self, limit: Duration) -> usize {
        let deadline = Instant::now() + limit;
        let mut count = self.count.lock();
        while *count > 0 && !self.none.wait_until(&mut count, deadline).timed_out() {}
        *count
    }
}

/// What the queues of a connection share.
pub(super) struct Shared {
    pub(super) device: Arc<dyn BlockDevice>,
    pub(super) access: Access,
    pub(super) serial: [u8; SERIAL_LEN],
    pub(super) record: Arc<InflightRecord>,
    pub(super) poll: Arc<BusyPoll>,
    pub(super) outstanding: Outstanding,
    pub(super) inflight_bytes: AtomicU64,
    memory: GuestMemoryAtomic<LoggedMemory>,
    /// The record belongs to this memory (checked at the first start of a ring).
    identity_checked: Mutex<bool>,
    closed: AtomicBool,
}

impl Shared {
    pub(super) fn new(
        device: Arc<dyn BlockDevice>,
        access: Access,
        serial: [u8; SERIAL_LEN],
        record: Arc<InflightRecord>,
        poll: Arc<BusyPoll>,
    ) -> Self {
        Self {
            device,
            access,
            serial,
            record,
            poll,
            outstanding: Outstanding::default(),
            inflight_bytes: AtomicU64::new(0),
            memory: GuestMemoryAtomic::new(LoggedMemory::new()),
            identity_checked: Mutex::new(false),
            closed: AtomicBool::new(false),
        }
    }

    pub(super) fn memory(&self) -> GuestMemoryLoadGuard<LoggedMemory> {
        self.memory.memory()
    }

    pub(super) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::SeqCst)
    }

    /// Makes sure that the record is of this guest.
    pub(super) fn check_memory_identity(&self) {
        let mut checked = self.identity_checked.lock();
        if !*checked {
            self.record.set_memory(memory_identity(&self.memory()));
            *checked = true;
        }
    }

    fn memory_changed(&self) {
        // The guest of a connection stays the same, whatever is plugged into it.
        if *self.identity_checked.lock() {
            self.record.rename_memory(memory_identity(&self.memory()));
        }
    }
}

/// A number for the memory of one guest: its regions and the files behind them (a new VM has new files). FNV-1a: it must not change
/// between builds, and only guards against mistakes.
fn memory_identity(memory: &LoggedMemory) -> u64 {
    let mut hash = 0xcbf2_9ce4_8422_2325u64;
    let mut add = |n: u64| {
        for byte in n.to_le_bytes() {
            hash = (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
    };
    for region in memory.iter() {
        add(region.start_addr().raw_value());
        add(region.len());
        let file = region.file_offset().and_then(|file| Some((file.file().metadata().ok()?, file.start())));
        if let Some((metadata, start)) = file {
            add(metadata.dev());
            add(metadata.ino());
            add(start);
        }
    }
    hash
}

/// The crate's worker thread of a connection.
type Worker = VringEpollHandler<Arc<Connection>>;

/// See the module.
pub(super) struct Connection {
    me: Weak<Self>,
    shared: Arc<Shared>,
    queues: Vec<Arc<Queue>>,
    /// The tasks that work the queues.
    tasks: Vec<AbortHandle>,
    /// Wakes the crate's worker, to see that the connection is closed.
    waker: EventNotifier,
    wake_event: EventConsumer,
    /// The crate's worker.
    worker: Mutex<Weak<Worker>>,
    /// Ends the connection's socket.
    shutdown: Mutex<Option<ShutdownHandle>>,
}

impl Connection {
    pub(super) fn new(shared: Shared, queues: u16, runtime: &Handle) -> io::Result<Arc<Self>> {
        let shared = Arc::new(shared);
        let (wake_event, waker) = new_event_consumer_and_notifier(EventFlag::NONBLOCK | EventFlag::CLOEXEC)?;
        let queues: Vec<Arc<Queue>> =
            (0..usize::from(queues)).map(|index| Arc::new(Queue::new(index, Arc::clone(&shared)))).collect();
        let tasks =
            queues.iter().map(|queue| runtime.spawn(Arc::clone(queue).work()).abort_handle()).collect();
        Ok(Arc::new_cyclic(|me| Self {
            me: me.clone(),
            shared,
            queues,
            tasks,
            waker,
            wake_event,
            worker: Mutex::new(Weak::new()),
            shutdown: Mutex::new(None),
        }))
    }

    /// The crate's daemon for this connection, with its worker thread.
    pub(super) fn daemon(self: &Arc<Self>) -> Result<VhostUserDaemon<Arc<Self>>, vhost_user_backend::Error> {
        let name = "blk-front-end".to_owned();
        let daemon = VhostUserDaemon::new(name, Arc::clone(self), self.shared.memory.clone())?;
        if let Some(worker) = daemon.get_epoll_handlers().first() {
            let fd = self.wake_event.as_raw_fd();
            worker
                .register_listener(fd, EventSet::IN, self.wake_token())
                .map_err(vhost_user_backend::Error::StartDaemon)?;
            *self.worker.lock() = Arc::downgrade(worker);
        }
        Ok(daemon)
    }

    /// The crate's number for the wake event: the first one that is free.
    fn wake_token(&self) -> u64 {
        self.queues.len() as u64 + 1
    }

    /// A ring was started: its kicks go to the queue's task from now on.
    fn take_over(&self, queue: &Queue, ring: &Ring) {
        if let Err(error) = queue.adopt(ring) {
            tracing::error!(%error, "a ring's kicks cannot be taken over");
            return;
        }
        let kick = ring.get_ref().get_kick().as_ref().map(AsRawFd::as_raw_fd);
        let worker = self.worker.lock().upgrade();
        if let (Some(kick), Some(worker)) = (kick, worker) {
            // Not found means that it was taken out before. The number only must not be that of a queue.
            let _ = worker.unregister_listener(kick, EventSet::IN, self.wake_token());
        }
    }

    pub(super) fn set_shutdown(&self, handle: Option<ShutdownHandle>) {
        *self.shutdown.lock() = handle;
    }

    /// Ends the connection's socket; its thread sees the end.
    pub(super) fn shut_down(&self) {
        if let Some(handle) = &*self.shutdown.lock() {
            handle.shutdown();
        }
    }

    /// Ends worker and tasks. Answers that come later stay out of the rings.
    pub(super) fn close(&self) {
        self.shared.closed.store(true, Ordering::SeqCst);
        self.queues.iter().for_each(|queue| queue.end());
        // The counter is full only if the worker is awake anyway.
        let _ = self.waker.notify();
    }

    /// Waits for the device; tells how many requests it still has.
    pub(super) fn wait_outstanding(&self, limit: Duration) -> usize {
        self.shared.outstanding.wait(limit)
    }
}

thread_local! {
    static WORKER: RefCell<Option<WorkerGuard>> = const { RefCell::new(None) };
}

/// Ends the connection when a worker dies of an error within the crate: a dead queue would stall the guest for ever, while a
/// new connection starts afresh.
struct WorkerGuard(Weak<Connection>);

impl WorkerGuard {
    /// Makes the end of this thread end the connection.
    fn set(connection: &Weak<Connection>) {
        WORKER.with_borrow_mut(|guard| {
            guard.get_or_insert_with(|| Self(Weak::clone(connection)));
        });
    }
}

impl Drop for WorkerGuard {
    fn drop(&mut self) {
        if let Some(connection) = self.0.upgrade() {
            connection.shut_down();
        }
    }
}

impl VhostUserBackend for Connection {
    type Bitmap = DirtyLog;
    type Vring = Ring;

    fn num_queues(&self) -> usize {
        self.queues.len()
    }

    fn max_queue_size(&self) -> usize {
        usize::from(geometry::QUEUE_SIZE)
    }

    fn features(&self) -> u64 {
        geometry::features(self.shared.access)
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        geometry::protocol_features()
    }

    fn acked_features(&self, features: u64) {
        dirty_log::follow(features, &self.shared.memory());
    }

    fn set_event_idx(&self, _enabled: bool) {
        // The rings have been told by the crate.
    }

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        let config = geometry::config(self.shared.device.size(), self.queues.len() as u16);
        let rest = config.get(offset as usize..).unwrap_or_default();
        let mut out: Vec<u8> = rest.iter().take(size as usize).copied().collect();
        // Fields that we do not know are zero.
        out.resize(size as usize, 0);
        out
    }

    fn update_memory(&self, _memory: GuestMemoryAtomic<LoggedMemory>) -> io::Result<()> {
        self.shared.memory_changed();
        Ok(())
    }

    fn queues_per_thread(&self) -> Vec<u64> {
        // One worker for all: it has nothing to do but to see rings start.
        vec![(0..self.queues.len()).fold(0, |mask, index| mask | 1 << index)]
    }

    fn stop_vring(&self, queue_index: u32) -> io::Result<()> {
        let Some(queue) = self.queues.get(queue_index as usize) else { return Ok(()) };
        queue.drain(DRAIN_LIMIT).map_err(|limit| {
            tracing::warn!(queue = queue_index, ?limit, "requests of a stopped ring are still in flight");
            io::Error::new(io::ErrorKind::TimedOut, "requests are still in flight")
        })
    }

    fn handle_event(
        &self,
        device_event: u16,
        _events: EventSet,
        vrings: &[Ring],
        _thread: usize,
    ) -> io::Result<()> {
        if u64::from(device_event) == self.wake_token() {
            // Nothing to read: somebody else's wake-up was merged into the last one.
            let _ = self.wake_event.consume();
        }
        WorkerGuard::set(&self.me);
        if self.shared.is_closed() {
            return Err(io::ErrorKind::ConnectionAborted.into());
        }
        let index = usize::from(device_event);
        if let (Some(queue), Some(ring)) = (self.queues.get(index), vrings.get(index)) {
            self.take_over(queue, ring);
        }
        Ok(())
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.tasks.iter().for_each(AbortHandle::abort);
    }
}
