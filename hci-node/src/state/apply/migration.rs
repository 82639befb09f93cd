//! VMs that move to another node while their guests run.
//!
//! | step | from then on |
//! |---|---|
//! | [`begin`] | the run's node writes it to the other one, where a run with a number of its own waits; the guest goes on, and is held for the last part |
//! | [`arrived`] | the run on the other node is the VM: volumes are open there in a new generation, ports are there |
//! | [`failed`], [`give_up`] | the present run is the VM, as before; it goes on if it was held |
//!
//! Whichever of the last two is committed first decides: the other one is refused. The present run was held before the other one can have
//! arrived, and goes on only when it is seen that the migration was given up; the other one begins only when it is seen that it has arrived. So
//! whatever is lost on the way, one of the two is the VM, and never both.

use super::{Applied, conflict, devices, invalid, not_found, storage, tasks};
use crate::state::{
    Assignment, ClusterState, DesiredRun, Goal, Migration, MigrationStage, MigrationTerms, NodeId,
    NodeService, Refusal, RunEpoch, Severity, Subject, TaskError, TaskId, Timestamp, Vm, VmId,
};

/// Least rate, in bytes a second: who paces a piece of 1 MiB looks once a second whether it is still wanted.
const MIN_RATE: u64 = 1 << 20;

/// Refuses what cannot be done to a VM on its way.
pub(super) fn check_none(vm: &Vm) -> Result<(), Refusal> {
    match (vm.migration, vm.renewal) {
        (None, None) => Ok(()),
        (None, Some(_)) => Err(conflict(
            format!("VM {} is moved into a new process just now", vm.name),
            format!("wait a moment, then try again; see it: hci vm get {}", vm.name),
        )),
        (Some(_), _) => Err(conflict(
            format!("VM {} is being migrated", vm.name),
            format!("wait for that, or give it up: hci vm migrate {} --cancel", vm.name),
        )),
    }
}

pub(super) fn begin(
    state: &mut ClusterState,
    task: Option<TaskId>,
    id: VmId,
    to: NodeId,
    terms: MigrationTerms,
    at: Timestamp,
) -> Result<Applied, Refusal> {
    let vm = state.vms.get(&id).ok_or_else(|| not_found("vm", id))?;
    let name = vm.name.clone();
    check_none(vm)?;
    let run = match vm.assignment.filter(|_| vm.desired == DesiredRun::Running) {
        Some(run) if vm.restart.is_none() && vm.suspension.is_none() => run,
        _ => {
            return Err(conflict(
                format!("VM {name} does not run"),
                format!(
                    "see it: hci vm get {name}; a VM that is off needs no migration, it starts on any node"
                ),
            ));
        }
    };
    devices::check_settled(vm)?;
    let node = state.nodes.get(&to).ok_or_else(|| not_found("node", to))?;
    let node_name = node.name.clone();
    if node.service != NodeService::InService {
        return Err(conflict(
            format!("node {node_name} is being emptied"),
            "choose another node: hci node list",
        ));
    }
    if run.node == to {
        return Err(conflict(
            format!("VM {name} runs on node {node_name} already"),
            "choose another node: hci node list",
        ));
    }
    if terms.bytes_per_second.is_some_and(|rate| rate < MIN_RATE) {
        return Err(invalid(
            "a VM cannot be sent as slowly as that",
            "leave the limit out, or use --rate 1MiB or more",
        ));
    }
    if let Some(vm) = state.vms.get_mut(&id) {
        vm.epoch.0 += 1;
        let epoch = vm.epoch;
        let stage = MigrationStage::Copying;
        vm.migration = Some(Migration { from: run.epoch, to, epoch, terms, task, stage });
    }
    let message = format!("VM {name} begins to move to {node_name}");
    state.note(at, Severity::Info, "vm-migrates", Subject::Vm(id), message);
    Ok(Applied::now("vm migrate", Subject::Vm(id), name).until(Goal::VmIsMigrated(id)))
}

