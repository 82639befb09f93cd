//! What volumes are made of: layers, and the snapshots that keep them.
//!
//! A volume's content lies in a **chain** of layers, top first: a block is that of the first layer that has it. A snapshot is a chain,
//! too: what its volume's was when it was taken, under a top that was put on then. Restoring puts a new top on a snapshot's chain; a
//! clone is another volume whose chain ends in one. So nothing is ever copied, and layers may be shared by any number of chains.
//!
//! Rules:
//! - Each volume has its own replica sets, and a copy is complete only when it holds **all layers of its volume** for its segment: those of
//!   the chain and those that only snapshots have. A clone begins with the complete copies of the volume that it comes from; from then on each
//!   goes its own way, and a copy that moves takes all layers along.
//! - Data are removed from a disk only when no volume needs that layer of that segment there ([`ClusterState::needs_part`]). While something is
//!   still to be removed, no volume that shares the layer gets a new copy on that disk.
//! - Only a layer that belongs to one volume alone, as does the one above it, is merged into that one: its coordinator locks both.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use super::{
    ClusterState, Custody, DiskId, FreezeId, Generation, SegmentIndex, SnapshotId, Timestamp, Volume,
    VolumeId,
};

/// Most layers of a chain: a read may have to look into each.
pub const MAX_DEPTH: usize = 32;
/// Most snapshots of a volume.
pub const MAX_SNAPSHOTS: usize = 64;

/// A layer: its number, and the volume that it was made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct LayerRef {
    /// The volume; it may be gone while clones of it need the layer.
    pub volume: VolumeId,
    /// The number; never used twice.
    pub number: u32,
}

/// A snapshot of a volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Snapshot {
    /// Its id.
    pub id: SnapshotId,
    /// Its name, unique among those of the volume.
    pub name: String,
    /// Its layers, top first.
    pub chain: Vec<LayerRef>,
    /// The volume's size when it was taken.
    pub size_bytes: u64,
    /// When it was taken.
    pub created: Timestamp,
}

/// The layers of a volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layers {
    /// Raised with each change of what a coordinator is told of them.
    pub revision: u64,
    /// Number of the next one.
    pub next: u32,
    /// The volume's chain, top first; never empty.
    pub chain: Vec<LayerRef>,
    /// Its snapshots, oldest first.
    pub snapshots: Vec<Snapshot>,
    /// The freeze that it takes part in. The top of the chain is the layer that begins with it.
    pub freeze: Option<PendingFreeze>,
    /// The layer of the chain that is being merged into the one above it.
    pub merge: Option<LayerRef>,
}

/// The freeze that a volume takes part in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PendingFreeze {
    /// Which one.
    pub id: FreezeId,
    /// How far it is.
    pub stage: FreezeStage,
}

/// How far a freeze is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FreezeStage {
    /// Coordinators are to hold writes.
    Hold,
    /// All hold: they go over to the new layer.
    Switch,
}

/// How far a volume is with a freeze.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FreezeStep {
    /// Its writes are held and flushed.
    Held,
    /// It has gone over to the new layer.
    Switched,
    /// It will not be: there is no snapshot.
    Abandoned,
}

/// Snapshots of one or several volumes that are being taken at one point in time.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Freeze {
    /// What the snapshots will be called.
    pub name: String,
    /// The volumes, their snapshots, and how far each is; none before it holds.
    pub volumes: BTreeMap<VolumeId, (SnapshotId, Option<FreezeStep>)>,
    /// When it began.
    pub begun: Timestamp,
}

/// A layer that nothing refers to any more, and the disks that may still hold data of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeadLayer {
    /// The volume that had it last.
    pub holder: VolumeId,
    /// That volume's generation when it let the layer go.
    pub generation: Generation,
    /// Whether the coordinator of that generation may still use it.
    pub custody: Custody,
    /// Segments that it may have.
    pub segments: u32,
    /// The disks.
    pub disks: BTreeSet<DiskId>,
}

impl Layers {
    /// Those of a volume that begins with this chain below its first layer.
    pub fn new(volume: VolumeId, below: &[LayerRef]) -> Self {
        let top = LayerRef { volume, number: 0 };
        Self {
            revision: 0,
            next: 1,
            chain: std::iter::once(top).chain(below.iter().copied()).collect(),
            snapshots: Vec::new(),
            freeze: None,
            merge: None,
        }
    }

