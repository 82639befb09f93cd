//! Merging a layer that no snapshot needs any more into the one above it, in the background.
//!
//! Every replica copies within its own disk what the upper layer lacks; nothing crosses the network. Each batch is done under a lock of its
//! range by all replicas that get writes, so that a replica that joins meanwhile has it, too. Blocks are copied, not moved: whatever is read through both
//! layers stays the same at every moment, and after a crash the merge is done again. When all of it is durable everywhere, a commit takes the lower layer out
//! of the chain; only then its data are removed.

use super::call::CallError;
use super::layers::Part;
use super::members::{SlotState, Target};
use super::open::COMPARE_BLOCKS;
use super::ranges::Mode;
use super::resync::volume_range;
use super::{Coordinator, Phase, geometry};
use crate::control::CommitError;
use crate::ids::{BLOCK_SIZE, LayerRef, SegmentIndex, Version};
use crate::replica::protocol::ReplicaOp;
use futures_util::future::join_all;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tokio::time::Instant;

/// Blocks merged under one lock: a guest's write to them waits for that long.
const BATCH: u32 = 64;

/// The merge cannot go on now.
struct Stuck;

impl Coordinator {
    /// Merges layers, one after the other, for as long as the volume is open.
    pub(super) async fn run_merges(self: Arc<Self>) {
        loop {
            self.phase.wait_for(|phase| phase == Phase::Open).await;
            let mut seen = self.layers.changed.seen();
            let view = self.layers.view();
            let merge = view.merge.and_then(|lower| Some((lower, view.above(lower)?)));
            let Some((lower, upper)) = merge else {
                self.layers.changed.changed(&mut seen).await;
                continue;
            };
            if self.merge_layer(lower, upper).await.is_ok() && self.merged(lower).await {
                continue;
            }
            tokio::time::sleep(self.rim.timing.retry).await;
        }
    }

    async fn merge_layer(self: &Arc<Self>, lower: LayerRef, upper: LayerRef) -> Result<(), Stuck> {
        tracing::info!(volume = %self.id, %lower, %upper, "merging a layer");
        let reopenings = self.reopenings.load(Ordering::Acquire);
        for segment in (0..geometry::segment_count(self.size())).map(SegmentIndex) {
            let end = geometry::segment_blocks(self.size(), segment);
            // A write that began when the lower layer was the top may still be on its way there, or wait for a replica.
            drop(self.ranges.lock(volume_range(segment, 0..end), Mode::Read).await);
            let mut block = 0;
            while block < end {
                let blocks = COMPARE_BLOCKS.min(end - block);
                for batch in self.batches_of(lower, segment, block..block + blocks).await? {
                    self.merge_batch(lower, upper, segment, batch).await?;
                }
                block += blocks;
            }
        }
        self.flush_replicas().await;
        // What was copied before the volume was opened again may be gone: replicas that lost power hold what was flushed.
        if self.reopenings.load(Ordering::Acquire) == reopenings { Ok(()) } else { Err(Stuck) }
    }

    /// Ranges of at most a batch that cover all that a layer has.
    async fn batches_of(
        &self,
        layer: LayerRef,
        segment: SegmentIndex,
        range: Range<u32>,
    ) -> Result<Vec<Range<u32>>, Stuck> {
        let source = self.table.lock().in_state(segment, SlotState::InSync).first().copied().ok_or(Stuck)?;
        let part = self.layers.view().part(segment, layer);
        let found = self.versions(source, part, range.start, range.end - range.start).await;
        let found = found.map_err(|error| {
            self.lose(&source, error.reason());
            Stuck
        })?;
        let mut batches: Vec<Range<u32>> = Vec::new();
        for block in found.iter().filter(|v| v.version != Version::default()).map(|v| v.block) {
            match batches.last_mut() {
                Some(last) if last.start / BATCH == block / BATCH => last.end = block + 1,
                _ => batches.push(block..block + 1),
            }
        }
        Ok(batches)
    }

    /// Has every replica merge a range. When one is lost meanwhile it is all done again, without the lock between: whoever brings a
    /// replica back needs it.
    async fn merge_batch(
        self: &Arc<Self>,
        lower: LayerRef,
        upper: LayerRef,
        segment: SegmentIndex,
        range: Range<u32>,
    ) -> Result<(), Stuck> {
        let started = Instant::now();
        loop {
            let mut seen = self.changed.seen();
            {
                let _range = self.ranges.lock(volume_range(segment, range.clone()), Mode::Copy).await;
                let view = self.layers.view();
                if view.above(lower) != Some(upper) {
                    return Err(Stuck);
                }
                let targets = self.table.lock().write_targets(segment);
                let part = view.part(segment, lower);
                let merges =
                    targets.iter().map(|target| self.merge_replica(*target, part, upper, range.clone()));
                let mut acked = Vec::new();
                for (target, result) in targets.iter().zip(join_all(merges).await) {
                    match result {
                        Ok(()) => acked.push(*target),
                        Err(CallError::Checksum) => {
                            self.clone().repair_layer(part, range.clone()).await;
                            return Err(Stuck);
                        }
                        // All wait for room.
                        Err(CallError::Full) => return Err(Stuck),
                        Err(error) => self.lose(target, error.reason()),
                    }
                }
                if self.table.lock().write_complete(segment, &acked) {
                    break;
                }
            }
            self.changed.changed(&mut seen).await;
        }
        let bytes = u64::from(range.end - range.start) * BLOCK_SIZE;
        let due = Duration::from_secs_f64(bytes as f64 / self.rim.timing.resync_rate.max(1) as f64);
        tokio::time::sleep_until(started + due).await;
        Ok(())
    }

    async fn merge_replica(
        &self,
        target: Target,
        lower: Part,
        into: LayerRef,
        range: Range<u32>,
    ) -> Result<(), CallError> {
        let op = ReplicaOp::Merge {
            at: super::call::address(target, lower),
            into,
            block: range.start,
            blocks: range.end - range.start,
            keep: lower.keep,
            compression: self.policy.lock().compression,
        };
        self.call(target, op, self.rim.timing.member_deadline).await?;
        self.table.lock().note_written(&target);
        Ok(())
    }

    /// Has the control plane take a layer out of the chain. False when it does not want to (any more).
    async fn merged(&self, lower: LayerRef) -> bool {
        loop {
            match self.rim.control.merged(self.id, self.generation, lower).await {
                Ok(config) => {
                    self.layers.configure(&config.layers);
                    return true;
                }
                Err(CommitError::Fenced) => {
                    self.fence();
                    return false;
                }
                Err(CommitError::Refused(reason)) => {
                    tracing::info!(volume = %self.id, %lower, reason, "the layer is needed again");
                    return false;
                }
                Err(CommitError::Unavailable(_)) => tokio::time::sleep(self.rim.timing.retry).await,
            }
        }
    }
}
