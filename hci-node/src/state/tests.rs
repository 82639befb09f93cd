//! Tests of the rules: those that carry data safety one by one. Random histories are in `histories`.

mod devices;
mod firmware;
mod histories;
mod layers;
mod migration;
mod renewal;
mod suspension;
mod transfers;
mod vms;

use proptest::prelude::*;

use super::{command::*, testing::*, *};

fn run(state: &mut ClusterState, op: Op) -> CommandResult {
    state.apply(&command(op))
}

fn refused(state: &mut ClusterState, op: Op) -> RefusalKind {
    let before = state.clone();
    let kind = run(state, op).unwrap_err().kind;
    assert_eq!(*state, before, "a refused command changed something");
    kind
}

fn with_vm(nodes: u128, replicas: u8) -> (ClusterState, VmId, VolumeId) {
    let mut state = cluster(nodes);
    let vm = new_vm(1, vec![new_volume(1, replicas)]);
    let ids = (vm.id, vm.disks[0].id);
    run(&mut state, Op::CreateVm { vm, unreachable: vec![] }).unwrap();
    (state, ids.0, ids.1)
}

fn assign(vm: VmId, node: u128, expected: u64, unreachable: &[u128]) -> Op {
    Op::AssignVm {
        vm,
        node: node_id(node),
        expected: RunEpoch(expected),
        reason: AssignReason::Start,
        unreachable: unreachable.iter().map(|n| node_id(*n)).collect(),
    }
}

fn open(volume: VolumeId, node: u128, expected: u64, unreachable: &[u128]) -> Op {
    Op::OpenVolume {
        volume,
        node: node_id(node),
        expected: Generation(expected),
        unreachable: unreachable.iter().map(|n| node_id(*n)).collect(),
    }
}

/// A volume that no VM has.
fn with_volume(state: &mut ClusterState, replicas: u8) -> VolumeId {
    let volume = new_volume(7, replicas);
    let id = volume.id;
    run(state, Op::CreateVolume { volume, near: None, unreachable: vec![] }).unwrap();
    id
}

#[test]
fn survives_postcard() {
    let (state, ..) = with_vm(3, 3);
    let bytes = postcard::to_stdvec(&state).unwrap();
    assert_eq!(postcard::from_bytes::<ClusterState>(&bytes).unwrap(), state);
}

#[test]
fn copies_go_to_distinct_nodes_and_the_first_to_the_vm() {
    let mut state = cluster(3);
    let volume = new_volume(1, 3);
    let id = volume.id;
    run(&mut state, Op::CreateVolume { volume, near: Some(node_id(2)), unreachable: vec![] }).unwrap();
    for segment in &state.volumes[&id].segments {
        assert_eq!(segment.replicas[0].node, node_id(2));
    }
    assert_eq!(invariants::violations(&state), Vec::<String>::new());
    assert_eq!(state.volumes[&id].min_in_sync, 2);
}

#[test]
fn too_few_nodes_are_named() {
    let mut state = cluster(2);
    let op = Op::CreateVolume { volume: new_volume(1, 3), near: None, unreachable: vec![] };
    let refusal = run(&mut state, op).unwrap_err();
    assert_eq!(refusal.kind, RefusalKind::Capacity);
    assert!(refusal.detail.contains("2 of 2 nodes"), "{refusal}");
    assert!(refusal.next.contains("--replicas 2"), "{}", refusal.next);
}

#[test]
fn opening_raises_the_generation_and_drops_the_unreachable() {
    let (mut state, vm, volume) = with_vm(3, 3);
    run(&mut state, assign(vm, 1, 0, &[])).unwrap();
    assert_eq!(state.volumes[&volume].generation, Generation(1));
    run(&mut state, assign(vm, 2, 1, &[1])).unwrap();
    let after = &state.volumes[&volume];
    assert_eq!((after.generation, after.coordinator), (Generation(2), Some(node_id(2))));
    assert_eq!(after.fewest_in_sync(), 2);
    assert!(state.events.iter().any(|event| event.kind == "volume-degraded"));
}

