//! One request to one replica, local or remote, and what its failure means for the replica.

use super::Coordinator;
use super::health::Verdict;
use super::layers::{Part, View};
use super::members::Target;
use crate::ids::{BLOCK_SIZE, LayerRef, SegmentIndex};
use crate::replica::protocol::{
    AckWhen, ReplicaAddress, ReplicaError, ReplicaOp, ReplicaOutcome, ReplicaRequest,
};
use crate::store::{BlockVersion, ReadReply, ReplicaWrite};
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

/// Why a request to a replica brought nothing.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum CallError {
    /// A block is damaged there.
    Checksum,
    /// The disk is full.
    Full,
    /// The disk failed.
    Disk(String),
    /// No answer, or one that shows that the replica is not what it was.
    Lost(String),
}

impl Coordinator {
    /// Sends a request and waits for the answer, for a limited time.
    pub(super) async fn call(
        &self,
        target: Target,
        op: ReplicaOp,
        deadline: Duration,
    ) -> Result<ReplicaOutcome, CallError> {
        let request =
            ReplicaRequest { volume: self.id, generation: self.generation, session: target.session, op };
        let started = Instant::now();
        let reply = if target.node == self.rim.node {
            let served = self.rim.replicas.handle(self.rim.node, request);
            match tokio::time::timeout(deadline, served).await {
                Ok(reply) => {
                    self.metrics.local.observe(started.elapsed());
                    reply
                }
                Err(_) => return Err(CallError::Lost("the disk did not answer in time".into())),
            }
        } else {
            match self.rim.transport.call(target.node, request, deadline).await {
                Ok(reply) => {
                    self.metrics.remote.observe(started.elapsed());
                    self.metrics.remote_disk.observe(Duration::from_micros(reply.served_us.into()));
                    reply
                }
                Err(error) => return Err(CallError::Lost(error.to_string())),
            }
        };
        reply.result.map_err(|error| match error {
            ReplicaError::Fenced { .. } => {
                self.fence();
                CallError::Lost(error.to_string())
            }
            ReplicaError::Checksum { block } => {
                tracing::error!(volume = %self.id, disk = %target.disk, block, "checksum error");
                self.metrics.checksum_errors.inc();
                CallError::Checksum
            }
            ReplicaError::Full => CallError::Full,
            ReplicaError::Failed(text) => CallError::Disk(text),
            other => CallError::Lost(other.to_string()),
        })
    }

    /// A replica failed a request of its session: it may lack a write from now on.
    pub(super) fn lose(&self, target: &Target, reason: &str) {
        let lost = self.table.lock().lose(target.disk, target.session, reason);
        if lost {
            self.metrics.replicas_lost.inc();
            tracing::warn!(volume = %self.id, disk = %target.disk, node = %target.node, reason, "replica lost");
            self.change(|_| ());
        }
    }

    /// How long to wait for a replica.
    fn deadline(&self, target: Target) -> Duration {
        self.health.lock().deadline(target.disk, self.rim.timing.member_deadline)
    }

    /// Takes note of a write's time. A disk that holds the others up for long is lost, if the volume can do without it.
    fn observe(&self, target: Target, started: Instant) {
        let now = Instant::now();
        let verdict = self.health.lock().observe(target.disk, now - started, now);
        let Verdict::Slow(reason) = verdict else { return };
        let spare = self.table.lock().is_spare(target.disk);
        if spare {
            self.health.lock().bar(target.disk, now);
            self.lose(&target, &reason);
        }
    }

    /// Reads blocks through all layers.
    pub(super) async fn read_replica(
        &self,
        target: Target,
        view: &View,
        segment: SegmentIndex,
        block: u32,
        blocks: u32,
    ) -> Result<ReadReply, CallError> {
        let at = ReplicaAddress { disk: target.disk, segment, layer: view.first() };
        self.read_at(target, at, view.below.clone(), block, blocks).await
    }

    /// Reads blocks of one layer.
    pub(super) async fn read_layer(
        &self,
        target: Target,
        part: Part,
        block: u32,
        blocks: u32,
    ) -> Result<ReadReply, CallError> {
        self.read_at(target, address(target, part), Arc::default(), block, blocks).await
    }

    async fn read_at(
        &self,
        target: Target,
        at: ReplicaAddress,
        below: Arc<[LayerRef]>,
        block: u32,
        blocks: u32,
    ) -> Result<ReadReply, CallError> {
        let op = ReplicaOp::Read { at, below, block, blocks };
        match self.call(target, op, self.deadline(target)).await? {
            ReplicaOutcome::Data(reply) if is_intact(&reply, blocks) => Ok(reply),
            _ => Err(CallError::Lost("the answer does not fit the request".into())),
        }
    }

    pub(super) async fn write_replica(
        &self,
        target: Target,
        part: Part,
        write: ReplicaWrite,
        ack: AckWhen,
    ) -> Result<(), CallError> {
        let op = ReplicaOp::Write { at: address(target, part), write, ack };
        let started = Instant::now();
        match self.call(target, op, self.deadline(target)).await? {
            ReplicaOutcome::Done => {
                if ack == AckWhen::Logged {
                    self.table.lock().note_written(&target);
                }
                self.observe(target, started);
                Ok(())
            }
            _ => Err(CallError::Lost("the answer does not fit the request".into())),
        }
    }

    pub(super) async fn versions(
        &self,
        target: Target,
        part: Part,
        block: u32,
        blocks: u32,
    ) -> Result<Vec<BlockVersion>, CallError> {
        let op = ReplicaOp::Versions { at: address(target, part), block, blocks };
        match self.call(target, op, self.rim.timing.member_deadline).await? {
            ReplicaOutcome::Versions(versions)
                if versions.iter().all(|v| (block..block + blocks).contains(&v.block)) =>
            {
                Ok(versions)
            }
            _ => Err(CallError::Lost("the answer does not fit the request".into())),
        }
    }

    /// The segments of which a replica has anything in a layer.
    pub(super) async fn stored(
        &self,
        target: Target,
        layer: LayerRef,
        segments: Range<u32>,
    ) -> Result<Vec<SegmentIndex>, CallError> {
        let (first, count) = (SegmentIndex(segments.start), segments.len() as u32);
        let op = ReplicaOp::Stored { disk: target.disk, layer, first, count };
        match self.call(target, op, self.rim.timing.member_deadline).await? {
            ReplicaOutcome::Stored(stored) if stored.iter().all(|s| segments.contains(&s.0)) => Ok(stored),
            _ => Err(CallError::Lost("the answer does not fit the request".into())),
        }
    }
}

impl CallError {
    /// For people.
    pub(super) fn reason(&self) -> &str {
        match self {
            Self::Checksum => "checksum error",
            Self::Full => "the disk is full",
            Self::Disk(text) | Self::Lost(text) => text,
        }
    }
}

pub(super) fn address(target: Target, part: Part) -> ReplicaAddress {
    ReplicaAddress { disk: target.disk, segment: part.segment, layer: part.layer }
}

/// Whether what came is what was asked for, and what its checksums say.
fn is_intact(reply: &ReadReply, blocks: u32) -> bool {
    let block = BLOCK_SIZE as usize;
    reply.crcs.len() == blocks as usize
        && reply.data.len() == blocks as usize * block
        && reply.data.chunks_exact(block).zip(&reply.crcs).all(|(data, crc)| crc32c::crc32c(data) == *crc)
}
