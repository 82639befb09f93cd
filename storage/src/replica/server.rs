//! Serves coordinators' requests on this node's disks, those of this node's own coordinators included.
//!
//! Fencing happens here: a replica keeps the highest generation that it was attached with, durably, and serves requests of
//! its current session only. A new session starts when all requests of the old one have ended; whatever of the old one comes
//! later is refused. Sessions live in memory: after a restart nobody is attached, so a coordinator learns of it by its next request.

use super::protocol::{
    AckWhen, BootEpoch, MAX_STORED, PowerEpoch, ReplicaError, ReplicaOp, ReplicaOutcome, ReplicaReply,
    ReplicaRequest, Session,
};
use crate::ids::{
    BLOCK_SIZE, BLOCKS_PER_SEGMENT, DiskId, Generation, MAX_DEPTH, SegmentKey, Version, VolumeId,
};
use crate::metrics::{DiskMetrics, Metrics};
use crate::scrub::{self, DamageList};
use crate::store::{
    BlockVersion, Compression, DamagedBlocks, DiskStore, Keep, ReplicaWrite, StoreError, WriteContent, thin,
};
use netfabric::NodeId;
use parking_lot::{Mutex, RwLock};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::Arc;
use tokio::time::Instant;

/// Damaged blocks that are named in one answer.
const MAX_DAMAGED: usize = 256;

/// The coordinator that a replica is attached to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Attachment {
    coordinator: NodeId,
    generation: Generation,
    session: Session,
}

/// The door of one replica: requests of the session hold it shared, a new attachment takes it exclusively.
type Gate = Arc<tokio::sync::RwLock<Option<Attachment>>>;

/// A disk that is open.
#[derive(Clone)]
pub(crate) struct ServedDisk {
    pub(crate) store: Arc<dyn DiskStore>,
    pub(crate) metrics: Arc<DiskMetrics>,
    /// What is known to be damaged on it.
    pub(crate) damage: Arc<DamageList>,
}

/// The replica server of a node.
pub(crate) struct ReplicaServer {
    node: NodeId,
    boot: BootEpoch,
    power: PowerEpoch,
    disks: RwLock<BTreeMap<DiskId, ServedDisk>>,
    metrics: Metrics,
    gates: Mutex<BTreeMap<(VolumeId, DiskId), Gate>>,
}

impl ReplicaServer {
    pub(crate) fn new(node: NodeId, boot: BootEpoch, power: PowerEpoch, metrics: Metrics) -> Self {
        Self { node, boot, power, disks: RwLock::default(), metrics, gates: Mutex::default() }
    }

    /// Adds a disk, or replaces its store; sessions with it end.
    pub(crate) fn add_disk(&self, disk: DiskId, store: Arc<dyn DiskStore>) -> ServedDisk {
        self.gates.lock().retain(|(_, d), _| *d != disk);
        let metrics = Arc::new(self.metrics.disk(disk));
        let served = ServedDisk { store, metrics, damage: Arc::default() };
        self.disks.write().insert(disk, served.clone());
        served
    }

    /// Takes a disk away.
    pub(crate) fn remove_disk(&self, disk: DiskId) {
        self.disks.write().remove(&disk);
        self.gates.lock().retain(|(_, d), _| *d != disk);
    }

    /// The disks.
    pub(crate) fn disks(&self) -> Vec<(DiskId, ServedDisk)> {
        self.disks.read().iter().map(|(id, disk)| (*id, disk.clone())).collect()
    }

    /// Removes what all disks hold of a volume.
    pub(crate) async fn delete_volume(&self, volume: VolumeId) -> Result<(), StoreError> {
        let mut result = Ok(());
        for (disk, served) in self.disks() {
            let gate = self.gate(volume, disk);
            let mut attachment = gate.write().await;
            *attachment = None;
            result = served.store.delete_volume(volume).await.and(result);
            served.damage.forget(|at| at.volume == volume);
            self.gates.lock().remove(&(volume, disk));
        }
        result
    }

    /// Removes what one disk holds of some segments in some layers, none of which anybody reads or writes there any more.
    /// Sessions go on: the disk may hold other parts of the volume.
    pub(crate) async fn delete_parts(&self, disk: DiskId, parts: &[SegmentKey]) -> Result<(), StoreError> {
        let served = self.disks.read().get(&disk).cloned();
        let Some(ServedDisk { store, damage, .. }) = served else {
            return Err(StoreError::Io(format!("disk {disk} is not here")));
        };
        for part in parts {
            store.remove(*part).await?;
            damage.forget(|at| at == part);
        }
        store.flush().await
    }