    /// All that a complete copy holds.
    pub fn all(&self) -> BTreeSet<LayerRef> {
        self.chain.iter().chain(self.snapshots.iter().flat_map(|snapshot| &snapshot.chain)).copied().collect()
    }

    /// Layers that only snapshots have.
    pub fn kept(&self) -> Vec<LayerRef> {
        self.all().into_iter().filter(|layer| !self.chain.contains(layer)).collect()
    }

    /// How many layers from the top on were not made equal by a freeze: copies may differ in them after a crash.
    pub fn unsettled(&self, volume: VolumeId) -> usize {
        let is_frozen = |layer: &LayerRef| {
            layer.volume != volume
                || self.snapshots.iter().any(|snapshot| snapshot.chain.first() == Some(layer))
        };
        self.chain.iter().take_while(|layer| !is_frozen(layer)).count()
    }

    /// A snapshot by name or id.
    pub fn find(&self, name: &str) -> Option<&Snapshot> {
        let is_it = |snapshot: &&Snapshot| snapshot.name == name || snapshot.id.to_string() == name;
        self.snapshots.iter().find(is_it)
    }

    /// Puts a new layer on a chain.
    pub fn put_top(&mut self, volume: VolumeId) {
        let top = LayerRef { volume, number: self.next };
        self.next += 1;
        self.chain.insert(0, top);
        self.revision += 1;
    }

    /// The first layer that no snapshot of the volume needs as one of its own: all that have it have the one above it, too.
    /// Whether other volumes have them is not looked at.
    fn superfluous(&self) -> impl Iterator<Item = (LayerRef, LayerRef)> {
        // The layer that is being frozen is about to be needed.
        let skipped = usize::from(self.freeze.is_some());
        let is_below = |upper: &LayerRef, lower: &LayerRef| {
            self.snapshots.iter().all(|snapshot| {
                match snapshot.chain.iter().position(|there| there == lower) {
                    None => true,
                    Some(at) => at > 0 && snapshot.chain[at - 1] == *upper,
                }
            })
        };
        let pairs = self.chain.windows(2).skip(skipped).filter_map(|pair| match pair {
            [upper, lower] => Some((*upper, *lower)),
            _ => None,
        });
        pairs.filter(move |(upper, lower)| is_below(upper, lower))
    }
}

impl ClusterState {
    /// Whether a volume other than this one has a layer.
    pub fn is_shared(&self, layer: LayerRef, but: VolumeId) -> bool {
        self.volumes.values().any(|other| other.id != but && other.layers.all().contains(&layer))
    }

    /// The layer of a volume that is to be merged into the one above it, if there is one.
    pub fn layer_to_merge(&self, volume: &Volume) -> Option<LayerRef> {
        let is_own = |layer: LayerRef| !self.is_shared(layer, volume.id);
        let mut superfluous = volume.layers.superfluous();
        superfluous.find(|(upper, lower)| is_own(*upper) && is_own(*lower)).map(|(_, lower)| lower)
    }

    /// Whether some volume needs a segment of a layer on a disk.
    pub fn needs_part(&self, layer: LayerRef, segment: SegmentIndex, disk: DiskId) -> bool {
        self.volumes.values().any(|volume| {
            volume.segments.get(segment.0 as usize).is_some_and(|segment| segment.on(disk).is_some())
                && volume.layers.all().contains(&layer)
        })
    }

    /// Whether data are still to be removed from a disk that belong to layers which a volume has, too.
    pub fn awaits_removal(&self, volume: &Volume, disk: DiskId) -> bool {
        let of_other = || {
            let all = volume.layers.all();
            self.retired
                .values()
                .filter_map(|disks| disks.get(&disk))
                .any(|retired| !retired.layers.is_disjoint(&all))
        };
        self.retired.get(&volume.id).is_some_and(|disks| disks.contains_key(&disk)) || of_other()
    }

    /// Whether the data of a layer that nothing refers to may be removed: no coordinator can still be using it.
    pub fn may_remove(&self, dead: &DeadLayer) -> bool {
        let holder = self.volumes.get(&dead.holder).filter(|volume| volume.coordinator.is_some());
        dead.custody == Custody::Nobody || holder.is_none_or(|volume| volume.generation != dead.generation)
    }
}
