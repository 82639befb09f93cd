//! The control plane of the simulated cluster: one consistent record of the volume, reachable from nodes that are connected to a
//! majority, with commits whose answer gets lost now and then.

use super::dice::Dice;
use super::history::History;
use super::net::Network;
use super::snapshots::Snapshots;
use crate::config::{CleanState, ReplicaConfig, ReplicaState, Tenure, VolumeConfig};
use crate::control::{CommitError, ControlPlane, FreezeStep};
use crate::coordinator::release::PROOF;
use crate::ids::{DiskId, FreezeId, Generation, LayerRef, SegmentIndex, VolumeId};
use futures_util::future::BoxFuture;
use netfabric::NodeId;
use parking_lot::Mutex;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use tokio::time::Instant;

/// The replicated record.
pub(super) struct Record {
    pub(super) volume: VolumeConfig,
    pub(super) coordinator: Option<NodeId>,
    /// Number of the coordinator's opening, for the history.
    pub(super) opening: u64,
    pub(super) snapshots: Snapshots,
    /// Disks that have all writes acknowledged so far, flushed or not: in sync since their last power cut.
    whole: BTreeSet<DiskId>,
    /// When a disk last lost its cache.
    cuts: BTreeMap<DiskId, Instant>,
    /// The opening that made its replicas equal. What it confirms later says nothing of them.
    made_equal: u64,
}

/// The consensus service.
pub(super) struct Raft {
    pub(super) record: Mutex<Record>,
    pub(super) history: Arc<Mutex<History>>,
    nodes: Vec<NodeId>,
    network: Arc<Network>,
    dice: Dice,
    /// Commits in a hundred whose answer is lost.
    lossy_percent: u64,
    /// A commit that would leave fewer replicas in sync is refused. Below the volume's minimum or at the last one: both must do.
    fewest_left: usize,
}

impl Raft {
    pub(super) fn new(
        volume: VolumeConfig,
        nodes: Vec<NodeId>,
        network: Arc<Network>,
        history: Arc<Mutex<History>>,
        dice: Dice,
    ) -> Arc<Self> {
        let whole = volume.segments.iter().flat_map(|s| s.replicas.iter().map(|r| r.disk)).collect();
        let fewest_left = if dice.percent(50) { 1 } else { usize::from(volume.min_in_sync.max(1)) };
        let snapshots = Snapshots::new(volume.id);
        let cuts = BTreeMap::new();
        let record = Mutex::new(Record {
            volume,
            coordinator: None,
            opening: 0,
            snapshots,
            whole,
            cuts,
            made_equal: 0,
        });
        Arc::new(Self { record, history, nodes, network, dice, lossy_percent: 5, fewest_left })
    }

    /// Whether a node reaches a majority.
    pub(super) fn reaches_majority(&self, node: NodeId) -> bool {
        let reached = self.nodes.iter().filter(|n| self.network.connected(node, **n)).count();
        reached * 2 > self.nodes.len()
    }

    /// Opens the volume on a node: raises the generation and drops members that cannot be reached, in one step. None when no
    /// replica in sync of some segment would be left.
    pub(super) fn open_volume(&self, node: NodeId) -> Option<VolumeConfig> {
        let mut record = self.record.lock();
        let mut volume = record.volume.clone();
        for segment in &mut volume.segments {
            let mut left = false;
            for replica in &mut segment.replicas {
                let reachable = self.network.connected(node, replica.node);
                match replica.state {
                    ReplicaState::InSync if reachable => left = true,
                    _ => replica.state = ReplicaState::OutOfSync,
                }
            }
            if !left {
                return None;
            }
        }
        volume.generation.0 += 1;
        record.volume = volume;
        record.coordinator = Some(node);
        record.end_freeze();
        record.restore_at_random(&self.dice, &mut self.history.lock());
        self.next_opening(&mut record);
        self.note_losses(&mut record);
        Some(record.volume.clone())
    }