    /// Serves one request of a node (this one included).
    pub(crate) async fn handle(&self, from: NodeId, request: ReplicaRequest) -> ReplicaReply {
        let started = Instant::now();
        let result = self.serve(from, request).await;
        let served_us = u32::try_from(started.elapsed().as_micros()).unwrap_or(u32::MAX);
        ReplicaReply { boot: self.boot, served_us, result }
    }

    async fn serve(&self, from: NodeId, request: ReplicaRequest) -> Result<ReplicaOutcome, ReplicaError> {
        let disk = request.op.disk();
        let ServedDisk { store, metrics, damage } =
            self.disks.read().get(&disk).cloned().ok_or(ReplicaError::NoSuchDisk)?;
        let caller =
            Attachment { coordinator: from, generation: request.generation, session: request.session };
        if let ReplicaOp::Attach { .. } = request.op {
            let gate = self.gate(request.volume, disk);
            let previous = attach(&gate, store.as_ref(), request.volume, caller).await?;
            return Ok(ReplicaOutcome::Attached { previous, power: self.power });
        }
        let known = self.gates.lock().get(&(request.volume, disk)).cloned();
        let gate = known.ok_or(ReplicaError::NotAttached)?;
        let attachment = gate.read().await;
        match *attachment {
            Some(current) if current == caller => {}
            Some(current) if current.generation > caller.generation => {
                return Err(ReplicaError::Fenced { current: current.generation });
            }
            Some(current)
                if current.generation == caller.generation && current.coordinator != caller.coordinator =>
            {
                return Err(ReplicaError::NotCoordinator);
            }
            _ => return Err(ReplicaError::NotAttached),
        }
        match request.op {
            ReplicaOp::Attach { .. } => Err(ReplicaError::Invalid("attach".into())),
            ReplicaOp::Write { at, write, ack } => {
                check_write(&write, from != self.node)?;
                let started = Instant::now();
                store.write(at.key(), write).await?;
                metrics.write.observe(started.elapsed());
                if ack == AckWhen::Durable {
                    flush(store.as_ref(), &metrics).await?;
                }
                Ok(ReplicaOutcome::Done)
            }
            ReplicaOp::Read { at, below, block, blocks } => {
                check_range(block, blocks)?;
                if u64::from(blocks) * BLOCK_SIZE > crate::ids::MAX_TRANSFER {
                    return Err(ReplicaError::Invalid(format!("a read of {blocks} blocks is too long")));
                }
                if below.len() >= MAX_DEPTH {
                    return Err(ReplicaError::Invalid(format!("{} layers are too many", below.len() + 1)));
                }
                let started = Instant::now();
                let data = if below.is_empty() {
                    store.read(at.key(), block, blocks).await?
                } else {
                    let layers = std::iter::once(at.layer).chain(below.iter().copied());
                    let chain: Vec<SegmentKey> = layers.map(|layer| layer.key(at.segment)).collect();
                    store.read_layers(&chain, block, blocks).await?
                };
                metrics.read.observe(started.elapsed());
                Ok(ReplicaOutcome::Data(data))
            }
            ReplicaOp::Versions { at, block, blocks } => {
                check_range(block, blocks)?;
                Ok(ReplicaOutcome::Versions(store.versions(at.key(), block..block + blocks).await?))
            }
            ReplicaOp::Stored { layer, first, count, .. } => {
                let end = first.0.checked_add(count).filter(|_| count <= MAX_STORED);
                let end =
                    end.ok_or_else(|| ReplicaError::Invalid(format!("{count} segments are too many")))?;
                Ok(ReplicaOutcome::Stored(store.stored(layer, first.0..end).await?))
            }
            ReplicaOp::Merge { at, into, block, blocks, keep, compression } => {
                check_range(block, blocks)?;
                if u64::from(blocks) * BLOCK_SIZE > crate::ids::MAX_TRANSFER {
                    return Err(ReplicaError::Invalid(format!("a merge of {blocks} blocks is too long")));
                }
                let range = block..block + blocks;
                merge(store.as_ref(), at.key(), into.key(at.segment), range, keep, compression).await?;
                Ok(ReplicaOutcome::Done)
            }
            ReplicaOp::Damaged { layers, skip, .. } => {
                let listed = damage.in_layers(&layers, skip as usize, MAX_DAMAGED);
                let still = still_damaged(store.as_ref(), &damage, &metrics, listed).await?;
                Ok(ReplicaOutcome::Damaged(still))
            }
            ReplicaOp::Flush { .. } => {
                flush(store.as_ref(), &metrics).await?;
                Ok(ReplicaOutcome::Done)
            }
        }
    }

