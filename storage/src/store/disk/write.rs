//! Writing: small writes go through the log, large ones straight to fresh slots.
//!
//! Through the log everything is written twice, which is well spent on small writes: many of them become one. What is to be compressed goes through it, too: a checkpoint
//! compresses it, so that nobody waits for that. A large one gains nothing by it. So the whole positions of a large write go to slots that are free, and when they are there the log gets a record that says where. Until a checkpoint gives the
//! slots to their positions, what was there before stays where it is.
//!
//! Why a power loss leaves each block old or new: the record is started only after the data have been written, so a sync that covers the record covers them. Of a record that
//! no sync covered, the data may be missing; recovery verifies them, and what is not there was never written ([`super::recover`]).

use super::core::{Placing, Tell, operation};
use super::device::buffer::AlignedBuf;
use super::device::{Finished, Request};
use super::engine::Shared;
use super::format::batch::Operation;
use super::format::layout::{SLOT, SLOT_BLOCKS, SlotNumber};
use crate::ids::{BLOCK_SIZE, BLOCKS_PER_SEGMENT, SegmentKey, Version};
use crate::store::{Compression, ReplicaWrite, StoreError, WriteContent};
use bytes::Bytes;
use futures_util::future::try_join_all;
use parking_lot::Mutex;
use std::ops::Range;
use std::sync::Arc;
use tokio::sync::oneshot;

/// Whole positions that make a write large: for one alone, to wait for two writes in turn costs more than to write it twice.
const LARGE: u32 = 2;
/// Positions in one record at most.
const POSITIONS_AT_ONCE: u32 = 16;

/// Data that are on their way to their slots.
struct Unlogged {
    operation: Operation,
    tell: Tell,
    /// Writes that have not ended.
    left: usize,
}

/// A part of a write.
struct Part {
    block: u32,
    data: Bytes,
    crcs: Vec<u32>,
    compression: Compression,
}

impl Part {
    /// Cuts off what is before a block of the segment.
    fn split_to(&mut self, block: u32) -> Self {
        let blocks = (block.clamp(self.block, self.block + self.crcs.len() as u32) - self.block) as usize;
        let rest = self.crcs.split_off(blocks);
        let crcs = std::mem::replace(&mut self.crcs, rest);
        let data = self.data.split_to(blocks * BLOCK_SIZE as usize);
        let first = self.block;
        self.block += blocks as u32;
        Self { block: first, data, crcs, compression: self.compression }
    }
}

/// The whole positions among blocks, when they are enough.
fn large(blocks: Range<u32>) -> Option<Range<u32>> {
    let positions = blocks.start.div_ceil(SLOT_BLOCKS)..blocks.end / SLOT_BLOCKS;
    (positions.end >= positions.start.saturating_add(LARGE)).then_some(positions)
}

impl Shared {
    /// Writes blocks. Returns when they are logged.
    pub(super) async fn write(
        self: &Arc<Self>,
        at: SegmentKey,
        write: ReplicaWrite,
    ) -> Result<(), StoreError> {
        let blocks = write.blocks();
        let WriteContent::Data { data, crcs } = &write.content else {
            let (operation, data) = operation(at, write)?;
            return self.log(operation, data).await;
        };
        let sane = data.len() as u64 == crcs.len() as u64 * BLOCK_SIZE
            && blocks.end <= BLOCKS_PER_SEGMENT
            && write.version != Version::default();
        let positions = large(blocks).filter(|_| write.compression == Compression::Off);
        if !sane || positions.is_none() && data.len() <= self.record_bytes {
            let (operation, data) = operation(at, write)?;
            return self.log(operation, data).await;
        }
        let ReplicaWrite { block, version, content: WriteContent::Data { data, crcs }, compression } = write
        else {
            return Err(StoreError::Invalid("a write without data".to_owned()));
        };
        let mut rest = Part { block, data, crcs, compression };
        let Some(positions) = positions else { return self.log_parts(at, version, rest).await };
        let head = rest.split_to(positions.start * SLOT_BLOCKS);
        let middle = rest.split_to(positions.end * SLOT_BLOCKS);
        tokio::try_join!(
            self.log_parts(at, version, head),
            self.place_parts(at, version, middle),
            self.log_parts(at, version, rest),
        )?;
        Ok(())
    }

