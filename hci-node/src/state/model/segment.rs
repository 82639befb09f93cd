//! Segments: the unit of placement, and the copies of each.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use crate::state::{ids::*, layers::LayerRef};

/// Size of a segment: the unit of placement.
pub const SEGMENT_BYTES: u64 = 1 << 30;

/// Whether a replica has every completed write.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ReplicaState {
    /// It has.
    InSync,
    /// It lacks some, and is resynced.
    OutOfSync,
}

/// One copy of a segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Replica {
    /// The disk that holds it.
    pub disk: DiskId,
    /// The node that the disk is in.
    pub node: NodeId,
    /// Whether it is complete.
    pub state: ReplicaState,
    /// The copy of the same segment that leaves once this one is complete.
    pub replaces: Option<DiskId>,
    /// Whether it is to stay.
    pub tenure: Tenure,
}

/// Whether a complete copy stays in its set. While its volume is open, only the coordinator can say when it may leave.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Tenure {
    /// It does.
    #[default]
    Stays,
    /// It is to leave as soon as the coordinator can do without it.
    Leaves,
}

/// Data of former copies on a disk, still to be removed there. While there is an entry for a volume and a disk, the
/// disk gets no new copies of that volume, so that removing can never hit anything that is in use.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Retired {
    /// The volume's generation when the latest of them left.
    pub generation: Generation,
    /// The segments.
    pub segments: BTreeSet<SegmentIndex>,
    /// Whether the coordinator of that generation may still use them.
    pub custody: Custody,
    /// The layers that the copies had. What another volume needs of them on the disk stays.
    pub layers: BTreeSet<LayerRef>,
}

/// Whether a coordinator may still use copies that have left their sets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Custody {
    /// It has not said that it does not.
    Coordinator,
    /// Nobody does.
    Nobody,
}

/// 1 GiB of a volume and where its copies are.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Segment {
    /// Its copies, on disks of distinct nodes; one that replaces another may be in the same node.
    pub replicas: Vec<Replica>,
}

impl Segment {
    /// The copy on a disk.
    pub fn on(&self, disk: DiskId) -> Option<&Replica> {
        self.replicas.iter().find(|replica| replica.disk == disk)
    }

    /// Whether a copy is to leave once another one is complete.
    pub fn is_replaced(&self, disk: DiskId) -> bool {
        self.replicas.iter().any(|replica| replica.replaces == Some(disk))
    }

    /// How many copies there are, not counting those that are to leave.
    pub fn staying(&self) -> usize {
        self.replicas.iter().filter(|replica| !self.is_replaced(replica.disk)).count()
    }

    /// How many copies are complete and stay, not counting the one on this disk.
    pub fn complete_without(&self, disk: DiskId) -> usize {
        let counts = |replica: &&Replica| {
            replica.disk != disk && replica.state == ReplicaState::InSync && replica.tenure == Tenure::Stays
        };
        self.replicas.iter().filter(counts).count()
    }

    /// How many copies are complete.
    pub fn in_sync(&self) -> usize {
        self.replicas.iter().filter(|replica| replica.state == ReplicaState::InSync).count()
    }
}
