//! The front end against a real back end (`vhost-user-backend`, in this process) that comes, goes and misbehaves. The driver's side of the
//! ring is played by the test.

use std::os::fd::AsRawFd;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use virtio_bindings::virtio_net::VIRTIO_NET_F_CSUM;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::blk::Disk;
use super::log::{DirtyLog, Marked};
use super::net::Nic;
use super::session::SessionError;
use super::test_backend::{Backend, DEADLINE, ECHO_AT, Marks, Seen, VERSION_1};
use super::worker::WorkerHandle;
use crate::config::{DiskConfig, MacAddr, NicConfig};
use crate::error::VmError;
use crate::handle::BackendState;
use crate::layout::MIB;
use crate::memory::{self, Memory, PAGE};
use crate::virtio::device::{Activation, ActiveQueue, ConfigChange, Start};

const CSUM: u64 = 1 << VIRTIO_NET_F_CSUM;

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
        let nic = NicConfig {
            id: "n".into(),
            socket: socket.clone(),
            mac: MacAddr([2, 0, 0, 0, 0, 1]),
            mtu: None,
            slot: None,
        };
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
fn a_backend_that_was_left_to_another_is_dialled_again_when_it_is_wanted() {
    let bench = Bench::new();
    let (backend, mut driver) = bench.running(VERSION_1);
    let shared = bench.worker.shared();
    // As a device that is held.
    bench.worker.deactivate();
    shared.leave();
    assert_eq!(bench.state(), BackendState::Waiting);
    // It sees a hang-up.
    backend.wait();
    let _ = std::fs::remove_file(&bench.socket);
    let other = UnixListener::bind(&bench.socket).unwrap();
    other.set_nonblocking(true).unwrap();
    std::thread::sleep(Duration::from_millis(600));
    assert!(other.accept().is_err(), "it does not dial");
    drop(other);
    shared.come_back();
    let backend = Backend::start(&bench.socket, VERSION_1);
    bench.worker.activate(Activation { start: Start::Resumed, ..driver.activation(VERSION_1) });
    driver.offer();
    driver.wait_all_used();
    assert_eq!(backend.seen(), [Seen::Work(1)], "no stop, and from the second buffer on");
    assert_eq!(bench.state(), BackendState::Connected);
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
    lesser.wait();
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
    let disk = DiskConfig { id: "d".into(), socket: socket.clone(), queues: 1, readonly: false, slot: None };
    let worker = WorkerHandle::spawn("d", socket.clone(), Box::new(Disk(disk))).unwrap();
    let sectors = |count: u64| count.to_le_bytes().to_vec();
    let small = Backend::start_with(&socket, VERSION_1, sectors(2048), Marks::Pages);
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
    let same = Backend::start_with(&socket, VERSION_1, sectors(2048), Marks::Pages);
    driver.offer();
    driver.wait_all_used();
    assert_eq!((change.generation(), interrupt.read().is_ok()), (0, false));
    same.kill();
    let large = Backend::start_with(&socket, VERSION_1, sectors(4096), Marks::Pages);
    wait_for("the interrupt", || interrupt.read().is_ok());
    assert_eq!((change.generation(), capacity()), (1, sectors(4096)));
    driver.offer();
    driver.wait_all_used();
    drop(worker);
    large.kill();
}

/// Pages that were marked.
fn taken(log: &DirtyLog) -> Vec<u64> {
    let Marked::Pages(words) = log.take() else { panic!("not only marks") };
    (0..words.len() as u64 * 64).filter(|page| words[(page / 64) as usize] >> (page % 64) & 1 == 1).collect()
}

/// What [`Backend`] writes for the buffer with this number: to a page of its own, and to the used ring.
fn written_for(head: u64) -> Vec<u64> {
    vec![USED / PAGE, ECHO_AT / PAGE + head]
}

