//! Snapshots: taken of several volumes at one point in time, restored, cloned, deleted; and layers that go.
//!
//! A freeze begins with a new, empty top on the chain of each of its volumes, which changes no content. Coordinators then hold, and go
//! over, in two steps that each of them reports; only when the last one has gone over there are snapshots. Whatever happens before ends
//! the freeze without any, and leaves at worst a layer that is merged away. A volume that nobody has open, and that was closed in good
//! order, holds by itself.

use std::collections::{BTreeMap, BTreeSet};

use super::{Applied, check_free, check_name, conflict, invalid, not_found, storage, tasks};
use crate::state::{
    Cleanliness, ClusterState, Custody, DeadLayer, DiskId, Freeze, FreezeId, FreezeStage, FreezeStep,
    Generation, Goal, LayerRef, Layers, PendingFreeze, Refusal, ReplicaState, Retired, SEGMENT_BYTES,
    Segment, SegmentIndex, Severity, Snapshot, SnapshotId, Subject, TaskError, Tenure, Timestamp, Volume,
    VolumeFill, VolumeId, VolumeOwner,
    layers::{MAX_DEPTH, MAX_SNAPSHOTS},
};

/// Most volumes of one freeze.
const MAX_VOLUMES: usize = 64;

pub(super) fn take(
    state: &mut ClusterState,
    id: FreezeId,
    name: &str,
    volumes: &BTreeMap<VolumeId, SnapshotId>,
    at: Timestamp,
) -> Result<Applied, Refusal> {
    check_name("snapshot", name)?;
    if volumes.is_empty() || volumes.len() > MAX_VOLUMES {
        return Err(invalid(
            format!("{} volumes at once", volumes.len()),
            format!("name 1 to {MAX_VOLUMES} volumes"),
        ));
    }
    if state.freezes.contains_key(&id) {
        return Err(invalid("the id of a freeze is never used twice", "send the request with a new id"));
    }
    for volume in volumes.keys() {
        let volume = state.volumes.get(volume).ok_or_else(|| not_found("volume", volume))?;
        check_takable(volume, name)?;
    }
    let mut members = BTreeMap::new();
    for (volume, snapshot) in volumes {
        let Some(volume) = state.volumes.get_mut(volume) else { continue };
        volume.layers.put_top(volume.id);
        volume.layers.freeze = Some(PendingFreeze { id, stage: FreezeStage::Hold });
        // Nobody writes to one that is closed, and opening it ends the freeze.
        let step = volume.coordinator.is_none().then_some(FreezeStep::Switched);
        members.insert(volume.id, (*snapshot, step));
    }
    state.freezes.insert(id, Freeze { name: name.to_owned(), volumes: members, begun: at });
    let first = volumes.keys().next().copied().unwrap_or_default();
    let subject_name = state.subject_name(&Subject::Volume(first));
    advance(state, id, at);
    settle(state);
    let applied = Applied::now("volume snapshot", Subject::Volume(first), subject_name);
    Ok(if state.freezes.contains_key(&id) { applied.until(Goal::SnapshotTaken(id)) } else { applied })
}

fn check_takable(volume: &Volume, name: &str) -> Result<(), Refusal> {
    let volume_name = &volume.name;
    check_free("snapshot", name, volume.layers.snapshots.iter().map(|snapshot| &snapshot.name))?;
    check_filled(volume)?;
    if volume.layers.freeze.is_some() {
        return Err(conflict(
            format!("a snapshot of volume {volume_name} is being taken"),
            "wait until it is there: hci task list",
        ));
    }
    if volume.layers.chain.len() >= MAX_DEPTH || volume.layers.snapshots.len() >= MAX_SNAPSHOTS {
        return Err(conflict(
            format!(
                "volume {volume_name} has {} snapshots and {} layers; {MAX_SNAPSHOTS} and {MAX_DEPTH} are the most",
                volume.layers.snapshots.len(),
                volume.layers.chain.len()
            ),
            format!("delete some: hci volume snapshot list {volume_name}"),
        ));
    }
    if volume.coordinator.is_none() && volume.cleanliness == Cleanliness::Unclean {
        return Err(conflict(
            format!("volume {volume_name} was not closed in good order, and its copies may differ"),
            "start what uses it, then take the snapshot",
        ));
    }
    Ok(())
}

