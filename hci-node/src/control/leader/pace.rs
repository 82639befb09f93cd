//! How fast volumes get their missing copies, to tell when they will have them. Kept in memory: a new leader measures
//! anew.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use crate::state::{ClusterState, ReplicaState, Volume, VolumeId};

#[derive(Clone, Copy, Debug)]
struct Begun {
    at: Instant,
    missing: u64,
    left: u64,
}

/// What is missing of each volume since when.
#[derive(Debug, Default)]
pub struct Pace {
    begun: BTreeMap<VolumeId, Begun>,
}

impl Pace {
    /// Notes what is missing now.
    pub fn look(&mut self, state: &ClusterState, now: Instant) {
        self.begun.retain(|id, _| state.volumes.get(id).is_some_and(|volume| missing(volume) > 0));
        for volume in state.volumes.values() {
            let left = missing(volume);
            if left == 0 {
                continue;
            }
            let begun = self.begun.entry(volume.id).or_insert(Begun { at: now, missing: left, left });
            if left > begun.left {
                // More went missing: what was measured does not say how long that takes.
                *begun = Begun { at: now, missing: left, left };
            }
            begun.left = left;
        }
    }

    /// How long each volume needs until nothing is missing, as far as can be told.
    pub fn etas(&self, now: Instant) -> BTreeMap<VolumeId, Duration> {
        let eta = |(id, begun): (&VolumeId, &Begun)| {
            let done = begun.missing - begun.left;
            let elapsed = now.saturating_duration_since(begun.at);
            (done > 0).then(|| (*id, elapsed.mul_f64(begun.left as f64 / done as f64)))
        };
        self.begun.iter().filter_map(eta).collect()
    }
}

/// Bytes of segments whose copies are missing or on their way.
fn missing(volume: &Volume) -> u64 {
    let wanted = usize::from(volume.replicas);
    let segments = volume.numbered().map(|(index, segment)| {
        let moving = segment
            .replicas
            .iter()
            .filter(|copy| copy.replaces.is_some() && copy.state == ReplicaState::OutOfSync)
            .count();
        let lacking = wanted.saturating_sub(segment.in_sync());
        volume.segment_bytes(index) * lacking.max(moving) as u64
    });
    segments.sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::{Command, Generation, Op, SegmentIndex, Timestamp, testing::*};

    #[test]
    fn the_time_left_follows_what_has_been_done_and_begins_anew_when_more_is_lost() {
        let mut state = cluster(3);
        let new = new_volume(1, 3);
        let volume = new.id;
        let mut run = |op| state.apply(&Command { at: Timestamp(0), task: None, op }).map(|_| ()).unwrap();
        run(Op::CreateVolume { volume: new, near: None, unreachable: vec![] });
        run(Op::OpenVolume { volume, node: node_id(1), expected: Generation(0), unreachable: vec![] });
        let generation = Generation(1);
        let out = |disk| Op::ReplicasOut { volume, generation, disk, reason: "reset".into() };
        run(out(disk_id(3)));
        let (mut pace, began) = (Pace::default(), Instant::now());
        let after = |seconds| began + Duration::from_secs(seconds);
        pace.look(&state, began);
        assert_eq!(pace.etas(after(10)).get(&volume), None, "nothing is known yet");
        let back = |segment| Op::ReplicaIn {
            volume,
            generation,
            segment: SegmentIndex(segment),
            disk: disk_id(3),
            departures: 1,
        };
        state.apply(&Command { at: Timestamp(0), task: None, op: back(0) }).unwrap();
        pace.look(&state, after(10));
        assert_eq!(pace.etas(after(10))[&volume], Duration::from_secs(20), "one of three in 10 s");
        state.apply(&Command { at: Timestamp(0), task: None, op: out(disk_id(2)) }).unwrap();
        pace.look(&state, after(11));
        assert_eq!(pace.etas(after(11)).get(&volume), None);
    }
}
