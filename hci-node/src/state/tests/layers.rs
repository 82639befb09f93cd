//! Snapshots, clones and layers that go: first one by one, then the data that random histories leave on the disks.

use std::collections::BTreeSet;

use super::*;
use crate::state::layers::MAX_DEPTH;

fn volume_id(n: u128) -> VolumeId {
    VolumeId(id(1000 + n))
}

fn take(n: u128, volumes: &[VolumeId]) -> Op {
    let numbered = volumes.iter().zip(0..).map(|(volume, m)| (*volume, SnapshotId(id(5000 + 100 * n + m))));
    Op::TakeSnapshot { freeze: FreezeId(id(6000 + n)), name: format!("s{n}"), volumes: numbered.collect() }
}

fn step(volume: VolumeId, n: u128, step: FreezeStep) -> Op {
    Op::FreezeProgress { volume, generation: Generation(1), freeze: FreezeId(id(6000 + n)), step }
}

fn chain(state: &ClusterState, volume: VolumeId) -> Vec<u32> {
    state.volumes[&volume].layers.chain.iter().map(|layer| layer.number).collect()
}

fn snapshot(state: &ClusterState, volume: VolumeId, name: &str) -> SnapshotId {
    state.volumes[&volume].layers.find(name).unwrap().id
}

/// Two volumes of a cluster of three nodes.
fn two() -> (ClusterState, VolumeId, VolumeId) {
    let mut state = cluster(3);
    for n in [1, 2] {
        let volume = new_volume(n, 3);
        run(&mut state, Op::CreateVolume { volume, near: None, unreachable: vec![] }).unwrap();
    }
    (state, volume_id(1), volume_id(2))
}

fn restore(volume: VolumeId, snapshot: SnapshotId) -> Op {
    Op::RestoreSnapshot { volume, snapshot }
}

fn copy(n: u128, source: VolumeId, snapshot: SnapshotId) -> Op {
    Op::CloneVolume { volume: volume_id(n), name: format!("v{n}"), source, snapshot }
}

#[test]
fn a_closed_volume_is_frozen_at_once_and_an_open_one_when_its_coordinator_has_gone_over() {
    let (mut state, one, two) = two();
    run(&mut state, take(1, &[one])).unwrap();
    assert_eq!((chain(&state, one), state.volumes[&one].layers.snapshots.len()), (vec![1, 0], 1));
    assert_eq!(refused(&mut state, take(1, &[one])), RefusalKind::Taken);

    run(&mut state, open(one, 1, 0, &[])).unwrap();
    run(&mut state, open(two, 2, 0, &[])).unwrap();
    run(&mut state, take(2, &[one, two])).unwrap();
    assert_eq!(
        refused(&mut state, step(one, 2, FreezeStep::Switched)),
        RefusalKind::Conflict,
        "two is not held"
    );
    run(&mut state, step(one, 2, FreezeStep::Held)).unwrap();
    assert_eq!(state.volumes[&one].layers.freeze.unwrap().stage, FreezeStage::Hold);
    run(&mut state, step(two, 2, FreezeStep::Held)).unwrap();
    assert_eq!(state.volumes[&one].layers.freeze.unwrap().stage, FreezeStage::Switch);
    run(&mut state, step(two, 2, FreezeStep::Switched)).unwrap();
    assert!(state.volumes[&two].layers.snapshots.is_empty(), "all or none");
    run(&mut state, step(one, 2, FreezeStep::Switched)).unwrap();
    assert!(state.freezes.is_empty());
    let taken = |volume| &state.volumes[&volume].layers.snapshots.last().unwrap().chain;
    assert_eq!((taken(one).len(), taken(two).len()), (2, 1));
}

#[test]
fn a_group_in_which_one_fails_has_no_snapshot() {
    for how in 0..4 {
        let (mut state, one, two) = two();
        run(&mut state, open(one, 1, 0, &[])).unwrap();
        run(&mut state, take(1, &[one, two])).unwrap();
        run(&mut state, step(one, 1, FreezeStep::Held)).unwrap();
        let end = match how {
            0 => step(one, 1, FreezeStep::Abandoned),
            // It was frozen by being closed; what opens it may write.
            1 => open(two, 2, 0, &[]),
            2 => open(one, 2, 1, &[1]),
            _ => Op::AbandonFreeze(FreezeId(id(6001))),
        };
        run(&mut state, end).unwrap();
        let _ = run(&mut state, step(one, 1, FreezeStep::Switched));
        for volume in [one, two] {
            let layers = &state.volumes[&volume].layers;
            assert!(layers.snapshots.is_empty() && layers.freeze.is_none(), "{how}");
            assert_eq!(layers.merge.map(|layer| layer.number), Some(0), "the layer too many is merged away");
        }
        assert!(state.freezes.is_empty());
    }
}

