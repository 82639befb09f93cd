//! The coordinator's view of a volume's replicas: who is attached, who is in sync, and what that allows. Pure.
//!
//! Two facts are kept apart for each replica of a segment: what Raft may hold ([`ReplicaState`], *committed*) and what this
//! coordinator knows ([`SlotState`]). The rules that S1 and S3 rest on are here:
//! - A write is complete when **every** replica that Raft may hold as in sync has it, and at least the volume's minimum is in sync.
//! - A replica that missed something is no longer equal, whatever Raft holds; nothing completes until either Raft has taken it
//!   out or a resync has made it equal again.
//! - A replica counts as "may be in sync" from the moment the commit that puts it in is *begun*.
//! - Of a commit that was not answered nobody knows whether it was made. A replica that it was to take out, or that was lost while it was
//!   to be put in, is taken out by a commit that is answered, whatever it does meanwhile: else one that came back while the volume was
//!   opened would be in sync here and out of the set in Raft for ever.

use crate::config::{ReplicaConfig, ReplicaState, SegmentConfig, Tenure, VolumeConfig};
use crate::ids::{DiskId, SegmentIndex};
use crate::replica::protocol::{PowerEpoch, Session};
use crate::status::{MemberState, ReplicaStatus, ResyncProgress};
use netfabric::NodeId;
use std::collections::{BTreeMap, BTreeSet};

#[cfg(test)]
mod tests;

/// What this coordinator knows of one replica of a segment.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum SlotState {
    /// May lack writes, gets none.
    Stale,
    /// Attached during opening; is being made equal with the others, gets no new writes yet.
    Opening,
    /// Gets new writes while older ones are copied to it.
    Copying,
    /// Equal; the commit that puts it into the in-sync set is under way.
    Joining,
    /// Equal and in the in-sync set.
    InSync,
}

#[derive(Clone, Copy, Debug)]
struct Slot {
    sync: SlotState,
    committed: ReplicaState,
    tenure: Tenure,
    contents: Contents,
}

/// Whether a replica still has what it acknowledged.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Contents {
    /// It has.
    Complete,
    /// Its machine lost power before everything was flushed.
    Incomplete,
}

#[derive(Clone, Debug)]
enum Link {
    Attached(Session),
    Detached(String),
}

#[derive(Clone, Debug)]
struct Member {
    node: NodeId,
    link: Link,
    slots: BTreeMap<SegmentIndex, Slot>,
    progress: Option<ResyncProgress>,
    /// As of its latest session.
    power: Option<PowerEpoch>,
    /// Writes acknowledged by it in this session, and how many of them a flush has covered.
    written: u64,
    flushed: u64,
}

/// An attached replica: where to send requests.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Target {
    /// The disk.
    pub(crate) disk: DiskId,
    /// Its node.
    pub(crate) node: NodeId,
    /// The session to use.
    pub(crate) session: Session,
}

/// All replicas of a volume.
#[derive(Debug)]
pub(crate) struct MemberTable {
    members: BTreeMap<DiskId, Member>,
    /// Those of which nobody knows whether Raft has them in the set.
    unanswered: BTreeSet<DiskId>,
    segments: u32,
    min_in_sync: usize,
    size: u64,
    /// What the volume grows to, while replicas of its new segments are not attached yet.
    growth: Option<Growth>,
}

#[derive(Debug)]
struct Growth {
    size: u64,
    segments: Vec<SegmentConfig>,
}

/// Whether a volume waits for all replicas of its new segments, or goes on without those that are away.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Patience {
    /// It waits.
    Waits,
    /// It has waited long enough.
    Over,
}

impl MemberTable {
    pub(crate) fn new(config: &VolumeConfig) -> Self {
        let (members, unanswered) = (BTreeMap::new(), BTreeSet::new());
        let mut table = Self { members, unanswered, segments: 0, min_in_sync: 1, size: 0, growth: None };
        table.segments = config.segments.len() as u32;
        table.configure(config);
        table
    }

