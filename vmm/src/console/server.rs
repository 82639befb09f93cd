//! The console's server thread: accepts clients on a unix socket, sends each the ring's content and then what follows, and
//! hands what they send to the serial port.

use std::collections::BTreeMap;
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::ring::Ring;
use super::serial::SerialPort;
use crate::isolation::{ThreadKind, confine_thread};
use crate::socket;

/// What those who attach late get to see.
const RING_SIZE: usize = 64 << 10;
/// Clients at a time; more are turned away.
const MAX_CLIENTS: usize = 32;
/// Input kept for a guest that does not read. When it is full, clients are not read from.
const MAX_INPUT: usize = 4096;
/// Written to one client before the others get their turn.
const WRITE_CHUNK: usize = 16 << 10;
/// How long the end of a guest waits for clients that do not read.
const FLUSH_DEADLINE: Duration = Duration::from_millis(300);

/// The guest's side of the output: a ring, and a way to wake the server.
pub(crate) struct Output {
    ring: Mutex<Ring>,
    wake: EventFd,
    /// Whether the server wants to be woken: it has clients and has not been woken since it last looked.
    listening: AtomicBool,
}

impl Output {
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self { ring: Mutex::new(Ring::new(RING_SIZE)), wake: event()?, listening: AtomicBool::new(false) })
    }

    /// Takes output from the guest. Never waits for a client.
    pub(crate) fn push(&self, data: &[u8]) {
        self.ring.lock().push(data);
        if self.listening.swap(false, Ordering::AcqRel) {
            self.wake();
        }
    }

    fn wake(&self) {
        // Fails only when the counter is full, in which case the server is awake anyhow.
        let _ = self.wake.write(1);
    }
}

fn event() -> io::Result<EventFd> {
    EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)
}

/// The running server. Dropping it ends the thread and removes the socket.
pub(crate) struct ConsoleServer {
    output: Arc<Output>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
    /// Given back when the thread has ended.
    _place: socket::Place,
}

impl ConsoleServer {
    /// Listens on `path`. `drained` is the event by which `serial` says that it takes input again.
    pub(crate) fn start(
        path: &Path,
        output: Arc<Output>,
        serial: Arc<SerialPort>,
        drained: EventFd,
    ) -> io::Result<Self> {
        let (listener, place) = socket::listen(path)?;
        let stop = Arc::new(AtomicBool::new(false));
        let epoll = Epoll::new()?;
        let mut server = Server {
            epoll,
            listener,
            output: output.clone(),
            serial,
            drained,
            stop: stop.clone(),
            clients: BTreeMap::new(),
            next_token: FIRST_CLIENT,
            input: Vec::new(),
        };
        server.register()?;
        let thread = std::thread::Builder::new().name("console".into()).spawn(move || {
            confine_thread(ThreadKind::Console);
            server.run();
        })?;
        Ok(Self { output, stop, thread: Some(thread), _place: place })
    }
}

impl Drop for ConsoleServer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        self.output.wake();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

const LISTENER: u64 = 0;
const WAKE: u64 = 1;
const DRAINED: u64 = 2;
const FIRST_CLIENT: u64 = 3;

struct Client {
    stream: UnixStream,
    /// Position in the output.
    position: u64,
    interest: EventSet,
}

struct Server {
    epoll: Epoll,
    listener: UnixListener,
    output: Arc<Output>,
    serial: Arc<SerialPort>,
    drained: EventFd,
    stop: Arc<AtomicBool>,
    clients: BTreeMap<u64, Client>,
    next_token: u64,
    input: Vec<u8>,
}

