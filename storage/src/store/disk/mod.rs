//! The log-structured disk store: one raw device, or one file that stands for it.
//!
//! ```text
//!  write ─► batch ─► log (ring) ──► overlay in memory          read ─► overlay? ─► log
//!             │          ▲                                         └─► block info ─► slot
//!  flush ─────┴─ sync ───┘
//!  large write ─► fresh slots, then a record of where they are ─► log
//!                        checkpoint: log ─► slots, block info, owners ─► sync ─► log is free again
//! ```
//!
//! A write is acknowledged when it is in the log: one sequential write, shared by all that came meanwhile, and one sync for all flushes that wait. Checkpoints move
//! it to its **slot** of 64 KiB later, many writes at once. Each block has its checksum and the version of its write in pages of **block info**; which slot belongs to which segment is written on the slots'
//! side (**owners**). All of these are checksummed and kept such that a power loss at any point leaves each block old or new.
//!
//! | module | it is |
//! |---|---|
//! | [`format`] | what is on the disk (pure) |
//! | [`index`], [`free`], [`cache`] | what is in memory |
//! | [`core`] | admission, batches, the overlay: a state machine without I/O |
//! | [`write`] | small writes through the log, large ones straight to fresh slots |
//! | [`apply`] | checkpoints |
//! | [`repack`] | checkpoints: positions whose data are compressed, or were |
//! | [`recover`] | formatting and opening |
//! | [`placed`] | opening: what of the large writes at the end of the log is there |
//! | [`read`], [`unpack`] | reading and verifying; what is compressed |
//! | [`scrub`] | verifying what is stored, at rest |
//! | [`offline`] | looking at a disk that nobody has open |
//! | [`rebuild`] | making a damaged index anew from what is beside the data |
//! | [`engine`] | starts I/O, waits, and has the applier's thread |
//! | [`device`] | the medium: io_uring past the page cache, or plain I/O in memory |
//! | `sim`, `flaws` (tests) | a simulated medium that loses what was not synced; planted bugs |
//!
//! No database, no page cache, and no other thread on a request's way: it goes to the disk in the caller's own first poll, and its completion is taken where
//! the caller's runtime waits. Memory: 4 bytes for each slot in use, the cached info of some gigabytes of hot data, and what is in the log.

mod apply;
mod cache;
mod core;
mod device;
mod engine;
#[cfg(test)]
mod flaws;
mod format;
mod free;
mod index;
pub mod offline;
mod placed;
mod read;
pub mod rebuild;
mod recover;
mod repack;
mod scrub;
#[cfg(test)]
pub(crate) mod sim;
#[cfg(test)]
mod tests;
mod unpack;
mod write;

pub use recover::OpenError;

use self::device::file::{self, Sharing};
use self::device::sealed::{KeyCheck, SealedDevice};
use self::engine::Engine;
use self::format::batch::Operation;
use self::format::directory::EntryNumber;
use self::format::layout::SLOT;
use self::format::superblock::Superblock;
use self::index::Taken;
use super::{BlockVersion, DiskStore, ReadReply, ReplicaWrite, ScrubCursor, ScrubStep, StoreError};
use crate::ids::{ByteSize, DiskId, Generation, LayerRef, SegmentIndex, SegmentKey, VolumeId};
use crate::key::DiskKey;
use crate::status::{DiskHealth, DiskUsage, VolumeUsage};
use bytes::Bytes;
use futures_util::future::BoxFuture;
use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

/// Segments that are counted under one hold of the lock.
const SEGMENTS_AT_ONCE: usize = 1024;

/// A disk store on a device or file. See the module.
pub struct LogStore {
    engine: Engine,
}

/// What a formatted device or file is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Identity {
    /// The disk.
    pub disk: DiskId,
    /// Bytes of data and their block info that it has room for.
    pub capacity: ByteSize,
    /// Whether what it holds is encrypted.
    pub encryption: Encryption,
}

/// How what a disk holds is encrypted.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Encryption {
    /// It is not.
    #[default]
    None,
    /// AES-256-XTS, but for the superblocks.
    Aes256Xts,
}

/// The disk that a device is whose first bytes these are: by its first superblock only, for those who look at many devices.
pub fn disk_of(start: &[u8]) -> Option<DiskId> {
    Superblock::decode(start).ok().map(|superblock| superblock.disk)
}

fn opening(source: io::Error) -> OpenError {
    OpenError::Io { doing: "opening the device", source }
}

impl LogStore {
    /// Makes an empty store of a device, or of a file that has its size already. What was there is lost.
    /// With a key, all but the superblocks will be encrypted.
    pub fn format(path: &Path, disk: DiskId, key: Option<&DiskKey>) -> Result<(), OpenError> {
        let mut device = file::open(path, Sharing::Exclusive).map_err(opening)?;
        let stamp = uuid::Uuid::new_v4().as_fields().0;
        let failed = |source| OpenError::Io { doing: "using the key", source };
        let check = key.map(KeyCheck::of).transpose().map_err(failed)?;
        if let Some(key) = key {
            device = Arc::new(SealedDevice::new(device, key).map_err(failed)?);
        }
        recover::format(device.as_ref(), disk, stamp, check)
    }

