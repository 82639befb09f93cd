//! How replicas keep up: pure. From the time that writes take on each disk follow its deadline and whether it is too slow to stay.
//!
//! A silent replica is found by its deadline, which follows what was observed of it (mean and mean deviation, as TCP does for its
//! retransmission), within bounds. A disk that answers, but ever later than its peers, holds up every write of the volume without
//! missing any deadline: it is **slow**, and is taken out when that lasts. What counts is for which part of the time a late write was
//! under way, not how many were late: while a disk stalls there are few, and between two stalls many that are fast. It
//! comes back after a pause that grows each time, or at once when the volume cannot do without it.

use crate::ids::DiskId;
use std::collections::BTreeMap;
use std::time::Duration;
use tokio::time::Instant;

/// Shortest deadline: stalls of this length are nothing unusual for a busy machine or an SSD that collects its garbage.
const SHORTEST_DEADLINE: Duration = Duration::from_millis(1500);
/// Deviations that are added to the mean.
const DEVIATIONS: f64 = 8.0;
/// Weight of a new observation.
const WEIGHT: f64 = 1.0 / 16.0;
/// Observations before anything follows from them.
const ENOUGH: u32 = 64;
/// Nothing faster than this is slow, whatever the peers do.
const SLOW: Duration = Duration::from_millis(50);
/// How many times slower than the slowest of its peers a late write is. A node that is merely busy stays below this.
const TIMES: f64 = 32.0;
/// Late writes were under way for half of this time, or more.
const SUSTAINED: Duration = Duration::from_secs(10);
/// How long a slow disk stays out, the first time and at most.
const OUT: std::ops::RangeInclusive<Duration> = Duration::from_secs(60)..=Duration::from_secs(960);

/// What was observed of one disk.
#[derive(Clone, Copy, Debug, Default)]
struct Observed {
    /// In seconds.
    mean: f64,
    deviation: f64,
    count: u32,
    window: Option<Window>,
}

/// How much of the time late writes were under way.
#[derive(Clone, Copy, Debug)]
struct Window {
    start: Instant,
    late: Duration,
    /// Up to when late writes have been counted: they overlap.
    counted: Instant,
}

impl Window {
    fn new(now: Instant) -> Self {
        Self { start: now, late: Duration::ZERO, counted: now }
    }

    fn add_late(&mut self, took: Duration, now: Instant) {
        self.late += took.min(now - self.counted);
        self.counted = now;
    }
}

/// A disk that is to be left out for now.
#[derive(Clone, Copy, Debug)]
struct Barred {
    until: Instant,
    pause: Duration,
}

/// What an observation means.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Verdict {
    /// Nothing.
    KeepsUp,
    /// The disk holds the others up; the text says by how much.
    Slow(String),
}

/// All disks of a volume.
#[derive(Debug, Default)]
pub(crate) struct Health {
    disks: BTreeMap<DiskId, Observed>,
    barred: BTreeMap<DiskId, Barred>,
}

impl Health {
    /// A write took this long on a disk.
    pub(crate) fn observe(&mut self, disk: DiskId, took: Duration, now: Instant) -> Verdict {
        let elapsed = took;
        let took = took.as_secs_f64();
        let peers = self.disks.iter().filter(|(other, o)| **other != disk && o.count >= ENOUGH);
        let slowest_peer = peers.map(|(_, o)| o.mean).reduce(f64::max);
        let observed = self.disks.entry(disk).or_default();
        if observed.count == 0 {
            (observed.mean, observed.deviation) = (took, took / 2.0);
        } else {
            observed.deviation += ((took - observed.mean).abs() - observed.deviation) * WEIGHT;
            observed.mean += (took - observed.mean) * WEIGHT;
        }
        observed.count = observed.count.saturating_add(1);
        let window = observed.window.get_or_insert_with(|| Window::new(now));
        if observed.count >= ENOUGH
            && slowest_peer.is_some_and(|peer| took > (peer * TIMES).max(SLOW.as_secs_f64()))
        {
            window.add_late(elapsed, now);
        }
        let length = now - window.start;
        if length < SUSTAINED {
            return Verdict::KeepsUp;
        }
        let late = window.late;
        *window = Window::new(now);
        if late * 2 < length {
            return Verdict::KeepsUp;
        }
        let part = 100.0 * late.as_secs_f64() / length.as_secs_f64();
        let peer = slowest_peer.unwrap_or_default() * 1e3;
        Verdict::Slow(format!(
            "the disk is slow: for {part:.0} % of {:.0} s writes were stuck in it, others take {peer:.1} ms",
            length.as_secs_f64()
        ))
    }

