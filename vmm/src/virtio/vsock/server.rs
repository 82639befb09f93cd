//! The thread that moves bytes between the guest's rings and streams outside.
//!
//! It lives as long as the device and serves while there are rings: whoever connects while the guest has no driver waits. Each round it does what can
//! be done now and then waits for kicks, for streams, or for those who connect.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io::{self, ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, SyncSender, TryRecvError};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use super::connection::ROOM;
use super::packet::{HEADER_BYTES, Header};
use super::switch::{Key, MOST, Switch};
use crate::memory::Memory;
use crate::socket;
use crate::virtio::device::Start;
use crate::virtio::local::{Appetite, Chain, Ring, ServiceError};

/// The longest line with which somebody outside says which port is wanted.
const MAX_LINE: usize = 32;
/// Most data of one packet; what drivers use.
const MAX_DATA: u32 = 64 << 10;
/// The event that says that all connections are gone (virtio 1.3, 5.10.6.7).
const TRANSPORT_RESET: [u8; 4] = [0; 4];

/// The queues.
pub(super) struct Rings {
    pub(super) memory: Memory,
    pub(super) to_guest: Ring,
    pub(super) from_guest: Ring,
    pub(super) events: Ring,
}

/// What connections the driver knows of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Known {
    /// None.
    Nothing,
    /// Those of this process.
    Ours,
    /// Those of another one, which it has to be told are gone.
    Theirs,
}

/// What the thread is told.
pub(super) enum Order {
    /// Serve these rings.
    Serve(Box<Rings>, Known),
    /// Serve no more, and say so.
    Rest(SyncSender<()>),
}

const LISTENER: u64 = 0;
const KICK: u64 = 1;
/// Streams come after this, each with a number of its own: events of one that is gone are not taken for another's.
const FIRST_STREAM: u64 = 2;

/// Somebody outside.
struct Peer {
    stream: UnixStream,
    who: Who,
    interest: EventSet,
    /// The other end is gone; it is looked at without being asked, as events would not end.
    hung_up: bool,
}

enum Who {
    /// Has not yet said which port it wants.
    Caller(Vec<u8>),
    /// Has a connection.
    Connected(Key),
}

pub(super) struct Server {
    listener: UnixListener,
    path: PathBuf,
    orders: Receiver<Order>,
    wake: EventFd,
    epoll: Epoll,
    switch: Switch,
    peers: BTreeMap<u64, Peer>,
    next_token: u64,
    /// The driver is to be told that its connections are gone.
    owes_reset: bool,
}

/// Whether to wait before the next round.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Round {
    Wait,
    AtOnce,
}

