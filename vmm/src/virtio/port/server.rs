//! The thread that moves bytes between the guest's rings and the client.
//!
//! Each round it does whatever can be done now ([`Server::pump`]) and then waits for kicks, for the client, or for a new one. A ring that was
//! left because there was no room is looked at again in a later round, which the client's progress brings about.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;

use parking_lot::Mutex;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::control::{Control, End, MESSAGE_BYTES};
use crate::memory::Memory;
use crate::virtio::local::{Appetite, Chain, Ring, ServiceError, Stop, wait};

/// What is kept for a client that does not read, before the guest has to wait. One more buffer of the guest's may come on top.
const TO_CLIENT_LIMIT: usize = 64 << 10;
/// Most that is taken of one buffer of the guest's. Drivers use much smaller ones.
const CHAIN_LIMIT: usize = 1 << 20;
/// What is kept for a guest that does not read, before the client has to wait.
const TO_GUEST_LIMIT: usize = 4096;

/// The queues that are used.
pub(super) struct Rings {
    pub(super) control_to_guest: Ring,
    pub(super) control_from_guest: Ring,
    pub(super) to_guest: Ring,
    pub(super) from_guest: Ring,
}

const LISTENER: u64 = 0;
const KICK: u64 = 1;
/// Clients come after this, each with a number of its own: events of one that is gone are not taken for another's.
const FIRST_CLIENT: u64 = 2;

struct Client {
    stream: UnixStream,
    token: u64,
    interest: EventSet,
}

pub(super) struct Server {
    name: &'static str,
    memory: Memory,
    epoll: Epoll,
    listener: UnixListener,
    control: Control,
    /// Where `control` is left at the end of the thread.
    kept: Arc<Mutex<Control>>,
    client: Option<Client>,
    next_token: u64,
    to_client: VecDeque<u8>,
    to_guest: VecDeque<u8>,
}

impl Server {
    /// `kept` is where the control messages go on from.
    pub(super) fn new(
        name: &'static str,
        listener: UnixListener,
        memory: Memory,
        kept: Arc<Mutex<Control>>,
    ) -> io::Result<Self> {
        let control = kept.lock().clone();
        Ok(Self {
            name,
            memory,
            epoll: Epoll::new()?,
            listener,
            control,
            kept,
            client: None,
            next_token: FIRST_CLIENT,
            to_client: VecDeque::new(),
            to_guest: VecDeque::new(),
        })
    }

    /// Serves the port until it is told to stop.
    pub(super) fn run(mut self, rings: Rings, stop: &Stop) -> Result<(), ServiceError> {
        let served = self.serve(rings, stop);
        *self.kept.lock() = self.control;
        served
    }

