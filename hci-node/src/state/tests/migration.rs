//! VMs that move while they run: there is always one run that is the VM, and it is never two.

use super::*;

/// What a random history may do about it; [`aim`] makes it fit.
pub(super) fn any_op() -> impl Strategy<Value = Op> {
    let vm = |n: u128| VmId(id(2000 + n));
    let (n, epoch) = (1..4u128, 0..4u64);
    prop_oneof![
        4 => (n.clone(), n.clone()).prop_map(move |(n, to)| migrate(vm(n), to)),
        3 => (n.clone(), epoch.clone()).prop_map(move |(n, epoch)| arrived(vm(n), epoch)),
        1 => (n.clone(), epoch.clone()).prop_map(move |(n, epoch)| failed(vm(n), epoch)),
        1 => (n.clone(), epoch).prop_map(move |(n, epoch)| exited(vm(n), epoch)),
        1 => n.prop_map(move |n| Op::CancelMigration(vm(n))),
    ]
}

/// Has steps of a migration mean the present one, mostly.
pub(super) fn aim(op: Op, step: usize, state: &ClusterState) -> Op {
    let newest = |vm: VmId, epoch| state.vms.get(&vm).map_or(epoch, |vm| vm.epoch);
    match op {
        Op::VmArrived { vm, epoch } if !step.is_multiple_of(4) => {
            Op::VmArrived { vm, epoch: newest(vm, epoch) }
        }
        Op::MigrationFailed { vm, epoch, error } if !step.is_multiple_of(4) => {
            Op::MigrationFailed { vm, epoch: newest(vm, epoch), error }
        }
        op => op,
    }
}

/// The latest run of each VM in a random history.
#[derive(Default)]
pub(super) struct Runs(std::collections::BTreeMap<VmId, Assignment>);

impl Runs {
    /// A VM runs once in a run epoch, on one node, and a run that was left behind never comes back.
    pub(super) fn follow(&mut self, after: &ClusterState) -> Result<(), TestCaseError> {
        for (id, vm) in &after.vms {
            let Some(run) = vm.assignment else { continue };
            let is_other = |last: &Assignment| (last.node, last.epoch) != (run.node, run.epoch);
            if let Some(last) = self.0.insert(*id, run).filter(is_other) {
                prop_assert!(run.epoch > last.epoch, "{run:?} is the VM after {last:?}");
            }
        }
        Ok(())
    }
}

fn migrate(vm: VmId, to: u128) -> Op {
    Op::MigrateVm { vm, to: node_id(to), terms: MigrationTerms::default() }
}

fn arrived(vm: VmId, epoch: u64) -> Op {
    Op::VmArrived { vm, epoch: RunEpoch(epoch) }
}

fn failed(vm: VmId, epoch: u64) -> Op {
    let error = TaskError { detail: "a cable was pulled".into(), next: "plug it in".into() };
    Op::MigrationFailed { vm, epoch: RunEpoch(epoch), error }
}

fn exited(vm: VmId, epoch: u64) -> Op {
    Op::VmExited { vm, epoch: RunEpoch(epoch), exit: VmExit::Crashed("a panic".into()) }
}

/// A VM on its way from node 1, where it is run 1, to node 2, where it will be run 2.
fn moving() -> (ClusterState, VmId, VolumeId, TaskId) {
    let (mut state, vm, volume) = with_vm(3, 3);
    run(&mut state, assign(vm, 1, 0, &[])).unwrap();
    run(&mut state, Op::VolumeOpened { volume, generation: Generation(1) }).unwrap();
    let task = TaskId(id(9));
    state.apply(&Command { at: Timestamp(1), task: Some(task), op: migrate(vm, 2) }).unwrap();
    (state, vm, volume, task)
}

fn check(state: &ClusterState) {
    assert_eq!(invariants::violations(state), Vec::<String>::new());
}

#[test]
fn vm_volumes_and_ports_arrive_in_one_step() {
    let (mut state, vm, volume, task) = moving();
    check(&state);
    assert_eq!(
        state.vms[&vm].assignment.unwrap().node,
        node_id(1),
        "it is where it was until it has arrived"
    );
    assert_eq!(state.vms_arriving(node_id(2)).count(), 1);
    assert_eq!(state.tasks[&task].state, TaskState::Running);

    // Its node lets go of the volume, clean, and nobody has it before the VM has arrived.
    let close = Op::CloseVolume { volume, generation: Generation(1), cleanliness: Cleanliness::Clean };
    run(&mut state, close.clone()).unwrap();
    let held = &state.volumes[&volume];
    assert_eq!((held.coordinator, held.cleanliness), (Some(node_id(1)), Cleanliness::Clean));
    assert_eq!(held.generation, Generation(2), "nobody has it open now");
    assert_eq!(refused(&mut state, open(volume, 2, 2, &[])), RefusalKind::Conflict);

    run(&mut state, arrived(vm, 2)).unwrap();
    run(&mut state, arrived(vm, 2)).expect("the answer was lost");
    check(&state);
    let now = &state.volumes[&volume];
    assert_eq!((now.coordinator, now.generation), (Some(node_id(2)), Generation(3)));
    assert_eq!(now.cleanliness, Cleanliness::Clean, "its copies need not be compared");
    let run_now = state.vms[&vm].assignment.unwrap();
    assert_eq!((run_now.node, run_now.epoch), (node_id(2), RunEpoch(2)));
    assert_eq!(state.vms_arriving(node_id(2)).count(), 0);
    assert_eq!(state.tasks[&task].state, TaskState::Running, "it is not seen there yet");
    assert_eq!(refused(&mut state, failed(vm, 2)), RefusalKind::Conflict, "it comes too late");
    assert_eq!(refused(&mut state, close), RefusalKind::Fenced);
    // What happens to the run that was left behind is nothing of the VM's any more.
    run(&mut state, exited(vm, 1)).unwrap();
    assert!(state.vms[&vm].assignment.is_some());
}

