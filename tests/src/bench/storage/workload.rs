//! What is measured, the same for every target.

use std::time::Duration;

use crate::bench::{Row, micros};

/// The part of the volume, the file or the image that is worked on.
pub const AREA: u64 = 1 << 30;
/// One measurement.
pub const DURATION: Duration = Duration::from_secs(3);
/// Size of a small request.
pub const SMALL: u32 = 4 << 10;
/// Size of a large request.
pub const LARGE: u32 = 1 << 20;

/// What a request does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A write.
    Write,
    /// A write, then a flush; their latency together.
    WriteFlush,
    /// A read.
    Read,
}

/// One measurement.
#[derive(Clone, Copy, Debug)]
pub struct Workload {
    /// For people and rows.
    pub name: &'static str,
    /// What its requests do.
    pub kind: Kind,
    /// Bytes of a request.
    pub size: u32,
    /// Requests in flight.
    pub depth: u16,
}

const fn workload(name: &'static str, kind: Kind, size: u32, depth: u16) -> Workload {
    Workload { name, kind, size, depth }
}

/// All of them. Small requests go to random places, large ones to ascending ones.
pub const WORKLOADS: [Workload; 8] = [
    workload("4 KiB random write, depth 1", Kind::Write, SMALL, 1),
    workload("4 KiB random write + flush, depth 1", Kind::WriteFlush, SMALL, 1),
    workload("4 KiB random read, depth 1", Kind::Read, SMALL, 1),
    workload("4 KiB random write, depth 32", Kind::Write, SMALL, 32),
    workload("4 KiB random write + flush, depth 32", Kind::WriteFlush, SMALL, 32),
    workload("4 KiB random read, depth 32", Kind::Read, SMALL, 32),
    workload("1 MiB write, depth 16", Kind::Write, LARGE, 16),
    workload("1 MiB read, depth 16", Kind::Read, LARGE, 16),
];

/// What runs while a replica is lost.
pub const UNDER_LOSS: Workload = workload("4 KiB random write, depth 8", Kind::Write, SMALL, 8);

/// What one measurement found.
#[derive(Clone, Debug, Default)]
pub struct Measured {
    /// Latency of each request, ascending.
    pub latencies: Vec<Duration>,
    /// From the first request to the last answer.
    pub elapsed: Duration,
    /// The longest time between two answers.
    pub longest_gap: Duration,
    /// CPU time of the target's processes and of the client.
    pub cpu: Duration,
    /// Memory of the largest process of the target, bytes.
    pub resident: u64,
}

impl Measured {
    /// The row of a workload.
    pub fn row(&self, target: &str, workload: Workload) -> Row {
        let count = self.latencies.len().max(1);
        let iops = self.latencies.len() as f64 / self.elapsed.as_secs_f64().max(f64::EPSILON);
        let mean = self.latencies.iter().sum::<Duration>() / count as u32;
        let at = |share: usize| {
            micros(self.latencies.get(self.latencies.len() * share / 100).copied().unwrap_or_default())
        };
        let mut figures = vec![
            ("iops", iops),
            ("mb_s", iops * f64::from(workload.size) / 1e6),
            ("mean_us", micros(mean)),
            ("p50_us", at(50)),
            ("p99_us", at(99)),
            ("cpu_us_per_io", micros(self.cpu) / count as f64),
        ];
        if self.resident > 0 {
            figures.push(("rss_mib", self.resident as f64 / f64::from(1 << 20)));
        }
        Row::new(target, workload.name, figures)
    }
}

/// Where the requests go: random places for small ones, ascending ones for large ones.
#[derive(Clone, Debug)]
pub struct Offsets {
    size: u32,
    state: u64,
}

impl Offsets {
    /// For requests of that size; the same sequence each time.
    pub fn new(size: u32) -> Self {
        Self { size, state: 0x2545_f491_4f6c_dd1d }
    }

    /// The next one.
    #[expect(clippy::should_implement_trait, reason = "it never ends, so it needs no Option")]
    pub fn next(&mut self) -> u64 {
        let pieces = AREA / u64::from(self.size);
        if self.size == LARGE {
            self.state = self.state.wrapping_add(1);
        } else {
            self.state ^= self.state << 13;
            self.state ^= self.state >> 7;
            self.state ^= self.state << 17;
        }
        self.state % pieces * u64::from(self.size)
    }
}

/// What is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// Bytes that do not compress.
    Random,
    /// Bytes of which LZ4 makes a little less than half.
    Halves,
}

impl Content {
    /// So many bytes of it.
    pub fn bytes(self, length: u32, seed: u64) -> Vec<u8> {
        let mut bytes = pattern(length, seed);
        if self == Self::Halves {
            bytes.chunks_mut(128).for_each(|line| line[56..].fill(0));
        }
        bytes
    }
}

/// Bytes that do not compress.
pub fn pattern(length: u32, seed: u64) -> Vec<u8> {
    let mut state = seed | 1 << 63;
    let words = (0..length / 8).map(|_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    });
    words.flatten().collect()
}
