//! Replica sets: copies of segments come and go.
//!
//! What keeps data safe: a copy comes out of sync and counts only once its coordinator has filled it; a copy leaves only
//! when enough others are complete, and that of an open volume by a commit of its coordinator, because nobody else knows whether the
//! others are complete still; and the data of one that has left are removed only when no coordinator can still
//! be reading them.

use std::collections::BTreeSet;

use super::{Applied, conflict, not_found, storage};
use crate::state::{
    ClusterState, Custody, DiskId, DiskState, Generation, LayerRef, Refusal, RefusalKind, Replica,
    ReplicaState, Retired, SegmentIndex, Subject, Tenure, Volume, VolumeId,
};

pub(super) fn add(
    state: &mut ClusterState,
    id: VolumeId,
    index: SegmentIndex,
    disk: DiskId,
    replaces: Option<DiskId>,
) -> Result<Applied, Refusal> {
    let volume = state.volumes.get(&id).ok_or_else(|| not_found("volume", id))?;
    let segment = volume.segments.get(index.0 as usize).ok_or_else(|| no_segment(volume))?;
    let done = Applied::now("replica add", Subject::Volume(id), &volume.name);
    if segment.on(disk).is_some() {
        return Ok(done);
    }
    let next = "look again: hci volume get";
    let target = state.disks.get(&disk).ok_or_else(|| not_found("disk", disk))?;
    if target.state != DiskState::Ready || !target.takes_replicas() {
        return Err(conflict("the disk takes no new copies", next));
    }
    if state.awaits_removal(volume, disk) {
        return Err(conflict("the disk still has data of former copies of this volume", next));
    }
    if let Some(old) = replaces
        && (segment.is_replaced(old) || segment.on(old).is_none_or(|old| old.replaces.is_some()))
    {
        return Err(conflict("the copy to be replaced is gone or being replaced", next));
    }
    if segment.replicas.iter().any(|other| other.node == target.node && Some(other.disk) != replaces) {
        return Err(conflict("the node has a copy already", next));
    }
    if replaces.is_none() && segment.staying() >= usize::from(volume.replicas) {
        return Err(conflict("the segment has all its copies", next));
    }
    let replica =
        Replica { disk, node: target.node, state: ReplicaState::OutOfSync, replaces, tenure: Tenure::Stays };
    let segment = state.volumes.get_mut(&id).and_then(|volume| volume.segments.get_mut(index.0 as usize));
    if let Some(segment) = segment {
        segment.replicas.push(replica);
    }
    Ok(done)
}

pub(super) fn remove(
    state: &mut ClusterState,
    id: VolumeId,
    index: SegmentIndex,
    disk: DiskId,
) -> Result<Applied, Refusal> {
    retire(state, id, index, disk)?;
    Ok(storage::answer_volume(state, "replica remove", id))
}

fn no_segment(volume: &Volume) -> Refusal {
    not_found("segment of volume", &volume.name)
}

/// Takes a copy out of its set. A complete one leaves only when as many others are complete as there should be, and of an
/// open volume only when its coordinator says so; one that is not complete when the volume keeps its minimum.
pub(super) fn retire(
    state: &mut ClusterState,
    id: VolumeId,
    index: SegmentIndex,
    disk: DiskId,
) -> Result<(), Refusal> {
    let volume = state.volumes.get_mut(&id).ok_or_else(|| not_found("volume", id))?;
    let is_open = volume.coordinator.is_some();
    let (replicas, minimum) = (usize::from(volume.replicas), usize::from(volume.min_in_sync.max(1)));
    let name = &volume.name;
    let segment = volume.segments.get_mut(index.0 as usize);
    let segment = segment.ok_or_else(|| not_found("segment of volume", name))?;
    let Some(leaving) = segment.on(disk).copied() else { return Ok(()) };
    let (others, needed) = match leaving.state {
        ReplicaState::InSync => (segment.complete_without(disk), replicas),
        // On its way in, and what it replaces is still there.
        ReplicaState::OutOfSync if leaving.replaces.is_some() => (segment.in_sync(), 1),
        ReplicaState::OutOfSync => (segment.in_sync(), minimum),
    };
    if others < needed {
        return Err(Refusal::new(
            RefusalKind::Unsafe,
            format!("volume {name} needs this copy: {others} others are complete, {needed} are wanted"),
            "wait until another copy is complete: hci volume get",
        ));
    }
    if is_open && leaving.state == ReplicaState::InSync {
        segment.replicas.iter_mut().filter(|r| r.disk == disk).for_each(|r| r.tenure = Tenure::Leaves);
        return Ok(());
    }
    take(state, id, index, disk)
}

