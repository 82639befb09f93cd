//! Calls between processes: one framing for QUIC streams and unix sockets.
//!
//! A call is one bidirectional stream (between nodes, see [`crate::mesh`]) or one connection (to a unix socket
//! inside a node, see [`call_unix`] and [`serve_unix`]). The caller writes one frame and the callee answers with
//! one. A slow call holds up no other. Where calls are many and small they share a stream, each frame behind its call's number.
//!
//! | module | it is |
//! |---|---|
//! | [`frame`] | the bytes of a frame, and the assembler that reads them from whatever pieces arrive |
//! | `tagged` | frames of many calls on one stream |
//! | [`codec`] | typed headers: one version byte, then postcard |
//! | `unix` | calls over unix sockets |
//!
//! A frame carries a small header (versioned postcard) and optional bulk data, which is never copied into the header
//! nor encoded. Invariants: a frame larger than [`MAX_HEADER`] + [`MAX_BULK`] is refused before it is read;
//! malformed input is an error for its stream and nothing else.

pub mod codec;
pub mod frame;
pub(crate) mod tagged;
mod unix;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::NodeId;

pub use codec::{DecodeError, EncodeError};
pub use unix::{ServeError, call_unix, serve_unix};

/// Largest header of a request or response, in bytes.
pub const MAX_HEADER: usize = 1 << 20;
/// Largest bulk part of a request or response, in bytes. Whoever has more sends it in several calls.
pub const MAX_BULK: usize = 16 << 20;

/// What a caller asks for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Request {
    /// Which method; numbers are assigned by the crate that serves them.
    pub method: u16,
    /// The typed part, see [`codec`].
    pub header: Bytes,
    /// Raw data that goes with it.
    pub bulk: Bytes,
}

impl Request {
    /// A request with a typed header and no bulk data.
    pub fn new<T: Serialize>(method: u16, header: &T) -> Result<Self, EncodeError> {
        Ok(Self { method, header: codec::encode(header)?, bulk: Bytes::new() })
    }

    /// The same request with bulk data.
    #[must_use]
    pub fn with_bulk(mut self, bulk: Bytes) -> Self {
        self.bulk = bulk;
        self
    }

    /// Reads the typed header.
    pub fn decode<T: DeserializeOwned>(&self) -> Result<T, DecodeError> {
        codec::decode(&self.header)
    }
}

/// What a callee answers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Response {
    /// The typed part, see [`codec`].
    pub header: Bytes,
    /// Raw data that goes with it.
    pub bulk: Bytes,
}

impl Response {
    /// A response with a typed header and no bulk data.
    pub fn new<T: Serialize>(header: &T) -> Result<Self, EncodeError> {
        Ok(Self { header: codec::encode(header)?, bulk: Bytes::new() })
    }

    /// The same response with bulk data.
    #[must_use]
    pub fn with_bulk(mut self, bulk: Bytes) -> Self {
        self.bulk = bulk;
        self
    }

    /// Reads the typed header.
    pub fn decode<T: DeserializeOwned>(&self) -> Result<T, DecodeError> {
        codec::decode(&self.header)
    }
}

/// Who called.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Caller {
    /// A node of the cluster, proven by its certificate.
    Node(NodeId),
    /// A process on this node, let in by the permissions of the socket file.
    Local,
}

/// Serves calls.
pub trait Handler: Send + Sync + 'static {
    /// Answers one call. The future is dropped when the mesh closes; a caller that gave up does not cancel it.
    fn handle(&self, from: Caller, request: Request) -> BoxFuture<'static, Result<Response, RpcError>>;
}

/// Why a callee refused or failed a call; travels to the caller.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{code}: {message}")]
pub struct RpcError {
    /// What kind of failure; callers decide by this.
    pub code: ErrorCode,
    /// What exactly, for people.
    pub message: String,
}

impl RpcError {
    /// An error with its code and text.
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self { code, message: message.into() }
    }

    /// The callee has no such method.
    pub fn unknown_method(method: u16) -> Self {
        Self::new(ErrorCode::UnknownMethod, format!("method {method:#06x} is not served here"))
    }
}

impl From<DecodeError> for RpcError {
    fn from(error: DecodeError) -> Self {
        Self::new(ErrorCode::Malformed, error.to_string())
    }
}

impl From<EncodeError> for RpcError {
    fn from(error: EncodeError) -> Self {
        Self::new(ErrorCode::Internal, error.to_string())
    }
}

/// Kinds of [`RpcError`]. Append only: the order is the wire format.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum ErrorCode {
    /// The callee does not know the method; it runs another version or another role.
    UnknownMethod,
    /// The request could not be decoded.
    Malformed,
    /// Understood and refused; the same call will be refused again.
    Refused,
    /// Not now; the same call may work later.
    Unavailable,
    /// The callee failed.
    Internal,
    /// What was asked for does not exist.
    NotFound,
}

impl std::fmt::Display for ErrorCode {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::UnknownMethod => "unknown method",
            Self::Malformed => "malformed request",
            Self::Refused => "refused",
            Self::Unavailable => "unavailable",
            Self::Internal => "internal error",
            Self::NotFound => "not found",
        })
    }
}

/// Why a call brought no response.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CallError {
    /// There is no connection; the request was not sent.
    #[error("{0} cannot be reached")]
    Unreachable(String),
    /// The deadline passed; the request may or may not have been carried out.
    #[error("no answer before the deadline")]
    Timeout,
    /// The connection or the stream broke; the request may or may not have been carried out.
    #[error("the connection broke during the call: {0}")]
    Reset(String),
    /// The callee answered with an error.
    #[error(transparent)]
    Remote(#[from] RpcError),
    /// The request is over the limits or cannot be encoded; it was not sent.
    #[error("the request cannot be sent: {0}")]
    Invalid(String),
}

impl From<EncodeError> for CallError {
    fn from(error: EncodeError) -> Self {
        Self::Invalid(error.to_string())
    }
}

impl From<DecodeError> for CallError {
    fn from(error: DecodeError) -> Self {
        Self::Reset(format!("unreadable response: {error}"))
    }
}
