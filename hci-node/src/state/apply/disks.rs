//! The disks of the pool: how they come, fail, are emptied and leave.
//!
//! A disk leaves the pool only when no volume and no data still to be removed refers to it.

use storage::KeySalt;

use super::{Applied, conflict, invalid, not_found, tasks};
use crate::state::{
    ClusterState, Disk, DiskId, DiskRoom, DiskService, DiskState, Goal, NodeId, PoolPolicy, Refusal,
    RefusalKind, Replica, ReplicaState, Segment, Severity, Subject, TaskError, Timestamp, Verified,
    WipePolicy,
};

/// Longest grace before replicas of a lost node are rebuilt: a week.
const MAX_GRACE_SECONDS: u32 = 7 * 24 * 3600;
/// Most of a disk that can be held in reserve.
const MAX_RESERVE_PERCENT: u8 = 50;
/// Most segments that are copied to or from one disk at a time.
const MAX_MOVES: u8 = 32;

pub(super) fn add_disk(
    state: &mut ClusterState,
    id: DiskId,
    node: NodeId,
    path: &str,
    wipe: WipePolicy,
    key_salt: Option<KeySalt>,
    at: Timestamp,
) -> Result<Applied, Refusal> {
    let owner = state.nodes.get(&node).ok_or_else(|| not_found("node", node))?;
    let name = format!("{}:{path}", owner.name);
    let done = Applied::now("disk add", Subject::Disk(id), name).until(Goal::DiskReady(id));
    if state.disks.contains_key(&id) {
        return Ok(done);
    }
    if !path.starts_with('/') || path.len() > 4096 || path.contains('\0') {
        return Err(invalid(format!("{path:?} is no absolute path"), "name a device: hci disk list"));
    }
    if state.disks.values().any(|disk| disk.node == node && disk.path == path) {
        return Err(Refusal::new(
            RefusalKind::Taken,
            format!("{path} of node {} is in the pool already", owner.name),
            "see it: hci disk list",
        ));
    }
    let disk = Disk {
        id,
        node,
        path: path.to_owned(),
        store: None,
        capacity_bytes: 0,
        state: DiskState::Preparing,
        wipe,
        added: at,
        service: DiskService::InService,
        room: DiskRoom::Free,
        scrubs: 0,
        verified: Verified::default(),
        key_salt,
    };
    state.disks.insert(id, disk);
    Ok(done)
}

pub(super) fn disk_ready(
    state: &mut ClusterState,
    id: DiskId,
    store: &str,
    capacity_bytes: u64,
    at: Timestamp,
) -> Result<Applied, Refusal> {
    let disk = state.disks.get_mut(&id).ok_or_else(|| not_found("disk", id))?;
    let fresh = disk.state == DiskState::Preparing;
    disk.store = Some(store.to_owned());
    disk.capacity_bytes = capacity_bytes;
    // Wiping was allowed once; should the disk be prepared again, its data counts.
    disk.wipe = WipePolicy::Refuse;
    if fresh {
        disk.state = DiskState::Ready;
        let message = format!("disk {} is in the pool", state.subject_name(&Subject::Disk(id)));
        state.note(at, Severity::Info, "disk-added", Subject::Disk(id), message);
        tasks::settle(state, &Goal::DiskReady(id), None, at);
    }
    Ok(Applied::now("disk ready", Subject::Disk(id), ""))
}

pub(super) fn abort_disk(
    state: &mut ClusterState,
    id: DiskId,
    error: &TaskError,
    at: Timestamp,
) -> Result<Applied, Refusal> {
    let disk = state.disks.get(&id).ok_or_else(|| not_found("disk", id))?;
    if disk.state != DiskState::Preparing {
        return Err(conflict("the disk is in use", "see it: hci disk list"));
    }
    state.disks.remove(&id);
    tasks::settle(state, &Goal::DiskReady(id), Some(error), at);
    Ok(Applied::now("disk abort", Subject::Disk(id), ""))
}

pub(super) fn set_disk_health(
    state: &mut ClusterState,
    id: DiskId,
    failed: Option<&str>,
    at: Timestamp,
) -> Result<Applied, Refusal> {
    let name = state.subject_name(&Subject::Disk(id));
    let disk = state.disks.get_mut(&id).ok_or_else(|| not_found("disk", id))?;
    match (&disk.state, failed) {
        (DiskState::Ready, Some(reason)) => {
            disk.state = DiskState::Failed { reason: reason.to_owned() };
            let message = format!("disk {name} failed: {reason}");
            state.note(at, Severity::Critical, "disk-failed", Subject::Disk(id), message);
        }
        (DiskState::Failed { .. }, None) => {
            disk.state = DiskState::Ready;
            state.note(
                at,
                Severity::Info,
                "disk-works",
                Subject::Disk(id),
                format!("disk {name} works again"),
            );
        }
        _ => {}
    }
    Ok(Applied::now("disk health", Subject::Disk(id), name))
}

