//! Volumes: where their copies are, what state these are in, and what may fail next.

use std::collections::BTreeMap;

use super::{Views, count};
use crate::{
    api::types as api,
    control::leader::pool::{
        View,
        standing::{self, Standing},
    },
    state::{
        Compression, Durability, Replica, ReplicaState, Segment, Snapshot, Subject, Timestamp, Volume,
        VolumeId, VolumeOwner,
        report::{VolumeReport, VolumeRunState},
    },
};

/// Copies of a volume that are on their way to another disk.
pub(super) fn moves(volume: &Volume) -> u32 {
    let copies = volume.segments.iter().flat_map(|segment| &segment.replicas);
    count(copies.filter(|copy| copy.replaces.is_some() && copy.state == ReplicaState::OutOfSync))
}

/// Segments of a volume with fewer complete copies than they should have.
pub(super) fn degraded(volume: &Volume) -> u32 {
    let wanted = usize::from(volume.replicas);
    count(volume.segments.iter().filter(|segment| segment.in_sync() < wanted))
}

/// How far a volume is to full redundancy, 0 to 1.
fn progress(volume: &Volume) -> f64 {
    let wanted = usize::from(volume.replicas);
    let there: usize = volume.segments.iter().map(|segment| segment.in_sync().min(wanted)).sum();
    let all = volume.segments.len() * wanted;
    if all == 0 { 1.0 } else { there as f64 / all as f64 }
}

/// The snapshots of a volume.
pub fn snapshots(volume: &Volume) -> Vec<api::Snapshot> {
    let shown = |snapshot: &Snapshot| api::Snapshot {
        id: snapshot.id.to_string(),
        name: snapshot.name.clone(),
        size_bytes: snapshot.size_bytes,
        created: snapshot.created.to_string(),
    };
    volume.layers.snapshots.iter().map(shown).collect()
}