#[test]
fn a_volume_goes_back_and_what_was_written_since_is_removed() {
    let (mut state, one, _) = two();
    run(&mut state, take(1, &[one])).unwrap();
    run(&mut state, take(2, &[one])).unwrap();
    let (first, second) = (snapshot(&state, one, "s1"), snapshot(&state, one, "s2"));
    run(&mut state, open(one, 1, 0, &[])).unwrap();
    assert_eq!(refused(&mut state, restore(one, first)), RefusalKind::Conflict);
    run(&mut state, close(one)).unwrap();
    run(&mut state, restore(one, first)).unwrap();
    assert_eq!((chain(&state, one), state.volumes[&one].layers.kept().len()), (vec![3, 0], 1));
    let top = LayerRef { volume: one, number: 2 };
    assert_eq!(state.dead_layers.keys().copied().collect::<Vec<_>>(), [top]);
    assert_eq!(state.dead_layers[&top].disks.len(), 3);
    run(&mut state, Op::DeleteSnapshot { volume: one, snapshot: second }).unwrap();
    assert!(state.dead_layers.contains_key(&LayerRef { volume: one, number: 1 }));
    for n in 1..4 {
        run(&mut state, Op::LayerPurged { layer: top, disk: disk_id(n) }).unwrap();
    }
    assert!(!state.dead_layers.contains_key(&top));
}

fn close(volume: VolumeId) -> Op {
    Op::CloseVolume { volume, generation: Generation(1), cleanliness: Cleanliness::Clean }
}

#[test]
fn a_clone_keeps_what_it_needs_when_its_source_is_deleted() {
    let (mut state, one, two) = two();
    run(&mut state, take(1, &[one])).unwrap();
    let taken = snapshot(&state, one, "s1");
    run(&mut state, copy(3, one, taken)).unwrap();
    let clone = volume_id(3);
    assert_eq!(state.volumes[&clone].segments, state.volumes[&one].segments);
    run(&mut state, Op::DeleteSnapshot { volume: one, snapshot: taken }).unwrap();
    assert!(state.dead_layers.is_empty(), "both have the layer");
    assert_eq!(state.volumes[&one].layers.merge, None, "what is shared is not merged");

    run(&mut state, Op::DeleteVolume(one)).unwrap();
    assert!(state.purge.is_empty(), "the volume's data must not go as a whole");
    let own = LayerRef { volume: one, number: 1 };
    assert_eq!(state.dead_layers.keys().copied().collect::<Vec<_>>(), [own]);
    let base = LayerRef { volume: one, number: 0 };
    assert_eq!(state.volumes[&clone].layers.merge, Some(base), "only the clone has it now");

    run(&mut state, open(clone, 1, 0, &[])).unwrap();
    run(&mut state, Op::LayerMerged { volume: clone, generation: Generation(1), layer: base }).unwrap();
    assert_eq!(state.volumes[&clone].layers.chain.len(), 1);
    assert_eq!(state.dead_layers[&base].custody, Custody::Coordinator);
    let purged = Op::LayerPurged { layer: base, disk: disk_id(1) };
    assert_eq!(refused(&mut state, purged.clone()), RefusalKind::Conflict, "it may still be read");
    run(&mut state, Op::LayerReleased { volume: clone, generation: Generation(1), layer: base }).unwrap();
    run(&mut state, purged).unwrap();
    assert!(state.volumes.contains_key(&two));
}

#[test]
fn a_layer_that_a_clone_came_to_need_is_not_taken_out_by_a_merge() {
    let (mut state, one, _) = two();
    for n in 1..=2 {
        run(&mut state, take(n, &[one])).unwrap();
    }
    let first = snapshot(&state, one, "s1");
    run(&mut state, Op::DeleteSnapshot { volume: one, snapshot: first }).unwrap();
    run(&mut state, open(one, 1, 0, &[])).unwrap();
    let base = LayerRef { volume: one, number: 0 };
    assert_eq!(state.volumes[&one].layers.merge, Some(base));
    let second = snapshot(&state, one, "s2");
    run(&mut state, copy(3, one, second)).unwrap();
    let merged = Op::LayerMerged { volume: one, generation: Generation(1), layer: base };
    assert_eq!(refused(&mut state, merged), RefusalKind::Conflict);
    assert_eq!(state.volumes[&volume_id(3)].layers.chain.len(), 3);
}

