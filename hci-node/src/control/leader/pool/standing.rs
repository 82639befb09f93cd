//! What a copy is worth.

use super::View;
use crate::state::{
    Availability, DiskService, DiskState, NodeService, Replica, ReplicaState, Segment, Volume,
};

/// What a copy is worth.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// Complete, on a disk that works and stays.
    Good,
    /// Being completed, on a disk that works and stays.
    Coming,
    /// Its node is lost, but not for long: it may come back.
    Waiting,
    /// On a disk that works but is to leave.
    Leaving,
    /// Not counted on any more: the disk failed or is dead, or its node has been lost for too long.
    Gone,
}

impl Standing {
    /// Whether the copy is counted on.
    pub fn is_firm(self) -> bool {
        matches!(self, Self::Good | Self::Coming | Self::Waiting)
    }
}

/// What a copy is worth now.
pub fn of(view: View<'_>, replica: &Replica) -> Standing {
    let (Some(disk), Some(node)) = (view.state.disks.get(&replica.disk), view.state.nodes.get(&replica.node))
    else {
        return Standing::Gone;
    };
    if disk.service == DiskService::Dead || matches!(disk.state, DiskState::Failed { .. }) {
        return Standing::Gone;
    }
    if let Availability::Lost { since } = node.availability {
        let grace = i64::from(view.state.pool.rebuild_grace_seconds);
        return if view.at >= since.plus_seconds(grace) { Standing::Gone } else { Standing::Waiting };
    }
    if disk.service == DiskService::Draining || node.service == NodeService::Leaving {
        return Standing::Leaving;
    }
    match replica.state {
        ReplicaState::InSync => Standing::Good,
        ReplicaState::OutOfSync => Standing::Coming,
    }
}

/// Whether a volume can be worked on: it can be opened only while every part of it has a complete copy in reach.
pub fn is_workable(view: View<'_>, volume: &Volume) -> bool {
    let has_source = |segment: &Segment| segment.replicas.iter().any(|replica| is_source(view, replica));
    volume.segments.iter().all(has_source)
}

/// Whether a copy can be read now to make another one.
pub fn is_source(view: View<'_>, replica: &Replica) -> bool {
    replica.state == ReplicaState::InSync
        && matches!(of(view, replica), Standing::Good | Standing::Leaving)
        && view.live.contains_key(&replica.node)
}