impl Views<'_> {
    fn volume_report(&self, volume: &Volume) -> Option<&VolumeReport> {
        let reports = &self.reports.get(&volume.coordinator?)?.local.volumes;
        reports.iter().find(|report| report.volume == volume.id && report.generation == volume.generation)
    }

    fn standing(&self, copy: &Replica) -> Standing {
        standing::of(View { state: self.state, live: self.reports, at: Timestamp::now() }, copy)
    }

    /// Complete copies of a segment that are in reach.
    fn present<'a>(&self, segment: &'a Segment) -> Vec<&'a Replica> {
        let is_present = |copy: &&Replica| {
            copy.state == ReplicaState::InSync
                && matches!(self.standing(copy), Standing::Good | Standing::Leaving)
        };
        segment.replicas.iter().filter(is_present).collect()
    }

    /// Segments of which no complete copy is in reach, if there are any.
    pub(super) fn out_of_reach(&self, volume: &Volume) -> Option<u32> {
        let lost = count(volume.segments.iter().filter(|segment| self.present(segment).is_empty()));
        (lost > 0).then_some(lost)
    }

    /// How many nodes may be lost before I/O on a volume stops.
    pub(super) fn spare_copies(&self, volume: &Volume) -> u32 {
        let spare =
            |segment: &Segment| self.present(segment).len().saturating_sub(usize::from(volume.min_in_sync));
        let least = volume.segments.iter().map(spare).min().unwrap_or(usize::from(volume.replicas));
        u32::try_from(least).unwrap_or(u32::MAX)
    }

    /// What may be lost without harm, and what may not.
    fn risks(&self, volume: &Volume) -> (String, Vec<String>) {
        match self.spare_copies(volume) {
            0 => {}
            1 => return ("the loss of any 1 node".to_owned(), Vec::new()),
            nodes => return (format!("the loss of any {nodes} nodes"), Vec::new()),
        }
        let mut risks = BTreeMap::new();
        for segment in &volume.segments {
            let present = self.present(segment);
            if present.len() > usize::from(volume.min_in_sync) {
                continue;
            }
            for copy in &present {
                let outcome = if present.len() == 1 { Outcome::Lost } else { Outcome::Waits };
                let entry = risks.entry(copy.disk).or_insert(outcome);
                *entry = (*entry).max(outcome);
            }
        }
        let sentence = |(disk, outcome)| {
            let disk = self.state.subject_name(&Subject::Disk(disk));
            match outcome {
                Outcome::Waits => format!("{disk} fails: writes wait until another copy is complete"),
                Outcome::Lost => format!("{disk} fails: data are lost unless another copy comes back"),
            }
        };
        ("no loss of a node or disk".to_owned(), risks.into_iter().map(sentence).collect())
    }

    /// What all disks hold of a volume: what it would take without compression, and what it takes.
    fn held(&self, volume: VolumeId) -> (u64, u64) {
        let disks = self.reports.values().flat_map(|report| &report.local.disks);
        let held = disks.filter_map(|disk| {
            let at = disk.volumes.binary_search_by_key(&volume, |held| held.volume).ok()?;
            disk.volumes.get(at)
        });
        held.fold((0, 0), |(data, stored), held| (data + held.data_bytes, stored + held.stored_bytes))
    }

    /// A volume.
    pub fn volume(&self, volume: &Volume) -> api::Volume {
        let report = self.volume_report(volume);
        let is_degraded = volume.is_degraded();
        let resync = report.map(|report| report.resync_blocks_left);
        let copies = || volume.segments.iter().flat_map(|segment| &segment.replicas);
        let is_coming = |copy: &Replica| self.standing(copy) == Standing::Coming;
        let (state, message) = match (volume.coordinator, report.map(|report| &report.state)) {
            (_, Some(VolumeRunState::Waiting(why))) => (api::VolumeState::Waiting, Some(why.clone())),
            (_, Some(VolumeRunState::Fenced)) => {
                (api::VolumeState::Waiting, Some("a newer generation exists".to_owned()))
            }
            (_, Some(VolumeRunState::Open)) if is_degraded && copies().any(is_coming) => {
                (api::VolumeState::Resyncing, None)
            }
            _ if is_degraded => (api::VolumeState::Degraded, None),
            (Some(_), Some(VolumeRunState::Open)) => (api::VolumeState::Healthy, None),
            (Some(_), _) => (api::VolumeState::Opening, None),
            (None, _) => (api::VolumeState::Closed, None),
        };
        let used_by = match volume.owner {
            VolumeOwner::None => None,
            VolumeOwner::Suspension(vm) => {
                Some(format!("state of vm {}", self.state.subject_name(&Subject::Vm(vm))))
            }
            VolumeOwner::Vm(vm) => Some(format!("vm {}", self.state.subject_name(&Subject::Vm(vm)))),
            VolumeOwner::Image(image) => {
                Some(format!("image {}", self.state.subject_name(&Subject::Image(image))))
            }
        };
        let (tolerates, at_risk) = self.risks(volume);
        let (data_bytes, stored_bytes) = self.held(volume.id);
        api::Volume {
            id: volume.id.to_string(),
            name: volume.name.clone(),
            size_bytes: volume.size_bytes,
            replicas: volume.replicas,
            in_sync: u8::try_from(volume.fewest_in_sync()).unwrap_or(u8::MAX),
            min_in_sync: volume.min_in_sync,
            state,
            message,
            generation: volume.generation.0,
            coordinator: volume.coordinator.map(|node| self.node_name(node)),
            used_by,
            durability: match volume.durability {
                Durability::WriteBack => api::Durability::WriteBack,
                Durability::WriteThrough => api::Durability::WriteThrough,
            },
            compression: match volume.compression {
                Compression::Off => api::Compression::Off,
                Compression::Lz4 => api::Compression::Lz4,
            },
            data_bytes,
            stored_bytes,
            operations_per_second: volume.limits.operations_per_second,
            bytes_per_second: volume.limits.bytes_per_second,
            resync_blocks_left: resync,
            segments: count(volume.segments.iter()),
            segments_degraded: degraded(volume),
            moves: moves(volume),
            progress: progress(volume),
            eta_seconds: self.etas.get(&volume.id).map(|eta| eta.as_secs()),
            tolerates,
            at_risk,
            snapshots: snapshots(volume),
            layers: count(volume.layers.chain.iter()),
            merging: volume.layers.merge.is_some(),
            placement: self.placement(volume),
            created: volume.created.to_string(),
        }
    }

    fn placement(&self, volume: &Volume) -> Vec<api::VolumePlacement> {
        let mut disks = BTreeMap::new();
        for segment in &volume.segments {
            for copy in &segment.replicas {
                let entry = disks.entry(copy.disk).or_insert_with(|| api::VolumePlacement {
                    node: self.node_name(copy.node),
                    disk: self.state.disks.get(&copy.disk).map(|disk| disk.path.clone()).unwrap_or_default(),
                    rack: self.state.nodes.get(&copy.node).and_then(|node| node.rack.clone()),
                    segments: 0,
                    in_sync: 0,
                    state: api::CopyState::InSync,
                    moving: 0,
                });
                entry.segments += 1;
                entry.in_sync += u32::from(copy.state == ReplicaState::InSync);
                entry.moving += u32::from(copy.replaces.is_some() || segment.is_replaced(copy.disk));
                entry.state = match self.standing(copy) {
                    Standing::Good => entry.state,
                    Standing::Coming => api::CopyState::Syncing,
                    Standing::Waiting => api::CopyState::Waiting,
                    Standing::Leaving => api::CopyState::Leaving,
                    Standing::Gone => api::CopyState::Gone,
                };
            }
        }
        disks.into_values().collect()
    }
}

