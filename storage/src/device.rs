//! The block device that a volume offers to its user: a guest's queue (vhost-user-blk) or this process.

use bytes::Bytes;
use futures_util::future::BoxFuture;
use thiserror::Error;

/// One request. Offsets and lengths are bytes and multiples of 512; any other is [`BlockError::Invalid`].
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum BlockOp {
    /// Read.
    Read {
        /// Where.
        offset: u64,
        /// How much.
        len: u64,
    },
    /// Write.
    Write {
        /// Where.
        offset: u64,
        /// What.
        data: Bytes,
    },
    /// Make all writes durable that were completed before.
    Flush,
    /// The content is not needed any more; reads as zeroes afterwards.
    Discard {
        /// Where.
        offset: u64,
        /// How much.
        len: u64,
    },
    /// Write zeroes.
    WriteZeroes {
        /// Where.
        offset: u64,
        /// How much.
        len: u64,
    },
}

/// Why a request failed.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
pub enum BlockError {
    /// No replica could serve it.
    #[error("I/O error: {0}")]
    Io(String),
    /// Out of range or not a multiple of 512.
    #[error("invalid request: {0}")]
    Invalid(String),
    /// The device was closed, fenced or replaced before the request was complete. Whether a write took effect is unknown. A target
    /// must not report this to a guest as a completion: the request stays in flight and is submitted again to the next opening.
    #[error("the volume was closed")]
    Closed,
}

/// Called once with the result; reads carry their data, all others an empty buffer.
pub type Completion = Box<dyn FnOnce(Result<Bytes, BlockError>) + Send>;

/// A volume, as its user sees it.
pub trait BlockDevice: Send + Sync + 'static {
    /// Size in bytes. It may grow.
    fn size(&self) -> u64;

    /// Waits until the device is larger than that; for ever when it is of those that do not grow.
    fn grown_from(&self, _size: u64) -> BoxFuture<'static, ()> {
        Box::pin(std::future::pending())
    }

    /// Starts a request; `done` is called when it is complete, in any order, on any thread, possibly before this returns.
    /// May be called from any thread, inside of a tokio runtime or not, and never blocks.
    fn submit(&self, op: BlockOp, done: Completion);

    /// Gives back, as [`BlockError::Closed`], requests that were not begun and wait for something that may never come: whoever
    /// submitted them is gone. A device that begins each request at once has none.
    fn recall(&self) {}
}