#[test]
fn what_comes_to_nothing_leaves_the_run_and_its_number_is_not_used_again() {
    let error = |why: &str| why.to_owned();
    let stop = |vm| Op::SetVmDesired { vm, desired: DesiredRun::Stopped(StopMode::Graceful) };
    let (state, vm, _, task) = moving();
    for (end, why, stays) in [
        (failed(vm, 2), error("a cable was pulled"), true),
        (Op::CancelMigration(vm), error("it was cancelled"), true),
        (exited(vm, 2), error("could not be made there: a panic"), true),
        (exited(vm, 1), error("its run ended"), false),
        (stop(vm), error("the VM was stopped"), true),
        (assign(vm, 3, 2, &[1]), error("node was lost"), false),
    ] {
        let mut state = state.clone();
        run(&mut state, end.clone()).unwrap();
        check(&state);
        let now = &state.vms[&vm];
        assert_eq!(now.migration, None, "{end:?}");
        assert_eq!(now.assignment.is_some_and(|run| run.epoch == RunEpoch(1)), stays, "{end:?}");
        let TaskState::Failed(failure) = &state.tasks[&task].state else { panic!("{end:?}") };
        assert!(failure.detail.contains(&why), "{failure:?}");
        assert_eq!(refused(&mut state, arrived(vm, 2)), RefusalKind::Conflict, "it comes too late");
        if let Some(run) = state.vms[&vm].assignment {
            assert!(run.epoch == RunEpoch(1) || run.epoch > RunEpoch(2), "the number is not used again");
        }
    }
    // Once more, with the next number.
    let mut state = state;
    run(&mut state, Op::CancelMigration(vm)).unwrap();
    assert_eq!(refused(&mut state, Op::CancelMigration(vm)), RefusalKind::Conflict);
    run(&mut state, migrate(vm, 3)).unwrap();
    assert_eq!(refused(&mut state, arrived(vm, 2)), RefusalKind::Conflict);
    run(&mut state, arrived(vm, 3)).unwrap();
    check(&state);
    assert_eq!(state.vms[&vm].assignment.unwrap().node, node_id(3));
}

#[test]
fn what_cannot_move_is_refused_and_says_why() {
    let (mut state, vm, _) = with_vm(3, 3);
    assert_eq!(refused(&mut state, migrate(vm, 2)), RefusalKind::Conflict, "it does not run");
    run(&mut state, assign(vm, 1, 0, &[])).unwrap();
    assert_eq!(refused(&mut state, migrate(vm, 1)), RefusalKind::Conflict, "it is there");
    assert_eq!(refused(&mut state, migrate(vm, 7)), RefusalKind::NotFound);
    let nothing = Op::MigrateVm {
        vm,
        to: node_id(2),
        terms: MigrationTerms { bytes_per_second: Some(0), longest_pause_ms: None },
    };
    assert_eq!(refused(&mut state, nothing), RefusalKind::Invalid);
    let draining = Op::SetNodeService { node: node_id(2), service: NodeService::Draining };
    run(&mut state, draining).unwrap();
    let refusal = run(&mut state, migrate(vm, 2)).unwrap_err();
    assert!(refusal.detail.contains("being emptied"), "{refusal}");
    run(&mut state, migrate(vm, 3)).unwrap();
    for op in [migrate(vm, 3), Op::RestartVm(vm), Op::PauseVm(vm), Op::ResumeVm(vm)] {
        let refusal = run(&mut state, op.clone()).unwrap_err();
        assert!(refusal.detail.contains("is being migrated"), "{op:?}: {refusal}");
        assert!(refusal.next.contains("--cancel"), "{}", refusal.next);
    }
}

#[test]
fn a_paused_vm_arrives_paused() {
    let (mut state, vm, _) = with_vm(3, 3);
    run(&mut state, assign(vm, 1, 0, &[])).unwrap();
    run(&mut state, Op::PauseVm(vm)).unwrap();
    run(&mut state, migrate(vm, 2)).unwrap();
    run(&mut state, arrived(vm, 2)).unwrap();
    check(&state);
    assert_eq!(state.vms[&vm].paused, Some(RunEpoch(2)));
    run(&mut state, Op::ResumeVm(vm)).unwrap();
    assert_eq!(state.vms[&vm].paused, None);
}
