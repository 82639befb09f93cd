//! The rules of the member table, one by one.

use super::*;
use crate::config::{Access, CleanState, Durability, LayersConfig, Limits};
use crate::ids::{ByteSize, Generation, SEGMENT_SIZE, VolumeId};
use crate::replica::protocol::BootEpoch;
use crate::store::Compression;
use uuid::Uuid;

const SEGMENT: SegmentIndex = SegmentIndex(0);
const POWER: PowerEpoch = PowerEpoch(Uuid::from_u128(1));
/// After a loss of power.
const NEXT_POWER: PowerEpoch = PowerEpoch(Uuid::from_u128(2));

fn disk(n: u128) -> DiskId {
    DiskId(Uuid::from_u128(n))
}

fn session(number: u64) -> Session {
    Session { boot: BootEpoch(1), number }
}

fn config(min_in_sync: u8, states: [ReplicaState; 3]) -> VolumeConfig {
    let replica = |(i, state)| ReplicaConfig {
        disk: disk(i as u128 + 1),
        node: NodeId::new(Uuid::from_u128(i as u128 + 1)),
        state,
        tenure: Tenure::Stays,
    };
    VolumeConfig {
        id: VolumeId::default(),
        size: ByteSize(SEGMENT_SIZE),
        generation: Generation(1),
        min_in_sync,
        durability: Durability::WriteBack,
        compression: Compression::Off,
        clean: CleanState::Clean,
        segments: vec![SegmentConfig {
            index: SEGMENT,
            replicas: states.into_iter().enumerate().map(replica).collect(),
        }],
        access: Access::Internal,
        limits: Limits::default(),
        layers: LayersConfig::default(),
    }
}

fn open(min_in_sync: u8) -> MemberTable {
    let mut table = MemberTable::new(&config(min_in_sync, [ReplicaState::InSync; 3]));
    for n in 1..4 {
        assert!(!table.ready_to_open());
        table.attached(disk(n), session(n as u64), POWER, true);
    }
    assert!(table.ready_to_open() && table.must_reopen());
    table.opened();
    assert!(!table.must_reopen());
    table
}

#[test]
fn a_write_is_complete_only_when_all_in_sync_have_it() {
    let table = open(2);
    let all = table.write_targets(SEGMENT);
    assert!(!table.write_complete(SEGMENT, &all[..2]));
    assert!(table.write_complete(SEGMENT, &all));
}

#[test]
fn a_lost_member_holds_up_writes_until_raft_has_taken_it_out() {
    let mut table = open(2);
    let all = table.write_targets(SEGMENT);
    assert!(table.lose(disk(3), session(3), "gone"));
    assert!(!table.lose(disk(3), session(3), "gone"), "said once");
    assert!(!table.write_complete(SEGMENT, &all), "an old session's acknowledgement does not count");
    assert_eq!(table.to_take_out()[0].0, disk(3));
    use ReplicaState::{InSync, OutOfSync};
    table.taken_out(disk(3), &config(2, [InSync, InSync, OutOfSync]));
    assert!(table.write_complete(SEGMENT, &all[..2]));
}

#[test]
fn a_member_that_came_back_before_the_commit_is_not_trusted() {
    let mut table = open(1);
    table.lose(disk(3), session(3), "restarted");
    table.attached(disk(3), session(9), POWER, false);
    let all = table.write_targets(SEGMENT);
    assert_eq!(all.len(), 3, "it gets new writes");
    assert!(!table.write_complete(SEGMENT, &all), "and yet Raft holds it as in sync and it is not equal");
    assert_eq!(table.to_take_out().len(), 1);
    assert!(table.begin_join(&all[2], SEGMENT));
    assert!(table.to_take_out().is_empty());
    assert!(table.write_complete(SEGMENT, &all));
}

