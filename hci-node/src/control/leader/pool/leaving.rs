//! Disks and nodes on their way out: forgotten when nothing refers to them any more, and until then the progress of the
//! tasks that wait for it.

use super::View;
use crate::state::{ClusterState, Disk, DiskId, DiskService, Goal, NodeId, NodeService, Op, Task, TaskState};

/// What is due.
pub fn operations(view: View<'_>) -> Vec<Op> {
    let state = view.state;
    let empty = state.disks.values().filter(|disk| {
        disk.service != DiskService::InService && state.segments_on(disk.id) == 0 && is_purged(state, disk)
    });
    let mut ops: Vec<_> = empty.map(|disk| Op::RemoveDisk(disk.id)).collect();
    let running = state.tasks.values().filter(|task| task.state == TaskState::Running);
    ops.extend(running.filter_map(|task| progress(state, task)));
    ops
}

/// Whether nothing is to be removed from a disk; from a dead one nothing can be.
fn is_purged(state: &ClusterState, disk: &Disk) -> bool {
    disk.service == DiskService::Dead
        || (!state.purge.values().any(|disks| disks.contains(&disk.id))
            && !state.retired.values().any(|disks| disks.contains_key(&disk.id))
            && !state.dead_layers.values().any(|dead| dead.disks.contains(&disk.id)))
}

fn disks_of(state: &ClusterState, node: NodeId) -> impl Iterator<Item = DiskId> {
    state.disks.values().filter(move |disk| disk.node == node).map(|disk| disk.id)
}

/// How far a task is, when that is news.
fn progress(state: &ClusterState, task: &Task) -> Option<Op> {
    let (permille, message) = match &task.goal {
        Goal::DiskGone { disk, segments } => moved(*segments, state.segments_on(*disk)),
        Goal::NodeGone { node, segments } => {
            let left = disks_of(state, *node).map(|disk| state.segments_on(disk)).sum();
            let (permille, message) = moved(*segments, left);
            match state.vms_on(*node).count() {
                0 => (permille, message),
                vms => (permille, format!("{vms} VMs are still there, {message}")),
            }
        }
        Goal::NodeDrained(node) => {
            let vms: Vec<_> = state.vms_on(*node).map(|vm| vm.name.as_str()).collect();
            (0, format!("waits for {} VMs to start elsewhere: {}", vms.len(), vms.join(", ")))
        }
        Goal::VolumeSettled(id) => {
            let volume = state.volumes.get(id)?;
            let wanted = usize::from(volume.replicas);
            let whole = volume
                .segments
                .iter()
                .filter(|segment| segment.in_sync() == wanted && segment.replicas.len() == wanted);
            let (done, all) = (whole.count(), volume.segments.len().max(1));
            let permille = u16::try_from(done * 999 / all).unwrap_or(0);
            (permille, format!("{done} of {all} segments have their {wanted} copies"))
        }
        _ => return None,
    };
    let is_news = permille > task.permille || message != task.message;
    is_news.then_some(Op::UpdateTask { task: task.id, permille, message })
}

fn moved(all: u32, left: u32) -> (u16, String) {
    let done = all.saturating_sub(left);
    let permille = u64::from(done) * 999 / u64::from(all.max(1));
    let message = match left {
        0 => "what was moved is removed from the disks".to_owned(),
        _ => format!("{done} of {all} segments have been moved"),
    };
    (u16::try_from(permille).unwrap_or(0), message)
}

/// Whether a node carries nothing any more, so that it can be taken out of the consensus group and forgotten.
pub fn is_ready_to_go(state: &ClusterState, node: NodeId) -> bool {
    let Some(member) = state.nodes.get(&node) else { return false };
    let has_open = || state.volumes.values().any(|volume| volume.coordinator == Some(node));
    member.service == NodeService::Leaving
        && state.vms_on(node).next().is_none()
        && disks_of(state, node).next().is_none()
        && (member.is_lost() || !has_open())
}
