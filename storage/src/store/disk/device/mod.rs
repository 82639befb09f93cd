//! The medium below a store: a raw device, or one file that stands for it.
//!
//! | module | it is |
//! |---|---|
//! | [`buffer`] | memory that the kernel may read and write directly |
//! | [`file`] | opening a device or file, and choosing how to do I/O on it |
//! | [`inline`] | I/O that is over when the call returns, for media that never wait (tmpfs) |
//! | [`sealed`], [`xts`] | encryption of what lies on another device |
//! | [`uring`] | I/O through io_uring, past the page cache, for all others |
//!
//! There are two ways to do I/O. Guests' requests are *started*, and end in a callback, on the thread that started them or where the completions
//! are reaped. The applier, recovery and tools have threads of their own and call what blocks.

pub(super) mod buffer;
pub(super) mod file;
mod inline;
pub(super) mod sealed;
mod uring;
mod xts;

use buffer::AlignedBuf;
use std::io;
use std::ops::Range;
use std::sync::Arc;

/// What can be started. Buffers travel with the request and come back with its end.
#[derive(Debug)]
pub(super) enum Request {
    /// Writes all of a buffer at an offset.
    Write(u64, Arc<AlignedBuf>),
    /// Reads into parts of a buffer, each from an offset. The parts do not overlap.
    Read(Vec<(u64, Range<usize>)>, AlignedBuf),
    /// Makes durable all whose end was told before this began.
    Sync,
}

/// How a request ended: a read with its buffer.
pub(super) type Finished = io::Result<Option<AlignedBuf>>;

/// Called once, when a request ended.
pub(super) type Done = Box<dyn FnOnce(Finished) + Send>;

/// See the module. All offsets and lengths are multiples of the block size.
pub(super) trait Device: Send + Sync {
    /// Bytes of it.
    fn size(&self) -> u64;

    /// Starts a request. `done` may be called before this returns.
    fn start(&self, request: Request, done: Done);

    /// Reads into all buffers, in any order. Blocks.
    fn read(&self, reads: &mut [(u64, AlignedBuf)]) -> io::Result<()>;

    /// Writes all, in any order. Blocks. Memory is aligned to blocks.
    fn write(&self, writes: &[(u64, &[u8])]) -> io::Result<()>;

    /// Makes durable all that was written before. Blocks.
    fn sync(&self) -> io::Result<()>;

    /// Waits for the end of all requests that were started.
    fn quiesce(&self) {}
}