#[test]
fn a_commit_that_was_not_answered_is_asked_for_again_though_the_member_came_back() {
    use ReplicaState::{InSync, OutOfSync};
    let mut table = MemberTable::new(&config(1, [InSync; 3]));
    table.attached(disk(1), session(1), POWER, true);
    table.attached(disk(2), session(2), POWER, true);
    table.not_answered(disk(3));
    table.attached(disk(3), session(3), POWER, true);
    assert!(table.ready_to_open());
    table.opened();
    assert_eq!(table.to_take_out().len(), 1, "Raft may hold it as out of sync");
    table.taken_out(disk(3), &config(1, [InSync, InSync, OutOfSync]));
    assert!(table.to_take_out().is_empty());
    assert_eq!(table.to_copy().len(), 1, "it comes back by a resync");
    table.not_answered(disk(2));
    table.stays_in(disk(2));
    assert!(table.to_take_out().is_empty());
}

#[test]
fn a_member_lost_while_it_is_put_in_is_taken_out_though_the_volume_opens_again_with_it() {
    use ReplicaState::{InSync, OutOfSync};
    let mut table = MemberTable::new(&config(1, [InSync, InSync, OutOfSync]));
    table.attached(disk(1), session(1), POWER, true);
    table.attached(disk(2), session(2), POWER, true);
    table.opened();
    table.attached(disk(3), session(3), POWER, false);
    let third = table.to_copy()[0].0;
    assert!(table.begin_join(&third, SEGMENT));
    table.detach_all("opening again");
    for n in 1..4 {
        table.attached(disk(n), session(10 + n as u64), POWER, true);
    }
    table.opened();
    assert_eq!(table.to_take_out().iter().map(|(d, _)| *d).collect::<Vec<_>>(), [disk(3)]);
}

#[test]
fn a_member_whose_joining_has_begun_may_not_be_left_out() {
    use ReplicaState::{InSync, OutOfSync};
    let mut table = MemberTable::new(&config(1, [InSync, InSync, OutOfSync]));
    table.attached(disk(1), session(1), POWER, true);
    table.attached(disk(2), session(2), POWER, true);
    assert!(table.ready_to_open());
    table.opened();
    table.attached(disk(3), session(3), POWER, false);
    let all = table.write_targets(SEGMENT);
    assert!(table.write_complete(SEGMENT, &all[..2]));
    assert!(table.begin_join(&all[2], SEGMENT));
    assert!(!table.write_complete(SEGMENT, &all[..2]));
    table.lose(disk(3), session(3), "gone again");
    assert!(!table.write_complete(SEGMENT, &all[..2]), "Raft may hold it as in sync by now");
    assert_eq!(table.to_take_out().len(), 1);
}

#[test]
fn below_the_minimum_nothing_completes() {
    use ReplicaState::{InSync, OutOfSync};
    let mut table = open(2);
    for n in [2, 3] {
        table.lose(disk(n), session(n as u64), "gone");
    }
    table.taken_out(disk(3), &config(2, [InSync, InSync, OutOfSync]));
    table.taken_out(disk(2), &config(2, [InSync, OutOfSync, OutOfSync]));
    let all = table.write_targets(SEGMENT);
    assert_eq!(all.len(), 1);
    assert!(!table.write_complete(SEGMENT, &all));
    assert!(!table.flush_complete(&all));
}

#[test]
fn a_flush_asks_only_members_that_have_something_to_flush() {
    let mut table = open(2);
    let targets = table.flush_targets();
    assert_eq!(targets.len(), 3, "what a member had before its session is not known to be durable");
    for (target, written) in &targets {
        table.note_flushed(target, *written);
    }
    assert!(table.flush_targets().is_empty());
    assert!(table.flush_complete(&table.flushed_members()));
    table.note_written(&targets[1].0);
    assert_eq!(table.flush_targets().len(), 1);
    assert!(!table.flush_complete(&table.flushed_members()));
}

