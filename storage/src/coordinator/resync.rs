//! Bringing replicas back while I/O goes on.
//!
//! A replica that can be reached again gets a new session, and with it all writes that start from then on. What it missed
//! is found by comparing versions with a replica in sync, and copied under range locks, in both directions of difference: blocks
//! that only the returning replica has go, too. When nothing differs any more its disk is flushed and a Raft commit puts the
//! replica in. New, empty replicas come in on the same path.

use super::copy::FixError;
use super::layers::Part;
use super::members::{Patience, SlotState, Target};
use super::open::{Attached, COMPARE_BLOCKS};
use super::ranges::Mode;
use super::{Coordinator, Phase, diff, geometry};
use crate::ids::{BLOCK_SIZE, BLOCKS_PER_SEGMENT, DiskId, LayerRef, SegmentIndex};
use crate::status::ResyncProgress;
use crate::transport::PeerChange;
use futures_util::StreamExt;
use futures_util::future::join;
use netfabric::NodeId;
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::broadcast::error::RecvError;
use tokio::time::Instant;

/// Blocks copied under one lock: a guest's write to them waits for that long.
const BATCH: u32 = 64;
/// Longest pause between attempts to reach a replica.
const MAX_PAUSE: Duration = Duration::from_secs(2);

/// When to try a member again.
struct Backoff {
    pause: Duration,
    at: Instant,
}

/// Why a resync stopped.
enum Stopped {
    /// The session is over; it starts anew with the next.
    SessionEnded,
    /// The source was lost or cannot be read; try again after a pause.
    Source,
}

impl Coordinator {
    /// Attaches members that are away and starts the resync of those that lack something, for as long as the volume is open.
    pub(super) async fn run_resync(self: Arc<Self>) {
        let mut backoff: BTreeMap<DiskId, Backoff> = BTreeMap::new();
        let mut followed: BTreeMap<DiskId, Target> = BTreeMap::new();
        let mut peers = self.rim.transport.subscribe();
        let mut growing_since: Option<Instant> = None;
        loop {
            self.phase.wait_for(|p| p == Phase::Open).await;
            let is_growing = self.table.lock().is_growing();
            growing_since = is_growing.then(|| growing_since.unwrap_or_else(Instant::now));
            if let Some(since) = growing_since {
                let waited = since.elapsed() >= self.rim.timing.open_grace;
                self.grow(if waited { Patience::Over } else { Patience::Waits });
            }
            let mut seen = self.changed.seen();
            for (target, _) in self.table.lock().to_copy() {
                if followed.insert(target.disk, target) != Some(target) {
                    self.spawn(self.clone().follow(target));
                }
            }
            let now = Instant::now();
            let away = self.away(now);
            let due: Vec<_> =
                away.into_iter().filter(|(disk, _)| backoff.get(disk).is_none_or(|b| b.at <= now)).collect();
            for (disk, node) in due {
                let pause =
                    backoff.get(&disk).map_or(self.rim.timing.retry, |b| (b.pause * 2).min(MAX_PAUSE));
                backoff.insert(disk, Backoff { pause, at: now + pause });
                self.spawn(self.clone().bring_back(disk, node));
            }
            tokio::select! {
                biased;
                event = peers.recv() => match event {
                    Ok(PeerChange::Up(node)) => {
                        let table = self.table.lock();
                        backoff.retain(|disk, _| table.node_of(*disk) != Some(node));
                    }
                    Ok(PeerChange::Down(_)) | Err(RecvError::Lagged(_)) => {}
                    Err(RecvError::Closed) => tokio::time::sleep(self.rim.timing.retry).await,
                },
                () = self.changed.changed(&mut seen) => {}
                () = tokio::time::sleep(self.rim.timing.retry) => {}
            }
        }
    }

    /// Members without a session, but for those that were too slow and can be done without for now.
    fn away(&self, now: Instant) -> Vec<(DiskId, NodeId)> {
        let table = self.table.lock();
        let health = self.health.lock();
        let mut away = table.detached();
        away.retain(|(disk, _)| !health.is_barred(*disk, now) || !table.is_spare(*disk));
        away
    }

