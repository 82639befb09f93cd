//! The thread that keeps a device connected to its backend.
//!
//! It dials for ever; a lost backend costs a log line and the time until it is back. The states are few: with or without a session,
//! with or without an activation (queues that a driver has set up). What the driver does comes as a command; what the backend does
//! comes as a hang-up of the socket.
//!
//! While a successor of this process tries to take the guest over, the backend is left to it and not dialled.
//!
//! A backend that takes the connection but does not answer holds up this thread, nobody else: those who wait for it have a deadline, and
//! then break the connection from outside ([`WorkerHandle`]).

use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TryRecvError, sync_channel};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::device::Kind;
use super::log::DirtyLog;
use super::session::{Capabilities, Session, SessionError};
use crate::error::{VmError, resource};
use crate::handle::BackendState;
use crate::isolation::{ThreadKind, confine_thread};
use crate::virtio::device::{Activation, ConfigChange, Start};

/// Between two attempts to connect: short at first, as a restarted backend is back within tens of milliseconds.
const BACKOFF_MIN: Duration = Duration::from_millis(10);
const BACKOFF_MAX: Duration = Duration::from_millis(250);
/// How long a driver's reset waits for the backend to let go of the queues.
const STOP_DEADLINE: Duration = Duration::from_secs(5);

/// How long it may take until a connection is given up.
const LEAVE_DEADLINE: Duration = Duration::from_secs(5);
/// How long a backend may take until it marks what it writes.
const LOG_DEADLINE: Duration = Duration::from_secs(5);

/// Whether the backend is wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Dialling {
    /// It is.
    On,
    /// It is another process's.
    Off,
}

enum Command {
    Activate(Activation),
    Deactivate(SyncSender<()>),
    /// Let go of the backend and dial no more, or dial again.
    Dial(Dialling, SyncSender<()>),
    /// Have the backend mark what it writes, or no more.
    Log(Option<Arc<DirtyLog>>, SyncSender<Result<(), SessionError>>),
}

/// How a backend is, seen from outside.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct BackendStatus {
    pub(crate) backend: BackendState,
    /// How often it came back after it had been lost.
    pub(crate) reconnects: u64,
}

/// What the thread shares with the device and with [`crate::VmHandle`].
pub(crate) struct Shared {
    id: String,
    socket: PathBuf,
    kind: Box<dyn Kind>,
    connected: AtomicBool,
    reconnects: AtomicU64,
    /// [`Shared::leave`].
    left: AtomicBool,
    /// The thread is to end.
    quitting: AtomicBool,
    /// Device configuration as the guest sees it.
    config: Mutex<Vec<u8>>,
    /// Set once the function is built.
    change: OnceLock<Arc<ConfigChange>>,
    /// A second handle of the current connection, for breaking it.
    breaker: Mutex<Option<UnixStream>>,
    last_error: Mutex<Option<SessionError>>,
    commands: SyncSender<Command>,
    wake: EventFd,
}

impl Shared {
    /// How the device is, for [`crate::VmHandle::status`].
    pub(crate) fn status(&self) -> BackendStatus {
        let connected = self.connected.load(Ordering::Acquire);
        BackendStatus {
            backend: if connected { BackendState::Connected } else { BackendState::Waiting },
            reconnects: self.reconnects.load(Ordering::Acquire),
        }
    }

    pub(crate) fn id(&self) -> &str {
        &self.id
    }

    pub(crate) fn socket(&self) -> &Path {
        &self.socket
    }

    pub(crate) fn kind(&self) -> &dyn Kind {
        self.kind.as_ref()
    }

    pub(crate) fn config(&self) -> &Mutex<Vec<u8>> {
        &self.config
    }

    /// Tells where configuration changes are to be announced.
    pub(crate) fn set_change(&self, change: Arc<ConfigChange>) {
        // Each device is built once.
        let _ = self.change.set(change);
    }

    /// Has the backend mark what it writes to guest memory. When this returns, it does; a backend that comes back later does, too, or says in the
    /// record that it cannot.
    pub(crate) fn start_log(&self, log: Arc<DirtyLog>) -> Result<(), SessionError> {
        let (done, answer) = sync_channel(1);
        self.send(Command::Log(Some(log), done));
        answer.recv_timeout(LOG_DEADLINE).unwrap_or(Err(SessionError::NoAnswer))
    }