#[test]
fn a_volume_is_not_taken_from_a_coordinator_whose_lease_holds() {
    let (mut state, vm, of_vm) = with_vm(3, 3);
    run(&mut state, assign(vm, 1, 0, &[])).unwrap();
    assert_eq!(refused(&mut state, assign(vm, 2, 1, &[])), RefusalKind::Conflict);
    assert_eq!(refused(&mut state, open(of_vm, 2, 1, &[])), RefusalKind::Conflict);

    let volume = with_volume(&mut state, 3);
    run(&mut state, open(volume, 1, 0, &[])).unwrap();
    assert_eq!(refused(&mut state, open(volume, 2, 1, &[])), RefusalKind::Conflict);
    run(&mut state, open(volume, 2, 1, &[1])).unwrap();
}

#[test]
fn the_last_complete_copy_stays() {
    let (mut state, vm, volume) = with_vm(3, 2);
    run(&mut state, assign(vm, 1, 0, &[])).unwrap();
    let disks: Vec<_> =
        state.volumes[&volume].segments[0].replicas.iter().map(|replica| replica.disk).collect();
    let out = |disk| Op::ReplicasOut { volume, generation: Generation(1), disk, reason: "reset".into() };
    run(&mut state, out(disks[1])).unwrap();
    assert_eq!(refused(&mut state, out(disks[0])), RefusalKind::Unsafe);
}

#[test]
fn a_volume_without_a_complete_copy_in_reach_is_not_opened() {
    let mut state = cluster(3);
    let volume = with_volume(&mut state, 2);
    let nodes: Vec<_> =
        state.volumes[&volume].segments[0].replicas.iter().map(|replica| replica.node).collect();
    let op = Op::OpenVolume { volume, node: node_id(3), expected: Generation(0), unreachable: nodes };
    assert_eq!(refused(&mut state, op), RefusalKind::Unsafe);
}

#[test]
fn old_generations_change_nothing() {
    let (mut state, vm, volume) = with_vm(3, 3);
    run(&mut state, assign(vm, 1, 0, &[])).unwrap();
    run(&mut state, assign(vm, 2, 1, &[1])).unwrap();
    let (generation, disk, segment) = (Generation(1), disk_id(2), SegmentIndex(0));
    let old = [
        Op::ReplicasOut { volume, generation, disk, reason: String::new() },
        Op::ReplicaIn { volume, generation, segment, disk, departures: 0 },
        Op::VolumeOpened { volume, generation },
        Op::CloseVolume { volume, generation, cleanliness: Cleanliness::Clean },
        Op::VolumeFilled { volume, generation },
    ];
    for op in old {
        assert_eq!(refused(&mut state, op), RefusalKind::Fenced);
    }
}

#[test]
fn the_disk_of_a_running_vm_moves_with_the_vm_only() {
    let (mut state, vm, volume) = with_vm(3, 3);
    run(&mut state, assign(vm, 1, 0, &[])).unwrap();
    assert_eq!(refused(&mut state, open(volume, 2, 1, &[1])), RefusalKind::Conflict);
    run(&mut state, open(volume, 1, 1, &[])).unwrap();
    run(&mut state, assign(vm, 2, 1, &[1])).unwrap();
    assert_eq!(state.volumes[&volume].coordinator, Some(node_id(2)));
}

#[test]
fn a_crashed_coordinator_leaves_the_volume_unclean() {
    let (mut state, vm, volume) = with_vm(3, 3);
    run(&mut state, assign(vm, 1, 0, &[])).unwrap();
    assert_eq!(state.volumes[&volume].cleanliness, Cleanliness::Clean);
    run(&mut state, Op::VolumeOpened { volume, generation: Generation(1) }).unwrap();
    run(&mut state, assign(vm, 2, 1, &[1])).unwrap();
    assert_eq!(state.volumes[&volume].cleanliness, Cleanliness::Unclean);
}