    /// Starts a session with a member that was away.
    async fn bring_back(self: Arc<Self>, disk: DiskId, node: NodeId) {
        let Attached::Session { target, power, .. } = self.attach(disk, node).await else { return };
        // A volume that is being opened again attaches its members itself, and another attempt may have been faster.
        let attached = {
            let mut table = self.table.lock();
            let wanted = self.phase.get() == Phase::Open && table.detached().iter().any(|(d, _)| *d == disk);
            if wanted {
                table.attached(disk, target.session, power, false);
                table.progress(disk, |p| *p = ResyncProgress::default());
            }
            wanted
        };
        if attached {
            tracing::info!(volume = %self.id, %disk, %node, "replica is back: resync");
            self.change(|_| ());
        }
    }

    /// Copies the member's segments until none is left, and again when its replica set grows, while the session lasts.
    async fn follow(self: Arc<Self>, target: Target) {
        loop {
            let mut seen = self.changed.seen();
            if !self.table.lock().is_current(&target) {
                return;
            }
            let copying = self.table.lock().to_copy();
            let segments =
                copying.into_iter().find(|(t, _)| *t == target).map(|(_, s)| s).unwrap_or_default();
            let mut pause = false;
            for segment in segments {
                match self.resync(target, segment).await {
                    Ok(()) => self.join(target, segment).await,
                    Err(Stopped::SessionEnded) => return,
                    Err(Stopped::Source) => pause = true,
                }
            }
            if pause {
                tokio::time::sleep(self.rim.timing.retry).await;
            } else {
                self.changed.changed(&mut seen).await;
            }
        }
    }

    /// Makes one segment's replica equal to those in sync.
    async fn resync(self: &Arc<Self>, target: Target, segment: SegmentIndex) -> Result<(), Stopped> {
        let end = geometry::segment_blocks(self.size(), segment);
        // Writes that began before the session are not sent to the member: they must have ended before anything is compared.
        drop(self.ranges.lock(volume_range(segment, 0..end), Mode::Copy).await);
        // From the bottom up, layers that come meanwhile included: the member takes part in merges, and what it merges from a layer that is
        // not equal yet is put right when the one above is compared.
        let mut done: Vec<LayerRef> = Vec::new();
        loop {
            let view = self.layers.view();
            let Some(layer) = view.all.iter().rev().find(|layer| !done.contains(layer)) else {
                return Ok(());
            };
            self.resync_layer(target, segment, *layer, end).await?;
            done.push(*layer);
        }
    }

    async fn resync_layer(
        self: &Arc<Self>,
        target: Target,
        segment: SegmentIndex,
        layer: LayerRef,
        end: u32,
    ) -> Result<(), Stopped> {
        let mut block = 0;
        while block < end {
            let view = self.layers.view();
            if !view.all.contains(&layer) {
                // It was merged meanwhile into the one that comes next.
                return Ok(());
            }
            let part = view.part(segment, layer);
            let blocks = COMPARE_BLOCKS.min(end - block);
            let differing = self.compare(target, part, block..block + blocks).await?;
            let count: u64 = differing.iter().map(|f| u64::from(f.blocks)).sum();
            self.table.lock().progress(target.disk, |p| {
                p.blocks_compared += u64::from(blocks);
                p.blocks_left += count;
            });
            let work = batches(&differing).into_iter().map(|(range, found)| async move {
                let copied = self.copy_batch(target, part, range).await;
                self.table
                    .lock()
                    .progress(target.disk, |p| p.blocks_left = p.blocks_left.saturating_sub(found));
                copied
            });
            let mut results = futures_util::stream::iter(work).buffer_unordered(2);
            while let Some(result) = results.next().await {
                result?;
            }
            block += blocks;
        }
        Ok(())
    }

