//! VMs that are paused, suspended to a volume, and resumed.
//!
//! | step | from then on |
//! |---|---|
//! | [`begin`] | the run's node holds its processors and writes it to a volume that was made for it |
//! | [`written`] | the run must not go on, and is ended: what was written is the VM |
//! | `vms::assign` | a new run, with the volume open on its node, is made from it; its processors do not run |
//! | [`used`] | what was written must not be used again, and is forgotten; then the processors run |
//!
//! Each step is one command, so that a crash anywhere leaves the VM either as it was before the step or as it is after it: there is
//! one run that may go on, or one state that a run may be made from, and never both. What has begun to run writes to the VM's disks: from the state
//! of before that nobody may ever start again.

use super::{Applied, conflict, devices, migration, not_found, storage, tasks};
use crate::state::{
    ClusterState, DesiredRun, Generation, Goal, NodeId, Refusal, RunEpoch, SavedRun, Severity, StopMode,
    Subject, Suspension, SuspensionStage, TaskError, TaskId, Timestamp, VmId, VolumeFill, VolumeOwner,
    command::NewVolume,
};
use vmm::Processor;

pub(super) fn pause(state: &mut ClusterState, id: VmId, at: Timestamp) -> Result<Applied, Refusal> {
    let vm = state.vms.get_mut(&id).ok_or_else(|| not_found("vm", id))?;
    let name = vm.name.clone();
    let run = match vm.assignment.filter(|_| vm.desired == DesiredRun::Running) {
        Some(run) if vm.restart.is_none() && vm.suspension.is_none() => run,
        _ => return Err(does_not_run(&name)),
    };
    migration::check_none(vm)?;
    if vm.paused == Some(run.epoch) {
        return Err(conflict(
            format!("VM {name} is paused already"),
            format!("let it run on: hci vm resume {name}"),
        ));
    }
    vm.paused = Some(run.epoch);
    state.note(at, Severity::Info, "vm-paused", Subject::Vm(id), format!("VM {name} is paused"));
    Ok(Applied::now("vm pause", Subject::Vm(id), name).until(Goal::VmIsPaused(id, run.epoch)))
}

fn does_not_run(name: &str) -> Refusal {
    conflict(format!("VM {name} does not run"), format!("see it: hci vm get {name}"))
}

pub(super) fn resume(state: &mut ClusterState, id: VmId, at: Timestamp) -> Result<Applied, Refusal> {
    let vm = state.vms.get_mut(&id).ok_or_else(|| not_found("vm", id))?;
    let name = vm.name.clone();
    let done = Applied::now("vm resume", Subject::Vm(id), &name);
    if vm.saved().is_some() {
        if vm.desired == DesiredRun::Running {
            return Err(conflict(
                format!("VM {name} is being resumed already"),
                format!("see it: hci vm get {name}"),
            ));
        }
        vm.desired = DesiredRun::Running;
        return Ok(done.until(Goal::VmRuns(id, RunEpoch(vm.epoch.0 + 1))));
    }
    migration::check_none(vm)?;
    let goal = Goal::VmRuns(id, vm.assignment.map_or(vm.epoch, |run| run.epoch));
    if vm.saving().is_some() {
        give_up(state, id, "the VM was resumed before it was suspended", at);
    } else if vm.paused.take().is_none() {
        return Err(conflict(
            format!("VM {name} is neither paused nor suspended"),
            format!("see it: hci vm get {name}"),
        ));
    }
    if let Some(vm) = state.vms.get_mut(&id) {
        vm.paused = None;
    }
    state.note(at, Severity::Info, "vm-resumed", Subject::Vm(id), format!("VM {name} runs on"));
    Ok(done.until(goal))
}

pub(super) fn begin(
    state: &mut ClusterState,
    task: Option<TaskId>,
    id: VmId,
    new: &NewVolume,
    unreachable: &[NodeId],
    at: Timestamp,
) -> Result<Applied, Refusal> {
    let vm = state.vms.get(&id).ok_or_else(|| not_found("vm", id))?;
    let name = vm.name.clone();
    if vm.is_suspended() {
        return Err(conflict(
            format!("VM {name} is suspended already"),
            format!("have it go on: hci vm resume {name}"),
        ));
    }
    if vm.saving().is_some() {
        return Err(conflict(
            format!("VM {name} is being suspended already"),
            format!("see it: hci vm get {name}"),
        ));
    }
    let run = match vm.assignment.filter(|_| vm.desired == DesiredRun::Running) {
        Some(run) if vm.restart.is_none() && vm.suspension.is_none() => run,
        _ => return Err(does_not_run(&name)),
    };
    migration::check_none(vm)?;
    devices::check_settled(vm)?;
    let owner = VolumeOwner::Suspension(id);
    let mut volume =
        storage::plan_volume(state, new, Some(run.node), unreachable, owner, VolumeFill::Import, at)?;
    volume.coordinator = Some(run.node);
    volume.generation.0 = 1;
    let volume_id = volume.id;
    state.volumes.insert(volume_id, volume);
    if let Some(vm) = state.vms.get_mut(&id) {
        let stage = SuspensionStage::Saving { epoch: run.epoch, task };
        vm.suspension = Some(Suspension { volume: volume_id, stage });
    }
    Ok(Applied::now("vm suspend", Subject::Vm(id), name).until(Goal::VmIsSuspended(id)))
}

