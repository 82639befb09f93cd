//! The disks that can take a copy, and which one is best.
//!
//! Placement of new volumes looks at what is promised; here it is what the nodes report as used, because a rebuild
//! that fills a disk would turn one failure into two. How much a thin segment will take is estimated from how full the
//! disk of a complete copy is.

use std::collections::{BTreeMap, BTreeSet};

use super::{View, standing};
use crate::state::{
    Availability, ClusterState, Disk, DiskId, NodeId, NodeService, Replica, ReplicaState, Segment,
    SegmentIndex, Subject, Volume, VolumeId,
    placement::{self, Domain},
    report::{DiskHealth, DiskReport, ProcessState},
};

/// A copy that is to be put somewhere.
#[derive(Clone, Debug)]
pub struct Copy<'a> {
    volume: VolumeId,
    segment: &'a Segment,
    replaces: Option<DiskId>,
    /// What it will take, as far as can be told.
    pub bytes: u64,
}

/// What the node of a disk reported about it last.
pub fn report(view: View<'_>, disk: DiskId) -> Option<&DiskReport> {
    let node = view.state.disks.get(&disk)?.node;
    view.live.get(&node)?.local.disks.iter().find(|report| report.disk == disk)
}

/// How full a disk is, in thousandths.
pub fn fill(view: View<'_>, disk: DiskId) -> Option<u64> {
    report(view, disk).map(|report| permille(report.used_bytes, report.capacity_bytes))
}

fn permille(used: u64, capacity: u64) -> u64 {
    u64::try_from(u128::from(used) * 1000 / u128::from(capacity.max(1))).unwrap_or(u64::MAX)
}

/// Whether another copy of the segment would be lost together with this one.
pub fn shares_domain(state: &ClusterState, segment: &Segment, replica: &Replica) -> bool {
    let domain = placement::domain(state, replica.node);
    segment
        .replicas
        .iter()
        .any(|other| other.disk != replica.disk && placement::domain(state, other.node) == domain)
}

/// What a copy of a segment takes, if all that is promised on the disk of a complete one is equally full.
fn estimate(view: View<'_>, promised: &BTreeMap<DiskId, u64>, segment: &Segment, most: u64) -> u64 {
    let complete = segment.replicas.iter().filter(|replica| replica.state == ReplicaState::InSync);
    let shares = complete.filter_map(|replica| {
        let used = report(view, replica.disk)?.used_bytes;
        let promised = promised.get(&replica.disk).copied().unwrap_or(0).max(1);
        let share = u128::from(used) * u128::from(most) / u128::from(promised);
        Some(u64::try_from(share).unwrap_or(u64::MAX))
    });
    shares.max().unwrap_or(most).min(most)
}

/// A disk that can take copies.
#[derive(Clone, Debug)]
pub struct Place {
    /// The disk.
    pub disk: DiskId,
    /// Its node.
    pub node: NodeId,
    /// What fails together with it.
    pub domain: Domain,
    capacity: u64,
    used: u64,
    moves: u32,
}

impl Place {
    /// How full it is with what is on its way, in thousandths.
    pub fn fill(&self) -> u64 {
        permille(self.used, self.capacity)
    }
}

/// The disks that can take copies.
pub struct Places {
    places: Vec<Place>,
    /// Nodes with a disk that could take copies but was not reported yet: it has just come.
    expected: BTreeSet<NodeId>,
    /// Copies on their way to or from each disk.
    moves: BTreeMap<DiskId, u32>,
    /// Bytes of volumes with copies on each disk, as if they were full.
    promised: BTreeMap<DiskId, u64>,
    reserve_percent: u64,
    limit: u32,
}

impl Places {
    /// From what is seen now.
    pub fn new(view: View<'_>) -> Self {
        let promised = placement::promised(view.state);
        let mut moves: BTreeMap<DiskId, u32> = BTreeMap::new();
        let mut coming: BTreeMap<DiskId, u64> = BTreeMap::new();
        // What cannot go on does not hold up others.
        let workable = view.state.volumes.values().filter(|volume| standing::is_workable(view, volume));
        for volume in workable {
            for (index, segment) in volume.numbered() {
                for replica in segment.replicas.iter().filter(|r| r.state == ReplicaState::OutOfSync) {
                    let Some(old) = replica.replaces else { continue };
                    *moves.entry(replica.disk).or_default() += 1;
                    *moves.entry(old).or_default() += 1;
                    *coming.entry(replica.disk).or_default() +=
                        estimate(view, &promised, segment, volume.segment_bytes(index));
                }
            }
        }
        let is_new = |disk: &&Disk| {
            let node = view.live.get(&disk.node);
            disk.takes_replicas()
                && node.is_some_and(|node| node.local.data_process == ProcessState::Up)
                && report(view, disk.id).is_none()
        };
        let expected = view.state.disks.values().filter(is_new).map(|disk| disk.node).collect();
        let usable = view.state.disks.values().filter_map(|disk| {
            let node = view.state.nodes.get(&disk.node)?;
            let report = report(view, disk.id)?;
            let is_there = node.availability == Availability::Available
                && node.service == NodeService::InService
                && report.health == DiskHealth::Ok;
            (is_there && disk.takes_replicas()).then(|| Place {
                disk: disk.id,
                node: disk.node,
                domain: placement::domain(view.state, disk.node),
                capacity: report.capacity_bytes,
                used: report.used_bytes + coming.get(&disk.id).copied().unwrap_or(0),
                moves: moves.get(&disk.id).copied().unwrap_or(0),
            })
        });
        Self {
            places: usable.collect(),
            expected,
            reserve_percent: u64::from(view.state.pool.reserve_percent.min(100)),
            limit: u32::from(view.state.pool.moves_per_disk),
            moves,
            promised,
        }
    }

