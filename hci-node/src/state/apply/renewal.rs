//! VMs that go on in a new process of their node while their guests run: migration in place.
//!
//! The run stays what it is: its epoch, its volumes' generations and its ports are the same, so there is nothing to hand over but the guest itself.
//! Its node sees to it that one of the two processes has the guest, and never both (`vmm_role/succession.rs`); here it is kept only that it is to be
//! done, for the node to begin it again after a crash, and for nothing else to be done to the VM meanwhile.

use super::{Applied, conflict, devices, migration, not_found, tasks};
use crate::state::{
    ClusterState, DesiredRun, Goal, Refusal, Renewal, RunEpoch, Severity, Subject, TaskError, Timestamp, VmId,
};

pub(super) fn begin(state: &mut ClusterState, id: VmId) -> Result<Applied, Refusal> {
    let vm = state.vms.get_mut(&id).ok_or_else(|| not_found("vm", id))?;
    let name = vm.name.clone();
    migration::check_none(vm)?;
    let run = match vm.assignment.filter(|_| vm.desired == DesiredRun::Running) {
        Some(run) if vm.restart.is_none() && vm.suspension.is_none() => run,
        _ => {
            return Err(conflict(
                format!("VM {name} does not run"),
                format!("see it: hci vm get {name}; a VM that is off starts in a new process anyway"),
            ));
        }
    };
    devices::check_settled(vm)?;
    vm.renewal = Some(Renewal { epoch: run.epoch });
    Ok(Applied::now("vm migrate", Subject::Vm(id), name).until(Goal::VmIsRenewed(id)))
}

/// The run goes on in a new process, or in the one that it was in.
pub(super) fn ended(
    state: &mut ClusterState,
    id: VmId,
    epoch: RunEpoch,
    error: Option<&TaskError>,
    at: Timestamp,
) -> Result<Applied, Refusal> {
    let vm = state.vms.get(&id).ok_or_else(|| not_found("vm", id))?;
    let name = vm.name.clone();
    if vm.renewal != Some(Renewal { epoch }) {
        return Err(conflict(format!("VM {name} is not moved into a new process"), "nothing is to be done"));
    }
    end(state, id, error, at);
    Ok(Applied::now("vm migrate", Subject::Vm(id), name))
}

/// Ends one that has not come to its end, for this reason.
pub(super) fn give_up(state: &mut ClusterState, id: VmId, why: &str, at: Timestamp) {
    let Some(vm) = state.vms.get(&id).filter(|vm| vm.renewal.is_some()) else { return };
    let error = TaskError { detail: why.to_owned(), next: format!("see the VM: hci vm get {}", vm.name) };
    end(state, id, Some(&error), at);
}

fn end(state: &mut ClusterState, id: VmId, error: Option<&TaskError>, at: Timestamp) {
    let Some(vm) = state.vms.get_mut(&id) else { return };
    vm.renewal = None;
    let (severity, kind, message) = match error {
        None => (Severity::Info, "vm-renewed", format!("VM {} goes on in a new process", vm.name)),
        Some(error) => (
            Severity::Warning,
            "vm-not-renewed",
            format!("VM {} did not move into a new process: {}", vm.name, error.detail),
        ),
    };
    state.note(at, severity, kind, Subject::Vm(id), message);
    tasks::settle(state, &Goal::VmIsRenewed(id), error, at);
}
