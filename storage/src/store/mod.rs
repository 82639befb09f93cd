//! The disk store: block contents of segment replicas on one disk.
//!
//! [`DiskStore`] is the boundary between replication above and formats below. Replication decides which writes reach a
//! disk and in which order; a store keeps them, with the version and the checksum of each block.
//!
//! Rules for every store:
//! - A write that returned `Ok` is seen by all later reads and by `versions`; it is durable after the next `flush` that was
//!   called after it and returned `Ok`.
//! - After a power loss at any point each block reads as a content written at or after the last flush that covered it
//!   (that flush's content included); never as a checksum error or a mix of two writes.
//! - Writes of overlapping ranges are never in flight at the same time (the coordinator's range lock); others are, in any number.
//! - Versions may go down: resync overwrites what a stale replica has. A store keeps what was written last.
//! - A block of zeroes keeps the version of the write that made it, but needs no room for data. Only where nothing was ever
//!   stored may zeroes be left out altogether, and only when the write says so ([`Keep::WhereStored`]).
//! - A store knows nothing of how layers lie above each other: each read names them ([`DiskStore::read_layers`]). A layer **has** a
//!   block when the block's version there is not the default one; recorded zeroes count as any other content.

pub mod disk;
mod layers;

use crate::ids::{BLOCKS_PER_SEGMENT, Generation, LayerRef, SegmentIndex, SegmentKey, Version, VolumeId};
use crate::status::{DiskHealth, DiskUsage, VolumeUsage};
use bytes::Bytes;
use futures_util::future::BoxFuture;
use std::ops::Range;
use thiserror::Error;

/// Blocks of a segment that are removed in one step.
const REMOVED_AT_ONCE: u32 = 16384;

/// One write to a segment replica: a run of whole blocks with one version.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ReplicaWrite {
    /// First block, within the segment.
    pub block: u32,
    /// Version of the write, stored with every block of it.
    pub version: Version,
    /// What is written.
    pub content: WriteContent,
    /// What becomes of data when they are moved from the log to their place.
    pub compression: Compression,
}

/// Whether data are compressed on the disk. It says nothing of what is there already: that stays as it is until it is written anew.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Compression {
    /// They are not.
    #[default]
    Off,
    /// With LZ4, where that saves room.
    Lz4,
}

/// What a write puts into its blocks.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum WriteContent {
    /// Data: a multiple of the block size, with the CRC32C of each block.
    Data {
        /// The bytes.
        data: Bytes,
        /// CRC32C of each block, computed once by the coordinator.
        crcs: Vec<u32>,
    },
    /// Zeroes (discard and write-zeroes): the store gives back the room.
    Zeroes {
        /// How many blocks.
        blocks: u32,
        /// Whether they are recorded where nothing is stored.
        keep: Keep,
    },
}

/// Whether zeroes are recorded where nothing is stored.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, serde::Serialize, serde::Deserialize)]
pub enum Keep {
    /// They may be left out: nothing lies below.
    #[default]
    WhereStored,
    /// They are recorded: they hide what a lower layer has. Of no effect on a write with the default version, after which the
    /// layer does not have the blocks.
    Always,
}

impl ReplicaWrite {
    /// The blocks that it writes, within the segment.
    pub fn blocks(&self) -> Range<u32> {
        let count = match &self.content {
            WriteContent::Data { crcs, .. } => crcs.len() as u32,
            WriteContent::Zeroes { blocks, .. } => *blocks,
        };
        self.block..self.block.saturating_add(count)
    }
}

/// What was read: whole blocks and the checksums they were verified against.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ReadReply {
    /// The bytes; zeroes where nothing is stored.
    pub data: Bytes,
    /// CRC32C of each block (of a zero block where nothing is stored).
    pub crcs: Vec<u32>,
}

/// What to write so that blocks become what was read: zeroes stay thin.
pub(crate) fn thin(reply: ReadReply, keep: Keep) -> WriteContent {
    if reply.data.iter().all(|byte| *byte == 0) {
        WriteContent::Zeroes { blocks: reply.crcs.len() as u32, keep }
    } else {
        WriteContent::Data { data: reply.data, crcs: reply.crcs }
    }
}

/// Version and checksum of one stored block.
#[derive(Clone, Copy, PartialEq, Eq, Debug, serde::Serialize, serde::Deserialize)]
pub struct BlockVersion {
    /// The block, within its segment.
    pub block: u32,
    /// Version of the write that it holds.
    pub version: Version,
    /// Its stored CRC32C.
    pub crc: u32,
}

/// How far a scrub of a disk has come. What the number means is the store's affair; the default is the beginning. A store accepts
/// any number: one that leads nowhere any more goes on at the next place there is.
#[derive(
    Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default, serde::Serialize, serde::Deserialize,
)]
pub struct ScrubCursor(pub u64);

/// A run of blocks whose stored content does not match its checksums, or cannot be read.
#[derive(Clone, PartialEq, Eq, Debug, serde::Serialize, serde::Deserialize)]
pub struct DamagedBlocks {
    /// The segment.
    pub at: SegmentKey,
    /// The blocks, within the segment.
    pub blocks: Range<u32>,
}

