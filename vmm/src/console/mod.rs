//! The serial console: a 16550 ([`serial`]) whose output goes into a ring of the last 64 KiB ([`ring`]), from which a server ([`server`])
//! feeds any number of clients on a unix socket.
//!
//! Invariant: output never makes a vCPU wait. A client is only a position in the stream; one that reads too slowly misses what has left
//! the ring. Input of all clients is merged.

pub(crate) mod ring;
pub(crate) mod serial;
pub(crate) mod server;
