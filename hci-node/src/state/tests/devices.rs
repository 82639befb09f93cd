//! Devices that come and go, and machines that grow: what is asked for, what a machine has, and that the two meet.

use super::*;

/// What a random history may do about it; [`aim`] makes it fit.
pub(super) fn any_op() -> impl Strategy<Value = Op> {
    let vm = |n: u128| VmId(id(2000 + n));
    let volume = |n: u128| VolumeId(id(1000 + n));
    let (n, epoch) = (1..4u128, 0..4u64);
    let device = prop_oneof![
        3 => n.clone().prop_map(move |n| VmDevice::Disk(volume(n))),
        1 => n.clone().prop_map(|n| VmDevice::Nic(PortId(id(3000 + n)))),
    ];
    let then = prop_oneof![Just(AfterDetach::Keep), Just(AfterDetach::Delete)];
    prop_oneof![
        4 => (n.clone(), n.clone()).prop_map(move |(n, disk)| attach(vm(n), volume(disk))),
        1 => (n.clone(), 4..7u128).prop_map(move |(n, new)| Op::AttachDisk {
            vm: vm(n),
            disk: GivenDisk::New(new_volume(new, 2)),
            unreachable: vec![],
        }),
        1 => (n.clone(), 4..7u128).prop_map(move |(n, port)| Op::AttachNic {
            vm: vm(n),
            port: NewPort { id: PortId(id(3000 + port)), network: NetworkId(id(300)) },
        }),
        3 => (n.clone(), device.clone(), then)
            .prop_map(move |(n, device, then)| Op::DetachDevice { vm: vm(n), device, then }),
        2 => (n.clone(), epoch.clone(), device.clone())
            .prop_map(move |(n, epoch, device)| Op::DeviceJoined { vm: vm(n), epoch: RunEpoch(epoch), device }),
        2 => (n.clone(), epoch.clone(), device)
            .prop_map(move |(n, epoch, device)| Op::DeviceLeft { vm: vm(n), epoch: RunEpoch(epoch), device }),
        2 => (n.clone(), 1..6u8, 1..6u64).prop_map(move |(n, vcpus, gib)| resize(vm(n), vcpus, gib)),
        2 => (n, epoch).prop_map(move |(n, epoch)| Op::VmReshaped {
            vm: vm(n),
            epoch: RunEpoch(epoch),
            shape: Shape { vcpus: 1, memory_bytes: 1 << 30 },
        }),
    ]
}

/// Has most of it mean a VM's own devices and its present run.
pub(super) fn aim(op: Op, step: usize, state: &ClusterState) -> Op {
    if step.is_multiple_of(4) {
        return op;
    }
    let run =
        |vm: &VmId, epoch| state.vms.get(vm).and_then(|vm| vm.assignment).map_or(epoch, |run| run.epoch);
    let own = |vm: &VmId, device| {
        let devices = state.vms.get(vm).map(|vm| &vm.devices);
        devices.and_then(|devices| devices.keys().nth(step % devices.len().max(1)).copied()).unwrap_or(device)
    };
    match op {
        Op::DetachDevice { vm, device, then } => Op::DetachDevice { vm, device: own(&vm, device), then },
        Op::DeviceJoined { vm, epoch, device } => {
            Op::DeviceJoined { vm, epoch: run(&vm, epoch), device: own(&vm, device) }
        }
        Op::DeviceLeft { vm, epoch, device } => {
            Op::DeviceLeft { vm, epoch: run(&vm, epoch), device: own(&vm, device) }
        }
        Op::VmReshaped { vm, epoch, shape } => {
            let shape = state.vms.get(&vm).and_then(|vm| vm.reshaping).unwrap_or(shape);
            Op::VmReshaped { vm, epoch: run(&vm, epoch), shape }
        }
        op => op,
    }
}

fn attach(vm: VmId, volume: VolumeId) -> Op {
    Op::AttachDisk { vm, disk: GivenDisk::Volume(volume), unreachable: vec![] }
}

fn detach(vm: VmId, volume: VolumeId, then: AfterDetach) -> Op {
    Op::DetachDevice { vm, device: VmDevice::Disk(volume), then }
}