/// What one step of a scrub found.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct ScrubStep {
    /// Where to go on; none at the end of the disk.
    pub next: Option<ScrubCursor>,
    /// Bytes that were read and verified, damaged ones included.
    pub checked: u64,
    /// What is damaged. Blocks that were written or removed during the step are not, whatever was read of them.
    pub damaged: Vec<DamagedBlocks>,
}

/// Why a store did not do what it was asked.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
pub enum StoreError {
    /// The disk returned an error; the store is marked as failed.
    #[error("I/O error: {0}")]
    Io(String),
    /// A block's content does not match its checksum.
    #[error("checksum error in block {block}")]
    Checksum {
        /// The block, within the segment.
        block: u32,
    },
    /// No room left; reads and deletes go on.
    #[error("the disk is full")]
    Full,
    /// The store's own metadata is damaged.
    #[error("damaged store: {0}")]
    Corrupt(String),
    /// The request makes no sense (range outside of the segment, lengths that do not agree).
    #[error("invalid request: {0}")]
    Invalid(String),
}

/// Storage of segment replicas on one disk. See the module's rules.
pub trait DiskStore: Send + Sync + 'static {
    /// Writes blocks. Returns when they are logged: readable, not necessarily durable.
    fn write(&self, at: SegmentKey, write: ReplicaWrite) -> BoxFuture<'_, Result<(), StoreError>>;

    /// Reads `blocks` blocks from `block` on, verifying every checksum.
    fn read(&self, at: SegmentKey, block: u32, blocks: u32) -> BoxFuture<'_, Result<ReadReply, StoreError>>;

    /// Reads `blocks` blocks from `block` on, each from the first of these layers that has it, and zeroes where none does; verifies
    /// every checksum. `chain` names the same segment in each layer, from the top down, and is not empty.
    ///
    /// Nobody writes those blocks of the first layer meanwhile. Into the others blocks may be merged from below, which changes no
    /// content. A store that can do better than to ask layer by layer should.
    fn read_layers<'a>(
        &'a self,
        chain: &'a [SegmentKey],
        block: u32,
        blocks: u32,
    ) -> BoxFuture<'a, Result<ReadReply, StoreError>> {
        layers::read(self, chain, block, blocks)
    }

    /// Removes all blocks of a segment in one layer, of which nobody reads or writes any more. Durable after the next flush.
    fn remove(&self, at: SegmentKey) -> BoxFuture<'_, Result<(), StoreError>> {
        Box::pin(async move {
            for start in (0..BLOCKS_PER_SEGMENT).step_by(REMOVED_AT_ONCE as usize) {
                let end = (start + REMOVED_AT_ONCE).min(BLOCKS_PER_SEGMENT);
                let stored = self.versions(at, start..end).await?;
                for run in stored.chunk_by(|one, next| one.block + 1 == next.block) {
                    let Some(first) = run.first() else { continue };
                    let content = WriteContent::Zeroes { blocks: run.len() as u32, keep: Keep::WhereStored };
                    let (block, compression) = (first.block, Compression::Off);
                    let write = ReplicaWrite { block, version: Version::default(), content, compression };
                    self.write(at, write).await?;
                }
            }
            Ok(())
        })
    }

    /// Makes everything durable whose write returned before this call.
    fn flush(&self) -> BoxFuture<'_, Result<(), StoreError>>;

    /// Versions of all blocks in the range that have one, ascending by block. Reads no data.
    fn versions(
        &self,
        at: SegmentKey,
        blocks: Range<u32>,
    ) -> BoxFuture<'_, Result<Vec<BlockVersion>, StoreError>>;

    /// The segments of a range of which anything is stored in a layer, ascending. Of the others all blocks are without a version.
    fn stored(
        &self,
        layer: LayerRef,
        segments: Range<u32>,
    ) -> BoxFuture<'_, Result<Vec<SegmentIndex>, StoreError>>;

    /// The highest generation stored for the volume; the default when there is none.
    fn generation(&self, volume: VolumeId) -> BoxFuture<'_, Result<Generation, StoreError>>;

    /// Stores the generation; durable on return.
    fn set_generation(
        &self,
        volume: VolumeId,
        generation: Generation,
    ) -> BoxFuture<'_, Result<(), StoreError>>;

    /// Removes all that is stored of the volume, its generation included. Nothing stored is no error. Durable on return.
    fn delete_volume(&self, volume: VolumeId) -> BoxFuture<'_, Result<(), StoreError>>;

    /// Verifies what is stored from `from` on, about `budget_bytes` of it and at least one block if there is one left, and reads it from
    /// the medium, not from any cache. Changes nothing: damaged blocks are for others to write again. Ends at once in a store
    /// that cannot.
    fn scrub(&self, from: ScrubCursor, budget_bytes: u64) -> BoxFuture<'_, Result<ScrubStep, StoreError>> {
        let _ = (from, budget_bytes);
        Box::pin(async { Ok(ScrubStep::default()) })
    }

    /// Space used and present.
    fn usage(&self) -> DiskUsage;

    /// What is held of each volume, by id. Nothing in a store that does not count it.
    fn held(&self) -> Vec<VolumeUsage> {
        Vec::new()
    }

    /// Whether the disk can be used.
    fn health(&self) -> DiskHealth;
}