    fn serve(&mut self, mut rings: Rings, stop: &Stop) -> Result<(), ServiceError> {
        let kicks = [&rings.control_to_guest, &rings.control_from_guest, &rings.to_guest, &rings.from_guest];
        let fds = kicks.map(|ring| (ring.kick_fd(), KICK));
        for (fd, token) in fds.into_iter().chain([(self.listener.as_raw_fd(), LISTENER), (stop.fd(), KICK)]) {
            self.epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::IN, token))?;
        }
        let mut events = [EpollEvent::default(); 8];
        while !stop.is_asked() {
            let count = wait(&self.epoll, &mut events)?;
            for ring in
                [&rings.control_to_guest, &rings.control_from_guest, &rings.to_guest, &rings.from_guest]
            {
                ring.take_kick();
            }
            // First what the guest has to say: whether a client is let in depends on it.
            self.pump(&mut rings, stop)?;
            for event in &events[..count] {
                match event.data() {
                    LISTENER => self.accept(),
                    KICK => {}
                    token => self.client_event(token, event.event_set()),
                }
            }
            self.pump(&mut rings, stop)?;
            self.update_interest();
        }
        Ok(())
    }

    fn ours(&self) -> End {
        if self.client.is_some() { End::Open } else { End::Closed }
    }

    /// Moves what can be moved now.
    fn pump(&mut self, rings: &mut Rings, stop: &Stop) -> Result<(), ServiceError> {
        rings.control_from_guest.serve(self, |_| stop.appetite(), Self::hear)?;
        loop {
            rings.from_guest.serve(self, |server| server.room_for_client(stop), Self::take_from_guest)?;
            let was_full = self.to_client.len() >= TO_CLIENT_LIMIT;
            self.write_to_client();
            if !was_full || self.to_client.len() >= TO_CLIENT_LIMIT || stop.is_asked() {
                break;
            }
        }
        if self.control.guest() == End::Closed {
            self.drop_client();
        }
        let anything = |server: &Self| match server.to_guest.is_empty() {
            true => Appetite::Full,
            false => stop.appetite(),
        };
        rings.to_guest.serve(self, anything, Self::give_to_guest)?;
        let news = |server: &Self| match server.control.has_news(server.ours()) {
            true => stop.appetite(),
            false => Appetite::Full,
        };
        rings.control_to_guest.serve(self, news, Self::tell)
    }

    /// A control message of the guest's.
    fn hear(&mut self, chain: Chain<'_>) -> u32 {
        let mut message = Vec::with_capacity(MESSAGE_BYTES);
        if let Ok(reader) = chain.reader(&self.memory)
            && reader.take(MESSAGE_BYTES as u64).read_to_end(&mut message).is_ok()
        {
            let before = self.control.guest();
            self.control.receive(&message);
            if before != self.control.guest() {
                tracing::debug!(port = self.name, now = ?self.control.guest(), "the guest's end changed");
            }
        }
        0
    }

    /// A control message for the guest. A buffer that is too small for it gets none of it: the message is lost, as with a driver
    /// that ignores it.
    fn tell(&mut self, chain: Chain<'_>) -> u32 {
        let ours = self.ours();
        let (Some(message), Ok(mut writer)) =
            (self.control.next(self.name, ours), chain.writer(&self.memory))
        else {
            return 0;
        };
        if writer.available_bytes() < message.len() || writer.write_all(&message).is_err() {
            return 0;
        }
        message.len() as u32
    }

    fn room_for_client(&self, stop: &Stop) -> Appetite {
        if self.to_client.len() < TO_CLIENT_LIMIT { stop.appetite() } else { Appetite::Full }
    }

    /// What the guest says. Without a client it is said to nobody.
    fn take_from_guest(&mut self, chain: Chain<'_>) -> u32 {
        if self.client.is_some()
            && let Ok(reader) = chain.reader(&self.memory)
        {
            let mut said = Vec::new();
            match reader.take(CHAIN_LIMIT as u64).read_to_end(&mut said) {
                Ok(_) => self.to_client.extend(said),
                Err(error) => tracing::debug!(port = self.name, %error, "a buffer cannot be read"),
            }
        }
        0
    }

    fn give_to_guest(&mut self, chain: Chain<'_>) -> u32 {
        let Ok(mut writer) = chain.writer(&self.memory) else { return 0 };
        let length = writer.available_bytes().min(self.to_guest.len());
        let piece = &self.to_guest.make_contiguous()[..length];
        if writer.write_all(piece).is_err() {
            return 0;
        }
        self.to_guest.drain(..length);
        length as u32
    }

    fn accept(&mut self) {
        while let Ok((stream, _)) = self.listener.accept() {
            if self.control.guest() == End::Closed {
                // Nobody would answer: the client sees its stream end.
                continue;
            }
            let (token, interest) = (self.next_token, EventSet::IN);
            let added = stream.set_nonblocking(true).and_then(|()| {
                self.epoll.ctl(ControlOperation::Add, stream.as_raw_fd(), EpollEvent::new(interest, token))
            });
            match added {
                Ok(()) => {
                    self.drop_client();
                    self.next_token += 1;
                    self.client = Some(Client { stream, token, interest });
                }
                Err(error) => tracing::warn!(port = self.name, %error, "client refused"),
            }
        }
    }

    fn client_event(&mut self, token: u64, events: EventSet) {
        let Some(client) = self.client.as_mut().filter(|client| client.token == token) else { return };
        let room = TO_GUEST_LIMIT.saturating_sub(self.to_guest.len());
        if room == 0 || !events.contains(EventSet::IN) {
            if events.intersects(EventSet::HANG_UP | EventSet::ERROR) {
                self.drop_client();
            }
            return;
        }
        let mut piece = [0; TO_GUEST_LIMIT];
        match client.stream.read(&mut piece[..room]) {
            Ok(0) => self.drop_client(),
            Ok(length) => self.to_guest.extend(&piece[..length]),
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
            Err(_) => self.drop_client(),
        }
    }

    fn write_to_client(&mut self) {
        let Some(client) = &mut self.client else { return };
        while !self.to_client.is_empty() {
            match client.stream.write(self.to_client.as_slices().0) {
                Ok(written) => drop(self.to_client.drain(..written)),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(_) => return self.drop_client(),
            }
        }
    }

    /// What was under way for or from the client goes with it.
    fn drop_client(&mut self) {
        // Closing the descriptor takes it out of the epoll set.
        self.client = None;
        self.to_client.clear();
        self.to_guest.clear();
    }

    /// Waits for room to write only where there is something to write, and for input only while there is room for it.
    fn update_interest(&mut self) {
        let Some(client) = &mut self.client else { return };
        let mut interest = EventSet::empty();
        interest.set(EventSet::IN, self.to_guest.len() < TO_GUEST_LIMIT);
        interest.set(EventSet::OUT, !self.to_client.is_empty());
        if interest == client.interest {
            return;
        }
        client.interest = interest;
        let event = EpollEvent::new(interest, client.token);
        if self.epoll.ctl(ControlOperation::Modify, client.stream.as_raw_fd(), event).is_err() {
            self.drop_client();
        }
    }
}
