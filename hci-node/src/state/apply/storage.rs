//! Volumes: the rules of design §4 about who may write where.
//!
//! A volume's in-sync set changes only here and in `replicas`. Three rules carry the data's safety: the last in-sync copy of a
//! segment is never taken out; whoever shows an old generation is refused; and a volume is opened elsewhere only when
//! its coordinator has closed it or its node's lease has ended.

use std::collections::BTreeSet;

use super::{Applied, check_free, check_name, conflict, invalid, migration, not_found, replicas, snapshots};
use crate::state::{
    BLOCK_BYTES, Cleanliness, ClusterState, DiskId, DiskService, Generation, Goal, LayerRef, Layers, NodeId,
    Outcome, Refusal, RefusalKind, ReplicaState, SegmentIndex, Severity, Subject, Timestamp, VmId, Volume,
    VolumeFill, VolumeId, VolumeLimits, VolumeOwner,
    command::{NewVolume, VolumeChange},
    placement::{self, Wish},
};

/// Largest volume: 64 TiB.
const MAX_VOLUME_BYTES: u64 = 64 << 40;
/// Most copies of a volume.
const MAX_REPLICAS: u8 = 3;

/// How many copies must be in sync for writes to go on, when nothing else was said: a majority.
fn usual_minimum(replicas: u8) -> u8 {
    if replicas >= 3 { 2 } else { 1 }
}

fn check_copies(replicas: u8, min_in_sync: u8) -> Result<(), Refusal> {
    if !(1..=MAX_REPLICAS).contains(&replicas) {
        return Err(invalid(format!("a volume cannot have {replicas} copies"), "use --replicas 1, 2 or 3"));
    }
    if !(1..=replicas).contains(&min_in_sync) {
        return Err(invalid(
            format!("{min_in_sync} of {replicas} copies cannot be the minimum"),
            "use a minimum from 1 to the number of copies",
        ));
    }
    Ok(())
}

/// A volume as it will be; used by VMs and images too.
pub(super) fn plan_volume(
    state: &ClusterState,
    new: &NewVolume,
    near: Option<NodeId>,
    unreachable: &[NodeId],
    owner: VolumeOwner,
    fill: VolumeFill,
    at: Timestamp,
) -> Result<Volume, Refusal> {
    check_name("volume", &new.name)?;
    check_free("volume", &new.name, state.volumes.values().map(|volume| &volume.name))?;
    let is_layer = |layer: &LayerRef| layer.volume == new.id;
    if state.volumes.contains_key(&new.id)
        || state.purge.contains_key(&new.id)
        || state.dead_layers.keys().any(is_layer)
        || state.volumes.values().any(|volume| {
            let of_snapshots = volume.layers.snapshots.iter().flat_map(|snapshot| &snapshot.chain);
            volume.layers.chain.iter().chain(of_snapshots).any(is_layer)
        })
    {
        // Disks may still hold data under that id, if only for its clones.
        return Err(invalid("the id of a volume is never used twice", "send the request with a new id"));
    }
    if new.size_bytes == 0 || new.size_bytes > MAX_VOLUME_BYTES {
        return Err(invalid(
            format!("{} bytes is no size for a volume", new.size_bytes),
            "use 4 KiB to 64 TiB: --size 10GiB",
        ));
    }
    let min_in_sync = new.min_in_sync.unwrap_or_else(|| usual_minimum(new.replicas));
    check_copies(new.replicas, min_in_sync)?;
    let size_bytes = new.size_bytes.next_multiple_of(BLOCK_BYTES);
    let wish = Wish { size_bytes, have: 0, replicas: new.replicas, near, unreachable, avoid: &[] };
    let segments = placement::place(state, &wish)?;
    Ok(Volume {
        id: new.id,
        name: new.name.clone(),
        size_bytes,
        replicas: new.replicas,
        min_in_sync,
        generation: Generation(0),
        coordinator: None,
        cleanliness: Cleanliness::Clean,
        segments,
        owner,
        fill,
        created: at,
        departures: 0,
        min_wanted: min_in_sync,
        durability: new.durability,
        compression: new.compression,
        limits: VolumeLimits::default(),
        layers: Layers::new(new.id, &[]),
    })
}