fn resize(vm: VmId, vcpus: u8, gib: u64) -> Op {
    let change = VmChange { vcpus: Some(vcpus), memory_bytes: Some(gib << 30), ..Default::default() };
    Op::SetVm { vm, change }
}

fn asked(state: &mut ClusterState, n: u128, op: Op) -> TaskId {
    let task = TaskId(id(9000 + n));
    state.apply(&Command { at: Timestamp(1), task: Some(task), op }).unwrap();
    task
}

fn running() -> (ClusterState, VmId, VolumeId) {
    let (mut state, vm, _) = with_vm(3, 3);
    let volume = with_volume(&mut state, 3);
    run(&mut state, assign(vm, 1, 0, &[])).unwrap();
    (state, vm, volume)
}

#[test]
fn a_running_vm_gets_a_disk_that_is_open_where_it_runs_and_loses_it_when_its_guest_lets_go() {
    let (mut state, vm, volume) = running();
    let (device, epoch) = (VmDevice::Disk(volume), RunEpoch(1));
    let task = asked(&mut state, 1, attach(vm, volume));
    assert_eq!(state.volumes[&volume].coordinator, Some(node_id(1)));
    assert_eq!(state.vms[&vm].devices[&device], DevicePlace { slot: 4, stage: DeviceStage::Joining });
    assert_eq!(state.tasks[&task].state, TaskState::Running);
    assert_eq!(refused(&mut state, Op::DeleteVolume(volume)), RefusalKind::Conflict);
    run(&mut state, Op::DeviceJoined { vm, epoch, device }).unwrap();
    assert_eq!(state.tasks[&task].state, TaskState::Done);

    let task = asked(&mut state, 2, detach(vm, volume, AfterDetach::Keep));
    assert_eq!(state.tasks[&task].state, TaskState::Running);
    assert_eq!(state.volumes[&volume].owner, VolumeOwner::Vm(vm), "its guest still writes to it");
    run(&mut state, Op::DeviceLeft { vm, epoch, device }).unwrap();
    assert_eq!(state.tasks[&task].state, TaskState::Done);
    assert_eq!(state.volumes[&volume].owner, VolumeOwner::None);
    assert!(!state.vms[&vm].disks.contains(&volume));
    assert_eq!(state.volume_use(&state.volumes[&volume]), VolumeUse::Nothing, "its node closes it");
}

#[test]
fn what_is_under_way_when_a_run_ends_is_done_with_it() {
    let (mut state, vm, volume) = running();
    let fresh = VolumeId(id(1004));
    let new = GivenDisk::New(new_volume(4, 2));
    run(&mut state, Op::AttachDisk { vm, disk: new, unreachable: vec![] }).unwrap();
    run(&mut state, attach(vm, volume)).unwrap();
    run(&mut state, Op::DeviceJoined { vm, epoch: RunEpoch(1), device: VmDevice::Disk(volume) }).unwrap();
    let leaves = asked(&mut state, 1, detach(vm, volume, AfterDetach::Delete));
    let grows = asked(&mut state, 2, resize(vm, 2, 2));
    run(&mut state, Op::VmExited { vm, epoch: RunEpoch(1), exit: VmExit::Crashed("gone".into()) }).unwrap();
    assert_eq!(state.tasks[&leaves].state, TaskState::Done);
    assert_eq!(state.tasks[&grows].state, TaskState::Done, "the next machine is that large");
    assert!(!state.volumes.contains_key(&volume));
    assert_eq!(state.vms[&vm].devices[&VmDevice::Disk(fresh)].stage, DeviceStage::Present);
    run(&mut state, assign(vm, 1, 1, &[])).unwrap();
    let make = state.vms[&vm].assignment.unwrap().make;
    assert_eq!(make.shape(), Shape { vcpus: 2, memory_bytes: 2 << 30 });
    assert_eq!(invariants::violations(&state), Vec::<String>::new());
}

#[test]
fn the_disk_that_a_guest_booted_from_stays_and_so_does_what_others_have() {
    let (mut state, vm, volume) = running();
    let boot = state.vms[&vm].disks[0];
    assert_eq!(refused(&mut state, detach(vm, boot, AfterDetach::Keep)), RefusalKind::Conflict);
    run(&mut state, attach(vm, volume)).unwrap();
    let other = new_vm(2, vec![]);
    let other_id = other.id;
    run(&mut state, Op::CreateVm { vm: other, unreachable: vec![] }).unwrap();
    assert_eq!(refused(&mut state, attach(other_id, volume)), RefusalKind::Conflict);
    assert_eq!(refused(&mut state, attach(other_id, VolumeId(id(1099)))), RefusalKind::NotFound);
}