/// The node of a VM that moves has closed one of its volumes, clean.
pub(super) fn lets_go(vm: &mut Vm) {
    if let Some(migration) = &mut vm.migration {
        migration.stage = MigrationStage::LettingGo;
    }
}

/// The migration with this arriving run.
fn current(vm: &Vm, epoch: RunEpoch) -> Result<Migration, Refusal> {
    vm.migration
        .filter(|migration| migration.epoch == epoch)
        .ok_or_else(|| conflict("this migration is no longer wanted", "nothing is to be done"))
}

pub(super) fn arrived(
    state: &mut ClusterState,
    id: VmId,
    epoch: RunEpoch,
    at: Timestamp,
) -> Result<Applied, Refusal> {
    let vm = state.vms.get(&id).ok_or_else(|| not_found("vm", id))?;
    let name = vm.name.clone();
    let done = Applied::now("vm arrived", Subject::Vm(id), &name);
    if vm.assignment.is_some_and(|run| run.epoch == epoch) {
        return Ok(done);
    }
    let migration = current(vm, epoch)?;
    let Some(run) = vm.assignment else { return Err(not_found("run of VM", name)) };
    let was_paused = vm.paused == Some(run.epoch);
    let volumes: Result<Vec<_>, _> =
        vm.disks.iter().map(|disk| storage::plan_handover(state, *disk, run.node, migration.to)).collect();
    for volume in volumes? {
        storage::commit_open(state, volume, at);
    }
    if let Some(vm) = state.vms.get_mut(&id) {
        vm.assignment = Some(Assignment { node: migration.to, epoch, since: at, make: run.make });
        vm.migration = None;
        vm.paused = was_paused.then_some(epoch);
    }
    let (from, to) = (Subject::Node(run.node), Subject::Node(migration.to));
    let message =
        format!("VM {name} moved from {} to {}", state.subject_name(&from), state.subject_name(&to));
    state.note(at, Severity::Info, "vm-migrated", Subject::Vm(id), message);
    Ok(done)
}

pub(super) fn failed(
    state: &mut ClusterState,
    id: VmId,
    epoch: RunEpoch,
    error: &TaskError,
    at: Timestamp,
) -> Result<Applied, Refusal> {
    let vm = state.vms.get(&id).ok_or_else(|| not_found("vm", id))?;
    let name = vm.name.clone();
    current(vm, epoch)?;
    end(state, id, error, at);
    Ok(Applied::now("vm migrate", Subject::Vm(id), name))
}

pub(super) fn cancel(state: &mut ClusterState, id: VmId, at: Timestamp) -> Result<Applied, Refusal> {
    let vm = state.vms.get(&id).ok_or_else(|| not_found("vm", id))?;
    let name = vm.name.clone();
    if vm.migration.is_none() {
        return Err(conflict(
            format!("VM {name} is not being migrated"),
            format!("see where it is: hci vm get {name}"),
        ));
    }
    give_up(state, id, "it was cancelled", at);
    Ok(Applied::now("vm migrate", Subject::Vm(id), name))
}

/// Ends a migration that has not come to its end, for this reason.
pub(super) fn give_up(state: &mut ClusterState, id: VmId, why: &str, at: Timestamp) {
    let Some(vm) = state.vms.get(&id).filter(|vm| vm.migration.is_some()) else { return };
    let error = TaskError { detail: why.to_owned(), next: format!("see the VM: hci vm get {}", vm.name) };
    end(state, id, &error, at);
}

fn end(state: &mut ClusterState, id: VmId, error: &TaskError, at: Timestamp) {
    let Some(vm) = state.vms.get_mut(&id) else { return };
    vm.migration = None;
    let message = format!("VM {} was not migrated: {}", vm.name, error.detail);
    state.note(at, Severity::Warning, "vm-not-migrated", Subject::Vm(id), message);
    tasks::settle(state, &Goal::VmIsMigrated(id), Some(error), at);
}
