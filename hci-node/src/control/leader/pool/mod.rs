//! Keeps the pool's redundancy: rebuilds lost copies elsewhere, empties disks and nodes that leave, evens out how full
//! the disks are. Pure: state and reports in, operations out.
//!
//! | module | it is |
//! |---|---|
//! | [`standing`] | what a copy is worth: good, coming, waited for, leaving, gone |
//! | [`places`] | the disks that can take a copy, and which one is best |
//! | [`rebalance`] | moves that nobody needs but that even things out |
//! | [`scrubs`] | what the verification of disks found |
//! | [`leaving`] | disks and nodes on their way out, and the progress of their tasks |
//!
//! A move is: add a copy that replaces another one, have the volume's coordinator fill it, and the old one leaves in the
//! same commit that makes the new one count. So a segment never has fewer complete copies for being moved, and nothing
//! has to be remembered here: what is under way is in the state. What is kept in memory is only what was said already.

pub mod leaving;
pub mod places;
pub mod rebalance;
pub mod scrubs;
pub mod standing;
#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};

use self::{places::Places, standing::Standing};
use crate::state::{
    ClusterState, DiskId, DiskRoom, DiskService, NodeId, Op, Replica, ReplicaState, Segment, SegmentIndex,
    Severity, Subject, Tenure, Timestamp, Volume, VolumeId, report::NodeReport,
};

/// Least time between two looks at all segments.
const PAUSE: Duration = Duration::from_millis(200);
/// Most changes of replica sets that one look asks for.
const MAX_CHANGES: usize = 32;
/// A disk that reached the reserve takes copies again when this share of it has become free beyond the reserve.
const HYSTERESIS_PERCENT: u64 = 2;

/// What a decision looks at.
#[derive(Clone, Copy)]
pub struct View<'a> {
    /// The replicated state.
    pub state: &'a ClusterState,
    /// What the live nodes reported last.
    pub live: &'a BTreeMap<NodeId, NodeReport>,
    /// The time, by the leader's clock.
    pub at: Timestamp,
}

/// What was said already.
#[derive(Debug, Default)]
pub struct Pool {
    looked: Option<Instant>,
    /// Disks whose copies are being moved.
    emptying: BTreeSet<DiskId>,
    /// Volumes for whose missing copies there is no place.
    without_place: BTreeSet<VolumeId>,
}

/// A segment that lacks a copy.
struct Lack<'a> {
    volume: &'a Volume,
    index: SegmentIndex,
    segment: &'a Segment,
    replaces: Option<DiskId>,
    /// Complete copies that can be read now.
    sources: usize,
}

impl Pool {
    /// The operations that are due now.
    pub fn decide(&mut self, view: View<'_>, now: Instant) -> Vec<Op> {
        if self.looked.is_some_and(|looked| now.saturating_duration_since(looked) < PAUSE) {
            return Vec::new();
        }
        self.looked = Some(now);
        let mut ops = rooms(view);
        let mut places = Places::new(view);
        let mut changes = Vec::new();
        let mut lacks = Vec::new();
        for volume in view.state.volumes.values().filter(|volume| volume.is_filled()) {
            if !standing::is_workable(view, volume) {
                // Only the return of a complete copy helps; a move that is begun now would hold up others.
                continue;
            }
            for (index, segment) in volume.numbered() {
                look(view, volume, index, segment, &mut changes, &mut lacks);
            }
        }
        // The most endangered first; of those in the order of their volumes.
        lacks.sort_by_key(|lack| lack.sources);
        let quiet = lacks.is_empty() && changes.is_empty();
        self.say_emptying(view, &lacks, &mut ops);
        self.fill(view, &lacks, &mut places, &mut changes, &mut ops);
        if quiet {
            changes.extend(rebalance::moves(view, &mut places));
        }
        changes.truncate(MAX_CHANGES);
        ops.extend(changes);
        ops.extend(leaving::operations(view));
        ops.extend(scrubs::operations(view));
        ops
    }

    fn fill(
        &mut self,
        view: View<'_>,
        lacks: &[Lack<'_>],
        places: &mut Places,
        changes: &mut Vec<Op>,
        ops: &mut Vec<Op>,
    ) {
        let mut without = BTreeMap::new();
        for lack in lacks {
            if changes.len() >= MAX_CHANGES {
                return;
            }
            let copy = places.copy(view, lack.volume, lack.index, lack.segment, lack.replaces);
            match places.choose(view, &copy) {
                Ok(Some(disk)) => changes.push(Op::AddReplica {
                    volume: lack.volume.id,
                    segment: lack.index,
                    disk,
                    replaces: lack.replaces,
                }),
                // There is a place, but as much is moved there as may be.
                Ok(None) => {}
                Err(why) => {
                    without.entry(lack.volume.id).or_insert(why);
                }
            }
        }
        for (volume, why) in &without {
            if !self.without_place.contains(volume) {
                let name = view.state.subject_name(&Subject::Volume(*volume));
                ops.push(Op::Note {
                    severity: Severity::Warning,
                    kind: "no-place".to_owned(),
                    subject: Subject::Volume(*volume),
                    message: format!("no disk can take the missing copies of volume {name}: {why}"),
                });
            }
        }
        self.without_place = without.into_keys().collect();
    }

    /// Says once that a disk's copies are moved.
    fn say_emptying(&mut self, view: View<'_>, lacks: &[Lack<'_>], ops: &mut Vec<Op>) {
        let sources: BTreeSet<_> = lacks.iter().filter_map(|lack| lack.replaces).collect();
        for disk in sources.difference(&self.emptying) {
            let name = view.state.subject_name(&Subject::Disk(*disk));
            let count = view.state.segments_on(*disk);
            ops.push(Op::Note {
                severity: Severity::Info,
                kind: "rebuild".to_owned(),
                subject: Subject::Disk(*disk),
                message: format!("the copies of {count} segments on disk {name} are rebuilt on other disks"),
            });
        }
        self.emptying.extend(sources);
        let state = view.state;
        self.emptying.retain(|disk| state.disks.contains_key(disk) && state.segments_on(*disk) > 0);
    }
}

