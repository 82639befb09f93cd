//! Snapshots in the simulated cluster: the control plane's part, and what each snapshot must read.
//!
//! The volume is one of a group whose other members hold in their own time, now and then too late. At the moment in which all hold, the history
//! is copied: from then on every replica in sync must read, through the snapshot's layers, a value that a read at that moment could have
//! returned, always the same one, and all replicas the same.

use super::client::{HOT, value_of};
use super::cluster::Cluster;
use super::dice::Dice;
use super::history::{Frozen, History, Value};
use super::raft::Record;
use crate::config::{Freeze, FreezeStage, LayersConfig};
use crate::control::{CommitError, FreezeStep};
use crate::ids::{
    BLOCK_SIZE, BLOCKS_PER_SEGMENT, FreezeId, LayerId, LayerRef, MAX_DEPTH, SECTOR_SIZE, SegmentIndex,
    VolumeId,
};
use std::collections::BTreeMap;
use std::time::Duration;
use tokio::time::Instant;
use uuid::Uuid;

/// How long the data of a dead layer are kept: a read that was on its way when it died has ended then.
const REMOVE_AFTER: Duration = Duration::from_secs(3);
/// How many openings in a hundred go back to a snapshot.
const RESTORE_PERCENT: u64 = 40;
/// Sectors in a block.
const SECTORS: u64 = BLOCK_SIZE / SECTOR_SIZE;

/// A freeze that is under way.
struct Pending {
    id: FreezeId,
    /// When the other volumes of the group hold.
    others: Instant,
    is_held: bool,
    frozen: Option<Frozen>,
}

/// A snapshot.
#[derive(Clone)]
pub(super) struct Snapshot {
    /// Its layers, the one that was frozen first.
    pub(super) layers: Vec<LayerRef>,
    frozen: Frozen,
    /// What was read from it.
    seen: BTreeMap<u64, Value>,
}

/// What the control plane knows of a volume's snapshots.
pub(super) struct Snapshots {
    volume: VolumeId,
    next: u32,
    pending: Option<Pending>,
    pub(super) taken: Vec<Snapshot>,
    /// Layers that nothing refers to any more, and since when.
    dead: Vec<(LayerRef, Instant)>,
    pub(super) count: u64,
    pub(super) merges: u64,
    pub(super) restores: u64,
}

impl Snapshots {
    pub(super) fn new(volume: VolumeId) -> Self {
        let (taken, dead) = (Vec::new(), Vec::new());
        Self { volume, next: 1, pending: None, taken, dead, count: 0, merges: 0, restores: 0 }
    }
}

impl Record {
    /// Begins a snapshot, if none is under way. False when it is refused.
    pub(super) fn begin_snapshot(&mut self, dice: &Dice, others: Duration) -> bool {
        let (layers, snapshots) = (&mut self.volume.layers, &mut self.snapshots);
        if snapshots.pending.is_some() || layers.chain.len() >= MAX_DEPTH || self.coordinator.is_none() {
            return false;
        }
        let id = FreezeId(Uuid::from_u128(u128::from(dice.next())));
        let top = LayerRef { volume: snapshots.volume, layer: LayerId(snapshots.next) };
        snapshots.next += 1;
        layers.chain.insert(0, top);
        layers.freeze = Some(Freeze { id, stage: FreezeStage::Hold });
        snapshots.pending =
            Some(Pending { id, others: Instant::now() + others, is_held: false, frozen: None });
        self.settle();
        true
    }

    /// Has the group go over once all hold.
    pub(super) fn advance(&mut self, history: &History) {
        let Some(pending) = &mut self.snapshots.pending else { return };
        if pending.is_held && pending.frozen.is_none() && Instant::now() >= pending.others {
            pending.frozen = Some(history.freeze());
            self.volume.layers.freeze = Some(Freeze { id: pending.id, stage: FreezeStage::Switch });
            self.settle();
        }
    }

