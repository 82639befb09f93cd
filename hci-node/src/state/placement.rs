//! Placement: on which disks the copies of a segment go.
//!
//! Copies are on disks of distinct nodes, and of distinct racks when there are enough racks. The first one is on the
//! node that will run the VM, so that its reads are local; the rest go where the most room is left. Room is what is not
//! yet *promised*: volumes are thin, so promises may exceed the capacity up to [`OVERCOMMIT`]. The choice stays
//! deterministic because it never looks at usage; disks that have only their reserve left are marked in the state.

use std::collections::{BTreeMap, BTreeSet};

use super::{
    ClusterState, DiskId, DiskRoom, NodeId, NodeService, Refusal, RefusalKind, Replica, ReplicaState,
    SEGMENT_BYTES, Segment, Tenure,
};

/// How much more than its capacity may be promised on a disk.
pub const OVERCOMMIT: u64 = 4;

/// What fails together: a rack, or a node that is in none.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Domain {
    /// A rack.
    Rack(String),
    /// A node of its own.
    Node(NodeId),
}

/// The failure domain of a node.
pub fn domain(state: &ClusterState, node: NodeId) -> Domain {
    match state.nodes.get(&node).and_then(|node| node.rack.clone()) {
        Some(rack) => Domain::Rack(rack),
        None => Domain::Node(node),
    }
}

/// What placement knows of a disk.
#[derive(Clone, Debug)]
struct Room {
    disk: DiskId,
    node: NodeId,
    domain: Domain,
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
    /// Segments that it has already: only further ones are placed.
    pub have: usize,
    /// How many copies.
    pub replicas: u8,
    /// The node for the first one.
    pub near: Option<NodeId>,
    /// Nodes that cannot take any.
    pub unreachable: &'a [NodeId],
    /// Disks that must not take any.
    pub avoid: &'a [DiskId],
}

/// Chooses the disks of a volume's new segments.
pub fn place(state: &ClusterState, wish: &Wish<'_>) -> Result<Vec<Segment>, Refusal> {
    let mut rooms = rooms(state, wish);
    let nodes: BTreeSet<_> = rooms.iter().map(|room| room.node).collect();
    let wanted = usize::from(wish.replicas);
    let count = wish.size_bytes.div_ceil(SEGMENT_BYTES);
    if nodes.len() < wanted && count > wish.have as u64 {
        return Err(Refusal::new(
            RefusalKind::Capacity,
            format!(
                "{wanted} copies need disks on {wanted} nodes, but {} of {} nodes have usable disks ({} disks in all{})",
                nodes.len(),
                state.nodes.len(),
                rooms.len(),
                match state.disks.values().filter(|disk| disk.room == DiskRoom::Reserved).count() {
                    0 => String::new(),
                    full => format!(
                        ", {full} more have only their reserve of {} % left",
                        state.pool.reserve_percent
                    ),
                }
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
    let mut segments = Vec::new();
    for index in wish.have as u64..count {
        let bytes = SEGMENT_BYTES.min(wish.size_bytes - index * SEGMENT_BYTES);
        segments.push(place_segment(&mut rooms, wish, bytes)?);
    }
    Ok(segments)
}

/// Bytes of volumes that each disk holds copies of, as if they were full.
pub fn promised(state: &ClusterState) -> BTreeMap<DiskId, u64> {
    let mut promised: BTreeMap<DiskId, u64> = BTreeMap::new();
    for volume in state.volumes.values() {
        for (index, segment) in volume.numbered() {
            let bytes = volume.segment_bytes(index);
            for replica in &segment.replicas {
                *promised.entry(replica.disk).or_default() += bytes;
            }
        }
    }
    promised
}

fn rooms(state: &ClusterState, wish: &Wish<'_>) -> Vec<Room> {
    let promised = promised(state);
    let stays = |node: NodeId| {
        !wish.unreachable.contains(&node)
            && state.nodes.get(&node).is_some_and(|node| node.service != NodeService::Leaving)
    };
    state
        .disks
        .values()
        .filter(|disk| disk.takes_replicas() && stays(disk.node) && !wish.avoid.contains(&disk.id))
        .map(|disk| Room {
            disk: disk.id,
            node: disk.node,
            domain: domain(state, disk.node),
            capacity: disk.capacity_bytes,
            promised: promised.get(&disk.id).copied().unwrap_or(0),
        })
        .collect()
}

fn place_segment(rooms: &mut [Room], wish: &Wish<'_>, bytes: u64) -> Result<Segment, Refusal> {
    let (mut used, mut domains) = (BTreeSet::new(), BTreeSet::new());
    let mut replicas = Vec::new();
    for copy in 0..wish.replicas {
        let best = rooms
            .iter_mut()
            .filter(|room| !used.contains(&room.node) && room.takes(bytes))
            .min_by_key(|room| {
                let is_far = copy == 0 && Some(room.node) != wish.near;
                (is_far, domains.contains(&room.domain), room.load(), room.disk)
            });
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
        domains.insert(room.domain.clone());
        replicas.push(Replica {
            disk: room.disk,
            node: room.node,
            state: ReplicaState::InSync,
            replaces: None,
            tenure: Tenure::Stays,
        });
    }
    Ok(Segment { replicas })
}