fn check_filled(volume: &Volume) -> Result<(), Refusal> {
    match volume.is_filled() {
        true => Ok(()),
        false => Err(conflict(
            format!("volume {} is being filled", volume.name),
            format!("wait until it is there: hci volume get {}", volume.name),
        )),
    }
}

pub(super) fn progress(
    state: &mut ClusterState,
    id: VolumeId,
    generation: Generation,
    freeze: FreezeId,
    step: FreezeStep,
    at: Timestamp,
) -> Result<Applied, Refusal> {
    storage::current(state, id, generation)?;
    let pending =
        state.volumes.get(&id).and_then(|volume| volume.layers.freeze).filter(|pending| pending.id == freeze);
    match (step, pending.map(|pending| pending.stage)) {
        // It is over already.
        (_, None) => {}
        (FreezeStep::Abandoned, Some(_)) => {
            give_up(state, id, "its writes could not be held for long enough")
        }
        (FreezeStep::Switched, Some(FreezeStage::Hold)) => {
            return Err(conflict("not all volumes are held", "hold this one until they are"));
        }
        (FreezeStep::Held, Some(FreezeStage::Switch)) => {}
        (FreezeStep::Held, Some(FreezeStage::Hold)) | (FreezeStep::Switched, Some(FreezeStage::Switch)) => {
            let member = state.freezes.get_mut(&freeze).and_then(|freeze| freeze.volumes.get_mut(&id));
            if let Some((_, done)) = member {
                *done = Some(step);
            }
            advance(state, freeze, at);
            settle(state);
        }
    }
    Ok(storage::answer_volume(state, "volume freeze", id))
}

/// Goes on once all volumes have come as far.
fn advance(state: &mut ClusterState, id: FreezeId, at: Timestamp) {
    let Some(freeze) = state.freezes.get(&id) else { return };
    let all = |wanted: &[FreezeStep]| {
        freeze.volumes.values().all(|(_, step)| step.is_some_and(|step| wanted.contains(&step)))
    };
    if all(&[FreezeStep::Switched]) {
        let freeze = freeze.clone();
        state.freezes.remove(&id);
        for (volume, (snapshot, _)) in &freeze.volumes {
            let Some(volume) = state.volumes.get_mut(volume) else { continue };
            volume.layers.freeze = None;
            volume.layers.revision += 1;
            let chain = volume.layers.chain.iter().skip(1).copied().collect();
            let (id, name, size_bytes) = (*snapshot, freeze.name.clone(), volume.size_bytes);
            volume.layers.snapshots.push(Snapshot { id, name, chain, size_bytes, created: at });
            let (id, message) =
                (volume.id, format!("snapshot {} of volume {} is taken", freeze.name, volume.name));
            state.note(at, Severity::Info, "snapshot-taken", Subject::Volume(id), message);
        }
        tasks::settle(state, &Goal::SnapshotTaken(id), None, at);
    } else if all(&[FreezeStep::Held, FreezeStep::Switched]) {
        let volumes: Vec<_> = freeze.volumes.keys().copied().collect();
        for volume in volumes {
            if let Some(volume) = state.volumes.get_mut(&volume)
                && volume.layers.freeze == Some(PendingFreeze { id, stage: FreezeStage::Hold })
            {
                volume.layers.freeze = Some(PendingFreeze { id, stage: FreezeStage::Switch });
                volume.layers.revision += 1;
            }
        }
    }
}

/// Ends the freeze that a volume takes part in, without snapshots.
pub(super) fn give_up(state: &mut ClusterState, volume: VolumeId, reason: &str) {
    let pending = state.volumes.get(&volume).and_then(|volume| volume.layers.freeze);
    if let Some(pending) = pending {
        let name = state.subject_name(&Subject::Volume(volume));
        end_without(state, pending.id, format!("volume {name}: {reason}"));
    }
}