pub(super) fn create_volume(
    state: &mut ClusterState,
    new: &NewVolume,
    near: Option<NodeId>,
    unreachable: &[NodeId],
    at: Timestamp,
) -> Result<Applied, Refusal> {
    let done = Applied::now("volume create", Subject::Volume(new.id), &new.name);
    if state.volumes.contains_key(&new.id) {
        return Ok(done);
    }
    let volume = plan_volume(state, new, near, unreachable, VolumeOwner::None, VolumeFill::Blank, at)?;
    state.volumes.insert(volume.id, volume);
    Ok(done)
}

pub(super) fn delete_volume(state: &mut ClusterState, id: VolumeId) -> Result<Applied, Refusal> {
    if state.purge.contains_key(&id) {
        return Ok(Applied::now("volume delete", Subject::Volume(id), ""));
    }
    let volume = state.volumes.get(&id).ok_or_else(|| not_found("volume", id))?;
    let name = volume.name.clone();
    let user = match volume.owner {
        VolumeOwner::Vm(vm) => Some(("VM", state.subject_name(&Subject::Vm(vm)), "hci vm delete")),
        VolumeOwner::Image(image) => {
            Some(("image", state.subject_name(&Subject::Image(image)), "hci image delete"))
        }
        VolumeOwner::Suspension(vm) => {
            Some(("suspended VM", state.subject_name(&Subject::Vm(vm)), "hci vm resume"))
        }
        VolumeOwner::None => None,
    };
    if let Some((what, user, command)) = user {
        return Err(conflict(
            format!("volume {name} is in use by the {what} {user}"),
            format!("it goes with its {what}: {command} {user}"),
        ));
    }
    if let Some(node) = volume.coordinator {
        return Err(conflict(
            format!("volume {name} is open on node {}", state.subject_name(&Subject::Node(node))),
            "wait until it is closed: hci volume get",
        ));
    }
    drop_volume(state, id);
    Ok(Applied::now("volume delete", Subject::Volume(id), name))
}

/// Forgets a volume with its snapshots, and remembers which disks still hold data that nobody else needs.
pub(super) fn drop_volume(state: &mut ClusterState, id: VolumeId) {
    snapshots::give_up(state, id, "the volume was deleted");
    let Some(volume) = state.volumes.remove(&id) else { return };
    let former = state.retired.remove(&id).unwrap_or_default();
    let copies = volume.segments.iter().flat_map(|segment| &segment.replicas).map(|replica| replica.disk);
    let disks: BTreeSet<DiskId> = copies.chain(former.keys().copied()).collect();
    let (shared, own): (Vec<_>, Vec<_>) =
        volume.layers.all().into_iter().partition(|layer| state.is_shared(*layer, id));
    if shared.iter().any(|layer| layer.volume == id) {
        snapshots::bury(state, &volume, own, &disks);
    } else {
        snapshots::bury(state, &volume, own.into_iter().filter(|layer| layer.volume != id), &disks);
        state.purge.insert(id, disks);
    }
    snapshots::pass_on(state, &volume, &former, &shared);
    snapshots::settle(state);
}

pub(super) fn volume_purged(
    state: &mut ClusterState,
    id: VolumeId,
    disks: &[DiskId],
) -> Result<Applied, Refusal> {
    if let Some(left) = state.purge.get_mut(&id) {
        for disk in disks {
            left.remove(disk);
        }
        if left.is_empty() {
            state.purge.remove(&id);
        }
    }
    Ok(Applied::now("volume purge", Subject::Volume(id), ""))
}

/// The volume as it will be once it is open on `node`; used by the assignment of VMs too.
pub(super) fn plan_open(
    state: &ClusterState,
    id: VolumeId,
    node: NodeId,
    unreachable: &[NodeId],
) -> Result<Volume, Refusal> {
    let mut volume = state.volumes.get(&id).ok_or_else(|| not_found("volume", id))?.clone();
    if !state.nodes.contains_key(&node) {
        return Err(not_found("node", node));
    }
    if let Some(coordinator) = volume.coordinator
        && coordinator != node
        && !unreachable.contains(&coordinator)
    {
        return Err(conflict(
            format!(
                "volume {} is open on node {}",
                volume.name,
                state.subject_name(&Subject::Node(coordinator))
            ),
            "wait until it is closed there: hci volume get",
        ));
    }
    for segment in &mut volume.segments {
        for replica in &mut segment.replicas {
            if unreachable.contains(&replica.node) && replica.node != node {
                replica.state = ReplicaState::OutOfSync;
            }
        }
    }
    if volume.fewest_in_sync() == 0 {
        return Err(Refusal::new(
            RefusalKind::Unsafe,
            format!("no complete copy of volume {} is in reach", volume.name),
            "bring the nodes with its complete copies back: hci volume get",
        ));
    }
    volume.generation.0 += 1;
    volume.coordinator = Some(node);
    Ok(volume)
}