    /// Takes over which replicas there are. Of those known already the state stays: this coordinator is the one who changes it,
    /// and a configuration that was on its way meanwhile may be older than what it knows. New segments wait for [`Self::grow`].
    pub(crate) fn configure(&mut self, config: &VolumeConfig) {
        if config.segments.len() < self.segments as usize {
            // Volumes do not shrink: this one is older than what is known.
            return;
        }
        self.min_in_sync = usize::from(config.min_in_sync.max(1));
        let (known, new) = config.segments.split_at(self.segments as usize);
        let mut named: BTreeMap<DiskId, Vec<SegmentIndex>> = BTreeMap::new();
        for segment in known {
            for replica in &segment.replicas {
                named.entry(replica.disk).or_default().push(segment.index);
                let member = self.member(replica);
                let sync = match member.link {
                    Link::Attached(_) => SlotState::Copying,
                    Link::Detached(_) => SlotState::Stale,
                };
                let new = Slot {
                    sync,
                    committed: replica.state,
                    tenure: replica.tenure,
                    contents: Contents::Complete,
                };
                member.slots.entry(segment.index).or_insert(new).tenure = replica.tenure;
            }
        }
        for replica in new.iter().flat_map(|segment| &segment.replicas) {
            named.entry(replica.disk).or_default();
            self.member(replica);
        }
        self.members.retain(|disk, member| {
            let kept = named.get(disk);
            member.slots.retain(|segment, _| kept.is_some_and(|s| s.contains(segment)));
            kept.is_some()
        });
        self.unanswered.retain(|disk| self.members.contains_key(disk));
        if new.is_empty() {
            self.size = self.size.max(config.size.0);
            self.growth = None;
        } else {
            self.growth = Some(Growth { size: config.size.0, segments: new.to_vec() });
        }
    }

    fn member(&mut self, replica: &ReplicaConfig) -> &mut Member {
        self.members.entry(replica.disk).or_insert_with(|| Member {
            node: replica.node,
            link: Link::Detached("not reached yet".into()),
            slots: BTreeMap::new(),
            progress: None,
            power: None,
            written: 0,
            flushed: 0,
        })
    }

    /// Takes new segments over once their replicas are attached. They are equal from the start: nothing was ever written to
    /// them. One that stays away lacks nothing yet, but it will with the first write: it is taken out as any other.
    pub(crate) fn grow(&mut self, patience: Patience) {
        let Some(growth) = &self.growth else { return };
        let attached = |replica: &&ReplicaConfig| {
            self.members.get(&replica.disk).is_some_and(|m| matches!(m.link, Link::Attached(_)))
        };
        let is_ready = |segment: &SegmentConfig| {
            let in_sync = || segment.replicas.iter().filter(|r| r.state == ReplicaState::InSync);
            let there = in_sync().filter(attached).count();
            there == in_sync().count() || (patience == Patience::Over && there > 0)
        };
        if !growth.segments.iter().all(is_ready) {
            return;
        }
        let Some(growth) = self.growth.take() else { return };
        for segment in &growth.segments {
            for replica in &segment.replicas {
                let Some(member) = self.members.get_mut(&replica.disk) else { continue };
                let sync = match (&member.link, replica.state) {
                    (Link::Attached(_), ReplicaState::InSync) => SlotState::InSync,
                    (Link::Attached(_), ReplicaState::OutOfSync) => SlotState::Copying,
                    (Link::Detached(_), _) => SlotState::Stale,
                };
                let slot = Slot {
                    sync,
                    committed: replica.state,
                    tenure: replica.tenure,
                    contents: Contents::Complete,
                };
                member.slots.insert(segment.index, slot);
            }
        }
        self.segments += growth.segments.len() as u32;
        self.size = self.size.max(growth.size);
    }

    /// The size that is served.
    pub(crate) fn size(&self) -> u64 {
        self.size
    }

    /// Whether new segments wait for their replicas.
    pub(crate) fn is_growing(&self) -> bool {
        self.growth.is_some()
    }

    /// Members without a session, with their nodes.
    pub(crate) fn detached(&self) -> Vec<(DiskId, NodeId)> {
        self.members
            .iter()
            .filter(|(_, m)| matches!(m.link, Link::Detached(_)))
            .map(|(d, m)| (*d, m.node))
            .collect()
    }