impl Server {
    pub(super) fn new(
        listener: UnixListener,
        path: &Path,
        cid: u32,
        orders: Receiver<Order>,
        wake: EventFd,
    ) -> io::Result<Self> {
        let epoll = Epoll::new()?;
        for (fd, token) in [(listener.as_raw_fd(), LISTENER), (wake.as_raw_fd(), KICK)] {
            epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::IN, token))?;
        }
        Ok(Self {
            listener,
            path: path.to_owned(),
            orders,
            wake,
            epoll,
            switch: Switch::new(cid),
            peers: BTreeMap::new(),
            next_token: FIRST_STREAM,
            owes_reset: false,
        })
    }

    /// Does what it is told, until there is nobody to tell it anything.
    pub(super) fn run(mut self) {
        while let Ok(order) = self.orders.recv() {
            match order {
                Order::Rest(done) => drop(done.send(())),
                Order::Serve(rings, known) => {
                    if known != Known::Ours {
                        self.switch.forget_all();
                        self.peers.clear();
                        self.owes_reset = known == Known::Theirs;
                    }
                    if let Err(error) = self.serve(*rings) {
                        tracing::warn!(device = "vsock", %error, "not served until its driver resets it");
                    }
                }
            }
        }
    }

    fn serve(&mut self, mut rings: Rings) -> Result<(), ServiceError> {
        let kicks = [&rings.to_guest, &rings.from_guest, &rings.events].map(Ring::kick_fd);
        for fd in kicks {
            self.epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::IN, KICK))?;
        }
        let served = self.serve_rounds(&mut rings);
        for fd in kicks {
            let _ = self.epoll.ctl(ControlOperation::Delete, fd, EpollEvent::default());
        }
        served
    }

    fn serve_rounds(&mut self, rings: &mut Rings) -> Result<(), ServiceError> {
        let mut events = [EpollEvent::default(); 32];
        let mut round = Round::AtOnce;
        loop {
            let timeout = if round == Round::Wait { -1 } else { 0 };
            let count = match self.epoll.wait(timeout, &mut events) {
                Err(error) if error.kind() == ErrorKind::Interrupted => 0,
                waited => waited?,
            };
            let _ = self.wake.read();
            match self.orders.try_recv() {
                Ok(Order::Rest(done)) => {
                    // Whoever asked goes on only when the rings are left alone, which they are from here on.
                    let _ = done.send(());
                    return Ok(());
                }
                Ok(Order::Serve(..)) | Err(TryRecvError::Empty) => {}
                Err(TryRecvError::Disconnected) => return Ok(()),
            }
            for ring in [&rings.to_guest, &rings.from_guest, &rings.events] {
                ring.take_kick();
            }
            for event in &events[..count] {
                match event.data() {
                    LISTENER => self.accept(),
                    KICK => {}
                    token => self.stream_event(token, event.event_set()),
                }
            }
            round = self.pump(rings)?;
        }
    }

    /// Moves what can be moved now.
    fn pump(&mut self, rings: &mut Rings) -> Result<Round, ServiceError> {
        let memory = rings.memory.clone();
        let hungry = |wanted: bool| if wanted { Appetite::Hungry } else { Appetite::Full };
        // A batch at a time: a guest that has no end of packets keeps nobody else waiting.
        let mut batch = (&mut *self, MOST);
        rings.from_guest.serve(
            &mut batch,
            |(server, left)| hungry(*left > 0 && server.switch.has_room()),
            |(server, left), chain| {
                *left -= 1;
                server.hear(&memory, chain)
            },
        )?;
        let more_heard = batch.1 == 0 || !self.switch.has_room();
        self.write_all_peers();
        let mut batch = (&mut *self, MOST);
        rings.to_guest.serve(
            &mut batch,
            |(server, left)| hungry(*left > 0 && server.switch.has_news()),
            |(server, left), chain| {
                *left -= 1;
                server.tell(&memory, chain)
            },
        )?;
        let more_told = batch.1 == 0 && self.switch.has_news();
        rings.events.serve(
            self,
            |server| hungry(server.owes_reset),
            |server, chain| server.tell_reset(&memory, chain),
        )?;
        self.leave_ended();
        let more_read = self.update_interests();
        let at_once = more_heard && self.switch.has_room() || more_told || more_read;
        Ok(if at_once { Round::AtOnce } else { Round::Wait })
    }

    /// A packet of the guest's.
    fn hear(&mut self, memory: &Memory, chain: Chain<'_>) -> u32 {
        let Ok(mut reader) = chain.reader(memory) else { return 0 };
        let mut header = [0; HEADER_BYTES];
        if reader.read_exact(&mut header).is_err() {
            return 0;
        }
        let header = Header::parse(&header);
        let mut data = Vec::new();
        if let Err(error) = reader.take(header.len.min(MAX_DATA).into()).read_to_end(&mut data) {
            tracing::debug!(%error, "a packet of the guest's cannot be read");
        }
        let Some(wish) = self.switch.receive(&header, &data) else { return 0 };
        let connected = socket::connect(&self.path_of(wish.key.host))
            .and_then(|stream| self.add(stream, Who::Connected(wish.key)));
        match connected {
            Ok(()) => self.switch.grant(&wish),
            Err(error) => {
                tracing::debug!(port = wish.key.host, %error, "nobody listens where the guest connects to");
                self.switch.refuse(&wish);
            }
        }
        0
    }

    /// Where those listen outside whom the guest may connect to.
    fn path_of(&self, port: u32) -> PathBuf {
        let mut path = OsString::from(&self.path);
        path.push(format!("_{port}"));
        path.into()
    }

    /// A packet for the guest. A buffer without room for a header gets none.
    fn tell(&mut self, memory: &Memory, chain: Chain<'_>) -> u32 {
        let Ok(mut writer) = chain.writer(memory) else { return 0 };
        let Some(most) = writer.available_bytes().checked_sub(HEADER_BYTES) else { return 0 };
        let Some((header, data)) = self.switch.next(most) else { return 0 };
        match writer.write_all(&header.bytes()).and_then(|()| writer.write_all(&data)) {
            Ok(()) => (HEADER_BYTES + data.len()) as u32,
            Err(_) => 0,
        }
    }

    fn tell_reset(&mut self, memory: &Memory, chain: Chain<'_>) -> u32 {
        let Ok(mut writer) = chain.writer(memory) else { return 0 };
        if writer.available_bytes() < TRANSPORT_RESET.len() || writer.write_all(&TRANSPORT_RESET).is_err() {
            return 0;
        }
        self.owes_reset = false;
        TRANSPORT_RESET.len() as u32
    }

    fn accept(&mut self) {
        while let Ok((stream, _)) = self.listener.accept() {
            // One too many sees the end of its stream.
            let room = self.peers.len() < MOST;
            let added = stream.set_nonblocking(true).and_then(|()| match room {
                true => self.add(stream, Who::Caller(Vec::new())),
                false => Err(io::Error::other("too many connections")),
            });
            if let Err(error) = added {
                tracing::warn!(%error, "a connection to the guest is refused");
            }
        }
    }

    fn add(&mut self, stream: UnixStream, who: Who) -> io::Result<()> {
        let (token, interest) = (self.next_token, EventSet::IN);
        self.epoll.ctl(ControlOperation::Add, stream.as_raw_fd(), EpollEvent::new(interest, token))?;
        self.next_token += 1;
        self.peers.insert(token, Peer { stream, who, interest, hung_up: false });
        Ok(())
    }

    fn stream_event(&mut self, token: u64, events: EventSet) {
        let Some(peer) = self.peers.get_mut(&token) else { return };
        if events.intersects(EventSet::HANG_UP | EventSet::ERROR) && !peer.hung_up {
            peer.hung_up = true;
            let _ = self.epoll.ctl(ControlOperation::Delete, peer.stream.as_raw_fd(), EpollEvent::default());
        }
        if events.contains(EventSet::IN) || peer.hung_up {
            self.read(token);
        }
    }

    fn read(&mut self, token: u64) {
        let Some(peer) = self.peers.get_mut(&token) else { return };
        match &mut peer.who {
            Who::Caller(line) => {
                let mut piece = [0; MAX_LINE];
                match peer.stream.read(&mut piece[..MAX_LINE - line.len()]) {
                    Ok(len) if len > 0 => {
                        line.extend(&piece[..len]);
                        self.listen_to(token);
                    }
                    Err(error) if is_for_later(&error) => {}
                    _ => drop(self.peers.remove(&token)),
                }
            }
            Who::Connected(key) => {
                let Some(connection) = self.switch.get(*key) else { return };
                let mut piece = [0; ROOM];
                let room = connection.room();
                if room == 0 {
                    if peer.hung_up && connection.heard_all() {
                        connection.gone();
                    }
                    return;
                }
                match peer.stream.read(&mut piece[..room]) {
                    Ok(0) if peer.hung_up => connection.gone(),
                    Ok(len) => connection.read(&piece[..len]),
                    Err(error) if is_for_later(&error) => {}
                    Err(_) => connection.gone(),
                }
            }
        }
    }

    /// Looks at what a caller has said: `CONNECT <port>` on a line of its own, and whatever it has to say to that port.
    fn listen_to(&mut self, token: u64) {
        let Some(Peer { who: who @ Who::Caller(_), .. }) = self.peers.get_mut(&token) else { return };
        let Who::Caller(said) = who else { return };
        let Some(end) = said.iter().position(|byte| *byte == b'\n') else {
            if said.len() >= MAX_LINE {
                self.peers.remove(&token);
            }
            return;
        };
        match port(&said[..end]).and_then(|port| self.switch.ask(port, &said[end + 1..])) {
            Some(key) => *who = Who::Connected(key),
            None => drop(self.peers.remove(&token)),
        }
    }

    fn write_all_peers(&mut self) {
        for peer in self.peers.values_mut() {
            let Who::Connected(key) = peer.who else { continue };
            let Some(connection) = self.switch.get(key) else { continue };
            while !connection.pending().is_empty() {
                match peer.stream.write(connection.pending()) {
                    Ok(len) => connection.wrote(len),
                    Err(error) if error.kind() == ErrorKind::Interrupted => {}
                    Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                    Err(_) => connection.gone(),
                }
            }
            if connection.ends_outward() {
                // Fails when nobody is there any more.
                let _ = peer.stream.shutdown(Shutdown::Write);
            }
        }
    }

    /// Connections that are over, and their streams.
    fn leave_ended(&mut self) {
        self.switch.forget_ended();
        let switch = &mut self.switch;
        // Closing a descriptor takes it out of the epoll set.
        self.peers.retain(|_, peer| match peer.who {
            Who::Caller(_) => true,
            Who::Connected(key) => switch.get(key).is_some(),
        });
    }

    /// Waits for room to write only where there is something to write, and for input only while there is room for it. Returns whether there is
    /// something to be read at once.
    fn update_interests(&mut self) -> bool {
        let mut at_once = false;
        let mut lost = Vec::new();
        for (token, peer) in &mut self.peers {
            let mut interest = EventSet::IN;
            if let Who::Connected(key) = peer.who
                && let Some(connection) = self.switch.get(key)
            {
                interest.set(EventSet::IN, connection.room() > 0);
                interest.set(EventSet::OUT, !connection.pending().is_empty());
            }
            if peer.hung_up {
                at_once |= interest.contains(EventSet::IN);
                lost.push(*token);
            } else if interest != peer.interest {
                peer.interest = interest;
                let event = EpollEvent::new(interest, *token);
                let fd = peer.stream.as_raw_fd();
                if let Err(error) = self.epoll.ctl(ControlOperation::Modify, fd, event) {
                    tracing::warn!(%error, "a connection to the guest is lost");
                    peer.hung_up = true;
                    at_once = true;
                }
            }
        }
        for token in lost {
            self.read(token);
        }
        at_once
    }
}

/// The port in a caller's line.
fn port(line: &[u8]) -> Option<u32> {
    let line = std::str::from_utf8(line).ok()?;
    line.strip_suffix('\r').unwrap_or(line).strip_prefix("CONNECT ")?.trim().parse().ok()
}

fn is_for_later(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted)
}

impl Known {
    /// What the driver knows of when the rings are set up in this way, by a device that was, or was not, restored from another's state.
    pub(super) fn of(start: Start, restored: bool) -> Self {
        match (start, restored) {
            (Start::Fresh, _) => Self::Nothing,
            (Start::Resumed, false) => Self::Ours,
            (Start::Resumed, true) => Self::Theirs,
        }
    }
}