/// The volume as it will be once `to` has it instead of `from`, which has let go of it or never completes anything in it again.
pub(super) fn plan_handover(
    state: &ClusterState,
    id: VolumeId,
    from: NodeId,
    to: NodeId,
) -> Result<Volume, Refusal> {
    let mut volume = state.volumes.get(&id).ok_or_else(|| not_found("volume", id))?.clone();
    if volume.coordinator != Some(from) {
        return Err(conflict(
            format!("volume {} is not open where its VM runs", volume.name),
            "wait until it is: hci volume get",
        ));
    }
    volume.generation.0 += 1;
    volume.coordinator = Some(to);
    Ok(volume)
}

/// Puts an opened volume in place and tells when it has fewer copies than before.
pub(super) fn commit_open(state: &mut ClusterState, mut volume: Volume, at: Timestamp) {
    let whole = state.volumes.get(&volume.id).is_some_and(|before| !before.is_degraded());
    let (id, name, degraded) = (volume.id, volume.name.clone(), volume.is_degraded());
    let (left, wanted) = (volume.fewest_in_sync(), volume.replicas);
    snapshots::give_up(state, id, "the volume was opened anew");
    if let Some(present) = state.volumes.get(&id) {
        volume.layers = present.layers.clone();
    }
    state.volumes.insert(id, volume);
    if whole && degraded {
        let message =
            format!("volume {name} is degraded: {left} of {wanted} copies; the others cannot be reached");
        state.note(at, Severity::Warning, "volume-degraded", Subject::Volume(id), message);
    }
}

pub(super) fn open_volume(
    state: &mut ClusterState,
    id: VolumeId,
    node: NodeId,
    expected: Generation,
    unreachable: &[NodeId],
    at: Timestamp,
) -> Result<Applied, Refusal> {
    let present = state.volumes.get(&id).ok_or_else(|| not_found("volume", id))?;
    if present.generation != expected {
        return Err(fenced(present, expected));
    }
    // The disk of a running VM moves with the VM, in one step (see `vms::assign`), never alone.
    let user = state.vms.values().find_map(|vm| {
        let runs_on = vm.assignment.filter(|_| vm.disks.contains(&id))?.node;
        (runs_on != node).then_some((vm, runs_on))
    });
    if let Some((vm, runs_on)) = user {
        return Err(conflict(
            format!("the VM {} runs on it on node {}", vm.name, state.subject_name(&Subject::Node(runs_on))),
            "stop the VM first",
        ));
    }
    let volume = plan_open(state, id, node, unreachable)?;
    commit_open(state, volume, at);
    Ok(answer_volume(state, "volume open", id))
}

pub(super) fn fenced(volume: &Volume, generation: Generation) -> Refusal {
    Refusal::new(
        RefusalKind::Fenced,
        format!("generation {generation} of volume {} is not current, {} is", volume.name, volume.generation),
        "stop using this volume: it is open elsewhere",
    )
}

pub(super) fn answer_volume(state: &ClusterState, kind: &'static str, id: VolumeId) -> Applied {
    let outcome = match state.volumes.get(&id) {
        Some(volume) => Outcome::Volume(Box::new(volume.clone())),
        None => Outcome::Done,
    };
    Applied::now(kind, Subject::Volume(id), "").answer(outcome)
}

/// The volume, if that generation is its current one and it is open.
pub(super) fn current(
    state: &mut ClusterState,
    id: VolumeId,
    generation: Generation,
) -> Result<&mut Volume, Refusal> {
    let volume = state.volumes.get_mut(&id).ok_or_else(|| not_found("volume", id))?;
    if volume.generation != generation || volume.coordinator.is_none() {
        return Err(fenced(volume, generation));
    }
    Ok(volume)
}

pub(super) fn volume_opened(
    state: &mut ClusterState,
    id: VolumeId,
    generation: Generation,
) -> Result<Applied, Refusal> {
    current(state, id, generation)?.cleanliness = Cleanliness::Unclean;
    Ok(answer_volume(state, "volume opened", id))
}