    /// Members that Raft may hold as in sync and that have no session: opening needs them.
    pub(crate) fn missing(&self) -> Vec<(DiskId, NodeId)> {
        let needed = |m: &Member| m.slots.values().any(|s| s.committed == ReplicaState::InSync);
        self.detached().into_iter().filter(|(d, _)| self.members.get(d).is_some_and(needed)).collect()
    }

    /// Sessions of members with segments in sync.
    pub(crate) fn with_segments_in_sync(&self) -> Vec<Target> {
        let in_sync = |m: &Member| m.slots.values().any(|slot| slot.sync == SlotState::InSync);
        self.members.iter().filter(|(_, m)| in_sync(m)).filter_map(|(disk, m)| m.target(*disk)).collect()
    }

    /// The node of a disk.
    pub(crate) fn node_of(&self, disk: DiskId) -> Option<NodeId> {
        self.members.get(&disk).map(|m| m.node)
    }

    /// A session began. While opening, replicas in the in-sync set wait to be made equal with each other; at any other
    /// time, and for replicas out of sync, it is resync that brings them back.
    pub(crate) fn attached(&mut self, disk: DiskId, session: Session, power: PowerEpoch, opening: bool) {
        let Some(member) = self.members.get_mut(&disk) else { return };
        let before = member.power.replace(power);
        if before.is_some_and(|before| before != power) && member.flushed < member.written {
            member.slots.values_mut().for_each(|slot| slot.contents = Contents::Incomplete);
        }
        member.link = Link::Attached(session);
        (member.written, member.flushed) = (1, 0);
        for slot in member.slots.values_mut() {
            slot.sync = match slot.committed {
                ReplicaState::InSync if opening => SlotState::Opening,
                _ => SlotState::Copying,
            };
        }
    }

    /// A request of this session failed. False when that session is over already.
    pub(crate) fn lose(&mut self, disk: DiskId, session: Session, reason: &str) -> bool {
        let Some(member) = self.members.get(&disk) else { return false };
        match member.link {
            Link::Attached(current) if current == session => self.detach(disk, reason),
            _ => return false,
        }
        true
    }

    fn detach(&mut self, disk: DiskId, reason: &str) {
        let Some(member) = self.members.get_mut(&disk) else { return };
        if member.slots.values().any(|s| s.sync == SlotState::Joining) {
            self.unanswered.insert(disk);
        }
        member.link = Link::Detached(reason.to_owned());
        member.slots.values_mut().for_each(|s| s.sync = SlotState::Stale);
    }

    /// A member could not be attached.
    pub(crate) fn unreachable(&mut self, disk: DiskId, reason: &str) {
        self.detach(disk, reason);
    }

    /// Ends all sessions, for opening again.
    pub(crate) fn detach_all(&mut self, reason: &str) {
        let disks: Vec<DiskId> = self.members.keys().copied().collect();
        disks.into_iter().for_each(|disk| self.detach(disk, reason));
    }

    /// Sessions of replicas to be made equal while opening; none as long as one that is needed is missing.
    pub(crate) fn ready_to_open(&self) -> bool {
        (0..self.segments).all(|s| {
            let mut found = false;
            self.slots(SegmentIndex(s)).all(|(_, slot)| {
                found |= slot.sync == SlotState::Opening;
                slot.committed == ReplicaState::OutOfSync || slot.sync == SlotState::Opening
            }) && found
        })
    }

    /// Opening is done: all replicas that took part are equal and durable. What one of them still had all of them have now.
    pub(crate) fn opened(&mut self) -> Contents {
        let has_all = |slot: &Slot| slot.sync == SlotState::Opening && slot.contents == Contents::Complete;
        let is_whole = (0..self.segments).all(|s| self.slots(SegmentIndex(s)).any(|(_, slot)| has_all(slot)));
        for member in self.members.values_mut() {
            for slot in member.slots.values_mut().filter(|s| s.sync == SlotState::Opening) {
                (slot.sync, slot.contents) = (SlotState::InSync, Contents::Complete);
            }
        }
        if is_whole { Contents::Complete } else { Contents::Incomplete }
    }

    /// Some segment has lost every replica in sync: only opening again can tell what is the truth.
    pub(crate) fn must_reopen(&self) -> bool {
        (0..self.segments)
            .any(|s| !self.slots(SegmentIndex(s)).any(|(_, slot)| slot.sync == SlotState::InSync))
    }

