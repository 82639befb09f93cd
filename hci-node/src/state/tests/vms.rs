//! What VMs are made of, and what becomes of them after a crash.

use super::*;

fn set(vm: VmId, change: VmChange) -> Op {
    Op::SetVm { vm, change }
}

#[test]
fn a_crash_starts_a_vm_again_or_leaves_it_off() {
    for (after_crash, stays) in [(AfterCrash::Restart, true), (AfterCrash::Stop, false)] {
        let (mut state, id, _) = with_vm(3, 3);
        run(&mut state, set(id, VmChange { after_crash: Some(after_crash), ..Default::default() })).unwrap();
        run(&mut state, assign(id, 1, 0, &[])).unwrap();
        let epoch = state.vms[&id].assignment.expect("it runs").epoch;
        run(&mut state, Op::VmExited { vm: id, epoch, exit: VmExit::Crashed("a panic".into()) }).unwrap();
        assert_eq!(state.vms[&id].desired == DesiredRun::Running, stays);
        if !stays {
            run(&mut state, Op::SetVmDesired { vm: id, desired: DesiredRun::Running }).unwrap();
            assert_eq!(state.vms[&id].desired, DesiredRun::Running, "whoever wants to starts it");
        }
    }
}

#[test]
fn a_crash_on_the_way_to_a_restart_is_no_reason_to_stay_off() {
    let (mut state, id, _) = with_vm(3, 3);
    let after_crash = Some(AfterCrash::Stop);
    run(&mut state, set(id, VmChange { after_crash, ..Default::default() })).unwrap();
    run(&mut state, assign(id, 1, 0, &[])).unwrap();
    let epoch = state.vms[&id].assignment.expect("it runs").epoch;
    run(&mut state, Op::RestartVm(id)).unwrap();
    run(&mut state, Op::VmExited { vm: id, epoch, exit: VmExit::Crashed("a panic".into()) }).unwrap();
    assert_eq!(state.vms[&id].desired, DesiredRun::Running);
}

#[test]
fn what_is_given_changes_and_the_rest_stays() {
    let (mut state, id, _) = with_vm(3, 3);
    let before = state.vms[&id].clone();
    let change = VmChange { memory_bytes: Some(2 << 30), ..Default::default() };
    run(&mut state, set(id, change)).unwrap();
    assert_eq!(state.vms[&id], Vm { memory_bytes: 2 << 30, ..before.clone() });
    for bad in [
        VmChange { vcpus: Some(0), ..Default::default() },
        VmChange { vcpus: Some(129), ..Default::default() },
        VmChange { memory_bytes: Some((1 << 30) + 1), ..Default::default() },
        VmChange { memory_bytes: Some(5 << 40), ..Default::default() },
    ] {
        assert_eq!(refused(&mut state, set(id, bad)), RefusalKind::Invalid);
    }
    assert_eq!(state.vms[&id], Vm { memory_bytes: 2 << 30, ..before });
}
