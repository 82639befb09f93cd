//! VMs that are paused, suspended and resumed: there is one run that may go on, or one state that a run may be made from.

use super::*;
use vmm::Processor;

/// What a random history may do about it; [`aim`] makes it fit.
pub(super) fn any_op() -> impl Strategy<Value = Op> {
    let vm = |n: u128| VmId(id(2000 + n));
    let n = 1..4u128;
    let epoch = 0..4u64;
    prop_oneof![
        1 => n.clone().prop_map(move |n| Op::PauseVm(vm(n))),
        2 => n.clone().prop_map(move |n| Op::ResumeVm(vm(n))),
        3 => n.clone().prop_map(move |n| suspend(vm(n), 0)),
        3 => (n.clone(), epoch.clone(), 0..2u64).prop_map(move |(n, epoch, generation)| written(vm(n), epoch, generation)),
        1 => (n.clone(), epoch.clone()).prop_map(move |(n, epoch)| failed(vm(n), epoch)),
        2 => (n.clone(), epoch).prop_map(move |(n, epoch)| Op::SuspensionUsed { vm: vm(n), epoch: RunEpoch(epoch) }),
        1 => (n, any::<bool>()).prop_map(move |(n, running)| Op::DiscardSuspension {
            vm: vm(n),
            desired: if running { DesiredRun::Running } else { DesiredRun::Stopped(StopMode::Force) },
        }),
    ]
}

/// Has a suspension use a volume that there is not, and its steps mean the present run, mostly.
pub(super) fn aim(op: Op, step: usize, state: &ClusterState) -> Op {
    let present = |vm: VmId| state.vms.get(&vm).map(|vm| vm.epoch);
    match op {
        Op::SuspendVm { vm, unreachable, .. } => match suspend(vm, 30_000 + step as u128) {
            Op::SuspendVm { volume, .. } => Op::SuspendVm { vm, volume, unreachable },
            other => other,
        },
        Op::VmSuspended { vm, epoch, generation, bytes, processor } if !step.is_multiple_of(4) => {
            let volume = state.vms.get(&vm).and_then(|vm| state.volumes.get(&vm.suspension.as_ref()?.volume));
            let generation = volume.map_or(generation, |volume| volume.generation);
            Op::VmSuspended { vm, epoch: present(vm).unwrap_or(epoch), generation, bytes, processor }
        }
        Op::SuspensionUsed { vm, epoch } if !step.is_multiple_of(4) => {
            Op::SuspensionUsed { vm, epoch: present(vm).unwrap_or(epoch) }
        }
        op => op,
    }
}

/// What was used up, or given up, in a random history.
#[derive(Default)]
pub(super) struct Used(std::collections::BTreeMap<VmId, RunEpoch>);

impl Used {
    /// A state that was forgotten never comes back, and no run is both meant to go on and to be made from.
    pub(super) fn follow(
        &mut self,
        before: &ClusterState,
        after: &ClusterState,
    ) -> Result<(), TestCaseError> {
        for (id, vm) in &after.vms {
            let saved = vm.saved().map(|saved| saved.epoch);
            if let (Some(saved), Some(used)) = (saved, self.0.get(id)) {
                prop_assert!(saved > *used, "a state is there again that was used up");
            }
            let was = before.vms.get(id).and_then(Vm::saved).map(|saved| saved.epoch);
            if let Some(was) = was.filter(|was| saved != Some(*was)) {
                self.0.insert(*id, was);
            }
        }
        Ok(())
    }
}

fn suspend(vm: VmId, number: u128) -> Op {
    let volume = NewVolume { name: format!("state{number}"), ..new_volume(number, 2) };
    Op::SuspendVm { vm, volume, unreachable: vec![] }
}

fn processor() -> Processor {
    Processor { vendor: "AuthenticAMD".into(), features: 7 }
}