/// What a segment needs: copies that go, and whether one has to come.
fn look<'a>(
    view: View<'_>,
    volume: &'a Volume,
    index: SegmentIndex,
    segment: &'a Segment,
    changes: &mut Vec<Op>,
    lacks: &mut Vec<Lack<'a>>,
) {
    let wanted = usize::from(volume.replicas);
    let standing = |replica: &Replica| standing::of(view, replica);
    let is_firm = |replica: &&Replica| standing(replica).is_firm() && !segment.is_replaced(replica.disk);
    let firm = segment.replicas.iter().filter(is_firm).count();
    let good = segment.replicas.iter().filter(|replica| standing(replica) == Standing::Good).count();
    if firm == wanted && segment.replicas.len() == wanted && good == wanted {
        return;
    }
    if let Some(disk) = dispensable(view, volume, segment, good) {
        changes.push(Op::RemoveReplica { volume: volume.id, segment: index, disk });
        return;
    }
    if firm >= wanted {
        return;
    }
    let sources = segment.replicas.iter().filter(|replica| standing::is_source(view, replica)).count();
    let replaceable = |state: Standing| {
        segment
            .replicas
            .iter()
            .find(|replica| {
                standing(replica) == state && replica.replaces.is_none() && !segment.is_replaced(replica.disk)
            })
            .map(|replica| replica.disk)
    };
    let replaces = replaceable(Standing::Gone).or_else(|| replaceable(Standing::Leaving));
    if replaces.is_some() || segment.staying() < wanted {
        lacks.push(Lack { volume, index, segment, replaces, sources });
    }
}

/// A copy that can go: the rule of the state allows it, and nothing gets better by keeping it.
fn dispensable(view: View<'_>, volume: &Volume, segment: &Segment, good: usize) -> Option<DiskId> {
    let (wanted, minimum) = (usize::from(volume.replicas), usize::from(volume.min_in_sync.max(1)));
    let allowed = |replica: &&Replica| match replica.state {
        // One that is to leave already waits for its coordinator, if there is one.
        ReplicaState::InSync => {
            (replica.tenure == Tenure::Stays || volume.coordinator.is_none())
                && segment.complete_without(replica.disk) >= wanted
        }
        ReplicaState::OutOfSync => replica.replaces.is_some() || segment.in_sync() >= minimum,
    };
    let standing = |replica: &Replica| standing::of(view, replica);
    let is_dead = |replica: &Replica| {
        view.state.disks.get(&replica.disk).is_none_or(|disk| disk.service == DiskService::Dead)
    };
    let is_incoming = |replica: &Replica| {
        replica.state == ReplicaState::OutOfSync
            && replica.replaces.is_some_and(|old| segment.on(old).is_some())
    };
    let candidates: Vec<_> = segment.replicas.iter().filter(allowed).collect();
    let first = |pick: &dyn Fn(&Replica) -> bool| {
        candidates.iter().find(|replica| pick(replica)).map(|replica| replica.disk)
    };
    // A dead disk's copy is worth nothing; a copy on its way to a disk that is not good itself goes nowhere.
    if let Some(disk) = first(&|replica| is_dead(replica)) {
        return Some(disk);
    }
    let gone = |replica: &Replica| matches!(standing(replica), Standing::Gone | Standing::Leaving);
    if let Some(disk) = first(&|replica| is_incoming(replica) && gone(replica)) {
        return Some(disk);
    }
    if good >= wanted {
        let unneeded = |replica: &Replica| !is_incoming(replica) && standing(replica) != Standing::Good;
        if let Some(disk) = first(&unneeded) {
            return Some(disk);
        }
    }
    if good > wanted {
        // The one that was to be replaced; else the one on the fullest disk that is not the coordinator's own.
        let replaced = first(&|replica| segment.is_replaced(replica.disk));
        let fill = |disk: DiskId| places::fill(view, disk).unwrap_or(0);
        return replaced.or_else(|| {
            candidates
                .iter()
                .max_by_key(|replica| {
                    let shares = places::shares_domain(view.state, segment, replica);
                    (Some(replica.node) != volume.coordinator, shares, fill(replica.disk), replica.disk)
                })
                .map(|replica| replica.disk)
        });
    }
    None
}

/// Marks disks that have reached the reserve, and those that have room again.
fn rooms(view: View<'_>) -> Vec<Op> {
    let reserve = u64::from(view.state.pool.reserve_percent);
    let reports = view.live.values().flat_map(|report| &report.local.disks);
    let changed = reports.filter_map(|report| {
        let disk = view.state.disks.get(&report.disk)?;
        let share = |percent: u64| report.capacity_bytes / 100 * percent.min(100);
        let limit = share(100 - reserve.min(100));
        let room = if report.used_bytes > limit {
            DiskRoom::Reserved
        } else if report.used_bytes <= limit.saturating_sub(share(HYSTERESIS_PERCENT)) {
            DiskRoom::Free
        } else {
            return None;
        };
        (report.capacity_bytes > 0 && room != disk.room).then_some(Op::SetDiskRoom { disk: disk.id, room })
    });
    changed.collect()
}