pub(super) fn written(
    state: &mut ClusterState,
    id: VmId,
    epoch: RunEpoch,
    generation: Generation,
    bytes: u64,
    processor: &Processor,
    at: Timestamp,
) -> Result<Applied, Refusal> {
    let vm = state.vms.get(&id).ok_or_else(|| not_found("vm", id))?;
    let name = vm.name.clone();
    let done = Applied::now("vm suspended", Subject::Vm(id), &name);
    if vm.is_written(epoch) {
        return Ok(done);
    }
    let (Some(run), Some(suspension)) = (vm.assignment, &vm.suspension) else { return Err(not_wanted()) };
    let volume = suspension.volume;
    if vm.saving() != Some(epoch) || run.epoch != epoch {
        return Err(not_wanted());
    }
    storage::current(state, volume, generation)?.fill = VolumeFill::Done;
    if let Some(vm) = state.vms.get_mut(&id) {
        let saved = SavedRun { epoch, make: run.make, processor: processor.clone(), bytes, at };
        vm.suspension = Some(Suspension { volume, stage: SuspensionStage::Saved(saved) });
        vm.desired = DesiredRun::Stopped(StopMode::Force);
        (vm.paused, vm.restart) = (None, None);
    }
    let message = format!("VM {name} is suspended: its state takes {} MiB", bytes.div_ceil(1 << 20));
    state.note(at, Severity::Info, "vm-suspended", Subject::Vm(id), message);
    Ok(done)
}

fn not_wanted() -> Refusal {
    conflict("this suspension is no longer wanted", "let the VM run on")
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
    if vm.saving() != Some(epoch) {
        return Err(not_wanted());
    }
    let message = format!("VM {name} could not be suspended and runs on: {}", error.detail);
    state.note(at, Severity::Warning, "vm-not-suspended", Subject::Vm(id), message);
    drop_state(state, id);
    tasks::settle(state, &Goal::VmIsSuspended(id), Some(error), at);
    Ok(Applied::now("vm suspend", Subject::Vm(id), name))
}

pub(super) fn used(
    state: &mut ClusterState,
    id: VmId,
    epoch: RunEpoch,
    at: Timestamp,
) -> Result<Applied, Refusal> {
    let vm = state.vms.get(&id).ok_or_else(|| not_found("vm", id))?;
    let name = vm.name.clone();
    let done = Applied::now("vm resumed", Subject::Vm(id), &name);
    let is_current = vm.assignment.is_some_and(|run| run.epoch == epoch);
    match vm.restoring() {
        Some(run) if run.epoch == epoch => {}
        // It was told before.
        None if is_current && vm.suspension.is_none() => return Ok(done),
        _ => return Err(conflict("this run of the VM is not to begin", "nothing is to be done")),
    }
    drop_state(state, id);
    state.note(at, Severity::Info, "vm-resumed", Subject::Vm(id), format!("VM {name} goes on where it was"));
    Ok(done)
}

pub(super) fn discard(
    state: &mut ClusterState,
    id: VmId,
    desired: DesiredRun,
    at: Timestamp,
) -> Result<Applied, Refusal> {
    let vm = state.vms.get_mut(&id).ok_or_else(|| not_found("vm", id))?;
    let name = vm.name.clone();
    if vm.saved().is_none() || vm.assignment.is_some() {
        return Err(conflict(
            format!("VM {name} is not suspended"),
            format!("start or stop it without --discard-state; see it: hci vm get {name}"),
        ));
    }
    vm.desired = desired;
    let (kind, goal) = match desired {
        DesiredRun::Running => ("vm start", Goal::VmRuns(id, RunEpoch(vm.epoch.0 + 1))),
        DesiredRun::Stopped(_) => ("vm stop", Goal::VmIsStopped(id)),
    };
    drop_state(state, id);
    let message = format!("the state of the suspended VM {name} is discarded");
    state.note(at, Severity::Info, "vm-state-discarded", Subject::Vm(id), message);
    Ok(Applied::now(kind, Subject::Vm(id), name).until(goal))
}

/// Ends a suspension that has not come to its end, for this reason.
pub(super) fn give_up(state: &mut ClusterState, id: VmId, why: &str, at: Timestamp) {
    let Some(vm) = state.vms.get(&id).filter(|vm| vm.saving().is_some()) else { return };
    let error = TaskError { detail: why.to_owned(), next: format!("see the VM: hci vm get {}", vm.name) };
    drop_state(state, id);
    tasks::settle(state, &Goal::VmIsSuspended(id), Some(&error), at);
}

/// Forgets what a VM would go on with, and its volume.
pub(super) fn drop_state(state: &mut ClusterState, id: VmId) {
    let suspension = state.vms.get_mut(&id).and_then(|vm| vm.suspension.take());
    if let Some(suspension) = suspension {
        storage::drop_volume(state, suspension.volume);
    }
}
