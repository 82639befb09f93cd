//! All connections of a guest: which packet is whose, and whose turn it is. A model without I/O.
//!
//! What the guest can make it keep is bounded: [`MOST`] connections, and as many answers to packets of none. When there are more of these to give the guest's
//! packets wait ([`Switch::has_room`]) until it has taken some.

use std::collections::VecDeque;
use std::collections::btree_map::{BTreeMap, Entry};
use std::ops::Bound;

use super::connection::Connection;
use super::packet::{HOST_CID, Header, Op, STREAM};

/// Most connections.
pub(super) const MOST: usize = 256;
/// Most answers to packets that belong to no connection.
const MOST_RESETS: usize = 256;
/// Ports outside of connections that begin there are from here on.
const FIRST_PORT: u32 = 1 << 30;

/// A connection's ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Key {
    pub(super) guest: u32,
    pub(super) host: u32,
}

/// The guest wants to talk to somebody at a port outside.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Wish {
    pub(super) key: Key,
    credit: (u32, u32),
}

/// The connections.
pub(super) struct Switch {
    cid: u64,
    connections: BTreeMap<Key, Connection>,
    resets: VecDeque<Header>,
    /// Who was told something last.
    last: Option<Key>,
    next_port: u32,
}

impl Switch {
    /// Of the guest with this address.
    pub(super) fn new(cid: u32) -> Self {
        Self {
            cid: cid.into(),
            connections: BTreeMap::new(),
            resets: VecDeque::new(),
            last: None,
            next_port: FIRST_PORT,
        }
    }

    pub(super) fn get(&mut self, key: Key) -> Option<&mut Connection> {
        self.connections.get_mut(&key)
    }

    pub(super) fn is_full(&self) -> bool {
        self.connections.len() >= MOST
    }

    /// Somebody outside, who has said this already, wants to talk to a port of the guest. None: there are too many connections.
    pub(super) fn ask(&mut self, guest: u32, first: &[u8]) -> Option<Key> {
        if self.is_full() {
            return None;
        }
        loop {
            let key = Key { guest, host: self.next_port };
            self.next_port = self.next_port.checked_add(1).unwrap_or(FIRST_PORT);
            // There are fewer connections than ports: one is free.
            if let Entry::Vacant(place) = self.connections.entry(key) {
                let greeting = format!("OK {}\n", key.host).into_bytes();
                place.insert(Connection::to_guest(greeting, first));
                return Some(key);
            }
        }
    }

    /// Whether a packet of the guest's can be taken.
    pub(super) fn has_room(&self) -> bool {
        self.resets.len() < MOST_RESETS
    }

    /// A packet of the guest's. A wish is to be granted or refused.
    pub(super) fn receive(&mut self, header: &Header, data: &[u8]) -> Option<Wish> {
        if header.src_cid != self.cid {
            // Nobody to answer.
            return None;
        }
        let key = Key { guest: header.src_port, host: header.dst_port };
        let credit = (header.buf_alloc, header.fwd_cnt);
        let full = self.is_full();
        let known = self.connections.get_mut(&key);
        let (Some(op), STREAM, HOST_CID, true) =
            (header.op, header.kind, header.dst_cid, data.len() == header.len as usize)
        else {
            self.reset(header);
            return None;
        };
        match (op, known) {
            (Op::Request, None) if !full => return Some(Wish { key, credit }),
            (op, Some(connection)) if op != Op::Request => {
                if connection.receive(op, header.flags, credit, data).is_err() {
                    tracing::debug!(?key, ?op, "the guest broke the protocol of a connection");
                    self.connections.remove(&key);
                    self.reset(header);
                }
            }
            _ => self.reset(header),
        }
        None
    }

    /// There is no such connection, whatever the guest thinks. It is not told that its own end is none.
    fn reset(&mut self, to: &Header) {
        if to.op != Some(Op::Reset) {
            self.resets.push_back(*to);
        }
    }

    /// Somebody is there for the guest.
    pub(super) fn grant(&mut self, wish: &Wish) {
        let (room, taken) = wish.credit;
        self.connections.insert(wish.key, Connection::from_guest(room, taken));
    }

    /// Nobody is.
    pub(super) fn refuse(&mut self, wish: &Wish) {
        let refused = self.header(wish.key, Op::Request);
        self.resets.push_back(Header {
            src_cid: refused.dst_cid,
            dst_cid: refused.src_cid,
            src_port: refused.dst_port,
            dst_port: refused.src_port,
            ..refused
        });
    }

    fn header(&self, key: Key, op: Op) -> Header {
        Header {
            src_cid: HOST_CID,
            dst_cid: self.cid,
            src_port: key.host,
            dst_port: key.guest,
            len: 0,
            kind: STREAM,
            op: Some(op),
            flags: 0,
            buf_alloc: 0,
            fwd_cnt: 0,
        }
    }

    /// Whether there is a packet for the guest.
    pub(super) fn has_news(&self) -> bool {
        !self.resets.is_empty() || self.connections.values().any(Connection::has_news)
    }

    /// The next packet for the guest, with at most so much data. Each connection has its turn.
    pub(super) fn next(&mut self, most: usize) -> Option<(Header, Vec<u8>)> {
        if let Some(to) = self.resets.pop_front() {
            let key = Key { guest: to.src_port, host: to.dst_port };
            return Some((Header { src_cid: to.dst_cid, ..self.header(key, Op::Reset) }, Vec::new()));
        }
        let news = |(_, connection): &(&Key, &Connection)| connection.has_news();
        let after = self.last.map_or(Bound::Unbounded, Bound::Excluded);
        let mut rest = self.connections.range((after, Bound::Unbounded));
        let key = *rest.find(news).or_else(|| self.connections.iter().find(news))?.0;
        let connection = self.connections.get_mut(&key)?;
        let told = connection.next(most)?;
        let (buf_alloc, fwd_cnt) = connection.credit();
        let header = self.header(key, told.op);
        self.last = Some(key);
        let len = told.data.len() as u32;
        Some((Header { flags: told.flags, len, buf_alloc, fwd_cnt, ..header }, told.data))
    }

    /// Forgets connections that are over.
    pub(super) fn forget_ended(&mut self) {
        self.connections.retain(|_, connection| !connection.is_over());
    }

    /// Forgets all: the guest's driver knows of none.
    pub(super) fn forget_all(&mut self) {
        self.connections.clear();
        self.resets.clear();
    }
}