#[test]
fn a_degraded_volume_heals() {
    let (mut state, vm, volume) = with_vm(3, 3);
    run(&mut state, assign(vm, 1, 0, &[])).unwrap();
    let generation = Generation(1);
    let disk = disk_id(3);
    run(&mut state, Op::ReplicasOut { volume, generation, disk, reason: "reset".into() }).unwrap();
    for segment in (0..3).map(SegmentIndex) {
        assert!(state.volumes[&volume].is_degraded());
        run(&mut state, Op::ReplicaIn { volume, generation, segment, disk, departures: 1 }).unwrap();
    }
    assert!(!state.volumes[&volume].is_degraded());
    assert_eq!(state.events.back().unwrap().kind, "volume-healed");
}

#[test]
fn a_delayed_return_does_not_undo_a_later_departure() {
    let (mut state, vm, volume) = with_vm(3, 3);
    run(&mut state, assign(vm, 1, 0, &[])).unwrap();
    let (generation, disk, segment) = (Generation(1), disk_id(3), SegmentIndex(0));
    let out = || Op::ReplicasOut { volume, generation, disk, reason: "reset".into() };
    run(&mut state, out()).unwrap();
    let asked = state.volumes[&volume].departures;
    run(&mut state, out()).unwrap();
    let late = Op::ReplicaIn { volume, generation, segment, disk, departures: asked };
    assert_eq!(refused(&mut state, late), RefusalKind::Conflict);
}

#[test]
fn a_volume_in_use_is_not_deleted_and_its_user_is_named() {
    let (mut state, _, volume) = with_vm(3, 3);
    let refusal = run(&mut state, Op::DeleteVolume(volume)).unwrap_err();
    assert_eq!(refusal.kind, RefusalKind::Conflict);
    assert!(refusal.detail.contains("vm1"), "{refusal}");
}

#[test]
fn deleting_a_vm_leaves_only_what_the_nodes_have_to_purge() {
    let (mut state, vm, volume) = with_vm(3, 3);
    assert_eq!(refused(&mut state, Op::DeleteVm(vm)), RefusalKind::Conflict);
    run(&mut state, Op::SetVmDesired { vm, desired: DesiredRun::Stopped(StopMode::Force) }).unwrap();
    run(&mut state, Op::DeleteVm(vm)).unwrap();
    assert!(state.volumes.is_empty() && state.ports.is_empty() && state.vms.is_empty());
    for n in 1..=3 {
        assert!(state.purge[&volume].contains(&disk_id(n)));
        run(&mut state, Op::VolumePurged { volume, disks: vec![disk_id(n)] }).unwrap();
    }
    assert!(state.purge.is_empty());
}

#[test]
fn of_two_starts_one_wins() {
    let (mut state, vm, _) = with_vm(3, 3);
    let start = || Op::SetVmDesired { vm, desired: DesiredRun::Running };
    run(&mut state, Op::SetVmDesired { vm, desired: DesiredRun::Stopped(StopMode::Graceful) }).unwrap();
    run(&mut state, start()).unwrap();
    assert_eq!(refused(&mut state, start()), RefusalKind::Conflict);
}

#[test]
fn a_run_ends_once_and_only_the_present_one() {
    let (mut state, vm, _) = with_vm(3, 3);
    run(&mut state, assign(vm, 1, 0, &[])).unwrap();
    run(&mut state, assign(vm, 2, 1, &[1])).unwrap();
    let exited = |epoch| Op::VmExited { vm, epoch: RunEpoch(epoch), exit: VmExit::GuestShutdown };
    run(&mut state, exited(1)).unwrap();
    assert!(state.vms[&vm].assignment.is_some(), "the old run's end does not end the new run");
    run(&mut state, exited(2)).unwrap();
    assert_eq!(state.vms[&vm].assignment, None);
    assert_eq!(state.vms[&vm].desired, DesiredRun::Stopped(StopMode::Graceful));
}