#[test]
fn a_copy_does_not_come_to_a_disk_from_which_shared_layers_are_to_be_removed() {
    let mut state = eight_disks();
    let volume = new_volume(1, 3);
    let one = volume.id;
    run(&mut state, Op::CreateVolume { volume, near: None, unreachable: vec![] }).unwrap();
    run(&mut state, take(1, &[one])).unwrap();
    let taken = snapshot(&state, one, "s1");
    run(&mut state, copy(3, one, taken)).unwrap();
    let (segment, clone) = (SegmentIndex(0), volume_id(3));
    let set: Vec<_> = state.volumes[&one].segments[0].replicas.iter().map(|replica| replica.disk).collect();
    let two = VolumeChange { replicas: Some(2), ..VolumeChange::default() };
    for volume in [one, clone] {
        run(&mut state, Op::SetVolume { volume, change: two, unreachable: vec![] }).unwrap();
    }
    run(&mut state, Op::RemoveReplica { volume: one, segment, disk: set[2] }).unwrap();
    let base = LayerRef { volume: one, number: 0 };
    assert!(state.needs_part(base, segment, set[2]), "the clone has a copy there");
    run(&mut state, Op::RemoveReplica { volume: clone, segment, disk: set[2] }).unwrap();
    assert!(!state.needs_part(base, segment, set[2]));
    for volume in [one, clone] {
        assert!(state.awaits_removal(&state.volumes[&volume], set[2]));
        let back = Op::AddReplica { volume, segment, disk: set[2], replaces: None };
        assert_eq!(refused(&mut state, back), RefusalKind::Conflict);
    }
}

#[test]
fn the_depth_is_bounded() {
    let (mut state, one, _) = two();
    for n in 1..MAX_DEPTH as u128 {
        run(&mut state, take(n, &[one])).unwrap();
    }
    assert_eq!(chain(&state, one).len(), MAX_DEPTH);
    assert_eq!(refused(&mut state, take(99, &[one])), RefusalKind::Conflict);
    let last = state.volumes[&one].layers.snapshots[MAX_DEPTH - 2].id;
    run(&mut state, copy(3, one, last)).unwrap();
}

/// What a random history may do about layers; [`aim`] makes it fit.
pub(super) fn any_op() -> impl Strategy<Value = Op> {
    let n = 1..5_u128;
    let generation = (0..3_u64).prop_map(Generation);
    let layer = LayerRef { volume: VolumeId::default(), number: 0 };
    let steps = prop_oneof![
        4 => Just(FreezeStep::Held),
        4 => Just(FreezeStep::Switched),
        1 => Just(FreezeStep::Abandoned)
    ];
    let snapshot = |number: u128| SnapshotId(id(number));
    prop_oneof![
        4 => proptest::collection::vec(n.clone(), 1..3).prop_map(|ns| {
            take(0, &ns.into_iter().collect::<BTreeSet<_>>().into_iter().map(volume_id).collect::<Vec<_>>())
        }),
        8 => (n.clone(), generation.clone(), steps).prop_map(|(n, generation, step)| Op::FreezeProgress {
            volume: volume_id(n),
            generation,
            freeze: FreezeId::default(),
            step,
        }),
        1 => Just(Op::AbandonFreeze(FreezeId::default())),
        3 => (n.clone(), 0..9_u128)
            .prop_map(move |(n, s)| Op::DeleteSnapshot { volume: volume_id(n), snapshot: snapshot(s) }),
        2 => (n.clone(), 0..9_u128).prop_map(move |(n, s)| restore(volume_id(n), snapshot(s))),
        3 => (n.clone(), n.clone(), 0..9_u128)
            .prop_map(move |(n, source, s)| copy(n, volume_id(source), snapshot(s))),
        4 => (n.clone(), generation)
            .prop_map(move |(n, generation)| Op::LayerMerged { volume: volume_id(n), generation, layer }),
        3 => (0..9_u32, 1..9_u128).prop_map(move |(number, disk)| Op::LayerPurged {
            layer: LayerRef { number, ..layer },
            disk: disk_id(disk),
        }),
        2 => n.prop_map(|n| Op::DeleteVolume(volume_id(n))),
    ]
}