    /// Compares once more with the range locked and copies what differs.
    async fn copy_batch(
        self: &Arc<Self>,
        target: Target,
        part: Part,
        range: Range<u32>,
    ) -> Result<(), Stopped> {
        let segment = part.segment;
        let started = Instant::now();
        let bytes = {
            let _range = self.ranges.lock(volume_range(segment, range.clone()), Mode::Copy).await;
            let source = self.source(segment)?;
            let fixes = self.compare_with(source, target, part, range).await?;
            let blocks: u64 = fixes.iter().map(|f| u64::from(f.blocks)).sum();
            match self.apply_fixes(part, &[source, target], fixes).await {
                Ok(()) => {}
                Err(FixError::Damaged(fix)) => {
                    tracing::error!(volume = %self.id, %segment, block = fix.block, "the source of a resync is damaged");
                    // Some other replica may have it intact: it is repaired from there, once the range is free.
                    let damaged = fix.block..fix.block + fix.blocks;
                    let this = self.clone();
                    self.spawn(async move { this.repair_layer(part, damaged).await });
                    return Err(Stopped::Source);
                }
                Err(FixError::Lost) => return Err(self.stopped(target)),
            }
            self.table.lock().progress(target.disk, |p| p.blocks_copied += blocks);
            self.metrics.resynced_blocks.inc_by(blocks);
            blocks * BLOCK_SIZE
        };
        // Pacing: outside of the lock, and split between the two batches that are under way.
        let due = Duration::from_secs_f64(2.0 * bytes as f64 / self.rim.timing.resync_rate.max(1) as f64);
        tokio::time::sleep_until(started + due).await;
        Ok(())
    }

    async fn compare(
        self: &Arc<Self>,
        target: Target,
        part: Part,
        range: Range<u32>,
    ) -> Result<Vec<diff::Fix>, Stopped> {
        let source = self.source(part.segment)?;
        self.compare_with(source, target, part, range).await
    }

    async fn compare_with(
        self: &Arc<Self>,
        source: Target,
        target: Target,
        part: Part,
        range: Range<u32>,
    ) -> Result<Vec<diff::Fix>, Stopped> {
        let blocks = range.end - range.start;
        let (right, theirs) = join(
            self.versions(source, part, range.start, blocks),
            self.versions(target, part, range.start, blocks),
        )
        .await;
        let theirs = theirs.map_err(|error| {
            self.lose(&target, error.reason());
            Stopped::SessionEnded
        })?;
        let right = right.map_err(|error| {
            self.lose(&source, error.reason());
            Stopped::Source
        })?;
        Ok(diff::resync(right, theirs))
    }

    /// A segment is equal: makes it durable and has Raft put it in.
    async fn join(self: &Arc<Self>, target: Target, segment: SegmentIndex) {
        // From here on flushes of the guest include the replica; what they covered before is covered by this one.
        if !self.change(|table| table.begin_join(&target, segment)) {
            return;
        }
        let written = self.table.lock().written(&target);
        if self.flush_replica(target, written).await {
            self.put_in(target, segment).await;
        }
    }

    fn source(&self, segment: SegmentIndex) -> Result<Target, Stopped> {
        let table = self.table.lock();
        let mut sources = table.in_state(segment, SlotState::InSync);
        sources.sort_by_key(|t| t.node != self.rim.node);
        sources.first().copied().ok_or(Stopped::Source)
    }

    fn stopped(&self, target: Target) -> Stopped {
        if self.table.lock().is_current(&target) { Stopped::Source } else { Stopped::SessionEnded }
    }
}

/// The blocks of a segment, within the volume.
pub(super) fn volume_range(segment: SegmentIndex, blocks: Range<u32>) -> Range<u64> {
    let start = u64::from(segment.0) * u64::from(BLOCKS_PER_SEGMENT);
    start + u64::from(blocks.start)..start + u64::from(blocks.end)
}

/// Ranges of at most a batch that cover all fixes, each with the number of differing blocks in it.
fn batches(fixes: &[diff::Fix]) -> Vec<(Range<u32>, u64)> {
    let mut batches: BTreeMap<u32, (Range<u32>, u64)> = BTreeMap::new();
    for fix in fixes {
        for block in fix.block..fix.block + fix.blocks {
            let (range, count) = batches.entry(block / BATCH).or_insert((block..block, 0));
            range.end = block + 1;
            *count += 1;
        }
    }
    batches.into_values().collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::Version;

    #[test]
    fn batches_are_small_and_leave_nothing_out() {
        let fix = |block, blocks| diff::Fix {
            block,
            blocks,
            version: Version::default(),
            sources: vec![0],
            targets: vec![1],
        };
        let found = batches(&[fix(3, 2), fix(60, 10), fix(1000, 1)]);
        assert_eq!(found, vec![(3..64, 6), (64..70, 6), (1000..1001, 1)]);
    }
}
