//! Fetches of images, exports of volumes.

use super::*;

/// What a random history may do about exports; [`aim`] makes it fit.
pub(super) fn any_op() -> impl Strategy<Value = Op> {
    let export = |n: u128| ExportId(id(600 + n));
    prop_oneof![
        2 => (0..4u128, 1..5u128, 1..5u128, any::<bool>()).prop_map(move |(n, volume, node, of_snapshot)| {
            Op::BeginExport {
                export: export(n),
                volume: new_volume(volume, 3).id,
                snapshot: of_snapshot.then(|| (SnapshotId::default(), VolumeId::default())),
                node: node_id(node),
            }
        }),
        1 => (0..4u128).prop_map(move |n| Op::EndExport(export(n))),
    ]
}

/// Has an export name a snapshot that there is, and a clone that there is not; now and then one that there is.
pub(super) fn aim(op: Op, step: usize, state: &ClusterState) -> Op {
    match op {
        Op::BeginExport { export, volume, snapshot: Some(_), node } => {
            let found = state.volumes.get(&volume).and_then(|volume| volume.layers.snapshots.first());
            let clone = if step.is_multiple_of(5) { volume } else { VolumeId(id(20_000 + step as u128)) };
            let snapshot = found.map(|snapshot| (snapshot.id, clone));
            Op::BeginExport { export, volume, snapshot, node }
        }
        op => op,
    }
}

#[test]
fn an_export_yields_to_a_vm_and_takes_its_clone_along() {
    let (mut state, vm, _) = with_vm(3, 3);
    let disk = state.vms[&vm].disks[0];
    let begin = |number, volume, snapshot| Op::BeginExport {
        export: ExportId(id(number)),
        volume,
        snapshot,
        node: node_id(1),
    };
    assert_eq!(refused(&mut state, begin(601, disk, None)), RefusalKind::Conflict, "the VM runs on it");
    let none = Some((SnapshotId(id(1)), VolumeId(id(602))));
    assert_eq!(refused(&mut state, begin(603, disk, none)), RefusalKind::NotFound);

    // Stopped, it can be read; started again, it takes its disk away from the export at once.
    run(&mut state, Op::SetVmDesired { vm, desired: DesiredRun::Stopped(StopMode::Force) }).unwrap();
    let epoch = state.vms[&vm].epoch;
    run(&mut state, Op::VmExited { vm, epoch, exit: VmExit::GuestShutdown }).unwrap();
    let generation = state.volumes[&disk].generation;
    if state.volumes[&disk].coordinator.is_some() {
        run(&mut state, Op::CloseVolume { volume: disk, generation, cleanliness: Cleanliness::Clean })
            .unwrap();
    }
    run(&mut state, begin(605, disk, None)).unwrap();
    let open = Op::OpenVolume { volume: disk, node: node_id(1), expected: generation, unreachable: vec![] };
    run(&mut state, open).unwrap();
    assert_eq!(state.volume_use(&state.volumes[&disk]), VolumeUse::Internal);
    run(&mut state, Op::SetVmDesired { vm, desired: DesiredRun::Running }).unwrap();
    assert_eq!(state.volume_use(&state.volumes[&disk]), VolumeUse::Nothing);

    run(&mut state, Op::CreateVolume { volume: new_volume(9, 3), near: None, unreachable: vec![] }).unwrap();
    let volume = new_volume(9, 3).id;
    run(&mut state, begin(604, volume, None)).unwrap();
    run(
        &mut state,
        Op::OpenVolume { volume, node: node_id(1), expected: Generation(0), unreachable: vec![] },
    )
    .unwrap();
    assert_eq!(state.volume_use(&state.volumes[&volume]), VolumeUse::Internal);
    assert_eq!(refused(&mut state, Op::DeleteVolume(volume)), RefusalKind::Conflict, "it is being read");
    run(&mut state, Op::EndExport(ExportId(id(604)))).unwrap();
    run(&mut state, Op::EndExport(ExportId(id(604)))).unwrap();
    assert_eq!(state.volume_use(&state.volumes[&volume]), VolumeUse::Nothing);
    assert!(state.volumes.contains_key(&volume));
}

#[test]
fn a_fetch_keeps_its_task_until_the_part_is_in() {
    let mut state = cluster(3);
    let image = ImageId(id(201));
    let parts = vec![ImagePart::Kernel];
    run(&mut state, Op::CreateImage { image, name: "web".into(), cmdline: String::new(), parts }).unwrap();
    let location = SourceLocation::Url("https://example.org/vmlinuz".into());
    let source = ImageSource { location, sha256: None };
    let fetch = Op::FetchImagePart { image, part: ImagePart::Kernel, node: node_id(1), source };
    let task = TaskId(id(9));
    state.apply(&Command { at: Timestamp(1), task: Some(task), op: fetch.clone() }).unwrap();
    assert_eq!(refused(&mut state, fetch.clone()), RefusalKind::Conflict);
    let begin = |node| Op::BeginImagePart {
        image,
        part: ImagePart::Kernel,
        node,
        volume: None,
        file: Some(BootFile { hash: ContentHash([1; 32]), size_bytes: 5 }),
        unreachable: vec![],
    };
    assert_eq!(refused(&mut state, begin(node_id(2))), RefusalKind::Conflict, "another node fetches it");
    run(&mut state, begin(node_id(1))).unwrap();
    assert_eq!(state.tasks[&task].state, TaskState::Running);
    run(&mut state, Op::CompleteImagePart { image, part: ImagePart::Kernel, node: node_id(1) }).unwrap();
    assert_eq!(state.tasks[&task].state, TaskState::Done);

    let second = TaskId(id(10));
    let image = ImageId(id(202));
    let parts = vec![ImagePart::Kernel];
    run(&mut state, Op::CreateImage { image, name: "gone".into(), cmdline: String::new(), parts }).unwrap();
    let fetch = match fetch {
        Op::FetchImagePart { part, node, source, .. } => Op::FetchImagePart { image, part, node, source },
        other => other,
    };
    state.apply(&Command { at: Timestamp(1), task: Some(second), op: fetch }).unwrap();
    run(&mut state, Op::DeleteImage(image)).unwrap();
    assert!(matches!(state.tasks[&second].state, TaskState::Failed(_)), "a fetch ends with its image");
}