fn written(vm: VmId, epoch: u64, generation: u64) -> Op {
    let (epoch, generation) = (RunEpoch(epoch), Generation(generation));
    Op::VmSuspended { vm, epoch, generation, bytes: 5 << 20, processor: processor() }
}

fn failed(vm: VmId, epoch: u64) -> Op {
    let error = TaskError { detail: "no room".into(), next: "make some".into() };
    Op::SuspensionFailed { vm, epoch: RunEpoch(epoch), error }
}

fn exited(vm: VmId, epoch: u64, exit: VmExit) -> Op {
    Op::VmExited { vm, epoch: RunEpoch(epoch), exit }
}

fn stop(vm: VmId) -> Op {
    Op::SetVmDesired { vm, desired: DesiredRun::Stopped(StopMode::Graceful) }
}

fn start(vm: VmId) -> Op {
    Op::SetVmDesired { vm, desired: DesiredRun::Running }
}

const STATE: u128 = 50;

fn state_volume() -> VolumeId {
    new_volume(STATE, 2).id
}

/// A VM that runs on node 1 and is being suspended there by a task.
fn saving() -> (ClusterState, VmId, TaskId) {
    let (mut state, vm, _) = with_vm(3, 3);
    run(&mut state, assign(vm, 1, 0, &[])).unwrap();
    let task = TaskId(id(9));
    let command = Command { at: Timestamp(1), task: Some(task), op: suspend(vm, STATE) };
    state.apply(&command).unwrap();
    (state, vm, task)
}

/// One that is suspended.
fn suspended() -> (ClusterState, VmId) {
    let (mut state, vm, _) = saving();
    run(&mut state, written(vm, 1, 1)).unwrap();
    run(&mut state, exited(vm, 1, VmExit::Stopped)).unwrap();
    for volume in [state_volume(), new_volume(1, 3).id] {
        let generation = state.volumes[&volume].generation;
        run(&mut state, Op::CloseVolume { volume, generation, cleanliness: Cleanliness::Clean }).unwrap();
    }
    assert!(state.vms[&vm].is_suspended());
    (state, vm)
}

fn check(state: &ClusterState) {
    assert_eq!(invariants::violations(state), Vec::<String>::new());
}

#[test]
fn a_pause_is_of_the_present_run_and_ends_with_it() {
    let (mut state, vm, _) = with_vm(3, 3);
    assert_eq!(refused(&mut state, Op::PauseVm(vm)), RefusalKind::Conflict, "it does not run");
    run(&mut state, assign(vm, 1, 0, &[])).unwrap();
    assert_eq!(refused(&mut state, Op::ResumeVm(vm)), RefusalKind::Conflict, "it is not paused");
    run(&mut state, Op::PauseVm(vm)).unwrap();
    assert_eq!(state.vms[&vm].paused, Some(RunEpoch(1)));
    assert_eq!(refused(&mut state, Op::PauseVm(vm)), RefusalKind::Conflict);
    run(&mut state, Op::ResumeVm(vm)).unwrap();
    assert_eq!(state.vms[&vm].paused, None);
    for ends in [stop(vm), Op::RestartVm(vm), assign(vm, 2, 1, &[1]), exited(vm, 1, VmExit::GuestShutdown)] {
        let mut state = state.clone();
        run(&mut state, Op::PauseVm(vm)).unwrap();
        run(&mut state, ends.clone()).unwrap();
        assert_eq!(state.vms[&vm].paused, None, "{ends:?}");
        check(&state);
    }
}