    /// Replicas of a segment in this state.
    pub(crate) fn in_state(&self, segment: SegmentIndex, sync: SlotState) -> Vec<Target> {
        self.targets_where(segment, |slot| slot.sync == sync)
    }

    /// Replicas that get a new write.
    pub(crate) fn write_targets(&self, segment: SegmentIndex) -> Vec<Target> {
        self.targets_where(segment, |slot| {
            matches!(slot.sync, SlotState::Copying | SlotState::Joining | SlotState::InSync)
        })
    }

    /// Replicas that may serve a read: the local one first, then the others from a start that `turn` moves, so that reads spread
    /// over them.
    pub(crate) fn readers(&self, segment: SegmentIndex, local: NodeId, turn: u32) -> Vec<Target> {
        let (mut readers, mut remote): (Vec<_>, Vec<_>) =
            self.in_state(segment, SlotState::InSync).into_iter().partition(|t| t.node == local);
        if !remote.is_empty() {
            let first = turn as usize % remote.len();
            remote.rotate_left(first);
        }
        readers.append(&mut remote);
        readers
    }

    /// Whether all segments of a disk have enough replicas in sync without it.
    pub(crate) fn is_spare(&self, disk: DiskId) -> bool {
        let Some(member) = self.members.get(&disk) else { return true };
        let others = |segment: SegmentIndex| {
            self.members
                .iter()
                .filter(|(d, m)| {
                    **d != disk && m.slots.get(&segment).is_some_and(|s| s.sync == SlotState::InSync)
                })
                .count()
        };
        member.slots.keys().all(|segment| others(*segment) >= self.min_in_sync)
    }

    /// Whether a write that these have acknowledged is complete.
    pub(crate) fn write_complete(&self, segment: SegmentIndex, acked: &[Target]) -> bool {
        let mut in_sync = 0;
        for (target, slot) in self.slots(segment) {
            let has = target.is_some_and(|t| acked.contains(&t));
            if slot.sync == SlotState::InSync && has {
                in_sync += 1;
            }
            if slot.committed == ReplicaState::InSync && !(slot.equal() && has) {
                return false;
            }
        }
        in_sync >= self.min_in_sync
    }

    /// Counts a write that a member acknowledged.
    pub(crate) fn note_written(&mut self, target: &Target) {
        if let Some(member) = self.session_mut(target) {
            member.written += 1;
        }
    }

    /// Members that a flush must reach, with the count of writes that the flush covers when it succeeds.
    pub(crate) fn flush_targets(&self) -> Vec<(Target, u64)> {
        self.members
            .iter()
            .filter(|(_, m)| m.flushed < m.written && m.slots.values().any(Slot::equal))
            .filter_map(|(d, m)| Some((m.target(*d)?, m.written)))
            .collect()
    }

    /// Members that take part in opening, with their counts of writes.
    pub(crate) fn opening_members(&self) -> Vec<(Target, u64)> {
        self.members
            .iter()
            .filter(|(_, m)| m.slots.values().any(|s| s.sync == SlotState::Opening))
            .filter_map(|(d, m)| Some((m.target(*d)?, m.written)))
            .collect()
    }

    /// Writes that a member has acknowledged in this session.
    pub(crate) fn written(&self, target: &Target) -> u64 {
        self.members
            .get(&target.disk)
            .filter(|m| m.target(target.disk).as_ref() == Some(target))
            .map_or(0, |m| m.written)
    }

    /// A flush of a member succeeded.
    pub(crate) fn note_flushed(&mut self, target: &Target, written: u64) {
        if let Some(member) = self.session_mut(target) {
            member.flushed = member.flushed.max(written);
        }
    }

    /// Whether a flush is complete that these members have seen, or that found nothing to do on them.
    pub(crate) fn flush_complete(&self, acked: &[Target]) -> bool {
        let enough = (0..self.segments).all(|s| {
            self.slots(SegmentIndex(s)).filter(|(_, slot)| slot.sync == SlotState::InSync).count()
                >= self.min_in_sync
        });
        enough
            && self.members.iter().all(|(disk, member)| {
                member.slots.values().all(|slot| {
                    slot.committed == ReplicaState::OutOfSync
                        || (slot.equal() && member.target(*disk).is_some_and(|t| acked.contains(&t)))
                })
            })
    }