    /// Has it mark no more. Does not wait for it.
    pub(crate) fn stop_log(&self) {
        self.send(Command::Log(None, sync_channel(1).0));
    }

    /// Leaves the backend to another process. The device is held: nothing is under way there. When this returns, the connection is closed.
    pub(crate) fn leave(&self) {
        self.left.store(true, Ordering::Release);
        let (done, left) = sync_channel(1);
        self.send(Command::Dial(Dialling::Off, done));
        if let Err(RecvTimeoutError::Timeout) = left.recv_timeout(LEAVE_DEADLINE) {
            // The thread waits for an answer of the backend, which does not come any more.
            self.break_connection();
            let _ = left.recv_timeout(LEAVE_DEADLINE);
        }
    }

    /// Dials again, if the backend was left. Does not wait for it.
    pub(crate) fn come_back(&self) {
        if self.left.swap(false, Ordering::AcqRel) {
            self.send(Command::Dial(Dialling::On, sync_channel(1).0));
        }
    }

    fn send(&self, command: Command) {
        // The driver cannot get ahead: each of its resets waits, and activations come in between only. Neither can who moves the guest.
        let taken = self.commands.try_send(command).is_ok();
        // The guest may let go of a device whose backend marks what it writes.
        if !taken && !self.quitting.load(Ordering::SeqCst) {
            tracing::error!(device = self.id, "connection thread does not take commands");
        }
        let _ = self.wake.write(1);
    }