pub(super) fn abandon(state: &mut ClusterState, id: FreezeId, _at: Timestamp) -> Result<Applied, Refusal> {
    end_without(state, id, "the volumes could not be held at the same time".to_owned());
    Ok(Applied::now("volume freeze", Subject::Cluster, ""))
}

fn end_without(state: &mut ClusterState, id: FreezeId, detail: String) {
    let Some(freeze) = state.freezes.remove(&id) else { return };
    for volume in freeze.volumes.keys() {
        if let Some(volume) = state.volumes.get_mut(volume)
            && volume.layers.freeze.is_some_and(|pending| pending.id == id)
        {
            volume.layers.freeze = None;
            volume.layers.revision += 1;
        }
    }
    let error = TaskError {
        detail: format!("snapshot {} was not taken: {detail}", freeze.name),
        next: "try again".to_owned(),
    };
    tasks::settle(state, &Goal::SnapshotTaken(id), Some(&error), freeze.begun);
    settle(state);
}

fn find(
    state: &ClusterState,
    volume: VolumeId,
    snapshot: SnapshotId,
) -> Result<(&Volume, &Snapshot), Refusal> {
    let volume = state.volumes.get(&volume).ok_or_else(|| not_found("volume", volume))?;
    let found = volume.layers.snapshots.iter().find(|there| there.id == snapshot);
    match found {
        Some(found) => Ok((volume, found)),
        None => Err(Refusal::new(
            crate::state::RefusalKind::NotFound,
            format!("volume {} has no such snapshot", volume.name),
            format!("see what there is: hci volume snapshot list {}", volume.name),
        )),
    }
}

pub(super) fn delete(
    state: &mut ClusterState,
    id: VolumeId,
    snapshot: SnapshotId,
) -> Result<Applied, Refusal> {
    let (volume, _) = find(state, id, snapshot)?;
    let (name, before) = (volume.name.clone(), volume.layers.all());
    change(state, id, before, |layers| layers.snapshots.retain(|there| there.id != snapshot));
    Ok(Applied::now("volume snapshot delete", Subject::Volume(id), name))
}

pub(super) fn restore(
    state: &mut ClusterState,
    id: VolumeId,
    snapshot: SnapshotId,
    at: Timestamp,
) -> Result<Applied, Refusal> {
    let (volume, found) = find(state, id, snapshot)?;
    let (name, before, chain) = (volume.name.clone(), volume.layers.all(), found.chain.clone());
    let snapshot_name = found.name.clone();
    if let Some(node) = volume.coordinator {
        return Err(conflict(
            format!("volume {name} is open on node {}", state.subject_name(&Subject::Node(node))),
            format!(
                "stop the VM that uses it (hci vm stop), and wait until it is closed: hci volume get {name}"
            ),
        ));
    }
    if volume.layers.freeze.is_some() {
        return Err(conflict(
            format!("a snapshot of volume {name} is being taken"),
            "wait until it is there",
        ));
    }
    change(state, id, before, |layers| {
        layers.chain = chain;
        layers.put_top(id);
    });
    let message = format!("volume {name} is as it was at snapshot {snapshot_name}");
    state.note(at, Severity::Warning, "volume-restored", Subject::Volume(id), message);
    Ok(Applied::now("volume snapshot restore", Subject::Volume(id), name))
}