    /// Members on which nothing was written since their last flush.
    pub(crate) fn flushed_members(&self) -> Vec<Target> {
        self.members
            .iter()
            .filter(|(_, m)| m.flushed >= m.written)
            .filter_map(|(d, m)| m.target(*d))
            .collect()
    }

    /// Nobody knows whether the commit that takes a member out was made.
    pub(crate) fn not_answered(&mut self, disk: DiskId) {
        if self.members.contains_key(&disk) {
            self.unanswered.insert(disk);
        }
    }

    /// The commit that takes a member out was not made, nor was an earlier one.
    pub(crate) fn stays_in(&mut self, disk: DiskId) {
        self.unanswered.remove(&disk);
    }

    /// Whether nobody knows if Raft has a member in the set.
    pub(crate) fn awaits_answer(&self, disk: DiskId) -> bool {
        self.unanswered.contains(&disk)
    }

    /// Members that Raft may hold as in sync and that are not equal, and those of which it is not known whether they were taken out
    /// already: to be taken out by a commit.
    pub(crate) fn to_take_out(&self) -> Vec<(DiskId, String)> {
        self.members
            .iter()
            .filter(|(disk, m)| {
                self.awaits_answer(**disk)
                    || m.slots.values().any(|s| {
                        s.committed == ReplicaState::InSync
                            && matches!(s.sync, SlotState::Stale | SlotState::Copying)
                    })
            })
            .map(|(d, m)| {
                let reason = match &m.link {
                    Link::Detached(reason) => reason.clone(),
                    Link::Attached(_) => "was away".to_owned(),
                };
                (*d, reason)
            })
            .collect()
    }

    /// Replicas in sync that are to leave, and may: see [`Self::staying`].
    pub(crate) fn leaving(&self) -> Vec<(DiskId, SegmentIndex)> {
        let leaving = |(disk, member): (&DiskId, &Member)| {
            let disk = *disk;
            let slots = member
                .slots
                .iter()
                .filter(|(_, slot)| slot.tenure == Tenure::Leaves && slot.committed == ReplicaState::InSync);
            slots.map(|(segment, _)| (disk, *segment)).collect::<Vec<_>>()
        };
        let mut leaving: Vec<_> = self.members.iter().flat_map(leaving).collect();
        leaving.retain(|(disk, segment)| self.staying(*disk, *segment).is_some());
        leaving
    }

    /// The others of a segment that Raft holds as in sync when a replica of it leaves; none when one of them is not known to
    /// have everything, or when there would be too few.
    pub(crate) fn staying(&self, disk: DiskId, segment: SegmentIndex) -> Option<Vec<Target>> {
        let others = self.members.iter().filter(|(other, _)| **other != disk);
        let slots = others.filter_map(|(other, m)| Some((m.target(*other), m.slots.get(&segment)?)));
        let mut staying = Vec::new();
        for (target, slot) in slots.filter(|(_, slot)| slot.committed == ReplicaState::InSync) {
            if slot.sync != SlotState::InSync {
                return None;
            }
            staying.push(target?);
        }
        (staying.len() >= self.min_in_sync).then_some(staying)
    }

    /// A commit took a member out: takes over its states from the volume as it stands now.
    pub(crate) fn taken_out(&mut self, disk: DiskId, config: &VolumeConfig) {
        self.unanswered.remove(&disk);
        let Some(member) = self.members.get_mut(&disk) else { return };
        for (index, slot) in &mut member.slots {
            let state = config
                .segments
                .iter()
                .find(|s| s.index == *index)
                .and_then(|s| s.replicas.iter().find(|r| r.disk == disk))
                .map_or(ReplicaState::OutOfSync, |r| r.state);
            slot.committed = state;
            if state == ReplicaState::OutOfSync && slot.sync != SlotState::Stale {
                slot.sync = SlotState::Copying;
            }
        }
    }

