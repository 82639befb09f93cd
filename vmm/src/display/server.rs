//! The display's thread: accepts clients on a unix socket and shows them the screen.
//!
//! The frame buffer is looked at only while a client waits for something to change, some times a second and less often when nothing does. Without a
//! client the thread sleeps and keeps nothing. A client that takes nothing of what waits for it is dropped after a while, and so is one that does not
//! come to the point.

use std::collections::BTreeMap;
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::Devices;
use super::keyboard::Action;
use super::rfb::{Input, Session, SessionError};
use super::screen::{Change, Screen};
use crate::isolation::{ThreadKind, confine_thread};
use crate::memory::Memory;
use crate::socket;

/// Clients at a time; more are turned away.
const MAX_CLIENTS: usize = 8;
/// How long a client may take nothing, or take to introduce itself.
const PATIENCE: Duration = Duration::from_secs(30);
/// Between two looks at the frame buffer: while it changes, and when it has not changed for [`QUIET`].
const LOOK: Duration = Duration::from_millis(40);
const LOOK_QUIET: Duration = Duration::from_millis(100);
const QUIET: Duration = Duration::from_secs(2);
/// Between two looks at who is too slow.
const CHECK: Duration = Duration::from_secs(1);
/// Read from one client before the others get their turn.
const READ_CHUNK: usize = 4096;

/// The running server. Dropping it ends the thread and removes the socket.
pub(crate) struct DisplayServer {
    stop: Arc<AtomicBool>,
    wake: EventFd,
    thread: Option<JoinHandle<()>>,
    /// Given back when the thread has ended.
    _place: socket::Place,
}

impl DisplayServer {
    /// Listens on `path`.
    pub(super) fn start(path: &Path, devices: Devices, memory: Memory) -> io::Result<Self> {
        let (listener, place) = socket::listen(path)?;
        let stop = Arc::new(AtomicBool::new(false));
        let wake = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        let epoll = Epoll::new()?;
        for (fd, token) in [(listener.as_raw_fd(), LISTENER), (wake.as_raw_fd(), WAKE)] {
            epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::IN, token))?;
        }
        let now = Instant::now();
        let mut server = Server {
            epoll,
            listener,
            stop: stop.clone(),
            devices,
            memory,
            clients: BTreeMap::new(),
            next_token: FIRST_CLIENT,
            screen: None,
            next_look: now,
            last_change: now,
        };
        let thread = std::thread::Builder::new().name("display".into()).spawn(move || {
            confine_thread(ThreadKind::Display);
            if let Err(error) = server.run() {
                tracing::error!(%error, "display server ends");
            }
        })?;
        Ok(Self { stop, wake, thread: Some(thread), _place: place })
    }
}

impl Drop for DisplayServer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        // Fails only when the counter is full, in which case the thread is awake anyhow.
        let _ = self.wake.write(1);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

const LISTENER: u64 = 0;
const WAKE: u64 = 1;
/// Clients come after this, each with a number of its own.
const FIRST_CLIENT: u64 = 2;

struct Client {
    stream: UnixStream,
    session: Session,
    interest: EventSet,
    /// When it last took something, or had nothing to take.
    last_progress: Instant,
}

