//! Random histories: whatever is asked in whatever order, what has to hold holds after each step.

use super::*;

/// What a random history may do; numbers are reduced to things that exist.
fn any_op() -> impl Strategy<Value = Op> {
    let n = 1..4u128;
    let epoch = 0..4u64;
    let volume = |n: u128| VolumeId(id(1000 + n));
    let vm = |n: u128| VmId(id(2000 + n));
    prop_oneof![
        (n.clone(), 1..4u8, 0..5u128).prop_map(|(n, replicas, gone)| Op::CreateVolume {
            volume: new_volume(n, replicas),
            near: None,
            unreachable: vec![node_id(gone)]
        }),
        (n.clone(), n.clone(), 1..4u8).prop_map(|(n, disk, replicas)| Op::CreateVm {
            vm: new_vm(n, vec![new_volume(disk, replicas)]),
            unreachable: vec![]
        }),
        n.clone().prop_map(move |n| Op::DeleteVolume(volume(n))),
        n.clone().prop_map(move |n| Op::DeleteVm(vm(n))),
        (n.clone(), n.clone(), epoch.clone(), proptest::collection::vec(n.clone(), 0..3))
            .prop_map(move |(n, node, expected, gone)| assign(vm(n), node, expected, &gone)),
        (n.clone(), n.clone(), epoch.clone(), proptest::collection::vec(n.clone(), 0..3)).prop_map(
            move |(n, node, generation, gone)| Op::OpenVolume {
                volume: volume(n),
                node: node_id(node),
                expected: Generation(generation),
                unreachable: gone.into_iter().map(node_id).collect(),
            }
        ),
        (n.clone(), epoch.clone(), n.clone()).prop_map(move |(n, generation, disk)| Op::ReplicasOut {
            volume: volume(n),
            generation: Generation(generation),
            disk: disk_id(disk),
            reason: "reset".into()
        }),
        (n.clone(), epoch.clone(), n.clone(), 0..4u32, 0..3u64).prop_map(
            move |(n, generation, disk, segment, departures)| {
                Op::ReplicaIn {
                    volume: volume(n),
                    generation: Generation(generation),
                    segment: SegmentIndex(segment),
                    disk: disk_id(disk),
                    departures,
                }
            }
        ),
        (n.clone(), epoch.clone(), any::<bool>()).prop_map(move |(n, generation, clean)| Op::CloseVolume {
            volume: volume(n),
            generation: Generation(generation),
            cleanliness: if clean { Cleanliness::Clean } else { Cleanliness::Unclean },
        }),
        (n.clone(), any::<bool>()).prop_map(move |(n, running)| Op::SetVmDesired {
            vm: vm(n),
            desired: if running { DesiredRun::Running } else { DesiredRun::Stopped(StopMode::Graceful) },
        }),
        n.clone().prop_map(move |n| Op::RestartVm(vm(n))),
        (n.clone(), epoch).prop_map(move |(n, epoch)| Op::VmExited {
            vm: vm(n),
            epoch: RunEpoch(epoch),
            exit: VmExit::GuestShutdown
        }),
        (4..8u128).prop_map(|n| Op::AddNode { node: new_node(n), token: TokenId(id(502)) }),
    ]
}