/// Has an operation name what there is: nobody guesses that.
pub(super) fn aim(op: Op, step: usize, state: &ClusterState) -> Op {
    let pick = |volume: VolumeId, number: SnapshotId| {
        let snapshots =
            state.volumes.get(&volume).map(|volume| volume.layers.snapshots.as_slice()).unwrap_or_default();
        let at = number.0.as_u128() as usize % snapshots.len().max(1);
        snapshots.get(at).map_or(number, |snapshot| snapshot.id)
    };
    match op {
        Op::TakeSnapshot { volumes, .. } => take(step as u128, &volumes.into_keys().collect::<Vec<_>>()),
        Op::FreezeProgress { volume, generation, step, freeze } => {
            let pending = state.volumes.get(&volume).and_then(|volume| volume.layers.freeze);
            Op::FreezeProgress {
                volume,
                generation,
                step,
                freeze: pending.map_or(freeze, |pending| pending.id),
            }
        }
        Op::AbandonFreeze(id) => Op::AbandonFreeze(state.freezes.keys().next().copied().unwrap_or(id)),
        Op::DeleteSnapshot { volume, snapshot } => {
            Op::DeleteSnapshot { volume, snapshot: pick(volume, snapshot) }
        }
        Op::RestoreSnapshot { volume, snapshot } => restore(volume, pick(volume, snapshot)),
        Op::CloneVolume { volume, name, source, snapshot } => {
            Op::CloneVolume { volume, name, source, snapshot: pick(source, snapshot) }
        }
        Op::LayerMerged { volume, generation, layer } => {
            let merge = state.volumes.get(&volume).and_then(|volume| volume.layers.merge);
            Op::LayerMerged { volume, generation, layer: merge.unwrap_or(layer) }
        }
        Op::LayerPurged { layer, disk } => {
            let dead: Vec<_> = state.dead_layers.keys().collect();
            let found = dead.get(layer.number as usize % dead.len().max(1));
            Op::LayerPurged { layer: found.map_or(layer, |found| **found), disk }
        }
        Op::ReplicasPurged { volume, disk, segments, .. } => {
            let retired = state.retired.get(&volume).and_then(|disks| disks.get(&disk));
            let layers = retired.into_iter().flat_map(|retired| retired.layers.iter().copied()).collect();
            Op::ReplicasPurged { volume, disk, segments, layers }
        }
        other => other,
    }
}

/// What the disks hold: which segments in which layers, as complete copies brought them there and removals took them away.
#[derive(Default)]
pub(super) struct Held(BTreeSet<(LayerRef, SegmentIndex, DiskId)>);

impl Held {
    /// Carries out what a command stands for, and checks that every complete copy has all layers of its volume.
    pub(super) fn follow(
        &mut self,
        op: &Op,
        before: &ClusterState,
        after: &ClusterState,
    ) -> Result<(), TestCaseError> {
        match op {
            Op::VolumePurged { volume, disks } => {
                let due = before.purge.get(volume).cloned().unwrap_or_default();
                let is_removed = |disk: &DiskId| disks.contains(disk) && due.contains(disk);
                self.0.retain(|(layer, _, disk)| layer.volume != *volume || !is_removed(disk));
            }
            Op::ReplicasPurged { volume, disk, segments, layers } if before.retired != after.retired => {
                let _ = volume;
                self.0.retain(|(layer, segment, there)| {
                    there != disk
                        || !segments.contains(segment)
                        || !layers.contains(layer)
                        || before.needs_part(*layer, *segment, *disk)
                });
            }
            Op::LayerPurged { layer, disk } if before.dead_layers != after.dead_layers => {
                self.0.retain(|(there, _, on)| there != layer || on != disk);
            }
            _ => {}
        }
        for (id, volume) in &after.volumes {
            let old = before.volumes.get(id);
            let known = old.map(|old| old.layers.all()).unwrap_or_default();
            for (index, segment) in volume.numbered() {
                let was = |disk| old.and_then(|old| old.segments.get(index.0 as usize)?.on(disk));
                for replica in segment.replicas.iter().filter(|replica| replica.state == ReplicaState::InSync)
                {
                    let was_complete = was(replica.disk).is_some_and(|was| was.state == ReplicaState::InSync);
                    let is_filled = matches!(op, Op::ReplicaIn { .. }) && !was_complete;
                    for layer in volume.layers.all() {
                        let is_new = layer.volume == *id && !known.contains(&layer);
                        let has_grown = old.is_some_and(|old| index.0 as usize >= old.segments.len());
                        if is_new || is_filled || has_grown {
                            self.0.insert((layer, index, replica.disk));
                        }
                        prop_assert!(
                            self.0.contains(&(layer, index, replica.disk)),
                            "{op:?}: {index:?} of {} on {} lacks {layer:?}",
                            volume.name,
                            replica.disk
                        );
                    }
                }
            }
        }
        Ok(())
    }
}