#[test]
fn tokens_count_expire_and_answer_twice() {
    let mut state = cluster(1);
    let mut once = token(7, TokenKind::Join { uses_left: 1 });
    once.expires = Some(Timestamp(2_000_000));
    let token_id = once.id;
    run(&mut state, Op::CreateToken(once)).unwrap();
    let join = |n| Op::AddNode { node: new_node(n), token: token_id };
    run(&mut state, join(5)).unwrap();
    run(&mut state, join(5)).expect("the answer was lost: the same node asks again");
    assert_eq!(refused(&mut state, join(6)), RefusalKind::Token);
    let mut late = token(8, TokenKind::Join { uses_left: 9 });
    late.expires = Some(Timestamp(10));
    let late_id = late.id;
    run(&mut state, Op::CreateToken(late)).unwrap();
    assert_eq!(refused(&mut state, Op::AddNode { node: new_node(6), token: late_id }), RefusalKind::Token);
    let mut twin = new_node(7);
    twin.name = "n1".into();
    let good = TokenId(id(502));
    assert_eq!(refused(&mut state, Op::AddNode { node: twin, token: good }), RefusalKind::Taken);
}

#[test]
fn an_import_that_fails_leaves_nothing() {
    let mut state = cluster(3);
    let image = ImageId(id(201));
    let parts = vec![ImagePart::Disk];
    run(&mut state, Op::CreateImage { image, name: "win".into(), cmdline: String::new(), parts }).unwrap();
    let begin = || Op::BeginImagePart {
        image,
        part: ImagePart::Disk,
        node: node_id(1),
        volume: Some(new_volume(9, 3)),
        file: None,
        unreachable: vec![],
    };
    let task = TaskId(id(9));
    state.apply(&Command { at: Timestamp(1), task: Some(task), op: begin() }).unwrap();
    assert_eq!(state.volume_use(&state.volumes[&new_volume(9, 3).id]), VolumeUse::Internal);
    assert_eq!(refused(&mut state, begin()), RefusalKind::Conflict);
    let error = TaskError { detail: "corrupt".into(), next: "again".into() };
    run(
        &mut state,
        Op::FailImagePart { image, part: ImagePart::Disk, node: node_id(1), error: error.clone() },
    )
    .unwrap();
    assert!(state.volumes.is_empty());
    assert_eq!(state.tasks[&task].state, TaskState::Failed(error));
    assert_eq!(state.images[&image].parts[&ImagePart::Disk], PartState::Awaiting);
}

#[test]
fn a_repeated_request_is_the_same_task() {
    let (mut state, vm, _) = with_vm(3, 3);
    let op = Op::SetVmDesired { vm, desired: DesiredRun::Stopped(StopMode::Graceful) };
    let asked = Command { at: Timestamp(1), task: Some(TaskId(id(9))), op };
    let first = state.apply(&asked).unwrap();
    let revision = state.revision;
    assert_eq!(state.apply(&asked).unwrap(), first);
    assert_eq!(state.revision, revision);
}

fn set_of(state: &ClusterState, volume: VolumeId, segment: usize) -> Vec<(DiskId, ReplicaState)> {
    state.volumes[&volume].segments[segment].replicas.iter().map(|copy| (copy.disk, copy.state)).collect()
}

/// Four nodes, a volume with three copies that node 1 has open, and a disk that has none of them.
fn with_spare() -> (ClusterState, VolumeId, DiskId) {
    let mut state = cluster(4);
    let volume = with_volume(&mut state, 3);
    run(&mut state, open(volume, 1, 0, &[])).unwrap();
    let used: Vec<_> = set_of(&state, volume, 0).into_iter().map(|(disk, _)| disk).collect();
    let spare = (1..=4).map(disk_id).find(|disk| !used.contains(disk)).unwrap();
    (state, volume, spare)
}