#[test]
fn a_vm_is_suspended_on_one_node_and_goes_on_on_another() {
    let (mut state, vm, _) = saving();
    let volume = &state.volumes[&state_volume()];
    assert_eq!((volume.coordinator, volume.owner), (Some(node_id(1)), VolumeOwner::Suspension(vm)));
    assert_eq!(state.volume_use(volume), VolumeUse::Internal);
    assert_eq!(refused(&mut state, suspend(vm, STATE + 1)), RefusalKind::Conflict);
    assert_eq!(refused(&mut state, Op::DeleteVolume(state_volume())), RefusalKind::Conflict);
    assert_eq!(refused(&mut state, written(vm, 1, 0)), RefusalKind::Fenced, "of an older generation");
    run(&mut state, written(vm, 1, 1)).unwrap();
    run(&mut state, written(vm, 1, 1)).expect("the answer was lost");
    check(&state);
    assert!(state.vms[&vm].is_written(RunEpoch(1)) && state.vms[&vm].restoring().is_none());
    run(&mut state, exited(vm, 1, VmExit::Stopped)).unwrap();
    assert_eq!(state.volume_use(&state.volumes[&state_volume()]), VolumeUse::Nothing);

    // What it is made of stays that of the saved run.
    let change = VmChange { memory_bytes: Some(4 << 30), ..Default::default() };
    run(&mut state, Op::SetVm { vm, change }).unwrap();
    run(&mut state, Op::ResumeVm(vm)).unwrap();
    assert_eq!(refused(&mut state, Op::ResumeVm(vm)), RefusalKind::Conflict);
    assert_eq!(
        refused(&mut state, assign(vm, 2, 1, &[])),
        RefusalKind::Conflict,
        "its volumes are open elsewhere"
    );
    run(&mut state, assign(vm, 2, 1, &[1])).unwrap();
    check(&state);
    let restored = state.vms[&vm].restoring().unwrap();
    assert_eq!((restored.node, restored.make.memory_bytes), (node_id(2), 1 << 30));
    assert_eq!(state.volume_use(&state.volumes[&state_volume()]), VolumeUse::Internal);

    let used = |epoch| Op::SuspensionUsed { vm, epoch: RunEpoch(epoch) };
    assert_eq!(refused(&mut state, used(1)), RefusalKind::Conflict, "an older run");
    run(&mut state, used(2)).unwrap();
    run(&mut state, used(2)).expect("the answer was lost");
    check(&state);
    assert!(!state.volumes.contains_key(&state_volume()) && state.purge.contains_key(&state_volume()));
    run(&mut state, exited(vm, 2, VmExit::NodeLost)).unwrap();
    run(&mut state, assign(vm, 3, 2, &[])).unwrap_err();
    run(&mut state, assign(vm, 3, 2, &[2])).unwrap();
    assert_eq!(state.vms[&vm].assignment.unwrap().make.memory_bytes, 4 << 30, "it boots, as it is set");
}

#[test]
fn a_suspension_that_does_not_come_to_its_end_leaves_the_run_and_no_volume() {
    let ends = |vm| {
        [
            (failed(vm, 1), true),
            (Op::ResumeVm(vm), true),
            (stop(vm), false),
            (exited(vm, 1, VmExit::Crashed("a panic".into())), true),
            (exited(vm, 1, VmExit::GuestShutdown), false),
            (assign(vm, 2, 1, &[1]), true),
        ]
    };
    let (state, vm, task) = saving();
    for (end, wanted) in ends(vm) {
        let mut state = state.clone();
        run(&mut state, end.clone()).unwrap();
        check(&state);
        assert_eq!(state.vms[&vm].suspension, None, "{end:?}");
        assert_eq!(state.vms[&vm].desired == DesiredRun::Running, wanted, "{end:?}");
        assert!(!state.volumes.contains_key(&state_volume()));
        assert!(matches!(state.tasks[&task].state, TaskState::Failed(_)), "{end:?}");
        assert_eq!(refused(&mut state, written(vm, 1, 1)), RefusalKind::Conflict, "it comes too late");
    }
}