    /// See [`crate::control::ControlPlane::freeze_step`].
    pub(super) fn freeze_step(
        &mut self,
        history: &History,
        id: FreezeId,
        step: FreezeStep,
    ) -> Result<(), CommitError> {
        let Some(pending) = self.snapshots.pending.as_mut().filter(|p| p.id == id) else { return Ok(()) };
        match step {
            FreezeStep::Held => {
                pending.is_held = true;
                self.advance(history);
            }
            FreezeStep::Switched => {
                let Some(frozen) = pending.frozen.take() else {
                    return Err(CommitError::Refused("not all hold".into()));
                };
                let layers = self.volume.layers.chain[1..].to_vec();
                self.snapshots.taken.push(Snapshot { layers, frozen, seen: BTreeMap::new() });
                self.snapshots.count += 1;
                self.end_freeze();
            }
            FreezeStep::Abandoned => self.end_freeze(),
        }
        Ok(())
    }

    /// There is no freeze any more: it became a snapshot, or the volume was opened by somebody else.
    pub(super) fn end_freeze(&mut self) {
        self.snapshots.pending = None;
        self.volume.layers.freeze = None;
        self.settle();
    }

    /// See [`crate::control::ControlPlane::merged`].
    pub(super) fn merged(&mut self, layer: LayerRef) -> Result<(), CommitError> {
        if self.volume.layers.merge != Some(layer) {
            return Err(CommitError::Refused("not to be merged".into()));
        }
        self.volume.layers.chain.retain(|there| *there != layer);
        for snapshot in &mut self.snapshots.taken {
            snapshot.layers.retain(|there| *there != layer);
        }
        self.snapshots.dead.push((layer, Instant::now()));
        self.snapshots.merges += 1;
        self.settle();
        Ok(())
    }

    /// Forgets a snapshot.
    pub(super) fn delete_snapshot(&mut self, at: usize) {
        let gone = self.snapshots.taken.remove(at);
        self.settle();
        let all: Vec<LayerRef> =
            self.volume.layers.chain.iter().chain(&self.volume.layers.kept).copied().collect();
        let dead = gone.layers.into_iter().filter(|layer| !all.contains(layer));
        self.snapshots.dead.extend(dead.map(|layer| (layer, Instant::now())));
    }

    /// Now and then the volume is not only opened by another node but put back to a snapshot before.
    pub(super) fn restore_at_random(&mut self, dice: &Dice, history: &mut History) {
        let count = self.snapshots.taken.len() as u64;
        if count > 0 && dice.percent(RESTORE_PERCENT) {
            let at = dice.below(count) as usize;
            self.restore(at);
            history.restore(&self.snapshots.taken[at].frozen);
            self.snapshots.restores += 1;
        }
    }

    /// The volume, which nobody has open, goes back to a snapshot.
    pub(super) fn restore(&mut self, at: usize) {
        let top = LayerRef { volume: self.snapshots.volume, layer: LayerId(self.snapshots.next) };
        self.snapshots.next += 1;
        let before = std::mem::take(&mut self.volume.layers.chain);
        self.volume.layers.chain =
            std::iter::once(top).chain(self.snapshots.taken[at].layers.clone()).collect();
        self.settle();
        let LayersConfig { chain, kept, .. } = &self.volume.layers;
        let dead = before.into_iter().filter(|layer| !chain.contains(layer) && !kept.contains(layer));
        let dead: Vec<_> = dead.map(|layer| (layer, Instant::now())).collect();
        self.snapshots.dead.extend(dead);
    }

    /// What follows from the chain and the snapshots.
    fn settle(&mut self) {
        let (layers, taken) = (&mut self.volume.layers, &self.snapshots.taken);
        let in_chain = |layer: &LayerRef| layers.chain.contains(layer);
        let mut kept: Vec<LayerRef> =
            taken.iter().flat_map(|s| &s.layers).filter(|layer| !in_chain(layer)).copied().collect();
        kept.sort();
        kept.dedup();
        let is_frozen = |layer: &LayerRef| taken.iter().any(|s| s.layers.first() == Some(layer));
        layers.unsettled = layers.chain.iter().take_while(|layer| !is_frozen(layer)).count() as u32;
        let only_child = |lower: &LayerRef, upper: &LayerRef| {
            taken.iter().all(|s| match s.layers.iter().position(|there| there == lower) {
                None => true,
                Some(at) => at > 0 && s.layers[at - 1] == *upper,
            })
        };
        // The layer that is about to be frozen is about to be needed.
        let skipped = usize::from(layers.freeze.is_some());
        layers.merge = layers
            .chain
            .windows(2)
            .skip(skipped)
            .find(|pair| only_child(&pair[1], &pair[0]))
            .map(|pair| pair[1]);
        layers.kept = kept;
        layers.revision += 1;
    }