#[test]
fn a_move_never_leaves_fewer_complete_copies_and_ends_when_the_coordinator_says_so() {
    let (mut state, volume, spare) = with_spare();
    let (segment, generation) = (SegmentIndex(0), Generation(1));
    let old = set_of(&state, volume, 0)[2].0;
    run(&mut state, Op::AddReplica { volume, segment, disk: spare, replaces: Some(old) }).unwrap();
    assert_eq!(set_of(&state, volume, 0).len(), 4);
    assert_eq!(state.volumes[&volume].segments[0].in_sync(), 3);
    assert_eq!(
        refused(&mut state, Op::RemoveReplica { volume, segment, disk: old }),
        RefusalKind::Unsafe,
        "the new one is not complete"
    );
    run(&mut state, Op::ReplicaIn { volume, generation, segment, disk: spare, departures: 0 }).unwrap();
    assert_eq!(state.volumes[&volume].segments[0].in_sync(), 4, "the old one is only to leave");
    let other = set_of(&state, volume, 0)[0].0;
    let left = |disk, generation| Op::ReplicaLeft { volume, generation, segment, disk };
    assert_eq!(refused(&mut state, left(old, Generation(0))), RefusalKind::Fenced);
    run(&mut state, left(other, generation)).unwrap();
    assert!(state.volumes[&volume].segments[0].on(other).is_some(), "nobody wants it to leave");
    run(&mut state, left(old, generation)).unwrap();
    run(&mut state, left(old, generation)).expect("asked twice");
    let disks = set_of(&state, volume, 0);
    assert!(disks.contains(&(spare, ReplicaState::InSync)) && disks.iter().all(|(disk, _)| *disk != old));
    assert_eq!((disks.len(), state.volumes[&volume].segments[0].in_sync()), (3, 3));
    assert!(state.retired[&volume].contains_key(&old));
}

#[test]
fn a_copy_that_is_to_leave_stays_when_it_is_needed_after_all() {
    let (mut state, volume, spare) = with_spare();
    let (segment, generation) = (SegmentIndex(0), Generation(1));
    let set = set_of(&state, volume, 0);
    let (lost, old) = (set[1].0, set[2].0);
    run(&mut state, Op::AddReplica { volume, segment, disk: spare, replaces: Some(old) }).unwrap();
    run(&mut state, Op::ReplicaIn { volume, generation, segment, disk: spare, departures: 0 }).unwrap();
    run(&mut state, Op::ReplicasOut { volume, generation, disk: lost, reason: "reset".into() }).unwrap();
    let left = Op::ReplicaLeft { volume, generation, segment, disk: old };
    run(&mut state, left.clone()).unwrap();
    let replica = *state.volumes[&volume].segments[0].on(old).expect("only two others are complete");
    assert_eq!((replica.state, replica.tenure), (ReplicaState::InSync, Tenure::Stays));
    let departures = state.volumes[&volume].departures;
    run(&mut state, Op::ReplicaIn { volume, generation, segment, disk: lost, departures }).unwrap();
    run(&mut state, left.clone()).unwrap();
    assert!(state.volumes[&volume].segments[0].on(old).is_some(), "it was not asked again");
    run(&mut state, Op::RemoveReplica { volume, segment, disk: old }).unwrap();
    run(&mut state, left).unwrap();
    assert!(state.volumes[&volume].segments[0].on(old).is_none());
}