    /// A further copy of a segment, with an estimate of what it will take.
    pub fn copy<'a>(
        &self,
        view: View<'_>,
        volume: &Volume,
        index: SegmentIndex,
        segment: &'a Segment,
        replaces: Option<DiskId>,
    ) -> Copy<'a> {
        let bytes = estimate(view, &self.promised, segment, volume.segment_bytes(index));
        Copy { volume: volume.id, segment, replaces, bytes }
    }

    /// All of them.
    pub fn all(&self) -> &[Place] {
        &self.places
    }

    /// Copies on their way to or from a disk.
    pub fn moves(&self, disk: DiskId) -> u32 {
        self.moves.get(&disk).copied().unwrap_or(0)
    }

    /// Whether anything is on its way.
    pub fn is_busy(&self) -> bool {
        !self.moves.is_empty()
    }

    /// How many copies may be on their way to or from one disk.
    pub fn limit(&self) -> u32 {
        self.limit
    }

    /// The best disk for a copy, which then counts as on its way; none when all that could take it are busy. The
    /// sentence says why there is none at all.
    pub fn choose(&mut self, view: View<'_>, copy: &Copy<'_>) -> Result<Option<DiskId>, String> {
        let others = || copy.segment.replicas.iter().filter(|replica| Some(replica.disk) != copy.replaces);
        let free_node = |place: &Place| {
            copy.segment.on(place.disk).is_none() && !others().any(|replica| replica.node == place.node)
        };
        let volume = view.state.volumes.get(&copy.volume);
        let is_clean =
            |place: &Place| volume.is_none_or(|volume| !view.state.awaits_removal(volume, place.disk));
        if self.expected.iter().any(|node| others().all(|replica| replica.node != *node)) {
            // Whether there is a place, and a better one, is seen in a moment.
            return Ok(None);
        }
        let on_free_nodes: Vec<_> = self.places.iter().filter(|place| free_node(place)).cloned().collect();
        if on_free_nodes.is_empty() {
            let nodes: Vec<_> =
                others().map(|replica| view.state.subject_name(&Subject::Node(replica.node))).collect();
            return Err(format!(
                "there is no usable disk on a node other than {}; add one (hci disk add NODE PATH) or use fewer copies",
                nodes.join(", ")
            ));
        }
        let with_room: Vec<_> =
            on_free_nodes.iter().filter(|place| self.has_room(place, copy.bytes)).cloned().collect();
        if with_room.is_empty() {
            return Err(format!(
                "all disks that could take them have only their reserve of {} % left; add disks (hci disk add NODE PATH)",
                self.reserve_percent
            ));
        }
        let busy_source = copy.replaces.is_some_and(|disk| self.moves(disk) >= self.limit);
        let best = with_room
            .iter()
            .filter(|place| is_clean(place) && place.moves < self.limit && !busy_source)
            .min_by_key(|place| {
                let shared =
                    others().any(|replica| placement::domain(view.state, replica.node) == place.domain);
                (shared, place.fill(), place.moves, place.disk)
            })
            .map(|place| place.disk);
        if let Some(disk) = best {
            self.occupy(disk, copy);
        }
        Ok(best)
    }

    /// Whether a disk keeps its reserve with so much more on it.
    fn has_room(&self, place: &Place, bytes: u64) -> bool {
        let limit = place.capacity / 100 * (100 - self.reserve_percent);
        place.used.saturating_add(bytes) <= limit
    }

    fn occupy(&mut self, disk: DiskId, copy: &Copy<'_>) {
        for moved in std::iter::once(disk).chain(copy.replaces) {
            *self.moves.entry(moved).or_default() += 1;
        }
        for place in &mut self.places {
            if place.disk == disk {
                place.used = place.used.saturating_add(copy.bytes);
            }
            if place.disk == disk || Some(place.disk) == copy.replaces {
                place.moves += 1;
            }
        }
    }

    /// Counts a copy as gone from a disk: its room comes back later.
    pub fn relieve(&mut self, disk: DiskId, bytes: u64) {
        for place in self.places.iter_mut().filter(|place| place.disk == disk) {
            place.used = place.used.saturating_sub(bytes);
        }
    }

    /// Puts a copy on a given disk, if that keeps its reserve and is not busy.
    pub fn take(&mut self, disk: DiskId, copy: &Copy<'_>) -> bool {
        let fits = self
            .places
            .iter()
            .any(|place| place.disk == disk && place.moves < self.limit && self.has_room(place, copy.bytes));
        if fits {
            self.occupy(disk, copy);
        }
        fits
    }
}