pub(super) fn close_volume(
    state: &mut ClusterState,
    id: VolumeId,
    generation: Generation,
    cleanliness: Cleanliness,
) -> Result<Applied, Refusal> {
    let volume = state.volumes.get(&id).ok_or_else(|| not_found("volume", id))?;
    if volume.generation == generation && volume.coordinator.is_none() {
        return Ok(answer_volume(state, "volume close", id));
    }
    current(state, id, generation)?;
    let user = state.vms.values().find(|vm| vm.disks.contains(&id) && vm.assignment.is_some());
    let user = user.map(|vm| (vm.id, vm.name.clone(), vm.migration.is_some()));
    match user {
        Some((vm, _, true)) if cleanliness == Cleanliness::Clean => return let_go(state, id, generation, vm),
        Some((_, name, _)) => return Err(conflict(format!("the VM {name} runs on it"), "stop the VM first")),
        None => {}
    }
    snapshots::give_up(state, id, "the volume was closed");
    let volume = current(state, id, generation)?;
    volume.coordinator = None;
    if cleanliness == Cleanliness::Clean {
        volume.cleanliness = Cleanliness::Clean;
    }
    Ok(answer_volume(state, "volume close", id))
}

/// A volume of a VM that moves is closed: it stays where it is until its VM has arrived, or has stayed. Whoever had it open does not have it
/// again: a generation is closed once.
fn let_go(
    state: &mut ClusterState,
    id: VolumeId,
    generation: Generation,
    vm: VmId,
) -> Result<Applied, Refusal> {
    snapshots::give_up(state, id, "the volume's VM moves");
    let volume = current(state, id, generation)?;
    volume.cleanliness = Cleanliness::Clean;
    volume.generation.0 += 1;
    if let Some(vm) = state.vms.get_mut(&vm) {
        migration::lets_go(vm);
    }
    Ok(answer_volume(state, "volume close", id))
}

pub(super) fn replicas_out(
    state: &mut ClusterState,
    id: VolumeId,
    generation: Generation,
    disk: DiskId,
    reason: &str,
    at: Timestamp,
) -> Result<Applied, Refusal> {
    let disk_name = state.subject_name(&Subject::Disk(disk));
    let volume = current(state, id, generation)?;
    let mut after = volume.clone();
    for segment in &mut after.segments {
        for replica in segment.replicas.iter_mut().filter(|replica| replica.disk == disk) {
            replica.state = ReplicaState::OutOfSync;
        }
    }
    if after.fewest_in_sync() == 0 {
        return Err(Refusal::new(
            RefusalKind::Unsafe,
            format!("disk {disk_name} holds the last complete copy of a part of volume {}", volume.name),
            "bring the disk or its node back",
        ));
    }
    // Also when the disk was out already: whoever is told that it is out must be able to rely on it.
    after.departures += 1;
    volume.departures = after.departures;
    if after != *volume {
        let message = format!(
            "volume {} is degraded: {} of {} copies; {disk_name} is out: {reason}",
            after.name,
            after.fewest_in_sync(),
            after.replicas
        );
        *volume = after;
        state.note(at, Severity::Warning, "volume-degraded", Subject::Volume(id), message);
    }
    Ok(answer_volume(state, "volume replicas out", id))
}

pub(super) fn replica_in(
    state: &mut ClusterState,
    id: VolumeId,
    generation: Generation,
    segment: SegmentIndex,
    disk: DiskId,
    departures: u64,
    at: Timestamp,
) -> Result<Applied, Refusal> {
    let is_dead = state.disks.get(&disk).is_none_or(|disk| disk.service == DiskService::Dead);
    let volume = current(state, id, generation)?;
    if is_dead {
        return Err(conflict("the disk was declared dead", "use the set as it is now"));
    }
    if volume.departures != departures {
        return Err(Refusal::new(
            RefusalKind::Conflict,
            format!("a disk left volume {} after its return was asked for", volume.name),
            "compare the copies again, then ask again",
        ));
    }
    let degraded = volume.is_degraded();
    let replica = volume
        .segments
        .get_mut(segment.0 as usize)
        .and_then(|segment| segment.replicas.iter_mut().find(|replica| replica.disk == disk))
        // Not "not found": the volume is there, and its coordinator may go on.
        .ok_or_else(|| conflict("the copy has left its set", "use the set as it is now"))?;
    replica.state = ReplicaState::InSync;
    let replaced = replica.replaces;
    settle_minimum(volume);
    if degraded && !volume.is_degraded() {
        let message = format!("volume {} has all its {} copies again", volume.name, volume.replicas);
        state.note(at, Severity::Info, "volume-healed", Subject::Volume(id), message);
    }
    if let Some(old) = replaced {
        // Where that would leave too few it stays, until the leader sees that there are enough.
        let _ = replicas::retire(state, id, segment, old);
    }
    Ok(answer_volume(state, "volume replica in", id))
}

