//! VMs that go on in a new process of their node.

use super::*;

/// What a random history may do about it; [`aim`] makes it fit.
pub(super) fn any_op() -> impl Strategy<Value = Op> {
    let vm = |n: u128| VmId(id(2000 + n));
    prop_oneof![
        (1..4u128).prop_map(move |n| Op::RenewVm(vm(n))),
        (1..4u128, proptest::option::of(Just(why()))).prop_map(move |(n, error)| Op::RenewalEnded {
            vm: vm(n),
            epoch: RunEpoch(1),
            error
        }),
    ]
}

/// Has the end mean the present one.
pub(super) fn aim(op: Op, state: &ClusterState) -> Op {
    match op {
        Op::RenewalEnded { vm, epoch, error } => {
            let present = state.vms.get(&vm).and_then(|vm| vm.renewal).map_or(epoch, |renewal| renewal.epoch);
            Op::RenewalEnded { vm, epoch: present, error }
        }
        op => op,
    }
}

fn why() -> TaskError {
    TaskError { detail: "no memory".into(), next: "get some".into() }
}

/// A VM that is run 1 on node 1 and gets a new process.
fn renewing() -> (ClusterState, VmId, TaskId) {
    let (mut state, vm, _) = with_vm(3, 3);
    run(&mut state, assign(vm, 1, 0, &[])).unwrap();
    let task = TaskId(id(9));
    state.apply(&Command { at: Timestamp(1), task: Some(task), op: Op::RenewVm(vm) }).unwrap();
    (state, vm, task)
}

fn check(state: &ClusterState) {
    assert_eq!(invariants::violations(state), Vec::<String>::new());
}

fn ended(vm: VmId, error: Option<TaskError>) -> Op {
    Op::RenewalEnded { vm, epoch: RunEpoch(1), error }
}

#[test]
fn the_run_stays_the_same_and_the_task_says_how_it_ended() {
    let (state, vm, task) = renewing();
    check(&state);
    let before = state.vms[&vm].assignment;
    for error in [None, Some(why())] {
        let mut state = state.clone();
        run(&mut state, ended(vm, error.clone())).unwrap();
        check(&state);
        assert_eq!((state.vms[&vm].assignment, state.vms[&vm].renewal), (before, None));
        let expected = error.map_or(TaskState::Done, TaskState::Failed);
        assert_eq!(state.tasks[&task].state, expected);
        assert_eq!(refused(&mut state, ended(vm, None)), RefusalKind::Conflict, "it is over");
    }
}

#[test]
fn nothing_else_is_done_to_the_vm_meanwhile_and_the_end_of_its_run_ends_it() {
    let (state, vm, task) = renewing();
    let migrate = Op::MigrateVm { vm, to: node_id(2), terms: MigrationTerms::default() };
    for op in [Op::RenewVm(vm), migrate, Op::RestartVm(vm), Op::PauseVm(vm), Op::ResumeVm(vm)] {
        let refusal = run(&mut state.clone(), op.clone()).unwrap_err();
        assert!(refusal.detail.contains("into a new process"), "{op:?}: {refusal}");
    }
    let exited = Op::VmExited { vm, epoch: RunEpoch(1), exit: VmExit::Crashed("a panic".into()) };
    let stop = Op::SetVmDesired { vm, desired: DesiredRun::Stopped(StopMode::Graceful) };
    for end in [exited, stop, assign(vm, 3, 1, &[1])] {
        let mut state = state.clone();
        run(&mut state, end.clone()).unwrap();
        check(&state);
        assert_eq!(state.vms[&vm].renewal, None, "{end:?}");
        assert!(matches!(state.tasks[&task].state, TaskState::Failed(_)), "{end:?}");
    }
    let (mut state, vm, _) = with_vm(3, 3);
    assert_eq!(refused(&mut state, Op::RenewVm(vm)), RefusalKind::Conflict, "it does not run");
}