    /// The same coordinator's process opens again with the same generation.
    pub(super) fn reopen_same(&self) -> VolumeConfig {
        let mut record = self.record.lock();
        self.next_opening(&mut record);
        record.volume.clone()
    }

    fn next_opening(&self, record: &mut Record) {
        record.opening += 1;
    }

    /// A disk lost its cache.
    pub(super) fn power_cut(&self, disks: &[DiskId]) {
        let mut record = self.record.lock();
        disks.iter().for_each(|d| {
            record.whole.remove(d);
            record.cuts.insert(*d, Instant::now());
        });
        self.note_losses(&mut record);
    }

    /// Writes not flushed may be gone when no member of some segment's in-sync set has them.
    fn note_losses(&self, record: &mut Record) {
        if record.is_any_lost(|disk| record.whole.contains(&disk)) {
            self.history.lock().lose_unflushed();
        }
    }

    /// Disks in sync for all segments.
    pub(super) fn in_sync(&self) -> Vec<DiskId> {
        let record = self.record.lock();
        let Some(first) = record.volume.segments.first() else { return Vec::new() };
        let in_sync = |d: &DiskId| {
            record
                .volume
                .segments
                .iter()
                .all(|s| s.replicas.iter().any(|r| r.disk == *d && r.state == ReplicaState::InSync))
        };
        first.replicas.iter().map(|r| r.disk).filter(|d| in_sync(d)).collect()
    }
}

impl Record {
    /// Whether some segment has no replica in sync that still has all that was acknowledged.
    fn is_any_lost(&self, is_whole: impl Fn(DiskId) -> bool) -> bool {
        let has_all = |r: &ReplicaConfig| r.state == ReplicaState::InSync && is_whole(r.disk);
        self.volume.segments.iter().any(|segment| !segment.replicas.iter().any(has_all))
    }
}

/// The control plane as one node's process sees it.
pub(super) struct NodeControl {
    pub(super) node: NodeId,
    pub(super) raft: Arc<Raft>,
}

impl NodeControl {
    /// Commits a change, if this node reaches a majority and the generation is current.
    fn commit<T: Send + 'static>(
        &self,
        generation: Generation,
        change: impl FnOnce(&Raft, &mut Record) -> Result<T, CommitError> + Send + 'static,
    ) -> BoxFuture<'static, Result<T, CommitError>> {
        let (raft, node) = (self.raft.clone(), self.node);
        Box::pin(async move {
            tokio::time::sleep(raft.dice.micros(4000)).await;
            if !raft.reaches_majority(node) {
                tokio::time::sleep(raft.dice.micros(500_000)).await;
                return Err(CommitError::Unavailable("no majority".into()));
            }
            let result = {
                let mut record = raft.record.lock();
                if record.volume.generation != generation || record.coordinator != Some(node) {
                    return Err(CommitError::Fenced);
                }
                change(&raft, &mut record)
            };
            tokio::time::sleep(raft.dice.micros(4000)).await;
            if raft.dice.percent(raft.lossy_percent) {
                return Err(CommitError::Unavailable("the answer was lost".into()));
            }
            result
        })
    }
}