pub(super) fn clone(
    state: &mut ClusterState,
    id: VolumeId,
    name: &str,
    source: VolumeId,
    snapshot: SnapshotId,
    at: Timestamp,
) -> Result<Applied, Refusal> {
    let done = Applied::now("volume clone", Subject::Volume(id), name);
    if state.volumes.contains_key(&id) {
        return Ok(done);
    }
    check_name("volume", name)?;
    check_free("volume", name, state.volumes.values().map(|volume| &volume.name))?;
    if state.purge.contains_key(&id) {
        return Err(invalid("the id of a volume is never used twice", "send the request with a new id"));
    }
    let (source, found) = find(state, source, snapshot)?;
    if found.chain.len() >= MAX_DEPTH {
        return Err(conflict(
            format!("snapshot {} lies on {} layers, which is the most", found.name, found.chain.len()),
            format!("delete other snapshots: hci volume snapshot list {}", source.name),
        ));
    }
    let segments = found.size_bytes.div_ceil(SEGMENT_BYTES) as usize;
    let volume = Volume {
        id,
        name: name.to_owned(),
        size_bytes: found.size_bytes,
        replicas: source.replicas,
        min_in_sync: source.min_in_sync,
        generation: Generation(0),
        coordinator: None,
        cleanliness: Cleanliness::Clean,
        segments: source.segments.iter().take(segments).map(complete_copies).collect(),
        owner: VolumeOwner::None,
        fill: VolumeFill::Done,
        departures: 0,
        created: at,
        min_wanted: source.min_wanted,
        durability: source.durability,
        compression: source.compression,
        limits: source.limits,
        layers: Layers::new(id, &found.chain),
    };
    state.volumes.insert(id, volume);
    settle(state);
    Ok(done)
}

/// The copies of a clone's segment: where the layers are complete now. What is missing is completed later.
fn complete_copies(segment: &Segment) -> Segment {
    let mut replicas = segment.replicas.clone();
    replicas.retain(|replica| replica.state == ReplicaState::InSync);
    // Two copies in one node are one that replaces the other: the one that stays is enough.
    let nodes: Vec<_> = replicas.iter().map(|replica| replica.node).collect();
    let mut seen = BTreeSet::new();
    let twice: BTreeSet<_> = nodes.into_iter().filter(|node| !seen.insert(*node)).collect();
    replicas.retain(|replica| !(twice.contains(&replica.node) && segment.is_replaced(replica.disk)));
    for replica in &mut replicas {
        (replica.replaces, replica.tenure) = (None, Tenure::Stays);
    }
    Segment { replicas }
}

pub(super) fn merged(
    state: &mut ClusterState,
    id: VolumeId,
    generation: Generation,
    layer: LayerRef,
) -> Result<Applied, Refusal> {
    let volume = storage::current(state, id, generation)?;
    if volume.layers.merge != Some(layer) {
        // Done before, or a clone needs it by now.
        return match volume.layers.chain.contains(&layer) {
            true => Err(conflict("the layer is not to be merged", "use the chain as it is now")),
            false => Ok(storage::answer_volume(state, "volume merge", id)),
        };
    }
    let before = volume.layers.all();
    change(state, id, before, |layers| {
        layers.chain.retain(|there| *there != layer);
        for snapshot in &mut layers.snapshots {
            snapshot.chain.retain(|there| *there != layer);
        }
    });
    Ok(storage::answer_volume(state, "volume merge", id))
}

/// Changes the layers of a volume and buries those that nothing has any more.
fn change(
    state: &mut ClusterState,
    id: VolumeId,
    before: BTreeSet<LayerRef>,
    change: impl FnOnce(&mut Layers),
) {
    let Some(volume) = state.volumes.get_mut(&id) else { return };
    change(&mut volume.layers);
    volume.layers.revision += 1;
    let after = volume.layers.all();
    let volume = volume.clone();
    let mut disks: BTreeSet<DiskId> =
        volume.segments.iter().flat_map(|segment| &segment.replicas).map(|replica| replica.disk).collect();
    disks.extend(state.retired.get(&id).into_iter().flat_map(BTreeMap::keys));
    let (shared, gone): (Vec<_>, Vec<_>) = before
        .into_iter()
        .filter(|layer| !after.contains(layer))
        .partition(|layer| state.is_shared(*layer, id));
    bury(state, &volume, gone, &disks);
    pass_on(state, &volume, &BTreeMap::new(), &shared);
    settle(state);
}