    fn is_in_sync(&self, segment: SegmentIndex, disk: crate::ids::DiskId) -> bool {
        self.volume
            .segments
            .iter()
            .filter(|s| s.index == segment)
            .flat_map(|s| &s.replicas)
            .any(|replica| replica.disk == disk && replica.state == crate::config::ReplicaState::InSync)
    }
}

/// Snapshots come and go at random.
pub(super) fn step(cluster: &Cluster) {
    let dice = &cluster.dice;
    let mut record = cluster.raft.record.lock();
    let count = record.snapshots.taken.len();
    if count > 0 && dice.percent(40) {
        record.delete_snapshot(dice.below(count as u64) as usize);
    } else {
        let others = if dice.percent(10) { 5_000_000 } else { 200_000 };
        record.begin_snapshot(dice, dice.micros(others));
    }
}

/// What the control plane does all the time: goes on with a freeze, removes layers that are dead, tells the coordinator.
pub(super) fn control(cluster: &Cluster) {
    let (config, due): (_, Vec<(LayerRef, Instant)>) = {
        let history = cluster.history.lock();
        let mut record = cluster.raft.record.lock();
        record.advance(&history);
        let is_due = |(_, since): &(LayerRef, Instant)| since.elapsed() >= REMOVE_AFTER;
        let (due, later) = std::mem::take(&mut record.snapshots.dead).into_iter().partition(is_due);
        record.snapshots.dead = later;
        (record.volume.clone(), due)
    };
    for node in &cluster.nodes {
        due.iter().for_each(|(layer, _)| node.disk.forget(*layer));
    }
    if let Some((_, coordinator)) = cluster.coordinator()
        && cluster.raft.record.lock().coordinator.is_some_and(|c| cluster.raft.reaches_majority(c))
    {
        coordinator.configure(&config);
    }
}

/// Reads every snapshot on every replica in sync.
pub(super) fn check(cluster: &Cluster) {
    let mut history = cluster.history.lock();
    let mut record = cluster.raft.record.lock();
    let mut taken = std::mem::take(&mut record.snapshots.taken);
    for (number, snapshot) in taken.iter_mut().enumerate() {
        for node in &cluster.nodes {
            for block in HOT.start / SECTORS..HOT.end / SECTORS {
                let segment = SegmentIndex((block / u64::from(BLOCKS_PER_SEGMENT)) as u32);
                if !record.is_in_sync(segment, node.disk_id) {
                    continue;
                }
                let chain: Vec<_> = snapshot.layers.iter().map(|layer| layer.key(segment)).collect();
                let data = match node.disk.look(&chain, (block % u64::from(BLOCKS_PER_SEGMENT)) as u32) {
                    Some(Ok(data)) => data,
                    Some(Err(error)) => {
                        history.violation(format!("snapshot {number} cannot be read: {error}"));
                        continue;
                    }
                    None => continue,
                };
                for (sector, bytes) in (block * SECTORS..).zip(data.chunks_exact(SECTOR_SIZE as usize)) {
                    let Some(value) = value_of(bytes) else {
                        history.violation(format!("sector {sector} of snapshot {number} is torn"));
                        continue;
                    };
                    let first = *snapshot.seen.entry(sector).or_insert(value);
                    if first != value || !snapshot.frozen.allows(sector, value) {
                        history.violation(format!(
                            "sector {sector} of snapshot {number} reads {value} on disk {}, {first} before; {:?}; known: {}",
                            node.disk_id,
                            snapshot.layers,
                            snapshot.frozen.known(sector)
                        ));
                    }
                }
            }
        }
    }
    record.snapshots.taken = taken;
}