impl ControlPlane for NodeControl {
    fn replicas_out(
        &self,
        _volume: VolumeId,
        generation: Generation,
        disk: DiskId,
        _reason: String,
    ) -> BoxFuture<'static, Result<VolumeConfig, CommitError>> {
        self.commit(generation, move |raft, record| {
            let minimum = raft.fewest_left;
            for segment in &record.volume.segments {
                let in_sync = |r: &&ReplicaConfig| r.state == ReplicaState::InSync;
                let is_in = segment.replicas.iter().filter(in_sync).any(|r| r.disk == disk);
                if is_in && segment.replicas.iter().filter(in_sync).count() <= minimum {
                    return Err(CommitError::Refused("below the minimum".into()));
                }
            }
            for replica in record.volume.segments.iter_mut().flat_map(|s| &mut s.replicas) {
                if replica.disk == disk {
                    replica.state = ReplicaState::OutOfSync;
                }
            }
            raft.note_losses(record);
            Ok(record.volume.clone())
        })
    }

    fn replica_in(
        &self,
        _volume: VolumeId,
        generation: Generation,
        segment: SegmentIndex,
        disk: DiskId,
    ) -> BoxFuture<'static, Result<VolumeConfig, CommitError>> {
        self.commit(generation, move |_, record| {
            for s in record.volume.segments.iter_mut().filter(|s| s.index == segment) {
                for replica in s.replicas.iter_mut().filter(|r| r.disk == disk) {
                    replica.state = ReplicaState::InSync;
                }
            }
            let everywhere = record
                .volume
                .segments
                .iter()
                .all(|s| s.replicas.iter().any(|r| r.disk == disk && r.state == ReplicaState::InSync));
            if everywhere {
                record.whole.insert(disk);
            }
            Ok(record.volume.clone())
        })
    }

    fn replica_left(
        &self,
        _volume: VolumeId,
        generation: Generation,
        segment: SegmentIndex,
        disk: DiskId,
    ) -> BoxFuture<'static, Result<VolumeConfig, CommitError>> {
        let asked = Instant::now();
        self.commit(generation, move |raft, record| {
            let minimum = usize::from(record.volume.min_in_sync.max(1));
            for segment in record.volume.segments.iter_mut().filter(|s| s.index == segment) {
                let in_sync = |r: &&ReplicaConfig| r.state == ReplicaState::InSync && r.disk != disk;
                if segment.replicas.iter().filter(in_sync).count() >= minimum {
                    segment.replicas.retain(|r| r.disk != disk || r.tenure == Tenure::Stays);
                }
                let stays = segment.replicas.iter_mut().filter(|r| r.disk == disk);
                stays.for_each(|r| r.tenure = Tenure::Stays);
            }
            // One that lost its cache before it was asked for a proof that it has everything excuses nothing.
            let since = asked - PROOF;
            let was_whole =
                |d| record.whole.contains(&d) || record.cuts.get(&d).is_some_and(|at| *at >= since);
            if !record.is_any_lost(was_whole) {
                raft.note_losses(record);
            }
            Ok(record.volume.clone())
        })
    }

    fn freeze_step(
        &self,
        _volume: VolumeId,
        generation: Generation,
        freeze: FreezeId,
        step: FreezeStep,
    ) -> BoxFuture<'static, Result<VolumeConfig, CommitError>> {
        self.commit(generation, move |raft, record| {
            record.freeze_step(&raft.history.lock(), freeze, step)?;
            Ok(record.volume.clone())
        })
    }

    fn merged(
        &self,
        _volume: VolumeId,
        generation: Generation,
        layer: LayerRef,
    ) -> BoxFuture<'static, Result<VolumeConfig, CommitError>> {
        self.commit(generation, move |_, record| {
            record.merged(layer)?;
            Ok(record.volume.clone())
        })
    }

    fn opened(
        &self,
        _volume: VolumeId,
        generation: Generation,
    ) -> BoxFuture<'static, Result<(), CommitError>> {
        self.commit(generation, move |raft, record| {
            record.volume.clean = CleanState::Unclean;
            let segments = &record.volume.segments;
            let in_sync =
                segments.iter().flat_map(|s| &s.replicas).filter(|r| r.state == ReplicaState::InSync);
            if record.made_equal != record.opening {
                record.whole.extend(in_sync.map(|r| r.disk));
                record.made_equal = record.opening;
            }
            raft.history.lock().opened(record.opening);
            Ok(())
        })
    }

    fn closed_clean(
        &self,
        _volume: VolumeId,
        generation: Generation,
    ) -> BoxFuture<'static, Result<(), CommitError>> {
        self.commit(generation, move |_, record| {
            record.volume.clean = CleanState::Clean;
            record.coordinator = None;
            record.end_freeze();
            Ok(())
        })
    }
}