impl Server {
    fn register(&mut self) -> io::Result<()> {
        for (fd, token) in [
            (self.listener.as_raw_fd(), LISTENER),
            (self.output.wake.as_raw_fd(), WAKE),
            (self.drained.as_raw_fd(), DRAINED),
        ] {
            self.epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::IN, token))?;
        }
        Ok(())
    }

    fn run(&mut self) {
        let mut events = [EpollEvent::default(); 16];
        while !self.stop.load(Ordering::Acquire) {
            let count = match self.epoll.wait(-1, &mut events) {
                Ok(count) => count,
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) => {
                    tracing::error!(%error, "console server ends");
                    return;
                }
            };
            for event in &events[..count] {
                self.handle(event.data(), event.event_set());
            }
            self.deliver_input();
            // First say that we want to be woken, then look: output in between is not missed.
            self.output.listening.store(!self.clients.is_empty(), Ordering::Release);
            self.send_output();
            self.update_interest();
        }
        self.flush_output();
    }

    /// Gives clients a last moment to take what the guest said at its end.
    fn flush_output(&mut self) {
        // Those too that connected a moment ago.
        self.accept();
        let deadline = Instant::now() + FLUSH_DEADLINE;
        let end = self.output.ring.lock().end();
        self.send_output();
        while self.clients.values().any(|client| client.position < end) && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(5));
            self.send_output();
        }
    }

    fn handle(&mut self, token: u64, events: EventSet) {
        match token {
            LISTENER => self.accept(),
            WAKE => drop(self.output.wake.read()),
            DRAINED => drop(self.drained.read()),
            client => self.receive(client, events),
        }
    }

    fn accept(&mut self) {
        while let Ok((stream, _)) = self.listener.accept() {
            if self.clients.len() >= MAX_CLIENTS {
                tracing::warn!(MAX_CLIENTS, "console client turned away");
                continue;
            }
            let token = self.next_token;
            let interest = EventSet::IN;
            let added = stream.set_nonblocking(true).and_then(|()| {
                self.epoll.ctl(ControlOperation::Add, stream.as_raw_fd(), EpollEvent::new(interest, token))
            });
            match added {
                Ok(()) => {
                    self.next_token += 1;
                    let position = self.output.ring.lock().start();
                    self.clients.insert(token, Client { stream, position, interest });
                }
                Err(error) => tracing::warn!(%error, "console client refused"),
            }
        }
    }

    fn receive(&mut self, token: u64, events: EventSet) {
        let Some(client) = self.clients.get_mut(&token) else { return };
        let mut buffer = [0; 512];
        let room = MAX_INPUT.saturating_sub(self.input.len()).min(buffer.len());
        let gone = events.intersects(EventSet::HANG_UP | EventSet::ERROR);
        if room == 0 || !events.intersects(EventSet::IN) {
            if gone {
                self.drop_client(token);
            }
            return;
        }
        match client.stream.read(&mut buffer[..room]) {
            Ok(0) => self.drop_client(token),
            Ok(len) => self.input.extend_from_slice(&buffer[..len]),
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
            Err(_) => self.drop_client(token),
        }
    }

    fn deliver_input(&mut self) {
        let taken = self.serial.receive(&self.input);
        self.input.drain(..taken);
    }

    fn send_output(&mut self) {
        let mut gone = Vec::new();
        for (token, client) in &mut self.clients {
            let mut chunk = [0; WRITE_CHUNK];
            loop {
                let (len, at) = {
                    let ring = self.output.ring.lock();
                    let (piece, at) = ring.read(client.position);
                    let len = piece.len().min(WRITE_CHUNK);
                    chunk[..len].copy_from_slice(&piece[..len]);
                    (len, at)
                };
                client.position = at;
                if len == 0 {
                    break;
                }
                match client.stream.write(&chunk[..len]) {
                    Ok(written) => client.position += written as u64,
                    Err(error) if error.kind() == ErrorKind::Interrupted => {}
                    Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                    Err(_) => {
                        gone.push(*token);
                        break;
                    }
                }
            }
        }
        for token in gone {
            self.drop_client(token);
        }
    }

    /// Waits for room to write only where there is something to write, and for input only while there is room for it.
    fn update_interest(&mut self) {
        let end = self.output.ring.lock().end();
        let mut failed = Vec::new();
        for (token, client) in &mut self.clients {
            let mut interest = EventSet::empty();
            interest.set(EventSet::IN, self.input.len() < MAX_INPUT);
            interest.set(EventSet::OUT, client.position < end);
            if interest != client.interest {
                client.interest = interest;
                let event = EpollEvent::new(interest, *token);
                if self.epoll.ctl(ControlOperation::Modify, client.stream.as_raw_fd(), event).is_err() {
                    failed.push(*token);
                }
            }
        }
        for token in failed {
            self.drop_client(token);
        }
    }

    fn drop_client(&mut self, token: u64) {
        // Closing the descriptor takes it out of the epoll set.
        self.clients.remove(&token);
    }
}

#[cfg(test)]
mod tests {
    use super::super::serial::IrqTrigger;
    use super::*;
    use crate::bus::IoDevice;

    struct Console {
        output: Arc<Output>,
        serial: Arc<SerialPort>,
        server: ConsoleServer,
    }

    fn console(path: &Path) -> Console {
        let output = Arc::new(Output::new().unwrap());
        let drained = event().unwrap();
        let serial = Arc::new(SerialPort::new(
            IrqTrigger(event().unwrap()),
            output.clone(),
            drained.try_clone().unwrap(),
        ));
        let server = ConsoleServer::start(path, output.clone(), serial.clone(), drained).unwrap();
        Console { output, serial, server }
    }

    fn connect(path: &Path) -> UnixStream {
        let stream = UnixStream::connect(path).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        stream
    }

    fn read(stream: &mut UnixStream, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        stream.read_exact(&mut data).unwrap();
        data
    }

    #[test]
    fn late_clients_get_the_past_and_all_get_what_follows() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("console.sock");
        let console = console(&path);
        console.output.push(b"before ");
        let mut early = connect(&path);
        assert_eq!(read(&mut early, 7), b"before ");
        console.output.push(b"after");
        assert_eq!(read(&mut early, 5), b"after");
        let mut late = connect(&path);
        assert_eq!(read(&mut late, 12), b"before after");
        console.output.push(b"last words");
        drop(console.server);
        assert_eq!(read(&mut late, 10), b"last words");
        assert!(!path.exists());
    }

    #[test]
    fn a_client_that_does_not_read_holds_up_nobody() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("console.sock");
        let console = console(&path);
        let _idle = connect(&path);
        for _ in 0..64 {
            console.output.push(&[b'x'; 16 << 10]);
        }
        console.output.push(b"end");
        let mut reader = connect(&path);
        let tail = read(&mut reader, RING_SIZE);
        assert!(tail.ends_with(b"end"));
    }

    #[test]
    fn input_reaches_the_guest_beyond_the_fifo() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("console.sock");
        let console = console(&path);
        let sent: Vec<u8> = (0..200).collect();
        connect(&path).write_all(&sent).unwrap();
        let mut received = Vec::new();
        let deadline = std::time::Instant::now() + Duration::from_secs(10);
        while received.len() < sent.len() {
            assert!(std::time::Instant::now() < deadline, "got {received:?}");
            let mut data = [0];
            console.serial.read(5, &mut data);
            if data[0] & 1 == 1 {
                console.serial.read(0, &mut data);
                received.push(data[0]);
            }
        }
        assert_eq!(received, sent);
    }
}