/// The coordinator lets a complete copy go. When it is needed after all, it stays.
pub(super) fn left(
    state: &mut ClusterState,
    id: VolumeId,
    generation: Generation,
    index: SegmentIndex,
    disk: DiskId,
) -> Result<Applied, Refusal> {
    let volume = storage::current(state, id, generation)?;
    let replicas = usize::from(volume.replicas);
    if let Some(segment) = volume.segments.get_mut(index.0 as usize)
        && segment.on(disk).is_some_and(|replica| replica.tenure == Tenure::Leaves)
    {
        if segment.complete_without(disk) >= replicas {
            // A return of this copy that was asked for before must not come after.
            volume.departures += 1;
            take(state, id, index, disk)?;
        } else {
            segment.replicas.iter_mut().filter(|r| r.disk == disk).for_each(|r| r.tenure = Tenure::Stays);
        }
    }
    Ok(storage::answer_volume(state, "replica left", id))
}

/// Its data are now to be removed.
fn take(state: &mut ClusterState, id: VolumeId, index: SegmentIndex, disk: DiskId) -> Result<(), Refusal> {
    let volume = state.volumes.get_mut(&id).ok_or_else(|| not_found("volume", id))?;
    let (name, generation) = (volume.name.clone(), volume.generation);
    let layers = volume.layers.all();
    let is_open = volume.coordinator.is_some();
    let segment = volume.segments.get_mut(index.0 as usize);
    let segment = segment.ok_or_else(|| not_found("segment of volume", &name))?;
    segment.replicas.retain(|replica| replica.disk != disk);
    for replica in segment.replicas.iter_mut().filter(|replica| replica.replaces == Some(disk)) {
        replica.replaces = None;
    }
    let custody = if is_open { Custody::Coordinator } else { Custody::Nobody };
    let fresh = || Retired { generation, segments: BTreeSet::new(), custody, layers: BTreeSet::new() };
    let retired = state.retired.entry(id).or_default().entry(disk).or_insert_with(fresh);
    (retired.generation, retired.custody) = (generation, custody);
    retired.segments.insert(index);
    retired.layers.extend(layers);
    Ok(())
}

pub(super) fn released(
    state: &mut ClusterState,
    id: VolumeId,
    generation: Generation,
    disk: DiskId,
    segments: &[SegmentIndex],
) -> Result<Applied, Refusal> {
    storage::current(state, id, generation)?;
    if let Some(retired) = state.retired.get_mut(&id).and_then(|disks| disks.get_mut(&disk))
        && retired.generation == generation
        && retired.segments.iter().all(|segment| segments.contains(segment))
    {
        retired.custody = Custody::Nobody;
    }
    Ok(Applied::now("replicas released", Subject::Volume(id), ""))
}

pub(super) fn purged(
    state: &mut ClusterState,
    id: VolumeId,
    disk: DiskId,
    segments: &[SegmentIndex],
    layers: &[LayerRef],
) -> Result<Applied, Refusal> {
    let done = Applied::now("replicas purged", Subject::Volume(id), "");
    let Some(retired) = state.retired.get(&id).and_then(|disks| disks.get(&disk)) else { return Ok(done) };
    if !retired.layers.iter().all(|layer| layers.contains(layer)) {
        // More came meanwhile: all of it is removed another time.
        return Ok(done);
    }
    if !state.may_purge(id, retired) {
        return Err(conflict("the volume's coordinator may still use these copies", "try again later"));
    }
    if let Some(disks) = state.retired.get_mut(&id) {
        if let Some(retired) = disks.get_mut(&disk) {
            retired.segments.retain(|segment| !segments.contains(segment));
            if retired.segments.is_empty() {
                disks.remove(&disk);
            }
        }
        if disks.is_empty() {
            state.retired.remove(&id);
        }
    }
    Ok(done)
}