#[test]
fn a_backend_marks_what_it_writes_from_when_it_is_asked_to_until_it_is_told_to_stop() {
    let bench = Bench::new();
    let (backend, mut driver) = bench.running(VERSION_1);
    let log = Arc::new(DirtyLog::new(16 * MIB).unwrap());
    bench.worker.shared().start_log(log.clone()).unwrap();
    assert_eq!(taken(&log), [0; 0], "what was written before is none of its business");
    driver.offer();
    driver.wait_all_used();
    bench.worker.deactivate();
    assert_eq!(taken(&log), written_for(1));
    // A driver that comes meanwhile is served with the record, too.
    driver.reset();
    bench.worker.activate(driver.activation(VERSION_1));
    driver.offer();
    driver.wait_all_used();
    bench.worker.deactivate();
    assert_eq!(taken(&log), written_for(0));
    let logging = |backend: &Backend| backend.features() & 1 << 26 != 0;
    assert!(logging(&backend));
    bench.worker.activate(driver.activation(VERSION_1));
    bench.worker.shared().stop_log();
    wait_for("the end of the record", || !logging(&backend));
    drop(bench);
    backend.kill();
}

#[test]
fn a_backend_that_comes_back_marks_and_what_the_one_before_left_out_counts() {
    let bench = Bench::new();
    let (backend, mut driver) = bench.running(VERSION_1);
    let log = Arc::new(DirtyLog::new(16 * MIB).unwrap());
    bench.worker.shared().start_log(log.clone()).unwrap();
    backend.kill();
    wait_for("the loss to be seen", || bench.state() == BackendState::Waiting);
    let backend = Backend::start(&bench.socket, VERSION_1);
    wait_for("its return", || bench.state() == BackendState::Connected);
    assert_eq!(log.take(), Marked::Any);
    assert_eq!(taken(&log), [0; 0], "once is enough");
    driver.offer();
    driver.wait_all_used();
    bench.worker.deactivate();
    assert_eq!(taken(&log), written_for(1));
    drop(bench);
    backend.kill();
}

#[test]
fn a_backend_that_cannot_mark_is_told_from_one_that_is_away() {
    let bench = Bench::new();
    let log = || Arc::new(DirtyLog::new(16 * MIB).unwrap());
    let away = bench.worker.shared().start_log(log());
    assert!(matches!(away, Err(SessionError::NoAnswer)), "{away:?}");
    let backend = Backend::start_with(&bench.socket, VERSION_1, Vec::new(), Marks::Nothing);
    bench.worker.wait_ready(DEADLINE).unwrap();
    let lacks = bench.worker.shared().start_log(log());
    assert!(matches!(lacks, Err(SessionError::Lacks("VHOST_USER_PROTOCOL_F_LOG_SHMFD"))), "{lacks:?}");
    // Its guest is served on.
    let mut driver = Driver::new();
    bench.worker.activate(driver.activation(VERSION_1));
    driver.offer();
    driver.wait_all_used();
    drop(bench);
    backend.kill();
}

#[test]
fn a_backend_that_comes_back_and_cannot_mark_any_more_serves_on_and_ends_the_record() {
    let bench = Bench::new();
    let (backend, mut driver) = bench.running(VERSION_1);
    let log = Arc::new(DirtyLog::new(16 * MIB).unwrap());
    bench.worker.shared().start_log(log.clone()).unwrap();
    backend.kill();
    let backend = Backend::start_with(&bench.socket, VERSION_1, Vec::new(), Marks::Nothing);
    driver.offer();
    driver.wait_all_used();
    assert_eq!(log.take(), Marked::Unknown("n".into()));
    drop(bench);
    backend.kill();
}

#[test]
fn a_silent_backend_holds_nobody_up() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("silent.sock");
    let listener = UnixListener::bind(&socket).unwrap();
    let nic = NicConfig {
        id: "n".into(),
        socket: socket.clone(),
        mac: MacAddr([2, 0, 0, 0, 0, 1]),
        mtu: None,
        slot: None,
    };
    let worker = WorkerHandle::spawn("n", socket, Box::new(Nic(nic))).unwrap();
    let (connection, _) = listener.accept().unwrap();
    assert!(connection.as_raw_fd() >= 0);
    let error = worker.wait_ready(Duration::from_millis(50)).err().unwrap();
    assert!(matches!(error, VmError::Backend { source: SessionError::NoAnswer, .. }), "{error:?}");
    drop(worker);
}