    /// Sends data through the log, in as many records as it takes.
    async fn log_parts(
        self: &Arc<Self>,
        at: SegmentKey,
        version: Version,
        mut rest: Part,
    ) -> Result<(), StoreError> {
        let step = (self.record_bytes / BLOCK_SIZE as usize) as u32;
        let mut parts = Vec::new();
        while !rest.crcs.is_empty() {
            let Part { block, data, crcs, compression } = rest.split_to(rest.block.saturating_add(step));
            let content = WriteContent::Data { data, crcs };
            parts.push(operation(at, ReplicaWrite { block, version, content, compression })?);
        }
        try_join_all(parts.into_iter().map(|(operation, data)| self.log(operation, data))).await?;
        Ok(())
    }

    /// Sends whole positions to slots of their own.
    async fn place_parts(
        self: &Arc<Self>,
        at: SegmentKey,
        version: Version,
        mut rest: Part,
    ) -> Result<(), StoreError> {
        let mut parts = Vec::new();
        while !rest.crcs.is_empty() {
            parts.push(rest.split_to(rest.block.saturating_add(POSITIONS_AT_ONCE * SLOT_BLOCKS)));
        }
        try_join_all(parts.into_iter().map(|part| self.place(at, version, part))).await?;
        Ok(())
    }

    async fn place(self: &Arc<Self>, at: SegmentKey, version: Version, part: Part) -> Result<(), StoreError> {
        let first = part.block / SLOT_BLOCKS;
        let positions = first..first + part.crcs.len() as u32 / SLOT_BLOCKS;
        let slots = loop {
            // Before asking, so that no room made in between goes unnoticed.
            let mut room = std::pin::pin!(self.room.notified());
            room.as_mut().enable();
            let placing = self.core.lock().place(at, positions.clone())?;
            match placing {
                Placing::Slots(slots) => break slots,
                Placing::ThroughTheLog => return Box::pin(self.log_parts(at, version, part)).await,
                Placing::Later => {
                    self.look_for_work();
                    room.await;
                }
            }
        };
        let Part { block, data, crcs, .. } = part;
        let layout = self.core.lock().layout;
        let mut writes: Vec<(u64, AlignedBuf)> = Vec::new();
        for (offset, bytes) in runs(&slots) {
            writes.push((layout.slot(offset), AlignedBuf::copy_of(&data[bytes])));
        }
        let (tell, told) = oneshot::channel();
        let operation = Operation::Placed { at, block, version, crcs, slots };
        let unlogged = Arc::new(Mutex::new(Some(Unlogged { operation, tell, left: writes.len() })));
        for (offset, buf) in writes {
            let (shared, unlogged) = (self.clone(), unlogged.clone());
            let ended = move |finished| shared.slot_written(&unlogged, finished);
            self.device.start(Request::Write(offset, Arc::new(buf)), Box::new(ended));
        }
        told.await.unwrap_or_else(|_| Err(StoreError::Io("the disk was closed".to_owned())))
    }

    /// A run of slots has its data. The last one has the record logged, whether or not anybody waits for it any more: the slots are taken.
    fn slot_written(self: &Arc<Self>, unlogged: &Mutex<Option<Unlogged>>, finished: Finished) {
        if let Err(error) = finished {
            self.failed(&format!("writing: {error}"));
        }
        let all = {
            let mut unlogged = unlogged.lock();
            if let Some(unlogged) = unlogged.as_mut() {
                unlogged.left -= 1;
            }
            unlogged.take_if(|unlogged| unlogged.left == 0)
        };
        if let Some(Unlogged { operation, tell, .. }) = all {
            self.core.lock().admit_placed(operation, tell);
            self.pump();
        }
    }
}

/// Slots one behind the other: the first of them, and the bytes of the data that go there.
fn runs(slots: &[SlotNumber]) -> impl Iterator<Item = (SlotNumber, Range<usize>)> + '_ {
    let mut before = 0;
    slots.chunk_by(|one, next| one.0 + 1 == next.0).map(move |run| {
        let start = before;
        before += run.len() * SLOT as usize;
        (run[0], start..before)
    })
}