#[test]
fn an_older_configuration_does_not_bring_a_member_back() {
    use ReplicaState::{InSync, OutOfSync};
    let mut table = open(2);
    table.lose(disk(3), session(3), "gone");
    table.taken_out(disk(3), &config(2, [InSync, InSync, OutOfSync]));
    table.configure(&config(2, [InSync; 3]));
    assert!(table.to_take_out().is_empty());
    assert!(table.write_complete(SEGMENT, &table.write_targets(SEGMENT)));
}

/// The volume with a second segment on disks 1, 2 and another one.
fn grown(last: u128) -> VolumeConfig {
    let mut config = config(2, [ReplicaState::InSync; 3]);
    let mut second = config.segments[0].clone();
    second.index = SegmentIndex(1);
    second.replicas[2].disk = disk(last);
    config.segments.push(second);
    config.size = ByteSize(2 * SEGMENT_SIZE);
    config
}

#[test]
fn a_volume_grows_on_replicas_that_are_attached_and_none_is_distrusted() {
    let mut table = open(2);
    table.configure(&grown(3));
    table.grow(Patience::Waits);
    assert_eq!((table.size(), table.is_growing()), (2 * SEGMENT_SIZE, false));
    assert!(table.to_take_out().is_empty() && table.to_copy().is_empty() && !table.must_reopen());
    let all = table.write_targets(SegmentIndex(1));
    assert!(all.len() == 3 && table.write_complete(SegmentIndex(1), &all));
    table.configure(&config(2, [ReplicaState::InSync; 3]));
    assert_eq!(table.size(), 2 * SEGMENT_SIZE, "it does not shrink");
    assert_eq!(table.write_targets(SegmentIndex(1)).len(), 3);
}

#[test]
fn a_volume_waits_with_growing_for_a_new_disk_but_not_for_ever() {
    let mut table = open(2);
    table.configure(&grown(4));
    table.grow(Patience::Waits);
    assert_eq!((table.size(), table.is_growing()), (SEGMENT_SIZE, true));
    assert!(table.to_take_out().is_empty() && !table.must_reopen(), "the old segment is as it was");
    assert_eq!(table.detached().len(), 1, "the new disk is to be attached");
    table.grow(Patience::Over);
    assert_eq!(table.size(), 2 * SEGMENT_SIZE);
    assert_eq!(table.to_take_out()[0].0, disk(4));

    let mut table = open(2);
    table.configure(&grown(4));
    table.attached(disk(4), session(4), POWER, false);
    table.grow(Patience::Waits);
    assert_eq!(table.size(), 2 * SEGMENT_SIZE);
    assert!(table.to_take_out().is_empty());
}

#[test]
fn readers_are_local_first_and_in_sync_only() {
    let mut table = open(1);
    let third = NodeId::new(Uuid::from_u128(3));
    assert_eq!(table.readers(SEGMENT, third, 0)[0].disk, disk(3));
    table.lose(disk(3), session(3), "gone");
    table.attached(disk(3), session(4), POWER, false);
    assert!(table.readers(SEGMENT, third, 0).iter().all(|t| t.disk != disk(3)));
}
#[test]
fn reads_spread_over_the_others_when_none_is_local() {
    let table = open(1);
    let first = |turn| table.readers(SEGMENT, NodeId::new(Uuid::from_u128(9)), turn)[0].disk;
    let firsts: std::collections::BTreeSet<_> = (0..3).map(first).collect();
    assert_eq!(firsts.len(), 3);
}

#[test]
fn a_disk_is_spare_only_while_enough_others_are_in_sync() {
    let mut table = open(2);
    assert!(table.is_spare(disk(1)));
    table.lose(disk(2), session(2), "gone");
    assert!(!table.is_spare(disk(1)) && table.is_spare(disk(2)));
}