    fn break_connection(&self) {
        if let Some(stream) = self.breaker.lock().take() {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

/// The running thread. Dropping it ends the connection and the thread.
pub(crate) struct WorkerHandle {
    shared: Arc<Shared>,
    ready: Receiver<Capabilities>,
    thread: Option<JoinHandle<()>>,
}

impl WorkerHandle {
    /// Starts to connect.
    pub(crate) fn spawn(id: &str, socket: PathBuf, kind: Box<dyn Kind>) -> Result<Self, VmError> {
        let (commands, receiver) = sync_channel(4);
        let wake = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(resource("eventfd"))?;
        let woken = wake.try_clone().map_err(resource("eventfd"))?;
        let shared = Arc::new(Shared {
            id: id.to_owned(),
            socket,
            kind,
            connected: AtomicBool::new(false),
            reconnects: AtomicU64::new(0),
            left: AtomicBool::new(false),
            quitting: AtomicBool::new(false),
            config: Mutex::default(),
            change: OnceLock::new(),
            breaker: Mutex::default(),
            last_error: Mutex::default(),
            commands,
            wake,
        });
        let (announce, ready) = sync_channel(1);
        let epoll = Epoll::new().map_err(resource("epoll"))?;
        epoll
            .ctl(ControlOperation::Add, woken.as_raw_fd(), EpollEvent::new(EventSet::IN, WAKE))
            .map_err(resource("epoll"))?;
        let worker = Worker {
            shared: shared.clone(),
            commands: receiver,
            wake: woken,
            epoll,
            announce: Some(announce),
            session: None,
            activation: None,
            log: None,
            dialling: Dialling::On,
            backoff: BACKOFF_MIN,
        };
        let thread = std::thread::Builder::new()
            .name(format!("vhost-{id}"))
            .spawn(move || {
                confine_thread(ThreadKind::Backend);
                worker.run();
            })
            .map_err(resource("thread"))?;
        Ok(Self { shared, ready, thread: Some(thread) })
    }

    pub(crate) fn shared(&self) -> Arc<Shared> {
        self.shared.clone()
    }

    /// Waits until the backend has said for the first time what it offers.
    pub(crate) fn wait_ready(&self, timeout: Duration) -> Result<Capabilities, VmError> {
        let deadline = Instant::now() + timeout;
        let answer = self.ready.recv_timeout(deadline.saturating_duration_since(Instant::now()));
        answer.map_err(|_| VmError::Backend {
            id: self.shared.id.clone(),
            socket: self.shared.socket.clone(),
            waited: timeout,
            source: self.shared.last_error.lock().take().unwrap_or(SessionError::NoAnswer),
        })
    }

    /// The driver has set its queues up.
    pub(crate) fn activate(&self, activation: Activation) {
        self.shared.send(Command::Activate(activation));
    }

    /// The driver has reset the device: returns when the backend does not touch the queues any more, or has been cut off.
    pub(crate) fn deactivate(&self) {
        let (done, stopped) = sync_channel(1);
        self.shared.send(Command::Deactivate(done));
        if let Err(RecvTimeoutError::Timeout) = stopped.recv_timeout(STOP_DEADLINE) {
            tracing::warn!(device = self.shared.id, "backend does not let go of the queues; cutting it off");
            self.shared.break_connection();
            let _ = stopped.recv_timeout(STOP_DEADLINE);
        }
    }
}

impl Drop for WorkerHandle {
    fn drop(&mut self) {
        // In this order: a connection that comes up later sees the flag and goes down by itself.
        self.shared.quitting.store(true, Ordering::SeqCst);
        self.shared.break_connection();
        let _ = self.shared.wake.write(1);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

const WAKE: u64 = 0;
const SESSION: u64 = 1;

/// Queues that a driver has set up, and whether a backend has already worked on them.
struct Queues {
    activation: Activation,
    start: Start,
}

struct Worker {
    shared: Arc<Shared>,
    commands: Receiver<Command>,
    wake: EventFd,
    epoll: Epoll,
    /// Taken with the first session.
    announce: Option<SyncSender<Capabilities>>,
    session: Option<Session>,
    activation: Option<Queues>,
    /// While the guest moves.
    log: Option<Arc<DirtyLog>>,
    dialling: Dialling,
    backoff: Duration,
}

impl Worker {
    fn run(mut self) {
        while !self.shared.quitting.load(Ordering::SeqCst) {
            match self.commands.try_recv() {
                Ok(Command::Activate(activation)) => {
                    let start = activation.start;
                    self.activation = Some(Queues { activation, start });
                    if let Err(error) = self.start_queues() {
                        self.drop_session(&error);
                    }
                }
                Ok(Command::Deactivate(done)) => {
                    self.stop_queues();
                    let _ = done.try_send(());
                }
                Ok(Command::Dial(dialling, done)) => {
                    self.set_dialling(dialling);
                    let _ = done.try_send(());
                }
                Ok(Command::Log(log, done)) => drop(done.try_send(self.set_log(log))),
                Err(TryRecvError::Disconnected) => return,
                Err(TryRecvError::Empty) => {
                    if self.session.is_none() && self.dialling == Dialling::On {
                        self.connect();
                    }
                    self.wait();
                }
            }
        }
    }

    /// Waits for a command, for the end of the session, or until it is time to dial again.
    fn wait(&mut self) {
        let timeout = match (&self.session, self.dialling) {
            (None, Dialling::On) => self.backoff.as_millis() as i32,
            (Some(_), _) | (None, Dialling::Off) => -1,
        };
        let mut events = [EpollEvent::default(); 2];
        match self.epoll.wait(timeout, &mut events) {
            Ok(count) => {
                for event in &events[..count] {
                    match event.data() {
                        WAKE => drop(self.wake.read()),
                        // Backends say nothing unasked: this is a hang-up, or as bad as one.
                        _ => self.drop_session(&SessionError::Request {
                            request: "connection",
                            source: vhost::Error::VhostUserProtocol(vhost::vhost_user::Error::Disconnected),
                        }),
                    }
                }
            }
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => {
                tracing::error!(device = self.shared.id, %error, "cannot wait for the backend");
                std::thread::sleep(BACKOFF_MAX);
            }
        }
    }

    fn connect(&mut self) {
        let connected = self.dial().and_then(|session| {
            self.session = Some(session);
            if let Some(log) = &self.log {
                // The one before may have ended between a write and its mark.
                log.lose();
            }
            self.start_queues()
        });
        match (connected, &self.session) {
            (Ok(()), Some(session)) => {
                let capabilities = session.capabilities().clone();
                self.backoff = BACKOFF_MIN;
                self.shared.connected.store(true, Ordering::Release);
                self.shared.last_error.lock().take();
                self.accept_config(&capabilities);
                match self.announce.take() {
                    Some(announce) => drop(announce.try_send(capabilities)),
                    None => {
                        self.shared.reconnects.fetch_add(1, Ordering::AcqRel);
                        tracing::info!(device = self.shared.id, "backend is back");
                    }
                }
            }
            (Err(error), _) => self.failed(error),
            (Ok(()), None) => {}
        }
    }

    fn dial(&mut self) -> Result<Session, SessionError> {
        let stream = UnixStream::connect(&self.shared.socket)?;
        *self.shared.breaker.lock() = Some(stream.try_clone()?);
        if self.shared.quitting.load(Ordering::SeqCst) {
            return Err(SessionError::NoAnswer);
        }
        let session = Session::negotiate(stream, self.shared.kind.as_ref())?;
        let events = EventSet::IN | EventSet::READ_HANG_UP;
        self.epoll.ctl(ControlOperation::Add, session.as_raw_fd(), EpollEvent::new(events, SESSION))?;
        Ok(session)
    }

    /// What a new session says about the device becomes what the guest sees.
    fn accept_config(&self, capabilities: &Capabilities) {
        let config = self.shared.kind.offer(capabilities).config;
        let changed = {
            let mut current = self.shared.config.lock();
            let changed = *current != config;
            *current = config;
            changed
        };
        if changed && let Some(change) = self.shared.change.get() {
            tracing::info!(device = self.shared.id, "device configuration changed");
            change.notify();
        }
    }

    /// Hands the queues to the backend, if there are queues and a backend.
    fn start_queues(&mut self) -> Result<(), SessionError> {
        let (Some(session), Some(queues)) = (&mut self.session, &mut self.activation) else { return Ok(()) };
        // The guest goes on with a backend that cannot mark. Its move does not.
        let log = self.log.as_deref().filter(|log| {
            let able = session.check_log().is_ok();
            if !able {
                log.give_up(&self.shared.id);
            }
            able
        });
        session.start(&queues.activation, queues.start, log)?;
        tracing::debug!(device = self.shared.id, start = ?queues.start, "queues are with the backend");
        queues.start = Start::Resumed;
        Ok(())
    }

    /// After an error the backend does not mark.
    fn set_log(&mut self, log: Option<Arc<DirtyLog>>) -> Result<(), SessionError> {
        let Some(session) = &mut self.session else {
            self.log = None;
            return if log.is_some() { Err(SessionError::NoAnswer) } else { Ok(()) };
        };
        if log.is_some() {
            session.check_log()?;
        }
        let running = self.activation.as_ref().map(|queues| queues.activation.features);
        let set = running.map_or(Ok(()), |features| session.set_log(features, log.as_deref()));
        match set {
            Ok(()) => self.log = log,
            Err(error) => {
                self.log = None;
                self.drop_session(&error);
                return Err(error);
            }
        }
        Ok(())
    }

    fn stop_queues(&mut self) {
        let Some(queues) = self.activation.take() else { return };
        if let Some(session) = &mut self.session
            && let Err(error) = session.stop(&queues.activation)
        {
            self.drop_session(&error);
        }
    }

    fn set_dialling(&mut self, dialling: Dialling) {
        if dialling == Dialling::Off && self.session.is_some() {
            tracing::debug!(device = self.shared.id, "backend left to another process");
            self.close();
        }
        self.dialling = dialling;
        self.backoff = BACKOFF_MIN;
    }

    fn drop_session(&mut self, error: &SessionError) {
        if !self.shared.quitting.load(Ordering::SeqCst) {
            tracing::warn!(device = self.shared.id, %error, "backend lost; the queues wait for it");
        }
        self.close();
    }

    /// An attempt to connect failed. Keeps the error for whoever waits, and says it once, not at each attempt.
    fn failed(&mut self, error: SessionError) {
        self.close();
        self.backoff = (self.backoff * 2).min(BACKOFF_MAX);
        let mut last = self.shared.last_error.lock();
        let text = error.to_string();
        if last.as_ref().is_none_or(|last| last.to_string() != text) {
            tracing::info!(device = self.shared.id, error = text, "backend not usable yet, dialling on");
        }
        *last = Some(error);
    }

    fn close(&mut self) {
        if let Some(session) = self.session.take() {
            let event = EpollEvent::new(EventSet::empty(), SESSION);
            if let Err(error) = self.epoll.ctl(ControlOperation::Delete, session.as_raw_fd(), event) {
                tracing::debug!(device = self.shared.id, %error, "epoll");
            }
        }
        self.shared.break_connection();
        self.shared.connected.store(false, Ordering::Release);
    }
}