/// Why a client goes.
#[derive(Debug, thiserror::Error)]
enum Gone {
    #[error("it has closed the connection")]
    Closed,
    #[error("{0}")]
    Stream(#[from] io::Error),
    #[error("{0}")]
    Session(#[from] SessionError),
    #[error("it is too slow")]
    Slow,
}

struct Server {
    epoll: Epoll,
    listener: UnixListener,
    stop: Arc<AtomicBool>,
    devices: Devices,
    memory: Memory,
    clients: BTreeMap<u64, Client>,
    next_token: u64,
    /// While there are clients.
    screen: Option<Screen>,
    next_look: Instant,
    last_change: Instant,
}

impl Server {
    fn run(&mut self) -> io::Result<()> {
        let mut events = [EpollEvent::default(); 16];
        while !self.stop.load(Ordering::Acquire) {
            let count = match self.epoll.wait(self.timeout(Instant::now()), &mut events) {
                Err(error) if error.kind() == ErrorKind::Interrupted => 0,
                waited => waited?,
            };
            for event in &events[..count] {
                match event.data() {
                    LISTENER => self.accept(),
                    WAKE => {}
                    token => self.on_client(token, |server, client| server.receive(client)),
                }
            }
            let now = Instant::now();
            self.look(now);
            let tokens: Vec<_> = self.clients.keys().copied().collect();
            for token in tokens {
                self.on_client(token, |server, client| server.send(client, token, now));
            }
            if self.clients.is_empty() {
                self.screen = None;
            }
        }
        Ok(())
    }

    /// For how long to wait, in milliseconds.
    fn timeout(&self, now: Instant) -> i32 {
        let waiting = self.clients.values().any(|client| client.session.waits());
        let wait = match (waiting, self.clients.is_empty()) {
            (true, _) => self.next_look.saturating_duration_since(now).min(CHECK),
            (false, false) => CHECK,
            (false, true) => return -1,
        };
        // Not before the time: rounded up. At most a second.
        wait.as_micros().div_ceil(1000) as i32
    }

    fn accept(&mut self) {
        while let Ok((stream, _)) = self.listener.accept() {
            if self.clients.len() >= MAX_CLIENTS {
                tracing::warn!(MAX_CLIENTS, "client of the display turned away");
                continue;
            }
            let token = self.next_token;
            let interest = EventSet::IN | EventSet::OUT;
            let added = stream.set_nonblocking(true).and_then(|()| {
                self.epoll.ctl(ControlOperation::Add, stream.as_raw_fd(), EpollEvent::new(interest, token))
            });
            if let Err(error) = added {
                tracing::warn!(%error, "client of the display refused");
                continue;
            }
            self.next_token += 1;
            let screen = self.screen.get_or_insert_with(|| {
                let mut screen = Screen::new();
                screen.update(&self.devices.ramfb, &self.memory);
                screen
            });
            let session = Session::new(screen.size());
            self.clients.insert(token, Client { stream, session, interest, last_progress: Instant::now() });
            tracing::debug!(token, "client of the display");
        }
    }

    /// Does something with a client, and drops it if it cannot go on.
    fn on_client(&mut self, token: u64, act: impl FnOnce(&mut Self, &mut Client) -> Result<(), Gone>) {
        let Some(mut client) = self.clients.remove(&token) else { return };
        match act(self, &mut client) {
            Ok(()) => drop(self.clients.insert(token, client)),
            Err(reason) => {
                tracing::debug!(token, %reason, "client of the display gone");
                for key in client.session.held_keys() {
                    self.devices.keyboard.key(key, Action::Release);
                }
            }
        }
    }

    fn receive(&mut self, client: &mut Client) -> Result<(), Gone> {
        let mut buffer = [0; READ_CHUNK];
        let len = match client.stream.read(&mut buffer) {
            Ok(0) => return Err(Gone::Closed),
            Ok(len) => len,
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {
                return Ok(());
            }
            Err(error) => return Err(error.into()),
        };
        let mut inputs = Vec::new();
        let received = client.session.receive(&buffer[..len], &mut inputs);
        for input in inputs {
            match input {
                Input::Key(key, action) => self.devices.keyboard.key(key, action),
                Input::Pointer(state) => self.devices.pointer.push(state),
            }
        }
        Ok(received?)
    }

    /// Looks at the frame buffer, if it is time to and somebody waits for it.
    fn look(&mut self, now: Instant) {
        let Some(screen) = &mut self.screen else { return };
        if now < self.next_look || !self.clients.values().any(|client| client.session.waits()) {
            return;
        }
        let change = screen.update(&self.devices.ramfb, &self.memory);
        if !matches!(&change, Change::Tiles(tiles) if tiles.is_empty()) {
            self.last_change = now;
        }
        for client in self.clients.values_mut() {
            client.session.screen_changed(screen.size(), &change);
        }
        // From the end of the look: a large screen on a slow machine does not take all of a processor.
        let pause = if now.duration_since(self.last_change) > QUIET { LOOK_QUIET } else { LOOK };
        self.next_look = Instant::now() + pause;
    }

    /// Sends what can be sent now, and says what to wait for.
    fn send(&mut self, client: &mut Client, token: u64, now: Instant) -> Result<(), Gone> {
        if let Some(screen) = &self.screen {
            client.session.fill(screen)?;
        }
        while !client.session.output().is_empty() {
            match client.stream.write(client.session.output()) {
                Ok(written) => {
                    client.session.sent(written);
                    client.last_progress = now;
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => return Err(error.into()),
            }
        }
        let idle = client.session.is_running() && !client.session.is_sending();
        if idle {
            client.last_progress = now;
        } else if now.saturating_duration_since(client.last_progress) > PATIENCE {
            return Err(Gone::Slow);
        }
        let mut interest = EventSet::IN;
        interest.set(EventSet::OUT, client.session.is_sending());
        if interest != client.interest {
            client.interest = interest;
            let event = EpollEvent::new(interest, token);
            self.epoll.ctl(ControlOperation::Modify, client.stream.as_raw_fd(), event)?;
        }
        Ok(())
    }
}

#[cfg(test)]
#[path = "server_tests.rs"]
mod tests;