    /// Attached members with segments to be copied.
    pub(crate) fn to_copy(&self) -> Vec<(Target, Vec<SegmentIndex>)> {
        self.members
            .iter()
            .filter_map(|(d, m)| {
                let copying: Vec<SegmentIndex> =
                    m.slots.iter().filter(|(_, s)| s.sync == SlotState::Copying).map(|(i, _)| *i).collect();
                (!copying.is_empty()).then_some((m.target(*d)?, copying))
            })
            .collect()
    }

    /// A segment was copied: from now on the replica may be in the in-sync set. False when the session is over.
    pub(crate) fn begin_join(&mut self, target: &Target, segment: SegmentIndex) -> bool {
        let slot = self.session_mut(target).and_then(|m| m.slots.get_mut(&segment));
        match slot {
            Some(slot) if slot.sync == SlotState::Copying => {
                (slot.sync, slot.committed) = (SlotState::Joining, ReplicaState::InSync);
                slot.contents = Contents::Complete;
                true
            }
            _ => false,
        }
    }

    /// Whether the commit that puts the replica in is still wanted.
    pub(crate) fn is_joining(&self, target: &Target, segment: SegmentIndex) -> bool {
        self.in_state(segment, SlotState::Joining).contains(target)
    }

    /// The commit was made.
    pub(crate) fn joined(&mut self, target: &Target, segment: SegmentIndex) {
        if let Some(slot) = self.session_mut(target).and_then(|m| m.slots.get_mut(&segment))
            && slot.sync == SlotState::Joining
        {
            slot.sync = SlotState::InSync;
        }
    }

    /// Changes the progress of a member's resync.
    pub(crate) fn progress(&mut self, disk: DiskId, change: impl FnOnce(&mut ResyncProgress)) {
        if let Some(member) = self.members.get_mut(&disk) {
            change(member.progress.get_or_insert_default());
        }
    }

    /// Whether this is the member's session now.
    pub(crate) fn is_current(&self, target: &Target) -> bool {
        self.members.get(&target.disk).and_then(|m| m.target(target.disk)).as_ref() == Some(target)
    }

    /// What a waiting request waits for.
    pub(crate) fn obstacle(&self) -> String {
        let away: Vec<String> = self
            .members
            .iter()
            .filter_map(|(d, m)| match &m.link {
                Link::Detached(reason) => Some(format!("disk {d} on node {}: {reason}", m.node)),
                Link::Attached(_) => None,
            })
            .collect();
        if away.is_empty() { "replicas are being brought back".into() } else { away.join("; ") }
    }

    /// For people and metrics.
    pub(crate) fn status(&self) -> Vec<ReplicaStatus> {
        self.members
            .iter()
            .map(|(disk, m)| {
                let in_sync = m.slots.values().filter(|s| s.sync == SlotState::InSync).count();
                let state = match &m.link {
                    Link::Detached(reason) => MemberState::Out(reason.clone()),
                    Link::Attached(_) if in_sync == m.slots.len() => MemberState::InSync,
                    Link::Attached(_) => MemberState::Syncing,
                };
                ReplicaStatus {
                    disk: *disk,
                    node: m.node,
                    state,
                    segments_in_sync: in_sync as u32,
                    segments: m.slots.len() as u32,
                    resync: m.progress,
                }
            })
            .collect()
    }

    fn slots(&self, segment: SegmentIndex) -> impl Iterator<Item = (Option<Target>, &Slot)> {
        self.members
            .iter()
            .filter_map(move |(disk, m)| m.slots.get(&segment).map(|slot| (m.target(*disk), slot)))
    }

    fn targets_where(&self, segment: SegmentIndex, wanted: impl Fn(&Slot) -> bool) -> Vec<Target> {
        self.slots(segment).filter(|(_, slot)| wanted(slot)).filter_map(|(target, _)| target).collect()
    }

    fn session_mut(&mut self, target: &Target) -> Option<&mut Member> {
        self.members.get_mut(&target.disk).filter(|m| m.target(target.disk).as_ref() == Some(target))
    }
}

impl Slot {
    fn equal(&self) -> bool {
        matches!(self.sync, SlotState::InSync | SlotState::Joining)
    }
}

impl Member {
    fn target(&self, disk: DiskId) -> Option<Target> {
        match self.link {
            Link::Attached(session) => Some(Target { disk, node: self.node, session }),
            Link::Detached(_) => None,
        }
    }
}