pub(super) fn set_policy(
    state: &mut ClusterState,
    policy: PoolPolicy,
    at: Timestamp,
) -> Result<Applied, Refusal> {
    if policy.rebuild_grace_seconds > MAX_GRACE_SECONDS {
        return Err(invalid("a grace of more than a week protects nothing", "use --rebuild-grace 10m"));
    }
    if policy.reserve_percent > MAX_RESERVE_PERCENT {
        return Err(invalid(
            format!("a reserve of {} % is too much", policy.reserve_percent),
            format!("use --reserve 0 to {MAX_RESERVE_PERCENT}"),
        ));
    }
    if !(1..=MAX_MOVES).contains(&policy.moves_per_disk) {
        return Err(invalid(
            format!("{} moves at a time are not possible", policy.moves_per_disk),
            format!("use --moves-per-disk 1 to {MAX_MOVES}"),
        ));
    }
    if state.pool != policy {
        state.pool = policy;
        let message = format!(
            "pool policy: rebuild after {} s, {} % in reserve, {} moves for each disk, rebalancing {:?}",
            policy.rebuild_grace_seconds, policy.reserve_percent, policy.moves_per_disk, policy.rebalancing
        );
        state.note(at, Severity::Info, "pool-policy", Subject::Cluster, message);
    }
    Ok(Applied::now("pool set", Subject::Cluster, "pool"))
}

pub(super) fn scrub(state: &mut ClusterState, id: DiskId) -> Result<Applied, Refusal> {
    let name = state.subject_name(&Subject::Disk(id));
    let disk = state.disks.get_mut(&id).ok_or_else(|| not_found("disk", id))?;
    if disk.state != DiskState::Ready {
        return Err(conflict(format!("disk {name} is not in use"), "see why: hci disk list"));
    }
    disk.scrubs += 1;
    Ok(Applied::now("disk scrub", Subject::Disk(id), name))
}

pub(super) fn set_service(
    state: &mut ClusterState,
    id: DiskId,
    service: DiskService,
    at: Timestamp,
) -> Result<Applied, Refusal> {
    let disk = state.disks.get(&id).ok_or_else(|| not_found("disk", id))?;
    let name = state.subject_name(&Subject::Disk(id));
    if disk.state == DiskState::Preparing {
        return Err(conflict(
            format!("disk {name} is being prepared"),
            "wait until it is in the pool: hci disk list",
        ));
    }
    let before = disk.service;
    let (kind, goal) = match service {
        DiskService::InService => {
            if before == DiskService::Dead {
                return Err(conflict(
                    format!("disk {name} was declared dead: what it holds is not counted on any more"),
                    "let it leave the pool, then add it again: hci disk add NODE PATH --wipe",
                ));
            }
            ("disk resume", Goal::Applied)
        }
        DiskService::Draining => {
            if before == DiskService::Dead {
                return Err(conflict(
                    format!("disk {name} was declared dead already"),
                    "see how far it is: hci task list",
                ));
            }
            ("disk evict", Goal::DiskGone { disk: id, segments: state.segments_on(id) })
        }
        DiskService::Dead => {
            check_dispensable(state, &[id])?;
            ("disk evict", Goal::DiskGone { disk: id, segments: state.segments_on(id) })
        }
    };
    set(state, id, service, at);
    Ok(Applied::now(kind, Subject::Disk(id), name).until(goal))
}

/// Puts the service in place and says so; used for all disks of a node, too.
pub(super) fn set(state: &mut ClusterState, id: DiskId, service: DiskService, at: Timestamp) {
    let name = state.subject_name(&Subject::Disk(id));
    let Some(disk) = state.disks.get_mut(&id) else { return };
    if std::mem::replace(&mut disk.service, service) == service {
        return;
    }
    let (severity, kind, message) = match service {
        DiskService::InService => {
            let stays = TaskError {
                detail: "the disk was put in service again".to_owned(),
                next: "see it: hci disk list".to_owned(),
            };
            tasks::settle_where(state, |goal| is_gone(goal, id), Some(&stays), at);
            (Severity::Info, "disk-in-service", format!("disk {name} is in service again"))
        }
        DiskService::Draining => {
            (Severity::Info, "disk-draining", format!("disk {name} is emptied and leaves the pool"))
        }
        DiskService::Dead => {
            discount(state, id);
            (Severity::Warning, "disk-dead", format!("disk {name} was declared dead"))
        }
    };
    state.note(at, severity, kind, Subject::Disk(id), message);
}

