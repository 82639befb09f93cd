//! A disk with a volatile cache: writes are readable at once and durable after a flush; a power cut drops, block by block and
//! by seed, what was not flushed.

use super::dice::Dice;
use crate::ids::{
    BLOCK_SIZE, ByteSize, DiskId, Generation, LayerRef, SegmentIndex, SegmentKey, Version, VolumeId,
};
use crate::status::{DiskHealth, DiskUsage};
use crate::store::{
    BlockVersion, DamagedBlocks, DiskStore, Keep, ReadReply, ReplicaWrite, ScrubCursor, ScrubStep,
    StoreError, WriteContent,
};
use bytes::{Bytes, BytesMut};
use futures_util::future::BoxFuture;
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// A block of a segment.
pub(super) type Key = (SegmentKey, u32);

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Stored {
    pub(super) version: Version,
    pub(super) data: Bytes,
    crc: u32,
}

impl Stored {
    pub(super) fn new(version: Version, data: Bytes) -> Self {
        let crc = crc32c::crc32c(&data);
        Self { version, data, crc }
    }
}

#[derive(Default)]
struct State {
    current: BTreeMap<Key, Stored>,
    durable: BTreeMap<Key, Stored>,
    /// Writes since the last flush, in order.
    cached: Vec<(Key, Stored)>,
    generations: BTreeMap<VolumeId, Generation>,
    full: bool,
    writes: u64,
}

/// The medium; survives crashes of the process that uses it.
pub(super) struct SimDisk {
    state: Mutex<State>,
    /// Counts the processes that had it open: what an earlier one has under way has no effect any more.
    opened: AtomicU64,
    id: DiskId,
    dice: Dice,
}

impl SimDisk {
    pub(super) fn new(id: DiskId, dice: Dice) -> Arc<Self> {
        Arc::new(Self { state: Mutex::default(), opened: AtomicU64::new(0), id, dice })
    }

    /// Opens the disk for a new process and takes it away from the one before.
    pub(super) fn open(self: &Arc<Self>) -> Arc<dyn DiskStore> {
        Arc::new(Handle { disk: self.clone(), opened: self.opened.fetch_add(1, Ordering::Relaxed) + 1 })
    }

    /// Takes the disk away from the process that has it.
    pub(super) fn detach(&self) {
        self.opened.fetch_add(1, Ordering::Relaxed);
    }

    /// Loses, for each block, any number of the last writes that were not flushed.
    pub(super) fn power_cut(&self) {
        self.detach();
        let mut state = self.state.lock();
        let mut cached: BTreeMap<Key, Vec<Stored>> = BTreeMap::new();
        for (key, stored) in std::mem::take(&mut state.cached) {
            cached.entry(key).or_default().push(stored);
        }
        for (key, versions) in cached {
            let survives = self.dice.below(versions.len() as u64 + 1) as usize;
            tracing::trace!(disk = %self.id, at = ?key, survives, of = versions.len(), "power cut");
            if survives > 0 {
                state.durable.insert(key, versions[survives - 1].clone());
            }
        }
        state.current = state.durable.clone();
    }

    pub(super) fn set_full(&self, full: bool) {
        self.state.lock().full = full;
    }

    /// Damages a block.
    pub(super) fn corrupt(&self, at: SegmentKey, block: u32) {
        let mut state = self.state.lock();
        let state = &mut *state;
        for map in [&mut state.current, &mut state.durable] {
            if let Some(stored) = map.get_mut(&(at, block)) {
                stored.crc ^= 1;
            }
        }
    }

    /// Damages everything.
    pub(super) fn corrupt_all(&self) {
        let mut state = self.state.lock();
        let state = &mut *state;
        state.current.values_mut().chain(state.durable.values_mut()).for_each(|stored| stored.crc ^= 1);
    }

    pub(super) fn is_intact(&self, at: SegmentKey, block: u32) -> bool {
        self.state.lock().current.get(&(at, block)).is_none_or(|s| crc32c::crc32c(&s.data) == s.crc)
    }

