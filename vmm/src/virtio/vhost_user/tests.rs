//! The front end against a real back end (`vhost-user-backend`, in this process) that comes, goes and misbehaves. The driver's side of the
//! ring is played by the test.

use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use vhost::vhost_user::Listener;
use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost_user_backend::{ShutdownHandle, VhostUserBackend, VhostUserDaemon, VringRwLock, VringT};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_net::VIRTIO_NET_F_CSUM;
use virtio_queue::QueueOwnedT;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::blk::Disk;
use super::net::Nic;
use super::session::SessionError;
use super::worker::WorkerHandle;
use crate::config::{DiskConfig, MacAddr, NicConfig};
use crate::error::VmError;
use crate::handle::BackendState;
use crate::layout::MIB;
use crate::memory::{self, Memory};
use crate::virtio::device::{Activation, ActiveQueue, ConfigChange, Start};

const DEADLINE: Duration = Duration::from_secs(20);
const VERSION_1: u64 = 1 << VIRTIO_F_VERSION_1;
const CSUM: u64 = 1 << VIRTIO_NET_F_CSUM;

/// What the back end saw, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Seen {
    Stop,
    /// The first buffer that it would take when it looked at the ring, if there was any.
    Work(u16),
}

type Log = Arc<Mutex<Vec<Seen>>>;
type BackendMemory = GuestMemoryAtomic<GuestMemoryMmap>;

/// Returns every buffer at once.
struct Echo {
    features: u64,
    /// The beginning of its configuration; a device without any when empty.
    config: Vec<u8>,
    log: Log,
    memory: Mutex<BackendMemory>,
}

impl VhostUserBackend for Echo {
    type Bitmap = ();
    type Vring = VringRwLock;

    fn num_queues(&self) -> usize {
        2
    }

    fn max_queue_size(&self) -> usize {
        256
    }

    fn features(&self) -> u64 {
        self.features | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        let config = match self.config.is_empty() {
            true => VhostUserProtocolFeatures::empty(),
            false => VhostUserProtocolFeatures::CONFIG,
        };
        VhostUserProtocolFeatures::MQ | VhostUserProtocolFeatures::REPLY_ACK | config
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
        vrings: &[VringRwLock],
        _thread: usize,
    ) -> io::Result<()> {
        let vring = &vrings[usize::from(queue)];
        let memory = self.memory.lock().memory();
        let from = vring.queue_next_avail();
        let heads: Vec<u16> =
            vring.get_mut().get_queue_mut().iter(memory).unwrap().map(|chain| chain.head_index()).collect();
        if !heads.is_empty() {
            self.log.lock().push(Seen::Work(from));
        }
        for head in heads {
            vring.add_used(head, 0).unwrap();
            vring.signal_used_queue()?;
        }
        Ok(())
    }
}

/// A back end on a socket, until it is killed.
struct Backend {
    stop: ShutdownHandle,
    thread: JoinHandle<()>,
    log: Log,
}

impl Backend {
    fn start(socket: &Path, features: u64) -> Self {
        Self::start_with_config(socket, features, Vec::new())
    }

    fn start_with_config(socket: &Path, features: u64, config: Vec<u8>) -> Self {
        let log = Log::default();
        let memory = || GuestMemoryAtomic::new(GuestMemoryMmap::<()>::new());
        let echo = Arc::new(Echo { features, config, log: log.clone(), memory: Mutex::new(memory()) });
        let mut listener = Listener::new(socket, true).unwrap();
        let (started, ready) = std::sync::mpsc::channel();
        let thread = std::thread::spawn(move || {
            let mut daemon = VhostUserDaemon::new("echo".into(), echo, memory()).unwrap();
            daemon.start(&mut listener).unwrap();
            started.send(daemon.shutdown_handle().unwrap()).unwrap();
            let _ = daemon.wait();
        });
        Self { stop: ready.recv_timeout(DEADLINE).unwrap(), thread, log }
    }

    fn kill(self) {
        self.stop.shutdown();
        self.thread.join().unwrap();
    }

