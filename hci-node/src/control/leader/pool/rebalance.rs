//! Moves that nobody needs but that even things out: copies of a segment that share a rack although there are enough
//! racks, and disks that are much fuller than others, for example after a node or a disk has come.
//!
//! Slow on purpose, and only while the pool is whole: every node is there, no disk is broken or leaves, no volume lacks
//! a copy.

use std::collections::BTreeSet;

use super::{
    View,
    places::{self, Place, Places},
};
use crate::state::{
    Availability, DiskId, DiskService, DiskState, NodeService, Op, Rebalancing, Replica, Segment,
    SegmentIndex, Volume, placement,
};

/// Disks may differ in how full they are by this many thousandths.
const MARGIN: u64 = 100;

/// The moves that are due, a few at a time.
pub fn moves(view: View<'_>, places: &mut Places) -> Vec<Op> {
    if view.state.pool.rebalancing == Rebalancing::Off || places.is_busy() || !is_whole(view) {
        return Vec::new();
    }
    let spread = spread(view, places);
    if spread.is_empty() { even_out(view, places) } else { spread }
}

fn is_whole(view: View<'_>) -> bool {
    let state = view.state;
    state.nodes.values().all(|node| {
        node.availability == Availability::Available
            && node.service == NodeService::InService
            && view.live.contains_key(&node.id)
    }) && state
        .disks
        .values()
        .all(|disk| disk.state == DiskState::Ready && disk.service == DiskService::InService)
        && state.volumes.values().all(|volume| volume.is_settled() && volume.is_filled())
        && state.retired.is_empty()
}

fn segments<'a>(view: View<'a>) -> impl Iterator<Item = (&'a Volume, SegmentIndex, &'a Segment)> {
    let volumes = view.state.volumes.values();
    volumes.flat_map(|volume| volume.numbered().map(move |(index, segment)| (volume, index, segment)))
}

/// Whether a copy can move to a disk without sharing a node, or more racks than before, with the others.
fn can_move(view: View<'_>, segment: &Segment, from: &Replica, to: &Place) -> bool {
    let mut others = segment.replicas.iter().filter(|replica| replica.disk != from.disk);
    let shares = others.clone().any(|replica| placement::domain(view.state, replica.node) == to.domain);
    segment.on(to.disk).is_none()
        && others.all(|replica| replica.node != to.node)
        && (!shares || places::shares_domain(view.state, segment, from))
}

fn relocation(volume: &Volume, index: SegmentIndex, from: DiskId, to: DiskId) -> Op {
    Op::AddReplica { volume: volume.id, segment: index, disk: to, replaces: Some(from) }
}

/// Moves of copies that share a rack to racks that have none.
fn spread(view: View<'_>, places: &mut Places) -> Vec<Op> {
    let racks: BTreeSet<_> = places.all().iter().map(|place| place.domain.clone()).collect();
    let mut moves = Vec::new();
    for (volume, index, segment) in segments(view) {
        if moves.len() >= places.limit() as usize {
            break;
        }
        let used: BTreeSet<_> =
            segment.replicas.iter().map(|replica| placement::domain(view.state, replica.node)).collect();
        if used.len() == segment.replicas.len() || racks.is_subset(&used) {
            continue;
        }
        let together = segment.replicas.iter().filter(|replica| {
            places::shares_domain(view.state, segment, replica) && Some(replica.node) != volume.coordinator
        });
        let Some(from) = together.max_by_key(|replica| (places::fill(view, replica.disk), replica.disk))
        else {
            continue;
        };
        let elsewhere = places
            .all()
            .iter()
            .filter(|place| !used.contains(&place.domain) && can_move(view, segment, from, place));
        let Some(to) = elsewhere.min_by_key(|place| (place.fill(), place.disk)).map(|place| place.disk)
        else {
            continue;
        };
        let copy = places.copy(view, volume, index, segment, Some(from.disk));
        if places.moves(from.disk) < places.limit() && places.take(to, &copy) {
            moves.push(relocation(volume, index, from.disk, to));
        }
    }
    moves
}

/// Moves from the fullest disk to emptier ones that can take something of it.
fn even_out(view: View<'_>, places: &mut Places) -> Vec<Op> {
    let mut moves = Vec::new();
    let Some(fullest) = places.all().iter().max_by_key(|place| (place.fill(), place.disk)) else {
        return moves;
    };
    let (source, limit) = (fullest.disk, places.limit() as usize);
    for (volume, index, segment) in segments(view) {
        if moves.len() >= limit {
            break;
        }
        let Some(from) = segment.on(source) else { continue };
        let Some(fill) = places.all().iter().find(|place| place.disk == source).map(Place::fill) else {
            break;
        };
        let emptier = places.all().iter().filter(|to| {
            // A running VM keeps its local copy.
            let is_local = volume.coordinator == Some(from.node) && to.node != from.node;
            to.fill() + MARGIN < fill && !is_local && can_move(view, segment, from, to)
        });
        let Some(to) = emptier.min_by_key(|place| (place.fill(), place.disk)).map(|place| place.disk) else {
            continue;
        };
        let copy = places.copy(view, volume, index, segment, Some(source));
        if places.take(to, &copy) {
            places.relieve(source, copy.bytes);
            moves.push(relocation(volume, index, source, to));
        }
    }
    moves
}
