//! What storage counts: latency histograms by volume and operation, by stage of a request and by disk, and the events that
//! operators want to know of.

use crate::device::BlockOp;
use crate::ids::{DiskId, VolumeId};
use prometheus::{HistogramOpts, HistogramVec, IntCounter, IntCounterVec, Opts, Registry};
use std::time::Duration;

/// Latency buckets in seconds: 25 µs to 10 s.
const BUCKETS: &[f64] = &[
    0.000_025, 0.000_05, 0.000_1, 0.000_2, 0.000_4, 0.000_8, 0.001_6, 0.003_2, 0.006_4, 0.012_8, 0.025, 0.05,
    0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0,
];

/// All metrics of this node's storage. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Metrics {
    registry: Registry,
    latency: HistogramVec,
    stages: HistogramVec,
    disks: HistogramVec,
    bytes: IntCounterVec,
    events: IntCounterVec,
    scrubbed: IntCounterVec,
    scrub_blocks: IntCounterVec,
}

impl Metrics {
    /// New metrics in a registry of their own.
    pub fn new() -> Result<Self, prometheus::Error> {
        let registry = Registry::new();
        let latency = HistogramVec::new(
            HistogramOpts::new("hci_volume_op_seconds", "Latency of volume operations.")
                .buckets(BUCKETS.to_vec()),
            &["volume", "op"],
        )?;
        let stages = HistogramVec::new(
            HistogramOpts::new(
                "hci_volume_stage_seconds",
                "Time that requests spend in each stage: queue (limits, waiting for the volume to open), local (this node's disk), \
                 remote (another node, there and back), remote_disk (the part of it in that node's disk).",
            )
            .buckets(BUCKETS.to_vec()),
            &["volume", "stage"],
        )?;
        let disks = HistogramVec::new(
            HistogramOpts::new(
                "hci_disk_op_seconds",
                "Latency of replicas' requests to a disk of this node.",
            )
            .buckets(BUCKETS.to_vec()),
            &["disk", "op"],
        )?;
        let bytes = IntCounterVec::new(
            Opts::new("hci_volume_bytes_total", "Bytes read, written and discarded by users of volumes."),
            &["volume", "op"],
        )?;
        let events = IntCounterVec::new(
            Opts::new(
                "hci_volume_events_total",
                "Replicas lost, blocks copied by resync and reconciliation, checksum errors, repairs, unreadable blocks.",
            ),
            &["volume", "event"],
        )?;
        let scrubbed = IntCounterVec::new(
            Opts::new("hci_disk_scrub_bytes_total", "Bytes read and verified by the scrub of a disk."),
            &["disk"],
        )?;
        let scrub_blocks = IntCounterVec::new(
            Opts::new(
                "hci_disk_scrub_blocks_total",
                "Blocks that the scrub of a disk found damaged, and those of them that are intact again.",
            ),
            &["disk", "result"],
        )?;
        registry.register(Box::new(scrubbed.clone()))?;
        registry.register(Box::new(scrub_blocks.clone()))?;
        registry.register(Box::new(latency.clone()))?;
        registry.register(Box::new(stages.clone()))?;
        registry.register(Box::new(disks.clone()))?;
        registry.register(Box::new(bytes.clone()))?;
        registry.register(Box::new(events.clone()))?;
        Ok(Self { registry, latency, stages, disks, bytes, events, scrubbed, scrub_blocks })
    }

    /// The registry, to be gathered with those of the other parts.
    pub fn registry(&self) -> &Registry {
        &self.registry
    }

    /// The metrics of one volume.
    pub(crate) fn volume(&self, volume: VolumeId) -> VolumeMetrics {
        let id = volume.to_string();
        let op = |op: &str| OpMetrics {
            latency: self.latency.with_label_values(&[&id, op]),
            bytes: self.bytes.with_label_values(&[&id, op]),
        };
        let event = |event: &str| self.events.with_label_values(&[&id, event]);
        let stage = |stage: &str| self.stages.with_label_values(&[&id, stage]);
        VolumeMetrics {
            queue: Stage(stage("queue")),
            local: Stage(stage("local")),
            remote: Stage(stage("remote")),
            remote_disk: Stage(stage("remote_disk")),
            read: op("read"),
            write: op("write"),
            flush: op("flush"),
            discard: op("discard"),
            checksum_errors: event("checksum_error"),
            repaired_blocks: event("block_repaired"),
            unreadable: event("block_unreadable"),
            replicas_lost: event("replica_lost"),
            resynced_blocks: event("block_resynced"),
            reconciled_blocks: event("block_reconciled"),
        }
    }

    /// The metrics of one disk of this node.
    pub(crate) fn disk(&self, disk: DiskId) -> DiskMetrics {
        let id = disk.to_string();
        let op = |op: &str| Stage(self.disks.with_label_values(&[&id, op]));
        DiskMetrics {
            read: op("read"),
            write: op("write"),
            flush: op("flush"),
            scrubbed: self.scrubbed.with_label_values(&[&id]),
            damaged: self.scrub_blocks.with_label_values(&[&id, "damaged"]),
            repaired: self.scrub_blocks.with_label_values(&[&id, "repaired"]),
        }
    }
}

/// Where a request's time goes.
#[derive(Clone, Debug)]
pub(crate) struct Stage(prometheus::Histogram);

impl Stage {
    pub(crate) fn observe(&self, took: Duration) {
        self.0.observe(took.as_secs_f64());
    }
}

/// The metrics of one disk, looked up once.
#[derive(Clone, Debug)]
pub(crate) struct DiskMetrics {
    pub(crate) read: Stage,
    pub(crate) write: Stage,
    pub(crate) flush: Stage,
    /// Bytes verified by scrubs.
    pub(crate) scrubbed: IntCounter,
    /// Blocks that they found damaged, and those of them that are intact again.
    pub(crate) damaged: IntCounter,
    pub(crate) repaired: IntCounter,
}

impl DiskMetrics {
    /// Replicas' requests to read or write so far.
    pub(crate) fn operations(&self) -> u64 {
        self.read.0.get_sample_count() + self.write.0.get_sample_count()
    }
}

#[derive(Clone, Debug)]
struct OpMetrics {
    latency: prometheus::Histogram,
    bytes: IntCounter,
}

/// The metrics of one volume, looked up once.
#[derive(Clone, Debug)]
pub(crate) struct VolumeMetrics {
    read: OpMetrics,
    write: OpMetrics,
    flush: OpMetrics,
    discard: OpMetrics,
    pub(crate) queue: Stage,
    pub(crate) local: Stage,
    pub(crate) remote: Stage,
    pub(crate) remote_disk: Stage,
    pub(crate) checksum_errors: IntCounter,
    pub(crate) repaired_blocks: IntCounter,
    pub(crate) unreadable: IntCounter,
    pub(crate) replicas_lost: IntCounter,
    pub(crate) resynced_blocks: IntCounter,
    pub(crate) reconciled_blocks: IntCounter,
}

impl VolumeMetrics {
    /// Counts one request.
    pub(crate) fn observe(&self, op: &BlockOp, elapsed: Duration) {
        let (metrics, bytes) = match op {
            BlockOp::Read { len, .. } => (&self.read, *len),
            BlockOp::Write { data, .. } => (&self.write, data.len() as u64),
            BlockOp::Flush => (&self.flush, 0),
            BlockOp::Discard { len, .. } | BlockOp::WriteZeroes { len, .. } => (&self.discard, *len),
        };
        metrics.latency.observe(elapsed.as_secs_f64());
        metrics.bytes.inc_by(bytes);
    }
}
