//! The plain-file disk store: a directory of ordinary files on any file system. Simple, and right.
//!
//! ```text
//!  write ──► log thread ──► log/ (append only) ──► overlay in memory ──► applier ──► volumes/…/*.data, *.meta
//!                               │ fdatasync                                             │ fdatasync
//!  flush ──► sync thread ───────┘                                      log files removed┘, oldest first
//! ```
//!
//! A write is one record in the log and is readable from the overlay at once. A flush syncs the log; flushes that come
//! while one is under way share the next. The applier copies what is *durable in the log* into the segments' files, syncs
//! them, and only then lets go of the log. Opening replays the log. [`codec`] has the formats.
//!
//! Why a power loss at any point leaves each block old or new:
//! - Before a record is durable, no file has been touched for it. If it survives whole it is replayed (new); if its end is torn,
//!   checksums tell, and it is dropped with all that follow it (old).
//! - After it is durable it is replayed until the files are durable, so a torn write in a file is written again.
//! - A record that a later one replaced in the overlay is never applied; the log keeps it until the later one is durable.
//!
//! Threads of one store: log, sync, apply, and a few for reads. Room for metadata is reserved: a full disk refuses data first,
//! zeroes later, and never reads, flushes and deletes. An error of the disk, or a failed sync, marks it as failed for good: what the kernel
//! did with the pages is unknown, so nothing more is promised.

mod codec;
mod core;
mod engine;
mod log;
mod media;
mod overlay;
mod recover;
mod segment;
#[cfg(test)]
mod sim;
#[cfg(test)]
mod tests;

pub use recover::OpenError;

use self::core::record;
use self::engine::Engine;
use self::media::RealMedia;
use super::{BlockVersion, DiskStore, ReadReply, ReplicaWrite, StoreError};
use crate::ids::{ByteSize, DiskId, Generation, SegmentKey, VolumeId};
use crate::status::{DiskHealth, DiskUsage};
use futures_util::future::BoxFuture;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

/// A disk store in a directory. See the module.
pub struct PlainStore {
    engine: Engine,
}

impl PlainStore {
    /// Gives a directory the identity of a disk. Again is no error; a directory that is another disk is refused.
    pub fn format(directory: &Path, disk: DiskId) -> Result<(), OpenError> {
        recover::format(&lock(directory)?, disk)
    }

    /// Opens a formatted directory: checks the identity and replays the log. Blocks for the time of the replay.
    pub fn open(directory: &Path, disk: DiskId) -> Result<Self, OpenError> {
        let core = recover::open(Arc::new(lock(directory)?), disk)?;
        let engine = Engine::start(core, disk)
            .map_err(|source| OpenError::Io { doing: "starting the threads of the store", source })?;
        Ok(Self { engine })
    }
}

fn lock(directory: &Path) -> Result<RealMedia, OpenError> {
    RealMedia::open(directory)
        .map_err(|source| OpenError::Io { doing: "opening the disk's directory", source })
}

impl DiskStore for PlainStore {
    fn write(&self, at: SegmentKey, write: ReplicaWrite) -> BoxFuture<'_, Result<(), StoreError>> {
        Box::pin(async move { self.engine.append(record(at, write)?).await })
    }

    fn read(&self, at: SegmentKey, block: u32, blocks: u32) -> BoxFuture<'_, Result<ReadReply, StoreError>> {
        Box::pin(self.engine.run(move |core| core.read(at, block, blocks)))
    }

    fn flush(&self) -> BoxFuture<'_, Result<(), StoreError>> {
        Box::pin(self.engine.sync())
    }

    fn versions(
        &self,
        at: SegmentKey,
        blocks: Range<u32>,
    ) -> BoxFuture<'_, Result<Vec<BlockVersion>, StoreError>> {
        Box::pin(self.engine.run(move |core| core.versions(at, &blocks)))
    }

    fn generation(&self, volume: VolumeId) -> BoxFuture<'_, Result<Generation, StoreError>> {
        Box::pin(async move { self.engine.core().generation(volume) })
    }

    fn set_generation(
        &self,
        volume: VolumeId,
        generation: Generation,
    ) -> BoxFuture<'_, Result<(), StoreError>> {
        Box::pin(self.engine.run(move |core| core.set_generation(volume, generation)))
    }

    fn delete_volume(&self, volume: VolumeId) -> BoxFuture<'_, Result<(), StoreError>> {
        Box::pin(self.engine.run(move |core| core.delete_volume(volume)))
    }

    fn usage(&self) -> DiskUsage {
        match self.engine.core().space() {
            Ok(space) => DiskUsage {
                used: ByteSize(space.total.saturating_sub(space.available)),
                total: ByteSize(space.total),
            },
            Err(_) => DiskUsage::default(),
        }
    }

    fn health(&self) -> DiskHealth {
        self.engine.core().health()
    }
}