fn is_gone(goal: &Goal, id: DiskId) -> bool {
    matches!(goal, Goal::DiskGone { disk, .. } if *disk == id)
}

/// Disks may be declared dead only when every segment has a complete copy elsewhere.
pub(super) fn check_dispensable(state: &ClusterState, ids: &[DiskId]) -> Result<(), Refusal> {
    let counts = |replica: &Replica| {
        let alive = |disk: &Disk| disk.service != DiskService::Dead;
        !ids.contains(&replica.disk)
            && replica.state == ReplicaState::InSync
            && state.disks.get(&replica.disk).is_some_and(alive)
    };
    let is_hit = |segment: &Segment| segment.replicas.iter().any(|replica| ids.contains(&replica.disk));
    let is_lost = |segment: &Segment| is_hit(segment) && !segment.replicas.iter().any(counts);
    let Some(volume) = state.volumes.values().find(|volume| volume.segments.iter().any(is_lost)) else {
        return Ok(());
    };
    let names: Vec<_> = ids.iter().map(|id| state.subject_name(&Subject::Disk(*id))).collect();
    Err(Refusal::new(
        RefusalKind::Unsafe,
        format!("disk {} holds the last complete copy of a part of volume {}", names.join(", "), volume.name),
        format!("bring it back, or give the data up: hci volume delete {}", volume.name),
    ))
}

/// What is on a dead disk counts as incomplete. Its coordinator may still write there, which does no harm: it waits for
/// more copies than it has to.
fn discount(state: &mut ClusterState, id: DiskId) {
    for volume in state.volumes.values_mut() {
        let copies = volume.segments.iter_mut().flat_map(|segment| &mut segment.replicas);
        let mut hit = false;
        for replica in copies.filter(|replica| replica.disk == id) {
            replica.state = ReplicaState::OutOfSync;
            hit = true;
        }
        if hit {
            volume.departures += 1;
        }
    }
}

pub(super) fn set_room(
    state: &mut ClusterState,
    id: DiskId,
    room: DiskRoom,
    at: Timestamp,
) -> Result<Applied, Refusal> {
    let name = state.subject_name(&Subject::Disk(id));
    let disk = state.disks.get_mut(&id).ok_or_else(|| not_found("disk", id))?;
    if std::mem::replace(&mut disk.room, room) != room {
        let (severity, kind, message) = match room {
            DiskRoom::Free => (Severity::Info, "disk-has-room", format!("disk {name} has room again")),
            DiskRoom::Reserved => (
                Severity::Warning,
                "disk-reserve",
                format!(
                    "disk {name} has only its reserve of {} % left: it gets no new copies",
                    state.pool.reserve_percent
                ),
            ),
        };
        state.note(at, severity, kind, Subject::Disk(id), message);
    }
    Ok(Applied::now("disk room", Subject::Disk(id), name))
}

pub(super) fn remove(state: &mut ClusterState, id: DiskId, at: Timestamp) -> Result<Applied, Refusal> {
    let done = Applied::now("disk remove", Subject::Disk(id), "");
    let Some(disk) = state.disks.get(&id) else { return Ok(done) };
    let name = state.subject_name(&Subject::Disk(id));
    let (node, service) = (disk.node, disk.service);
    if service == DiskService::InService {
        return Err(conflict(format!("disk {name} is in service"), "empty it first: hci disk evict DISK"));
    }
    if state.segments_on(id) > 0 {
        return Err(conflict(
            format!("disk {name} still holds copies"),
            "wait until it is empty: hci disk list",
        ));
    }
    let left = |state: &ClusterState| {
        state.purge.values().any(|disks| disks.contains(&id))
            || state.retired.values().any(|disks| disks.contains_key(&id))
            || state.dead_layers.values().any(|dead| dead.disks.contains(&id))
    };
    if service == DiskService::Draining && left(state) {
        return Err(conflict(
            format!("data are still to be removed from disk {name}"),
            "wait until it is empty",
        ));
    }
    // What a dead disk holds nobody can remove.
    for disks in state.purge.values_mut() {
        disks.remove(&id);
    }
    state.purge.retain(|_, disks| !disks.is_empty());
    for disks in state.retired.values_mut() {
        disks.remove(&id);
    }
    state.retired.retain(|_, disks| !disks.is_empty());
    for dead in state.dead_layers.values_mut() {
        dead.disks.remove(&id);
    }
    state.dead_layers.retain(|_, dead| !dead.disks.is_empty());
    state.disks.remove(&id);
    let message = format!("disk {name} has left the pool");
    state.note(at, Severity::Info, "disk-removed", Subject::Node(node), message);
    tasks::settle_where(state, |goal| is_gone(goal, id), None, at);
    Ok(done)
}