    fn gate(&self, volume: VolumeId, disk: DiskId) -> Gate {
        self.gates.lock().entry((volume, disk)).or_default().clone()
    }
}

async fn flush(store: &dyn DiskStore, metrics: &DiskMetrics) -> Result<(), StoreError> {
    let started = Instant::now();
    store.flush().await?;
    metrics.flush.observe(started.elapsed());
    Ok(())
}

/// What is on the list and still damaged; what is intact leaves the list.
async fn still_damaged(
    store: &dyn DiskStore,
    damage: &DamageList,
    metrics: &DiskMetrics,
    listed: Vec<(SegmentKey, u32)>,
) -> Result<Vec<DamagedBlocks>, StoreError> {
    let mut still = Vec::new();
    for (at, block) in listed {
        match store.read(at, block, 1).await {
            Ok(_) => {
                damage.remove(at, block);
                metrics.repaired.inc();
            }
            Err(StoreError::Checksum { .. }) => still.push((at, block)),
            Err(error) => return Err(error),
        }
    }
    Ok(scrub::runs(still.into_iter()))
}

/// Copies what the upper layer does not have. Nobody writes these blocks meanwhile.
async fn merge(
    store: &dyn DiskStore,
    lower: SegmentKey,
    upper: SegmentKey,
    range: Range<u32>,
    keep: Keep,
    compression: Compression,
) -> Result<(), StoreError> {
    let is_there = |found: &BlockVersion| found.version != Version::default();
    let above: BTreeSet<u32> =
        store.versions(upper, range.clone()).await?.iter().filter(|v| is_there(v)).map(|v| v.block).collect();
    let mut lacking = store.versions(lower, range).await?;
    lacking.retain(|found| is_there(found) && !above.contains(&found.block));
    let one_write = |a: &BlockVersion, b: &BlockVersion| a.block + 1 == b.block && a.version == b.version;
    for run in lacking.chunk_by(one_write) {
        let Some(first) = run.first() else { continue };
        let found = store.read(lower, first.block, run.len() as u32).await?;
        let content = thin(found, keep);
        let (block, version) = (first.block, first.version);
        store.write(upper, ReplicaWrite { block, version, content, compression }).await?;
    }
    Ok(())
}

async fn attach(
    gate: &Gate,
    store: &dyn DiskStore,
    volume: VolumeId,
    caller: Attachment,
) -> Result<Generation, ReplicaError> {
    let mut attachment = gate.write().await;
    let previous = store.generation(volume).await?;
    if caller.generation < previous {
        return Err(ReplicaError::Fenced { current: previous });
    }
    if let Some(current) = *attachment
        && current.generation == caller.generation
    {
        if current.coordinator != caller.coordinator {
            return Err(ReplicaError::NotCoordinator);
        }
        if caller.session < current.session {
            return Err(ReplicaError::NotAttached);
        }
    }
    if caller.generation > previous {
        store.set_generation(volume, caller.generation).await?;
    }
    *attachment = Some(caller);
    Ok(previous)
}

fn check_range(block: u32, blocks: u32) -> Result<(), ReplicaError> {
    match block.checked_add(blocks) {
        Some(end) if end <= BLOCKS_PER_SEGMENT && blocks > 0 => Ok(()),
        _ => Err(ReplicaError::Invalid(format!("blocks {block}+{blocks} are outside of a segment"))),
    }
}

/// What came over the network is checked against its checksums, too: what is stored must be what was sent.
fn check_write(write: &ReplicaWrite, remote: bool) -> Result<(), ReplicaError> {
    match &write.content {
        WriteContent::Zeroes { blocks, .. } => check_range(write.block, *blocks),
        WriteContent::Data { data, crcs } => {
            if data.len() as u64 != crcs.len() as u64 * BLOCK_SIZE {
                return Err(ReplicaError::Invalid("data and checksums do not agree in length".into()));
            }
            check_range(write.block, u32::try_from(crcs.len()).unwrap_or(u32::MAX))?;
            let bad = |(block, crc): (&[u8], &u32)| crc32c::crc32c(block) != *crc;
            if remote && data.chunks_exact(BLOCK_SIZE as usize).zip(crcs).any(bad) {
                return Err(ReplicaError::Invalid("data do not match their checksums".into()));
            }
            Ok(())
        }
    }
}

impl From<StoreError> for ReplicaError {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::Io(text) => Self::Failed(text),
            StoreError::Corrupt(text) => Self::Failed(format!("damaged store: {text}")),
            StoreError::Checksum { block } => Self::Checksum { block },
            StoreError::Full => Self::Full,
            StoreError::Invalid(text) => Self::Invalid(text),
        }
    }
}