/// What the loss of one more disk does.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Outcome {
    /// Writes wait.
    Waits,
    /// The last complete copy is gone.
    Lost,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::{ClusterState, Command, Generation, Op, VolumeId, report::NodeReport, testing::*};

    /// Three nodes with a disk each, and a volume that is open on the first one.
    fn cluster_with_volume(replicas: u8) -> (ClusterState, VolumeId) {
        let mut state = cluster(3);
        let volume = new_volume(1, replicas);
        let id = volume.id;
        run(&mut state, Op::CreateVolume { volume, near: Some(node_id(1)), unreachable: vec![] });
        let node = node_id(1);
        run(&mut state, Op::OpenVolume { volume: id, node, expected: Generation(0), unreachable: vec![] });
        (state, id)
    }

    fn run(state: &mut ClusterState, op: Op) {
        state.apply(&Command { at: Timestamp(0), task: None, op }).unwrap();
    }

    fn seen(state: &ClusterState, id: VolumeId) -> api::Volume {
        let reports = state.nodes.keys().map(|node| (*node, NodeReport::default())).collect();
        let views = Views { state, reports: &reports, etas: &Default::default(), members: &[], leader: None };
        views.volume(&state.volumes[&id])
    }

    #[test]
    fn a_whole_volume_tolerates_a_node_and_names_no_risk() {
        let (state, id) = cluster_with_volume(3);
        let view = seen(&state, id);
        assert_eq!((view.tolerates.as_str(), view.at_risk.len()), ("the loss of any 1 node", 0));
        assert_eq!((view.progress, view.segments_degraded, view.placement.len()), (1.0, 0, 3));
    }

    #[test]
    fn a_degraded_volume_names_the_disks_that_must_not_fail() {
        let (mut state, volume) = cluster_with_volume(3);
        let out =
            Op::ReplicasOut { volume, generation: Generation(1), disk: disk_id(3), reason: "reset".into() };
        run(&mut state, out);
        let view = seen(&state, volume);
        assert_eq!(view.tolerates, "no loss of a node or disk");
        assert_eq!(view.at_risk.len(), 2, "{:?}", view.at_risk);
        assert!(view.at_risk.iter().all(|risk| risk.ends_with("writes wait until another copy is complete")));
        assert!(view.at_risk[0].starts_with("n1:/dev/vdb"), "{:?}", view.at_risk);
        assert_eq!(view.segments_degraded, 3);
        assert!((view.progress - 2.0 / 3.0).abs() < 1e-9);
        let third = view.placement.iter().find(|place| place.node == "n3").unwrap();
        assert_eq!((third.state, third.in_sync, third.segments), (api::CopyState::Syncing, 0, 3));
    }

    #[test]
    fn a_volume_whose_last_copy_is_out_of_reach_is_critical() {
        let (mut state, _) = cluster_with_volume(1);
        let availability = crate::state::Availability::Lost { since: Timestamp(0) };
        run(&mut state, Op::SetAvailability { node: node_id(1), availability });
        let views = Views {
            state: &state,
            reports: &Default::default(),
            etas: &Default::default(),
            members: &[],
            leader: Some(node_id(2)),
        };
        let status = views.status();
        assert_eq!(status.health, api::Health::Critical);
        let message = &status.problems[0].message;
        assert!(message.contains("3 of 3 segments"), "{message}");
    }

    #[test]
    fn the_last_copy_is_named_as_such() {
        let (state, id) = cluster_with_volume(1);
        let view = seen(&state, id);
        assert_eq!(view.at_risk, ["n1:/dev/vdb fails: data are lost unless another copy comes back"]);
    }
}
