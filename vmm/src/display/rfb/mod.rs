//! The server's side of RFB (RFC 6143, and the community's rfbproto for what it does not have), without sockets: [`Session`] is one client. Bytes that
//! it sent go in, what it does with keys and pointer comes out, and so do bytes for it.
//!
//! Written here: the crates that serve this protocol bring an async runtime with them, and the VMM has none.
//!
//! # Invariants
//! - Whatever a client sends ends in an ignored message or in an error, after which it is dropped. What is kept of its input is less than a
//!   message of bounded length; long texts are skipped as they come.
//! - What waits to be sent to it is bounded: an update is made piece by piece as the client takes it.
//! - A client gets an update only when it has asked for one.

mod keysym;
mod message;
mod pixels;
mod session;
mod zrle;

pub(super) use pixels::Rgb;
pub(super) use session::{Input, Session, SessionError};
pub(super) use zrle::TILE;