#[test]
fn nothing_comes_or_goes_while_a_vm_moves_and_it_does_not_move_while_something_comes() {
    let (mut state, vm, volume) = running();
    let migrate = Op::MigrateVm { vm, to: node_id(2), terms: MigrationTerms::default() };
    run(&mut state, attach(vm, volume)).unwrap();
    assert_eq!(refused(&mut state, migrate.clone()), RefusalKind::Conflict);
    let joined = Op::DeviceJoined { vm, epoch: RunEpoch(1), device: VmDevice::Disk(volume) };
    run(&mut state, joined.clone()).unwrap();
    assert_eq!(refused(&mut state, joined), RefusalKind::Conflict, "it is told once");
    run(&mut state, migrate).unwrap();
    assert_eq!(refused(&mut state, detach(vm, volume, AfterDetach::Keep)), RefusalKind::Conflict);
    run(&mut state, Op::VmArrived { vm, epoch: RunEpoch(2) }).unwrap();
    assert_eq!(state.volumes[&volume].coordinator, Some(node_id(2)), "it came along");
    run(&mut state, detach(vm, volume, AfterDetach::Keep)).unwrap();
}

#[test]
fn slots_are_given_again_and_run_out() {
    let (mut state, vm, volume) = with_vm(3, 3);
    let spare = with_volume(&mut state, 2);
    run(&mut state, attach(vm, spare)).unwrap();
    run(&mut state, detach(vm, volume, AfterDetach::Delete)).unwrap();
    assert_eq!(state.vms[&vm].devices[&VmDevice::Disk(spare)].slot, 4, "it stays where its guest knows it");
    run(&mut state, Op::AttachDisk { vm, disk: GivenDisk::New(new_volume(50, 1)), unreachable: vec![] })
        .unwrap();
    assert_eq!(state.vms[&vm].devices[&VmDevice::Disk(VolumeId(id(1050)))].slot, 2);
    for n in 51..70 {
        let op = Op::AttachDisk { vm, disk: GivenDisk::New(new_volume(n, 1)), unreachable: vec![] };
        if run(&mut state, op.clone()).is_err() {
            refused(&mut state, op);
        }
    }
    assert_eq!(state.vms[&vm].disks.len(), 16);
    assert_eq!(invariants::violations(&state), Vec::<String>::new());
}

#[test]
fn a_running_vm_grows_at_once_and_keeps_what_it_gives_back_until_it_has() {
    let (mut state, vm, _) = running();
    let most = state.vms[&vm].assignment.unwrap().make.most;
    assert_eq!(most, Shape { vcpus: 4, memory_bytes: 4 << 30 });
    let memory = |state: &ClusterState| state.vms[&vm].assignment.unwrap().make.memory_bytes;
    let task = asked(&mut state, 1, resize(vm, 2, 3));
    assert_eq!(memory(&state), 3 << 30, "nobody else gets that memory");
    let shape = Shape { vcpus: 2, memory_bytes: 3 << 30 };
    run(&mut state, Op::VmReshaped { vm, epoch: RunEpoch(1), shape }).unwrap();
    assert_eq!(state.tasks[&task].state, TaskState::Done);

    // Fewer processors, and more memory than it can have, come with the next run.
    let task = asked(&mut state, 2, resize(vm, 1, 2));
    assert_eq!(memory(&state), 3 << 30);
    let shape = Shape { vcpus: 2, memory_bytes: 2 << 30 };
    assert_eq!(state.vms[&vm].reshaping, Some(shape));
    run(&mut state, Op::VmReshaped { vm, epoch: RunEpoch(1), shape }).unwrap();
    assert_eq!((memory(&state), &state.tasks[&task].state), (2 << 30, &TaskState::Done));
    run(&mut state, resize(vm, 8, 16)).unwrap();
    assert_eq!(state.vms[&vm].reshaping, Some(most));
}