    /// The disk that a device or file is, if it is one. Others may have it open.
    pub fn identify(path: &Path) -> Result<Identity, OpenError> {
        let device = file::open(path, Sharing::Shared).map_err(opening)?;
        let superblock = recover::superblock(device.as_ref())?;
        let capacity = ByteSize(u64::from(superblock.layout.slots) * SLOT);
        let encryption = match superblock.sealed {
            Some(_) => Encryption::Aes256Xts,
            None => Encryption::None,
        };
        Ok(Identity { disk: superblock.disk, capacity, encryption })
    }

    /// Opens a store: what its log has is applied on return. Blocks for the time of that. Must be called within the runtime that will use it.
    /// `key` is that which it was formatted with.
    pub fn open(path: &Path, disk: DiskId, key: Option<&DiskKey>) -> Result<Self, OpenError> {
        let device = file::open(path, Sharing::Exclusive).map_err(opening)?;
        let device = recover::unlocked(device, key)?;
        let applier = recover::open(device, disk)?;
        let engine = Engine::start(applier)
            .map_err(|source| OpenError::Io { doing: "starting the applier of the store", source })?;
        Ok(Self { engine })
    }

    /// A store whose applier the simulation lets run.
    #[cfg(test)]
    fn driven(shared: std::sync::Arc<engine::Shared>) -> Self {
        Self { engine: Engine::driven(shared) }
    }

    async fn log_durably(&self, operation: Operation) -> Result<(), StoreError> {
        self.engine.shared.log(operation, Bytes::new()).await?;
        self.engine.shared.sync().await
    }
}

impl DiskStore for LogStore {
    fn write(&self, at: SegmentKey, write: ReplicaWrite) -> BoxFuture<'_, Result<(), StoreError>> {
        Box::pin(self.engine.shared.write(at, write))
    }

    fn read(&self, at: SegmentKey, block: u32, blocks: u32) -> BoxFuture<'_, Result<ReadReply, StoreError>> {
        Box::pin(self.engine.shared.read(at, block..block.saturating_add(blocks)))
    }

    fn flush(&self) -> BoxFuture<'_, Result<(), StoreError>> {
        Box::pin(self.engine.shared.sync())
    }

    fn versions(
        &self,
        at: SegmentKey,
        blocks: Range<u32>,
    ) -> BoxFuture<'_, Result<Vec<BlockVersion>, StoreError>> {
        Box::pin(self.engine.shared.versions(at, blocks))
    }

    fn stored(
        &self,
        layer: LayerRef,
        segments: Range<u32>,
    ) -> BoxFuture<'_, Result<Vec<SegmentIndex>, StoreError>> {
        Box::pin(async move {
            let core = self.engine.shared.core.lock();
            core.check_failed()?;
            let there = |segment: &SegmentIndex| core.index.names.contains_key(&layer.key(*segment));
            Ok(segments.map(SegmentIndex).filter(there).collect())
        })
    }

    fn generation(&self, volume: VolumeId) -> BoxFuture<'_, Result<Generation, StoreError>> {
        Box::pin(async move {
            let core = self.engine.shared.core.lock();
            core.check_failed()?;
            Ok(core.index.generations.get(&volume).map(|stored| stored.value).unwrap_or_default())
        })
    }

    fn set_generation(
        &self,
        volume: VolumeId,
        generation: Generation,
    ) -> BoxFuture<'_, Result<(), StoreError>> {
        Box::pin(self.log_durably(Operation::Generation(volume, generation)))
    }

    fn delete_volume(&self, volume: VolumeId) -> BoxFuture<'_, Result<(), StoreError>> {
        Box::pin(self.log_durably(Operation::DeleteVolume(volume)))
    }

    fn remove(&self, at: SegmentKey) -> BoxFuture<'_, Result<(), StoreError>> {
        Box::pin(self.engine.shared.log(Operation::DeleteSegment(at), Bytes::new()))
    }

    fn scrub(&self, from: ScrubCursor, budget_bytes: u64) -> BoxFuture<'_, Result<ScrubStep, StoreError>> {
        Box::pin(self.engine.shared.scrub(from, budget_bytes))
    }

    fn usage(&self) -> DiskUsage {
        let core = self.engine.shared.core.lock();
        let slots = u64::from(core.layout.slots);
        let used = slots - u64::from(core.index.slots.count()) + u64::from(core.index.wanted);
        DiskUsage { used: ByteSize(used.min(slots) * SLOT), total: ByteSize(slots * SLOT) }
    }

    fn held(&self) -> Vec<VolumeUsage> {
        let mut held: BTreeMap<VolumeId, VolumeUsage> = BTreeMap::new();
        let mut from = Some(EntryNumber(0));
        while let Some(first) = from {
            // Not all at once: writes wait for the lock.
            let core = self.engine.shared.core.lock();
            let mut segments = core.index.segments.range(first..);
            for segment in segments.by_ref().take(SEGMENTS_AT_ONCE).map(|(_, segment)| segment) {
                let taken = segment.taken();
                if taken == Taken::default() {
                    continue;
                }
                let volume = segment.key.volume;
                let none = VolumeUsage { volume, data: ByteSize(0), stored: ByteSize(0) };
                let usage = held.entry(volume).or_insert(none);
                usage.data.0 += taken.positions_bytes();
                usage.stored.0 += taken.bytes();
            }
            from = segments.next().map(|(entry, _)| *entry);
        }
        held.into_values().collect()
    }

    fn health(&self) -> DiskHealth {
        let core = self.engine.shared.core.lock();
        match &core.failed {
            Some(error) => DiskHealth::Failed(error.clone()),
            None if core.full => DiskHealth::Full,
            None => DiskHealth::Ok,
        }
    }
}
