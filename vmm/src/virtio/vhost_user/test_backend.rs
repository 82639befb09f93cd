//! A back end (`vhost-user-backend`, in this process) for tests: it returns every buffer, and says what it saw.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use parking_lot::Mutex;
use vhost::vhost_user::Listener;
use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost_user_backend::bitmap::BitmapMmapRegion;
use vhost_user_backend::{ShutdownHandle, VhostUserBackend, VhostUserDaemon, VringRwLock, VringT};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_queue::QueueOwnedT;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier};

use crate::memory::PAGE;

pub(crate) const DEADLINE: Duration = Duration::from_secs(20);
pub(crate) const VERSION_1: u64 = 1 << VIRTIO_F_VERSION_1;
/// Where it writes to guest memory.
pub(crate) const ECHO_AT: u64 = 0x20_0000;

/// What the back end saw, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Seen {
    Stop,
    /// The first buffer that it would take when it looked at the ring, if there was any.
    Work(u16),
}

type Log = Arc<Mutex<Vec<Seen>>>;
type BackendMemory = GuestMemoryAtomic<GuestMemoryMmap<BitmapMmapRegion>>;

/// What of its writes to guest memory it marks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Marks {
    Pages,
    Nothing,
}

/// Returns every buffer at once, and writes how many it has returned to the page of [`ECHO_AT`] that has the buffer's number.
struct Echo {
    features: u64,
    /// The beginning of its configuration; a device without any when empty.
    config: Vec<u8>,
    marks: Marks,
    log: Log,
    acked: Arc<AtomicU64>,
    returned: AtomicU64,
    memory: Mutex<BackendMemory>,
}

impl VhostUserBackend for Echo {
    type Bitmap = BitmapMmapRegion;
    type Vring = VringRwLock<BackendMemory>;

    fn num_queues(&self) -> usize {
        2
    }

    fn max_queue_size(&self) -> usize {
        256
    }

    fn features(&self) -> u64 {
        let marks = match self.marks {
            Marks::Pages => VhostUserVirtioFeatures::LOG_ALL,
            Marks::Nothing => VhostUserVirtioFeatures::empty(),
        };
        self.features | (VhostUserVirtioFeatures::PROTOCOL_FEATURES | marks).bits()
    }

    fn acked_features(&self, features: u64) {
        self.acked.store(features, Ordering::Relaxed);
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        let config = match self.config.is_empty() {
            true => VhostUserProtocolFeatures::empty(),
            false => VhostUserProtocolFeatures::CONFIG,
        };
        let marks = match self.marks {
            Marks::Pages => VhostUserProtocolFeatures::LOG_SHMFD,
            Marks::Nothing => VhostUserProtocolFeatures::empty(),
        };
        VhostUserProtocolFeatures::MQ | VhostUserProtocolFeatures::REPLY_ACK | config | marks
    }

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        let mut config = self.config.clone();
        config.resize((offset + size) as usize, 0);
        config.split_off(offset as usize)
    }

    fn set_event_idx(&self, _enabled: bool) {}

    fn update_memory(&self, memory: BackendMemory) -> io::Result<()> {
        *self.memory.lock() = memory;
        Ok(())
    }

    fn exit_event(&self, _thread: usize) -> Option<(EventConsumer, EventNotifier)> {
        new_event_consumer_and_notifier(EventFlag::NONBLOCK).ok()
    }

    fn stop_vring(&self, _index: u32) -> io::Result<()> {
        self.log.lock().push(Seen::Stop);
        Ok(())
    }

    fn handle_event(
        &self,
        queue: u16,
        _events: EventSet,
        vrings: &[VringRwLock<BackendMemory>],
        _thread: usize,
    ) -> io::Result<()> {
        let vring = &vrings[usize::from(queue)];
        let memory = self.memory.lock().memory();
        let from = vring.queue_next_avail();
        let mut ring = vring.get_mut();
        // A kick may come for a queue that has just been stopped.
        let Ok(chains) = ring.get_queue_mut().iter(memory.clone()) else { return Ok(()) };
        let heads: Vec<u16> = chains.map(|chain| chain.head_index()).collect();
        drop(ring);
        if !heads.is_empty() {
            self.log.lock().push(Seen::Work(from));
        }
        for head in heads {
            let returned = self.returned.fetch_add(1, Ordering::Relaxed) + 1;
            memory.write_obj(returned, GuestAddress(ECHO_AT + PAGE * u64::from(head))).unwrap();
            vring.add_used(head, 0).unwrap();
            vring.signal_used_queue()?;
        }
        Ok(())
    }
}

/// A back end on a socket, until it is killed.
pub(crate) struct Backend {
    stop: ShutdownHandle,
    thread: JoinHandle<()>,
    log: Log,
    acked: Arc<AtomicU64>,
}

impl Backend {
    /// One without any configuration that marks what it writes.
    pub(crate) fn start(socket: &Path, features: u64) -> Self {
        Self::start_with(socket, features, Vec::new(), Marks::Pages)
    }

    pub(crate) fn start_with(socket: &Path, features: u64, config: Vec<u8>, marks: Marks) -> Self {
        let (log, acked) = (Log::default(), Arc::<AtomicU64>::default());
        let memory = || GuestMemoryAtomic::new(GuestMemoryMmap::new());
        let echo = Arc::new(Echo {
            features,
            config,
            marks,
            log: log.clone(),
            acked: acked.clone(),
            returned: AtomicU64::new(0),
            memory: Mutex::new(memory()),
        });
        let mut listener = Listener::new(socket, true).unwrap();
        let (started, ready) = std::sync::mpsc::channel();
        let thread = std::thread::spawn(move || {
            let mut daemon = VhostUserDaemon::new("echo".into(), echo, memory()).unwrap();
            daemon.start(&mut listener).unwrap();
            started.send(daemon.shutdown_handle().unwrap()).unwrap();
            let _ = daemon.wait();
        });
        Self { stop: ready.recv_timeout(DEADLINE).unwrap(), thread, log, acked }
    }

    pub(crate) fn kill(self) {
        self.stop.shutdown();
        self.wait();
    }

    /// Waits until it ends by itself.
    pub(crate) fn wait(self) {
        self.thread.join().unwrap();
    }

    /// What the front end has accepted.
    pub(crate) fn features(&self) -> u64 {
        self.acked.load(Ordering::Relaxed)
    }

    pub(crate) fn seen(&self) -> Vec<Seen> {
        self.log.lock().clone()
    }
}