    fn seen(&self) -> Vec<Seen> {
        self.log.lock().clone()
    }
}

/// The driver's side of queue 0.
struct Driver {
    memory: Memory,
    available: u16,
    kick: EventFd,
    call: EventFd,
}

const SIZE: u16 = 16;
const DESCRIPTORS: u64 = 0x1000;
const AVAILABLE: u64 = 0x2000;
const USED: u64 = 0x3000;

impl Driver {
    fn new() -> Self {
        let event = || EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).unwrap();
        Self { memory: memory::create(16 * MIB).unwrap(), available: 0, kick: event(), call: event() }
    }

    fn activation(&self, features: u64) -> Activation {
        let queue = ActiveQueue {
            index: 0,
            size: SIZE,
            descriptors: GuestAddress(DESCRIPTORS),
            available: GuestAddress(AVAILABLE),
            used: GuestAddress(USED),
            kick: self.kick.try_clone().unwrap(),
            call: self.call.try_clone().unwrap(),
        };
        Activation { features, memory: self.memory.clone(), queues: vec![queue], start: Start::Fresh }
    }

    /// Makes one more buffer available and kicks.
    fn offer(&mut self) {
        let head = self.available % SIZE;
        let descriptor = GuestAddress(DESCRIPTORS + 16 * u64::from(head));
        self.memory.write_obj(0x10_0000u64, descriptor).unwrap();
        self.memory.write_obj(64u32, GuestAddress(descriptor.0 + 8)).unwrap();
        self.memory.write_obj(head, GuestAddress(AVAILABLE + 4 + 2 * u64::from(head))).unwrap();
        self.available += 1;
        self.memory.write_obj(self.available, GuestAddress(AVAILABLE + 2)).unwrap();
        self.kick.write(1).unwrap();
    }

    fn used(&self) -> u16 {
        self.memory.read_obj(GuestAddress(USED + 2)).unwrap()
    }

    fn wait_all_used(&self) {
        wait_for("all buffers to come back", || self.used() == self.available);
    }

    fn reset(&mut self) {
        self.available = 0;
        self.memory.write_slice(&[0; 0x3000], GuestAddress(DESCRIPTORS)).unwrap();
    }
}

fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + DEADLINE;
    while !done() {
        assert!(Instant::now() < deadline, "waited for {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

struct Bench {
    _dir: tempfile::TempDir,
    socket: PathBuf,
    worker: WorkerHandle,
}

impl Bench {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("n.sock");
        let nic =
            NicConfig { id: "n".into(), socket: socket.clone(), mac: MacAddr([2, 0, 0, 0, 0, 1]), mtu: None };
        let worker = WorkerHandle::spawn("n", socket.clone(), Box::new(Nic(nic))).unwrap();
        Self { _dir: dir, socket, worker }
    }

    fn state(&self) -> BackendState {
        self.worker.shared().status().backend
    }

    /// Back end and driver, working together.
    fn running(&self, features: u64) -> (Backend, Driver) {
        let backend = Backend::start(&self.socket, features);
        assert_eq!(self.worker.wait_ready(DEADLINE).unwrap().features, features);
        let mut driver = Driver::new();
        self.worker.activate(driver.activation(features));
        driver.offer();
        driver.wait_all_used();
        (backend, driver)
    }
}

#[test]
fn a_new_driver_starts_from_a_stopped_empty_queue() {
    let bench = Bench::new();
    let (backend, driver) = bench.running(VERSION_1);
    assert_eq!(backend.seen(), [Seen::Stop, Seen::Work(0)]);
    wait_for("the interrupt", || driver.call.read().is_ok());
    bench.worker.deactivate();
    assert_eq!(backend.seen().last(), Some(&Seen::Stop));
    drop(bench);
    backend.kill();
}

#[test]
fn a_lost_backend_goes_on_where_the_used_ring_ends() {
    let bench = Bench::new();
    let (backend, mut driver) = bench.running(VERSION_1);
    driver.offer();
    driver.wait_all_used();
    backend.kill();
    wait_for("the loss to be seen", || bench.state() == BackendState::Waiting);
    driver.offer();
    // As if the old process had taken the kick with it.
    let _ = driver.kick.read();
    let backend = Backend::start(&bench.socket, VERSION_1);
    driver.wait_all_used();
    assert_eq!(backend.seen(), [Seen::Work(2)], "no stop, and from the third buffer on");
    wait_for("the reconnect to be counted", || bench.worker.shared().status().reconnects == 1);
    drop(bench);
    backend.kill();
}

#[test]
fn a_driver_that_started_while_the_backend_was_away_is_a_new_driver() {
    let bench = Bench::new();
    let (backend, mut driver) = bench.running(VERSION_1);
    backend.kill();
    bench.worker.deactivate();
    driver.reset();
    bench.worker.activate(driver.activation(VERSION_1));
    driver.offer();
    let backend = Backend::start(&bench.socket, VERSION_1);
    driver.wait_all_used();
    assert_eq!(backend.seen(), [Seen::Stop, Seen::Work(0)]);
    drop(bench);
    backend.kill();
}

#[test]
fn a_backend_that_offers_less_than_promised_is_not_used() {
    let bench = Bench::new();
    let (backend, mut driver) = bench.running(VERSION_1 | CSUM);
    backend.kill();
    let lesser = Backend::start(&bench.socket, VERSION_1);
    driver.offer();
    // It is hung up on, so it ends by itself.
    lesser.thread.join().unwrap();
    assert_ne!(driver.used(), driver.available);
    assert_eq!(bench.state(), BackendState::Waiting);
    let backend = Backend::start(&bench.socket, VERSION_1 | CSUM);
    driver.wait_all_used();
    drop(bench);
    backend.kill();
}

/// A volume that has grown ends its connection; the next one tells the new size.
#[test]
fn a_disk_that_has_grown_tells_the_driver_by_a_configuration_interrupt() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("d.sock");
    let disk = DiskConfig { id: "d".into(), socket: socket.clone(), queues: 1, readonly: false };
    let worker = WorkerHandle::spawn("d", socket.clone(), Box::new(Disk(disk))).unwrap();
    let sectors = |count: u64| count.to_le_bytes().to_vec();
    let small = Backend::start_with_config(&socket, VERSION_1, sectors(2048));
    worker.wait_ready(DEADLINE).unwrap();
    let interrupt = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).unwrap();
    let change = Arc::new(ConfigChange::new(Arc::new(vec![interrupt.try_clone().unwrap()])));
    change.set_vector(0);
    worker.shared().set_change(change.clone());
    let mut driver = Driver::new();
    worker.activate(driver.activation(VERSION_1));
    let capacity = || worker.shared().config().lock()[..8].to_vec();
    wait_for("the size", || capacity() == sectors(2048));

    // Another connection alone is no change.
    small.kill();
    let same = Backend::start_with_config(&socket, VERSION_1, sectors(2048));
    driver.offer();
    driver.wait_all_used();
    assert_eq!((change.generation(), interrupt.read().is_ok()), (0, false));
    same.kill();
    let large = Backend::start_with_config(&socket, VERSION_1, sectors(4096));
    wait_for("the interrupt", || interrupt.read().is_ok());
    assert_eq!((change.generation(), capacity()), (1, sectors(4096)));
    driver.offer();
    driver.wait_all_used();
    drop(worker);
    large.kill();
}

#[test]
fn a_silent_backend_holds_nobody_up() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("silent.sock");
    let listener = UnixListener::bind(&socket).unwrap();
    let nic =
        NicConfig { id: "n".into(), socket: socket.clone(), mac: MacAddr([2, 0, 0, 0, 0, 1]), mtu: None };
    let worker = WorkerHandle::spawn("n", socket, Box::new(Nic(nic))).unwrap();
    let (connection, _) = listener.accept().unwrap();
    assert!(connection.as_raw_fd() >= 0);
    let error = worker.wait_ready(Duration::from_millis(50)).err().unwrap();
    assert!(matches!(error, VmError::Backend { source: SessionError::NoAnswer, .. }), "{error:?}");
    drop(worker);
}