/// A higher minimum counts once all copies are there.
fn settle_minimum(volume: &mut Volume) {
    if !volume.is_degraded() {
        volume.min_in_sync = volume.min_wanted;
    }
}

pub(super) fn volume_filled(
    state: &mut ClusterState,
    id: VolumeId,
    generation: Generation,
) -> Result<Applied, Refusal> {
    current(state, id, generation)?.fill = VolumeFill::Done;
    Ok(answer_volume(state, "volume filled", id))
}

pub(super) fn set_volume(
    state: &mut ClusterState,
    id: VolumeId,
    change: &VolumeChange,
    unreachable: &[NodeId],
) -> Result<Applied, Refusal> {
    let volume = state.volumes.get(&id).ok_or_else(|| not_found("volume", id))?;
    let name = volume.name.clone();
    let wanted = change.replicas.unwrap_or(volume.replicas);
    let minimum = match (change.min_in_sync, change.replicas) {
        (Some(minimum), _) => minimum,
        (None, Some(replicas)) if replicas != volume.replicas => usual_minimum(replicas),
        (None, _) => volume.min_wanted,
    };
    check_copies(wanted, minimum)?;
    if let Some(limits) = change.limits
        && (limits.operations_per_second == Some(0) || limits.bytes_per_second == Some(0))
    {
        return Err(invalid("a limit of nothing stops the volume", "use a limit of 1 or more, or none"));
    }
    if wanted > volume.replicas {
        // One segment more stands for all: the others are placed one by one, as room permits.
        let wish =
            Wish { size_bytes: BLOCK_BYTES, have: 0, replicas: wanted, near: None, unreachable, avoid: &[] };
        placement::place(state, &wish)?;
    }
    if let Some(volume) = state.volumes.get_mut(&id) {
        volume.replicas = wanted;
        volume.min_wanted = minimum;
        volume.min_in_sync = volume.min_in_sync.min(minimum);
        volume.durability = change.durability.unwrap_or(volume.durability);
        volume.compression = change.compression.unwrap_or(volume.compression);
        volume.limits = change.limits.unwrap_or(volume.limits);
        settle_minimum(volume);
    }
    Ok(Applied::now("volume set", Subject::Volume(id), name).until(Goal::VolumeSettled(id)))
}

pub(super) fn grow_volume(
    state: &mut ClusterState,
    id: VolumeId,
    size_bytes: u64,
    unreachable: &[NodeId],
    at: Timestamp,
) -> Result<Applied, Refusal> {
    let volume = state.volumes.get(&id).ok_or_else(|| not_found("volume", id))?;
    let name = volume.name.clone();
    if size_bytes > MAX_VOLUME_BYTES {
        return Err(invalid("a volume has at most 64 TiB", "use a smaller size"));
    }
    let size_bytes = size_bytes.next_multiple_of(BLOCK_BYTES);
    if size_bytes < volume.size_bytes {
        return Err(invalid(
            format!("volume {name} has {} bytes already, and volumes do not shrink", volume.size_bytes),
            format!("give a larger size: hci volume grow {name} --size SIZE"),
        ));
    }
    if !volume.is_filled() {
        return Err(conflict(
            format!("volume {name} is being filled"),
            format!("wait until it is there: hci volume get {name}"),
        ));
    }
    if matches!(volume.owner, VolumeOwner::Image(_)) {
        return Err(conflict(
            format!("volume {name} is the disk of an image"),
            "grow the volumes that are made from it",
        ));
    }
    let former: Vec<_> =
        state.disks.keys().filter(|disk| state.awaits_removal(volume, **disk)).copied().collect();
    let wish = Wish {
        size_bytes,
        have: volume.segments.len(),
        replicas: volume.replicas,
        near: volume.coordinator,
        unreachable,
        avoid: &former,
    };
    let added = placement::place(state, &wish)?;
    if let Some(volume) = state.volumes.get_mut(&id)
        && size_bytes > volume.size_bytes
    {
        volume.segments.extend(added);
        volume.size_bytes = size_bytes;
        let message = format!("volume {name} has {size_bytes} bytes now");
        state.note(at, Severity::Info, "volume-grown", Subject::Volume(id), message);
    }
    Ok(Applied::now("volume grow", Subject::Volume(id), name))
}