/// What a random history may do to replica sets, disks and nodes.
fn any_change() -> impl Strategy<Value = Op> {
    let volume = |n: u128| VolumeId(id(1000 + n));
    let (n, disk, segment) = (1..4u128, 1..9u128, 0..5u32);
    let picked = (n.clone(), segment, disk.clone());
    let disk_service =
        prop_oneof![Just(DiskService::InService), Just(DiskService::Draining), Just(DiskService::Dead)];
    let node_service = prop_oneof![
        2 => Just(NodeService::InService),
        1 => Just(NodeService::Draining),
        1 => Just(NodeService::Leaving)
    ];
    prop_oneof![
        6 => (picked.clone(), proptest::option::of(disk.clone())).prop_map(move |((n, segment, disk), replaces)| {
            Op::AddReplica {
                volume: volume(n),
                segment: SegmentIndex(segment),
                disk: disk_id(disk),
                replaces: replaces.map(disk_id),
            }
        }),
        3 => picked.clone().prop_map(move |(n, segment, disk)| Op::RemoveReplica {
            volume: volume(n),
            segment: SegmentIndex(segment),
            disk: disk_id(disk),
        }),
        3 => (picked.clone(), 0..3u64).prop_map(move |((n, segment, disk), generation)| Op::ReplicaLeft {
            volume: volume(n),
            generation: Generation(generation),
            segment: SegmentIndex(segment),
            disk: disk_id(disk),
        }),
        // Departures are not guessed right often enough to have copies come in.
        6 => (picked.clone(), 0..3u64, 0..2u64).prop_map(move |((n, segment, disk), generation, departures)| {
            Op::ReplicaIn {
                volume: volume(n),
                generation: Generation(generation),
                segment: SegmentIndex(segment),
                disk: disk_id(disk),
                departures,
            }
        }),
        2 => (picked.clone(), 0..3u64).prop_map(move |((n, segment, disk), generation)| Op::ReplicasReleased {
            volume: volume(n),
            generation: Generation(generation),
            disk: disk_id(disk),
            segments: vec![SegmentIndex(segment)],
        }),
        2 => picked.prop_map(move |(n, segment, disk)| Op::ReplicasPurged {
            volume: volume(n),
            disk: disk_id(disk),
            segments: vec![SegmentIndex(segment)],
            layers: Vec::new(),
        }),
        1 => (n.clone(), disk.clone()).prop_map(move |(n, disk)| Op::VolumePurged {
            volume: volume(n),
            disks: vec![disk_id(disk)]
        }),
        2 => (disk.clone(), disk_service)
            .prop_map(|(disk, service)| Op::SetDiskService { disk: disk_id(disk), service }),
        1 => disk.clone().prop_map(|disk| Op::RemoveDisk(disk_id(disk))),
        1 => (disk, any::<bool>()).prop_map(|(disk, full)| Op::SetDiskRoom {
            disk: disk_id(disk),
            room: if full { DiskRoom::Reserved } else { DiskRoom::Free },
        }),
        1 => (1..5u128, node_service)
            .prop_map(|(node, service)| Op::SetNodeService { node: node_id(node), service }),
        1 => (1..5u128, any::<bool>()).prop_map(|(node, lost)| Op::SetAvailability {
            node: node_id(node),
            availability: if lost {
                Availability::Lost { since: Timestamp(0) }
            } else {
                Availability::Available
            },
        }),
        1 => (1..5u128).prop_map(|node| Op::RemoveNode(node_id(node))),
        2 => (n.clone(), proptest::option::of(0..5u8), proptest::option::of(0..4u8)).prop_map(
            move |(n, replicas, min_in_sync)| Op::SetVolume {
                volume: volume(n),
                change: VolumeChange { replicas, min_in_sync, ..VolumeChange::default() },
                unreachable: vec![],
            }
        ),
        1 => (n, 0..6u64).prop_map(move |(n, gib)| Op::GrowVolume {
            volume: volume(n),
            size_bytes: gib << 30,
            unreachable: vec![],
        }),
    ]
}

/// No change of a replica set by itself takes complete copies away that are needed.
fn check_redundancy(op: &Op, before: &ClusterState, after: &ClusterState) -> Result<(), TestCaseError> {
    let own_decision = matches!(
        op,
        Op::AddReplica { .. }
            | Op::RemoveReplica { .. }
            | Op::ReplicaIn { .. }
            | Op::ReplicaLeft { .. }
            | Op::SetVolume { .. }
    );
    for (id, volume) in &after.volumes {
        let Some(old) = before.volumes.get(id).filter(|_| own_decision) else { continue };
        for (now, was) in volume.segments.iter().zip(&old.segments) {
            let enough = usize::from(volume.replicas).min(was.in_sync());
            prop_assert!(now.in_sync() >= enough, "{op:?} took a copy that is needed");
        }
    }
    Ok(())
}

proptest! {
    #[test]
    fn random_histories_keep_the_invariants(
        ops in proptest::collection::vec(prop_oneof![4 => any_op(), 4 => any_change(), 3 => layers::any_op(), 1 => transfers::any_op(), 3 => suspension::any_op(), 3 => migration::any_op(), 1 => renewal::any_op(), 3 => devices::any_op()], 1..80)
    ) {
        let mut state = eight_disks();
        let mut twin = state.clone();
        let (mut held, mut used) = (layers::Held::default(), suspension::Used::default());
        let mut runs = migration::Runs::default();
        for (step, op) in ops.into_iter().enumerate() {
            let before = state.clone();
            let op = transfers::aim(layers::aim(op, step, &state), step, &state);
            let op = renewal::aim(migration::aim(suspension::aim(op, step, &state), step, &state), &state);
            let op = devices::aim(op, step, &state);
            let asked = Command {
                at: Timestamp(step as i64),
                task: Some(TaskId(id(10_000 + step as u128))),
                op,
            };
            let result = state.apply(&asked);
            check_redundancy(&asked.op, &before, &state)?;
            held.follow(&asked.op, &before, &state)?;
            used.follow(&before, &state)?;
            runs.follow(&state)?;
            prop_assert_eq!(&twin.apply(&asked), &result);
            prop_assert_eq!(&twin, &state);
            if result.is_err() {
                prop_assert_eq!(&before, &state);
            }
            prop_assert_eq!(invariants::violations(&state), Vec::<String>::new());
            for (id, volume) in &state.volumes {
                if let Some(old) = before.volumes.get(id) {
                    prop_assert!(volume.generation >= old.generation);
                    let moved = old.coordinator != volume.coordinator && volume.coordinator.is_some();
                    prop_assert!(!moved || volume.generation > old.generation);
                }
            }
            for (id, vm) in &state.vms {
                if let Some(old) = before.vms.get(id) {
                    prop_assert!(vm.epoch >= old.epoch);
                }
            }
            let bytes = postcard::to_stdvec(&state).unwrap();
            prop_assert_eq!(&postcard::from_bytes::<ClusterState>(&bytes).unwrap(), &state);
        }
    }
}