#[test]
fn data_of_a_copy_that_left_are_kept_until_the_coordinator_lets_go() {
    let (mut state, volume, spare) = with_spare();
    let (segment, generation) = (SegmentIndex(0), Generation(1));
    let old = set_of(&state, volume, 0)[2].0;
    run(&mut state, Op::AddReplica { volume, segment, disk: spare, replaces: Some(old) }).unwrap();
    run(&mut state, Op::ReplicaIn { volume, generation, segment, disk: spare, departures: 0 }).unwrap();
    run(&mut state, Op::ReplicaLeft { volume, generation, segment, disk: old }).unwrap();
    let segments = vec![segment];
    let layers = vec![LayerRef { volume, number: 0 }];
    let purged = || Op::ReplicasPurged { volume, disk: old, segments: vec![segment], layers: layers.clone() };
    assert_eq!(refused(&mut state, purged()), RefusalKind::Conflict);
    let back = Op::AddReplica { volume, segment, disk: old, replaces: Some(spare) };
    assert_eq!(refused(&mut state, back.clone()), RefusalKind::Conflict, "its data are about to go");
    let stale =
        Op::ReplicasReleased { volume, generation: Generation(0), disk: old, segments: segments.clone() };
    assert_eq!(refused(&mut state, stale), RefusalKind::Fenced);
    run(&mut state, Op::ReplicasReleased { volume, generation, disk: old, segments }).unwrap();
    run(&mut state, purged()).unwrap();
    assert!(state.retired.is_empty());
    run(&mut state, back).unwrap();
}

#[test]
fn a_copy_that_left_while_nobody_had_the_volume_open_is_free_at_once() {
    let mut state = cluster(4);
    let volume = with_volume(&mut state, 3);
    run(&mut state, open(volume, 1, 0, &[])).unwrap();
    run(&mut state, Op::CloseVolume { volume, generation: Generation(1), cleanliness: Cleanliness::Clean })
        .unwrap();
    run(
        &mut state,
        Op::SetVolume {
            volume,
            change: VolumeChange { replicas: Some(2), ..VolumeChange::default() },
            unreachable: vec![],
        },
    )
    .unwrap();
    let disk = set_of(&state, volume, 0)[2].0;
    run(&mut state, Op::RemoveReplica { volume, segment: SegmentIndex(0), disk }).unwrap();
    assert!(state.may_purge(volume, &state.retired[&volume][&disk]));
    let next = set_of(&state, volume, 0)[1].0;
    let one_too_many = Op::RemoveReplica { volume, segment: SegmentIndex(0), disk: next };
    assert_eq!(refused(&mut state, one_too_many), RefusalKind::Unsafe);
    run(&mut state, Op::DeleteVolume(volume)).unwrap();
    assert!(state.retired.is_empty() && state.purge[&volume].contains(&disk));
}

#[test]
fn more_copies_raise_the_minimum_only_once_they_are_there() {
    let mut state = cluster(3);
    let volume = with_volume(&mut state, 1);
    run(&mut state, open(volume, 1, 0, &[])).unwrap();
    let set = |replicas| Op::SetVolume {
        volume,
        change: VolumeChange { replicas: Some(replicas), ..VolumeChange::default() },
        unreachable: vec![],
    };
    assert_eq!(refused(&mut state, set(4)), RefusalKind::Invalid);
    run(&mut state, set(3)).unwrap();
    assert_eq!(state.volumes[&volume].min_in_sync, 1, "writes go on");
    for segment in 0..3 {
        let used = set_of(&state, volume, segment as usize)[0].0;
        let segment = SegmentIndex(segment);
        for disk in (1..=3).map(disk_id).filter(|disk| *disk != used) {
            run(&mut state, Op::AddReplica { volume, segment, disk, replaces: None }).unwrap();
            assert!(!state.volumes[&volume].is_settled());
            let generation = Generation(1);
            run(&mut state, Op::ReplicaIn { volume, generation, segment, disk, departures: 0 }).unwrap();
        }
    }
    assert_eq!(state.volumes[&volume].min_in_sync, 2);
    assert!(state.volumes[&volume].is_settled());
}