#[test]
fn a_run_that_could_not_be_made_from_it_leaves_the_vm_suspended() {
    let (mut state, vm) = suspended();
    run(&mut state, Op::ResumeVm(vm)).unwrap();
    run(&mut state, assign(vm, 2, 1, &[])).unwrap();
    assert_eq!(refused(&mut state, Op::RestartVm(vm)), RefusalKind::Conflict);
    assert_eq!(refused(&mut state, Op::PauseVm(vm)), RefusalKind::Conflict);
    // Its node is lost before it began: it is made again elsewhere.
    run(&mut state, assign(vm, 3, 2, &[2])).unwrap();
    assert_eq!(refused(&mut state, Op::SuspensionUsed { vm, epoch: RunEpoch(2) }), RefusalKind::Conflict);
    check(&state);
    // Its state is damaged: it stays suspended, and says so.
    run(&mut state, exited(vm, 3, VmExit::Crashed("a checksum differs".into()))).unwrap();
    check(&state);
    assert!(state.vms[&vm].is_suspended() && state.volumes.contains_key(&state_volume()));
    assert!(state.events.back().unwrap().message.contains("stays suspended: a checksum differs"));
    // Whoever changes their mind stops it before it begins.
    run(&mut state, Op::ResumeVm(vm)).unwrap();
    run(&mut state, assign(vm, 3, 3, &[2])).unwrap();
    run(&mut state, stop(vm)).unwrap();
    run(&mut state, exited(vm, 4, VmExit::Stopped)).unwrap();
    assert!(state.vms[&vm].is_suspended());
    check(&state);
}

#[test]
fn a_suspended_vm_is_started_stopped_and_deleted_in_clear_ways() {
    let (state, vm) = suspended();
    let refusal = run(&mut state.clone(), stop(vm)).unwrap_err();
    assert!(refusal.detail.contains("is suspended") && refusal.next.contains("--discard-state"), "{refusal}");
    assert_eq!(refused(&mut state.clone(), suspend(vm, STATE + 1)), RefusalKind::Conflict);
    assert_eq!(refused(&mut state.clone(), Op::PauseVm(vm)), RefusalKind::Conflict);

    let mut started = state.clone();
    run(&mut started, start(vm)).unwrap();
    run(&mut started, assign(vm, 2, 1, &[])).unwrap();
    assert!(started.vms[&vm].restoring().is_some(), "starting is resuming");

    for (desired, runs) in [(DesiredRun::Running, true), (DesiredRun::Stopped(StopMode::Force), false)] {
        let mut state = state.clone();
        run(&mut state, Op::DiscardSuspension { vm, desired }).unwrap();
        check(&state);
        assert!(!state.volumes.contains_key(&state_volume()));
        assert_eq!(state.vms[&vm].desired == DesiredRun::Running, runs);
        assert_eq!(refused(&mut state, Op::DiscardSuspension { vm, desired }), RefusalKind::Conflict);
    }

    let mut deleted = state;
    run(&mut deleted, Op::DeleteVm(vm)).unwrap();
    check(&deleted);
    assert!(deleted.volumes.is_empty() && deleted.purge.contains_key(&state_volume()));
}

#[test]
fn what_was_told_under_an_older_generation_comes_too_late() {
    let (mut state, vm, _) = saving();
    run(&mut state, open(state_volume(), 1, 1, &[])).unwrap();
    assert_eq!(refused(&mut state, written(vm, 1, 1)), RefusalKind::Fenced);
    run(&mut state, written(vm, 1, 2)).unwrap();
    // Raising it once more takes nothing away.
    run(&mut state, open(state_volume(), 1, 2, &[])).unwrap();
    assert!(state.vms[&vm].is_written(RunEpoch(1)));
    check(&state);
}

#[test]
fn there_is_no_suspending_without_room() {
    let (mut state, vm, _) = with_vm(3, 3);
    run(&mut state, assign(vm, 1, 0, &[])).unwrap();
    let volume = NewVolume { size_bytes: 2 << 40, ..new_volume(STATE, 3) };
    let refusal = run(&mut state, Op::SuspendVm { vm, volume, unreachable: vec![] }).unwrap_err();
    assert_eq!(refusal.kind, RefusalKind::Capacity);
    assert_eq!(state.vms[&vm].suspension, None);
}