    /// What it holds of a volume, never-written blocks left out.
    pub(super) fn contents(&self) -> BTreeMap<Key, Stored> {
        let mut contents = self.state.lock().current.clone();
        contents.retain(|_, s| s.version != Version::default());
        contents
    }

    /// Removes a layer, as if it had been given up long ago.
    pub(super) fn forget(&self, layer: LayerRef) {
        let mut state = self.state.lock();
        let is_kept = |at: &SegmentKey| at.volume != layer.volume || at.layer != layer.layer;
        state.current.retain(|(at, _), _| is_kept(at));
        state.durable.retain(|(at, _), _| is_kept(at));
        state.cached.retain(|((at, _), _)| is_kept(at));
    }

    /// What a block reads through layers, the top first.
    pub(super) fn look(&self, chain: &[SegmentKey], block: u32) -> Bytes {
        let state = self.state.lock();
        let found = chain.iter().find_map(|at| {
            state.current.get(&(*at, block)).filter(|stored| stored.version != Version::default())
        });
        found.map_or_else(|| Bytes::from(vec![0; BLOCK_SIZE as usize]), |stored| stored.data.clone())
    }

    /// Blocks written so far.
    pub(super) fn blocks_written(&self) -> u64 {
        self.state.lock().writes
    }
}

struct Handle {
    disk: Arc<SimDisk>,
    opened: u64,
}

impl Handle {
    /// Takes its time; an operation of a process that is gone never ends.
    async fn pause(&self, max_micros: u64) {
        tokio::time::sleep(self.disk.dice.micros(max_micros)).await;
        if self.disk.opened.load(Ordering::Relaxed) != self.opened {
            std::future::pending::<()>().await;
        }
    }
}