#[test]
fn limits_durability_and_compression_change_alone_and_a_limit_of_nothing_is_refused() {
    let mut state = cluster(3);
    let volume = with_volume(&mut state, 3);
    let set = |change| Op::SetVolume { volume, change, unreachable: vec![] };
    let limits = VolumeLimits { operations_per_second: Some(100), bytes_per_second: None };
    run(&mut state, set(VolumeChange { limits: Some(limits), ..Default::default() })).unwrap();
    let durability = Some(Durability::WriteThrough);
    run(&mut state, set(VolumeChange { durability, ..Default::default() })).unwrap();
    assert_eq!(state.volumes[&volume].compression, Compression::Off);
    let compression = Some(Compression::Lz4);
    run(&mut state, set(VolumeChange { compression, ..Default::default() })).unwrap();
    let now = &state.volumes[&volume];
    assert_eq!((now.limits, now.durability), (limits, Durability::WriteThrough));
    assert_eq!(now.compression, Compression::Lz4);
    assert_eq!((now.replicas, now.min_in_sync), (3, 2));
    let nothing = Some(VolumeLimits { operations_per_second: Some(0), bytes_per_second: None });
    assert_eq!(
        refused(&mut state, set(VolumeChange { limits: nothing, ..Default::default() })),
        RefusalKind::Invalid
    );
}

#[test]
fn a_volume_grows_and_does_not_shrink() {
    let mut state = cluster(3);
    let volume = with_volume(&mut state, 3);
    let grow = |size_bytes| Op::GrowVolume { volume, size_bytes, unreachable: vec![] };
    run(&mut state, grow((7 << 30) + 1)).unwrap();
    let grown = &state.volumes[&volume];
    assert_eq!((grown.size_bytes, grown.segments.len()), ((7 << 30) + 4096, 8));
    assert_eq!(refused(&mut state, grow(4 << 30)), RefusalKind::Invalid);
    run(&mut state, grow((7 << 30) + 4096)).expect("asked twice");
    assert_eq!(invariants::violations(&state), Vec::<String>::new());
}

#[test]
fn a_dead_disk_leaves_unless_it_holds_the_last_copy() {
    let mut state = cluster(3);
    let (safe, alone) = (with_volume(&mut state, 3), new_volume(8, 1));
    let lonely = alone.id;
    run(&mut state, Op::CreateVolume { volume: alone, near: Some(node_id(2)), unreachable: vec![] }).unwrap();
    let dead = |n| Op::SetDiskService { disk: disk_id(n), service: DiskService::Dead };
    let refusal = run(&mut state, dead(2)).unwrap_err();
    assert_eq!(refusal.kind, RefusalKind::Unsafe);
    assert!(refusal.detail.contains(&state.volumes[&lonely].name), "{refusal}");
    run(&mut state, dead(3)).unwrap();
    assert_eq!(state.volumes[&safe].fewest_in_sync(), 2, "it is not counted on any more");
    assert_eq!(refused(&mut state, Op::RemoveDisk(disk_id(3))), RefusalKind::Conflict);
    for segment in (0..3).map(SegmentIndex) {
        run(&mut state, Op::RemoveReplica { volume: safe, segment, disk: disk_id(3) }).unwrap();
    }
    run(&mut state, Op::RemoveDisk(disk_id(3))).unwrap();
    assert!(!state.disks.contains_key(&disk_id(3)) && state.retired.is_empty());
}

#[test]
fn a_drained_disk_leaves_when_it_is_empty_and_its_task_ends() {
    let mut state = cluster(3);
    let task = TaskId(id(9));
    let service = DiskService::Draining;
    let op = Op::SetDiskService { disk: disk_id(3), service };
    state.apply(&Command { at: Timestamp(1), task: Some(task), op }).unwrap();
    let taken = Op::CreateVolume { volume: new_volume(1, 3), near: None, unreachable: vec![] };
    assert_eq!(refused(&mut state, taken), RefusalKind::Capacity, "it takes nothing new");
    run(&mut state, Op::RemoveDisk(disk_id(3))).unwrap();
    assert_eq!(state.tasks[&task].state, TaskState::Done);
    assert_eq!(refused(&mut state, Op::RemoveDisk(disk_id(2))), RefusalKind::Conflict);
}

