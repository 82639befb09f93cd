//! Placement: on which disks the copies of a segment go.
//!
//! Copies are on disks of distinct nodes. The first one is on the node that will run the VM, so that its reads are
//! local; the rest go where the most room is left. Room is what is not yet *promised*: volumes are thin, so promises
//! may exceed the capacity up to [`OVERCOMMIT`], and the choice stays deterministic because it never looks at usage.

use std::collections::{BTreeMap, BTreeSet};

use super::{
    ClusterState, DiskId, DiskState, NodeId, Refusal, RefusalKind, Replica, ReplicaState, SEGMENT_BYTES,
    Segment,
};

/// How much more than its capacity may be promised on a disk.
pub const OVERCOMMIT: u64 = 4;

/// What placement knows of a disk.
#[derive(Clone, Copy, Debug)]
struct Room {
    disk: DiskId,
    node: NodeId,
    capacity: u64,
    promised: u64,
}

impl Room {
    fn takes(&self, bytes: u64) -> bool {
        self.promised + bytes <= self.capacity.saturating_mul(OVERCOMMIT)
    }

    /// Share of the capacity that is promised, in 1/65536, to compare disks of different sizes.
    fn load(&self) -> u128 {
        (u128::from(self.promised) << 16) / u128::from(self.capacity.max(1))
    }
}

/// Where a volume's copies are wanted.
#[derive(Clone, Debug)]
pub struct Wish<'a> {
    /// Size of the volume.
    pub size_bytes: u64,
    /// How many copies.
    pub replicas: u8,
    /// The node for the first one.
    pub near: Option<NodeId>,
    /// Nodes that cannot take any.
    pub unreachable: &'a [NodeId],
}

/// Chooses the disks of a new volume.
pub fn place(state: &ClusterState, wish: &Wish<'_>) -> Result<Vec<Segment>, Refusal> {
    let mut rooms = rooms(state, wish.unreachable);
    let nodes: BTreeSet<_> = rooms.iter().map(|room| room.node).collect();
    let wanted = usize::from(wish.replicas);
    if nodes.len() < wanted {
        return Err(Refusal::new(
            RefusalKind::Capacity,
            format!(
                "{wanted} copies need disks on {wanted} nodes, but {} of {} nodes have usable disks ({} disks in all)",
                nodes.len(),
                state.nodes.len(),
                rooms.len()
            ),
            if nodes.is_empty() {
                "add disks: hci disk list, then hci disk add NODE PATH".to_owned()
            } else {
                format!(
                    "add disks on further nodes (hci disk add NODE PATH), or use --replicas {}",
                    nodes.len()
                )
            },
        ));
    }
    let count = wish.size_bytes.div_ceil(SEGMENT_BYTES);
    let mut segments = Vec::new();
    for index in 0..count {
        let bytes = SEGMENT_BYTES.min(wish.size_bytes - index * SEGMENT_BYTES);
        segments.push(place_segment(&mut rooms, wish, bytes)?);
    }
    Ok(segments)
}

fn rooms(state: &ClusterState, unreachable: &[NodeId]) -> Vec<Room> {
    let mut promised: BTreeMap<DiskId, u64> = BTreeMap::new();
    for volume in state.volumes.values() {
        for (index, segment) in volume.segments.iter().enumerate() {
            let start = index as u64 * SEGMENT_BYTES;
            let bytes = SEGMENT_BYTES.min(volume.size_bytes.saturating_sub(start));
            for replica in &segment.replicas {
                *promised.entry(replica.disk).or_default() += bytes;
            }
        }
    }
    state
        .disks
        .values()
        .filter(|disk| disk.state == DiskState::Ready && !unreachable.contains(&disk.node))
        .map(|disk| Room {
            disk: disk.id,
            node: disk.node,
            capacity: disk.capacity_bytes,
            promised: promised.get(&disk.id).copied().unwrap_or(0),
        })
        .collect()
}

fn place_segment(rooms: &mut [Room], wish: &Wish<'_>, bytes: u64) -> Result<Segment, Refusal> {
    let mut used = BTreeSet::new();
    let mut replicas = Vec::new();
    for copy in 0..wish.replicas {
        let best = rooms
            .iter_mut()
            .filter(|room| !used.contains(&room.node) && room.takes(bytes))
            .min_by_key(|room| (copy == 0 && Some(room.node) != wish.near, room.load(), room.disk));
        let Some(room) = best else {
            return Err(Refusal::new(
                RefusalKind::Capacity,
                format!(
                    "the pool has no room for {} more copies of {} bytes on distinct nodes",
                    wish.replicas - copy,
                    wish.size_bytes
                ),
                "delete volumes (hci volume list), or add disks (hci disk add NODE PATH)",
            ));
        };
        room.promised += bytes;
        used.insert(room.node);
        replicas.push(Replica { disk: room.disk, node: room.node, state: ReplicaState::InSync });
    }
    Ok(Segment { replicas })
}