/// Notes that layers of a volume, which nothing has any more, are to be removed from these disks.
pub(super) fn bury(
    state: &mut ClusterState,
    volume: &Volume,
    layers: impl IntoIterator<Item = LayerRef>,
    disks: &BTreeSet<DiskId>,
) {
    let custody = if volume.coordinator.is_some() { Custody::Coordinator } else { Custody::Nobody };
    for layer in layers {
        state.dead_layers.insert(
            layer,
            DeadLayer {
                holder: volume.id,
                generation: volume.generation,
                custody,
                segments: u32::try_from(volume.segments.len()).unwrap_or(u32::MAX),
                disks: disks.clone(),
            },
        );
    }
}

/// A volume lets layers go that others have: their segments are removed from those disks on which none of the others has a copy,
/// in the name of one of them. `former` are disks with data of the volume that were to be removed already.
pub(super) fn pass_on(
    state: &mut ClusterState,
    volume: &Volume,
    former: &BTreeMap<DiskId, Retired>,
    layers: &[LayerRef],
) {
    let mut left: BTreeMap<DiskId, BTreeSet<SegmentIndex>> = BTreeMap::new();
    for (index, segment) in volume.numbered() {
        for replica in &segment.replicas {
            left.entry(replica.disk).or_default().insert(index);
        }
    }
    for (disk, retired) in former {
        left.entry(*disk).or_default().extend(&retired.segments);
    }
    for layer in layers {
        let heir =
            state.volumes.values().find(|other| other.id != volume.id && other.layers.all().contains(layer));
        let Some((heir, generation)) = heir.map(|heir| (heir.id, heir.generation)) else { continue };
        for (disk, segments) in &left {
            let unneeded: BTreeSet<_> = segments
                .iter()
                .filter(|segment| !state.needs_part(*layer, **segment, *disk))
                .copied()
                .collect();
            if unneeded.is_empty() {
                continue;
            }
            let fresh = || Retired {
                generation,
                segments: BTreeSet::new(),
                custody: Custody::Nobody,
                layers: BTreeSet::new(),
            };
            let retired = state.retired.entry(heir).or_default().entry(*disk).or_insert_with(fresh);
            retired.segments.extend(unneeded);
            retired.layers.insert(*layer);
        }
    }
}

pub(super) fn released(
    state: &mut ClusterState,
    id: VolumeId,
    generation: Generation,
    layer: LayerRef,
) -> Result<Applied, Refusal> {
    storage::current(state, id, generation)?;
    if let Some(dead) = state.dead_layers.get_mut(&layer)
        && dead.holder == id
        && dead.generation == generation
    {
        dead.custody = Custody::Nobody;
    }
    Ok(Applied::now("layer released", Subject::Volume(id), ""))
}

pub(super) fn purged(state: &mut ClusterState, layer: LayerRef, disk: DiskId) -> Result<Applied, Refusal> {
    let done = Applied::now("layer purged", Subject::Volume(layer.volume), "");
    let Some(dead) = state.dead_layers.get(&layer) else { return Ok(done) };
    if !state.may_remove(dead) {
        return Err(conflict("the volume's coordinator may still use this layer", "try again later"));
    }
    if let Some(dead) = state.dead_layers.get_mut(&layer) {
        dead.disks.remove(&disk);
        if dead.disks.is_empty() {
            state.dead_layers.remove(&layer);
        }
    }
    Ok(done)
}

/// Decides anew which layers are merged.
pub(super) fn settle(state: &mut ClusterState) {
    let changed: Vec<_> = state
        .volumes
        .values()
        .filter(|volume| volume.layers.chain.len() > 1 || volume.layers.merge.is_some())
        .map(|volume| (volume.id, state.layer_to_merge(volume)))
        .collect();
    for (id, merge) in changed {
        if let Some(volume) = state.volumes.get_mut(&id)
            && volume.layers.merge != merge
        {
            volume.layers.merge = merge;
            volume.layers.revision += 1;
        }
    }
}