#[test]
fn a_node_leaves_empty_and_for_good() {
    let mut state = cluster(4);
    let leave = Op::SetNodeService { node: node_id(4), service: NodeService::Leaving };
    assert_eq!(refused(&mut state, Op::RemoveNode(node_id(4))), RefusalKind::Conflict);
    run(&mut state, leave).unwrap();
    assert_eq!(state.disks[&disk_id(4)].service, DiskService::Draining);
    assert_eq!(refused(&mut state, Op::RemoveNode(node_id(4))), RefusalKind::Conflict, "its disk is there");
    run(&mut state, Op::RemoveDisk(disk_id(4))).unwrap();
    run(&mut state, Op::RemoveNode(node_id(4))).unwrap();
    let again = Op::AddNode { node: new_node(4), token: TokenId(id(502)) };
    assert_eq!(refused(&mut state, again), RefusalKind::Conflict);
}

#[test]
fn copies_go_to_distinct_racks_while_there_are_enough() {
    let mut state = cluster(4);
    for (n, rack) in [(1, "r1"), (2, "r1"), (3, "r2"), (4, "r3")] {
        run(&mut state, Op::SetNodeRack { node: node_id(n), rack: Some(rack.into()) }).unwrap();
    }
    let volume = with_volume(&mut state, 3);
    for segment in &state.volumes[&volume].segments {
        let racks: std::collections::BTreeSet<_> =
            segment.replicas.iter().map(|copy| state.nodes[&copy.node].rack.clone()).collect();
        assert_eq!(racks.len(), 3);
    }
    run(&mut state, Op::SetNodeRack { node: node_id(4), rack: Some("r2".into()) }).unwrap();
    run(&mut state, Op::CreateVolume { volume: new_volume(2, 3), near: None, unreachable: vec![] })
        .expect("two racks are too few for three copies, three nodes are enough");
}

#[test]
fn a_disk_at_its_reserve_gets_no_new_copies() {
    let mut state = cluster(3);
    run(&mut state, Op::SetDiskRoom { disk: disk_id(2), room: DiskRoom::Reserved }).unwrap();
    let wanted =
        |replicas| Op::CreateVolume { volume: new_volume(1, replicas), near: None, unreachable: vec![] };
    assert_eq!(refused(&mut state, wanted(3)), RefusalKind::Capacity);
    run(&mut state, wanted(2)).unwrap();
    assert_eq!(state.segments_on(disk_id(2)), 0);
}

#[test]
fn a_forced_restart_stays_forced() {
    let (mut state, vm, _) = with_vm(3, 3);
    assert_eq!(refused(&mut state, Op::ResetVm(vm)), RefusalKind::Conflict);
    run(&mut state, assign(vm, 1, 0, &[])).unwrap();
    run(&mut state, Op::ResetVm(vm)).unwrap();
    run(&mut state, Op::RestartVm(vm)).unwrap();
    assert_eq!(state.vms[&vm].restart, Some(Restart { epoch: RunEpoch(1), mode: StopMode::Force }));
}

/// Four nodes with two disks each.
fn eight_disks() -> ClusterState {
    let mut state = cluster(4);
    for n in 5..=8 {
        let (disk, node) = (disk_id(n), node_id(n - 4));
        run(
            &mut state,
            Op::AddDisk { disk, node, path: "/dev/vdc".into(), wipe: WipePolicy::Refuse, key_salt: None },
        )
        .unwrap();
        run(&mut state, Op::DiskReady { disk, store: "/store".into(), capacity_bytes: 100 << 30 }).unwrap();
    }
    state
}