    /// When a disk that has not answered is given up; `longest` at most.
    pub(crate) fn deadline(&self, disk: DiskId, longest: Duration) -> Duration {
        match self.disks.get(&disk) {
            Some(o) if o.count >= ENOUGH => {
                let expected = Duration::from_secs_f64(o.mean + DEVIATIONS * o.deviation);
                expected.max(SHORTEST_DEADLINE).min(longest)
            }
            _ => longest,
        }
    }

    /// A slow disk was left out.
    pub(crate) fn bar(&mut self, disk: DiskId, now: Instant) {
        let pause = self.barred.get(&disk).map_or(*OUT.start(), |b| (b.pause * 2).min(*OUT.end()));
        self.barred.insert(disk, Barred { until: now + pause, pause });
        self.disks.remove(&disk);
    }

    /// Whether a disk is to stay out for now.
    pub(crate) fn is_barred(&self, disk: DiskId, now: Instant) -> bool {
        self.barred.get(&disk).is_some_and(|b| now < b.until)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FAST: Duration = Duration::from_micros(200);
    const LONGEST: Duration = Duration::from_millis(2500);

    fn disk(n: u128) -> DiskId {
        DiskId(uuid::Uuid::from_u128(n))
    }

    /// Writes on two disks, ten a second; returns after how many seconds the first was found slow.
    fn run(first: impl Fn(u32) -> Duration, second: Duration, seconds: u32) -> Option<u32> {
        let mut health = Health::default();
        let start = Instant::now();
        (0..seconds * 10).find_map(|i| {
            let now = start + Duration::from_millis(u64::from(i) * 100);
            assert_eq!(health.observe(disk(2), second, now), Verdict::KeepsUp);
            (health.observe(disk(1), first(i), now) != Verdict::KeepsUp).then_some(i / 10)
        })
    }

    #[test]
    fn a_disk_that_is_slow_for_long_is_found_and_one_like_its_peers_is_not() {
        let found = run(|_| Duration::from_millis(300), FAST, 60).unwrap();
        assert!((10..30).contains(&found), "{found}");
        assert_eq!(run(|_| Duration::from_millis(300), Duration::from_millis(200), 60), None);
        assert_eq!(run(|_| FAST, FAST, 60), None);
        // A hundred times slower than its peer, and still nobody minds.
        assert_eq!(run(|_| FAST * 100, FAST, 60), None);
    }

    #[test]
    fn a_short_stall_is_forgiven() {
        let stalls = |i: u32| if i % 200 < 20 { Duration::from_millis(400) } else { FAST };
        assert_eq!(run(stalls, FAST, 300), None);
    }

    #[test]
    fn a_disk_that_stalls_again_and_again_is_found_however_fast_it_is_in_between() {
        let mut health = Health::default();
        let start = Instant::now();
        let mut found = None;
        // 16 writes that wait for 300 ms, then 200 fast ones within 30 ms.
        for cycle in 0..90u64 {
            let stalled = start + Duration::from_millis(cycle * 330 + 300);
            for _ in 0..16 {
                let verdict = health.observe(disk(1), Duration::from_millis(300), stalled);
                found = found.or((verdict != Verdict::KeepsUp).then_some(cycle * 330 / 1000));
            }
            for i in 0..200 {
                let now = stalled + Duration::from_micros(i * 150);
                assert_eq!(health.observe(disk(2), FAST, now), Verdict::KeepsUp);
                health.observe(disk(1), FAST, now);
            }
        }
        assert!(found.is_some_and(|seconds| (10..25).contains(&seconds)), "{found:?}");
    }

    #[test]
    fn deadlines_follow_what_was_observed_within_their_bounds() {
        let mut health = Health::default();
        let now = Instant::now();
        assert_eq!(health.deadline(disk(1), LONGEST), LONGEST);
        (0..200).for_each(|_| drop(health.observe(disk(1), FAST, now)));
        assert_eq!(health.deadline(disk(1), LONGEST), SHORTEST_DEADLINE);
        for i in 0..200 {
            let took = if i % 2 == 0 { FAST } else { Duration::from_millis(400) };
            health.observe(disk(1), took, now);
        }
        let deadline = health.deadline(disk(1), LONGEST);
        assert!(deadline > SHORTEST_DEADLINE && deadline < LONGEST, "{deadline:?}");
        (0..200).for_each(|_| drop(health.observe(disk(1), LONGEST, now)));
        assert_eq!(health.deadline(disk(1), LONGEST), LONGEST);
    }

    #[test]
    fn a_slow_disk_stays_out_longer_each_time() {
        let mut health = Health::default();
        let start = Instant::now();
        health.bar(disk(1), start);
        assert!(health.is_barred(disk(1), start + *OUT.start() / 2));
        assert!(!health.is_barred(disk(1), start + *OUT.start()));
        health.bar(disk(1), start);
        assert!(health.is_barred(disk(1), start + *OUT.start()));
        assert!(!health.is_barred(disk(2), start));
    }
}