#[test]
fn a_member_leaves_only_while_all_others_in_the_set_have_everything() {
    let mut table = open(1);
    let mut leaves = config(1, [ReplicaState::InSync; 3]);
    leaves.segments[0].replicas[0].tenure = Tenure::Leaves;
    assert!(table.leaving().is_empty());
    table.configure(&leaves);
    assert_eq!(table.leaving(), [(disk(1), SEGMENT)]);
    let staying = table.staying(disk(1), SEGMENT).unwrap();
    assert_eq!(staying.iter().map(|target| target.disk).collect::<Vec<_>>(), [disk(2), disk(3)]);
    table.lose(disk(3), session(3), "gone");
    assert!(table.leaving().is_empty(), "Raft counts on one that is lost");
    table.attached(disk(3), session(9), POWER, false);
    assert!(table.leaving().is_empty(), "it lacks something");
    use ReplicaState::{InSync, OutOfSync};
    table.taken_out(disk(3), &config(1, [InSync, InSync, OutOfSync]));
    assert_eq!(table.leaving(), [(disk(1), SEGMENT)], "the second is enough, and is all that Raft counts on");
    table.lose(disk(2), session(2), "gone");
    assert!(table.leaving().is_empty());
}

#[test]
fn a_member_stays_when_too_few_would_be_left_or_the_control_plane_changes_its_mind() {
    let mut table = open(3);
    let mut leaves = config(3, [ReplicaState::InSync; 3]);
    leaves.segments[0].replicas[0].tenure = Tenure::Leaves;
    table.configure(&leaves);
    assert!(table.leaving().is_empty());
    leaves.min_in_sync = 2;
    table.configure(&leaves);
    assert_eq!(table.leaving().len(), 1);
    table.configure(&config(2, [ReplicaState::InSync; 3]));
    assert!(table.leaving().is_empty());
}

/// All members have written something that was not flushed, are gone, and come back; those named after a loss of power.
fn come_back(table: &mut MemberTable, without_power: &[u128]) -> Contents {
    let flushed: Vec<_> = table.flush_targets();
    flushed.iter().for_each(|(target, written)| table.note_flushed(target, *written));
    flushed.iter().for_each(|(target, _)| table.note_written(target));
    table.detach_all("opening again");
    for n in 1..4 {
        let power = if without_power.contains(&n) { NEXT_POWER } else { POWER };
        table.attached(disk(n), session(20 + n as u64), power, true);
    }
    table.opened()
}

#[test]
fn writes_are_lost_only_when_all_in_the_set_lost_power_with_something_not_flushed() {
    assert_eq!(come_back(&mut open(2), &[]), Contents::Complete);
    assert_eq!(come_back(&mut open(2), &[1, 3]), Contents::Complete, "the second has everything");
    let mut table = open(2);
    assert_eq!(come_back(&mut table, &[1, 2, 3]), Contents::Incomplete);
    table.detach_all("opening again");
    (1..4).for_each(|n| table.attached(disk(n), session(30 + n as u64), NEXT_POWER, true));
    assert_eq!(table.opened(), Contents::Complete, "said once");

    let mut table = open(2);
    for (target, written) in table.flush_targets() {
        table.note_flushed(&target, written);
    }
    table.detach_all("opening again");
    (1..4).for_each(|n| table.attached(disk(n), session(20 + n as u64), NEXT_POWER, true));
    assert_eq!(table.opened(), Contents::Complete, "all was flushed");
}

#[test]
fn a_member_that_lost_power_and_was_not_copied_to_yet_does_not_count_as_whole() {
    let mut table = open(1);
    table.flush_targets().iter().for_each(|(target, _)| table.note_written(target));
    table.lose(disk(1), session(1), "gone");
    table.attached(disk(1), session(9), NEXT_POWER, false);
    table.detach_all("opening again");
    table.attached(disk(1), session(10), NEXT_POWER, true);
    for n in [2, 3] {
        table.attached(disk(n), session(20 + n as u64), NEXT_POWER, true);
    }
    assert_eq!(table.opened(), Contents::Incomplete);
}