impl DiskStore for Handle {
    fn write(&self, at: SegmentKey, write: ReplicaWrite) -> BoxFuture<'_, Result<(), StoreError>> {
        Box::pin(async move {
            self.pause(500).await;
            for (i, block) in write.blocks().enumerate() {
                // Block by block: a crash in between leaves a write half way.
                if i > 0 && self.disk.dice.percent(20) {
                    self.pause(100).await;
                }
                let mut state = self.disk.state.lock();
                if state.full {
                    return Err(StoreError::Full);
                }
                let size = BLOCK_SIZE as usize;
                let (data, crc) = match &write.content {
                    WriteContent::Data { data, crcs } => (data.slice(i * size..(i + 1) * size), crcs[i]),
                    // As much is left out as the rules of the store permit.
                    WriteContent::Zeroes { keep: Keep::WhereStored, .. }
                        if state
                            .current
                            .get(&(at, block))
                            .is_none_or(|s| s.version == Version::default()) =>
                    {
                        continue;
                    }
                    WriteContent::Zeroes { .. } => {
                        let zeroes = Bytes::from(vec![0; size]);
                        let crc = crc32c::crc32c(&zeroes);
                        (zeroes, crc)
                    }
                };
                let stored = Stored { version: write.version, data, crc };
                tracing::trace!(disk = %self.disk.id, ?at, block, version = ?stored.version, value = ?&stored.data[..2], "stored");
                state.current.insert((at, block), stored.clone());
                state.cached.push(((at, block), stored));
                state.writes += 1;
            }
            Ok(())
        })
    }

    fn read(&self, at: SegmentKey, block: u32, blocks: u32) -> BoxFuture<'_, Result<ReadReply, StoreError>> {
        Box::pin(async move {
            self.pause(300).await;
            let state = self.disk.state.lock();
            let zeroes = Bytes::from(vec![0; BLOCK_SIZE as usize]);
            let (mut data, mut crcs) = (BytesMut::new(), Vec::new());
            for block in block..block + blocks {
                match state.current.get(&(at, block)) {
                    Some(stored) if crc32c::crc32c(&stored.data) != stored.crc => {
                        return Err(StoreError::Checksum { block });
                    }
                    Some(stored) => {
                        data.extend_from_slice(&stored.data);
                        crcs.push(stored.crc);
                    }
                    None => {
                        data.extend_from_slice(&zeroes);
                        crcs.push(crc32c::crc32c(&zeroes));
                    }
                }
            }
            Ok(ReadReply { data: data.freeze(), crcs })
        })
    }

    fn flush(&self) -> BoxFuture<'_, Result<(), StoreError>> {
        Box::pin(async move {
            let covered = self.disk.state.lock().cached.len();
            self.pause(2000).await;
            let mut state = self.disk.state.lock();
            let covered = covered.min(state.cached.len());
            tracing::trace!(disk = %self.disk.id, writes = covered, "flushed");
            for (key, stored) in state.cached.drain(..covered).collect::<Vec<_>>() {
                state.durable.insert(key, stored);
            }
            Ok(())
        })
    }

    fn versions(
        &self,
        at: SegmentKey,
        blocks: Range<u32>,
    ) -> BoxFuture<'_, Result<Vec<BlockVersion>, StoreError>> {
        Box::pin(async move {
            self.pause(300).await;
            let state = self.disk.state.lock();
            let found = state.current.range((at, blocks.start)..(at, blocks.end));
            Ok(found
                .map(|((_, block), s)| BlockVersion { block: *block, version: s.version, crc: s.crc })
                .collect())
        })
    }

    fn stored(
        &self,
        layer: LayerRef,
        segments: Range<u32>,
    ) -> BoxFuture<'_, Result<Vec<SegmentIndex>, StoreError>> {
        Box::pin(async move {
            self.pause(300).await;
            let state = self.disk.state.lock();
            let there = |segment: &SegmentIndex| {
                let at = layer.key(*segment);
                state.current.range((at, 0)..=(at, u32::MAX)).next().is_some()
            };
            Ok(segments.map(SegmentIndex).filter(there).collect())
        })
    }

    fn generation(&self, volume: VolumeId) -> BoxFuture<'_, Result<Generation, StoreError>> {
        Box::pin(
            async move { Ok(self.disk.state.lock().generations.get(&volume).copied().unwrap_or_default()) },
        )
    }

    fn set_generation(
        &self,
        volume: VolumeId,
        generation: Generation,
    ) -> BoxFuture<'_, Result<(), StoreError>> {
        Box::pin(async move {
            self.pause(1000).await;
            self.disk.state.lock().generations.insert(volume, generation);
            Ok(())
        })
    }

    fn delete_volume(&self, volume: VolumeId) -> BoxFuture<'_, Result<(), StoreError>> {
        Box::pin(async move {
            let mut state = self.disk.state.lock();
            state.current.retain(|(key, _), _| key.volume != volume);
            state.durable.retain(|(key, _), _| key.volume != volume);
            state.cached.retain(|((key, _), _)| key.volume != volume);
            state.generations.remove(&volume);
            Ok(())
        })
    }

    fn scrub(&self, from: ScrubCursor, budget_bytes: u64) -> BoxFuture<'_, Result<ScrubStep, StoreError>> {
        Box::pin(async move {
            self.pause(1000).await;
            let state = self.disk.state.lock();
            let blocks = (budget_bytes / BLOCK_SIZE).max(1) as usize;
            let mut step = ScrubStep::default();
            // The cursor counts blocks: those that come or go before it while it passes are of no account here.
            for ((at, block), stored) in state.current.iter().skip(from.0 as usize).take(blocks) {
                step.checked += BLOCK_SIZE;
                if crc32c::crc32c(&stored.data) != stored.crc {
                    step.damaged.push(DamagedBlocks { at: *at, blocks: *block..*block + 1 });
                }
            }
            let end = from.0 + step.checked / BLOCK_SIZE;
            step.next = (end < state.current.len() as u64).then_some(ScrubCursor(end));
            Ok(step)
        })
    }

    fn usage(&self) -> DiskUsage {
        DiskUsage { used: ByteSize(0), total: ByteSize(0) }
    }

    fn health(&self) -> DiskHealth {
        DiskHealth::Ok
    }
}
