//! Reads, writes and flushes.

use super::call::CallError;
use super::geometry::{self, Piece};
use super::layers::Part;
use super::members::Target;
use super::ranges::Mode;
use super::{Coordinator, Phase};
use crate::device::{BlockError, BlockOp};
use crate::ids::{BLOCK_SIZE, SegmentIndex};
use crate::replica::protocol::{AckWhen, ReplicaOp, ReplicaOutcome};
use crate::signal::Seen;
use crate::store::{ReadReply, ReplicaWrite, WriteContent};
use bytes::{Bytes, BytesMut};
use futures_util::future::{join_all, try_join_all};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tokio::time::Instant;

/// Zeroes are sent in pieces of this size, so that none takes long on any disk.
const MAX_ZEROES: u64 = 64 << 20;
/// Blocks that are read from the same replica when none is local, before it is another's turn.
const TURN: u32 = 64;
/// How often a write is tried again that every replica refused for lack of room.
const FULL_RETRY: Duration = Duration::from_secs(1);

/// What a write puts into its range.
#[derive(Clone)]
enum Payload {
    Data(Bytes),
    Zeroes,
}

impl Coordinator {
    /// Carries out one request.
    pub(super) async fn execute(self: &Arc<Self>, op: BlockOp) -> Result<Bytes, BlockError> {
        let started = Instant::now();
        self.serving().await;
        let early = self.limiter.lock().admit(&op, Instant::now());
        if !early.is_zero() {
            // A close waits for this request, and its user for the close.
            tokio::select! {
                biased;
                () = tokio::time::sleep(early) => {}
                () = self.phase.wait_for(|phase| phase == Phase::Closing) => {}
            }
        }
        self.metrics.queue.observe(started.elapsed());
        let result = loop {
            let reopenings = self.reopenings.load(Ordering::Acquire);
            let result = self.attempt(&op).await;
            // A part of a write that was complete before the volume was opened again may be gone: replicas that lost power hold what was
            // flushed. So may be what a part of a read saw. As long as the request is not answered it is done again.
            let has_parts = !matches!(op, BlockOp::Flush);
            if !(has_parts && result.is_ok() && self.reopenings.load(Ordering::Acquire) != reopenings) {
                break result;
            }
        };
        self.metrics.observe(&op, started.elapsed());
        result
    }

    async fn attempt(self: &Arc<Self>, op: &BlockOp) -> Result<Bytes, BlockError> {
        match op {
            BlockOp::Read { offset, len } => self.read(*offset, *len).await,
            BlockOp::Write { offset, data } => self.write(*offset, data.clone()).await,
            // Rare: in a box, so that the others' futures do not have to be as large.
            BlockOp::Discard { offset, len } | BlockOp::WriteZeroes { offset, len } => {
                Box::pin(self.zero(*offset, *len)).await
            }
            BlockOp::Flush => {
                self.flush_replicas().await;
                // Told once, as the kernel does with its files: a file system stops trusting its disk then.
                if self.loss.swap(false, Ordering::AcqRel) {
                    return Err(BlockError::Io(
                        "all copies lost power, and writes not flushed with it".into(),
                    ));
                }
                Ok(Bytes::new())
            }
        }
    }

    async fn read(self: &Arc<Self>, offset: u64, len: u64) -> Result<Bytes, BlockError> {
        geometry::check(self.size(), offset, len)?;
        let mut pieces = geometry::transfers(offset, len);
        match (pieces.next(), pieces.next()) {
            (None, _) => Ok(Bytes::new()),
            (Some(piece), None) => self.read_piece(piece).await,
            (Some(first), Some(second)) => {
                let all = [first, second].into_iter().chain(pieces);
                let parts = Box::pin(try_join_all(all.map(|piece| self.read_piece(piece)))).await?;
                let mut whole = BytesMut::with_capacity(len as usize);
                parts.iter().for_each(|part| whole.extend_from_slice(part));
                Ok(whole.freeze())
            }
        }
    }

    async fn write(self: &Arc<Self>, offset: u64, data: Bytes) -> Result<Bytes, BlockError> {
        geometry::check(self.size(), offset, data.len() as u64)?;
        let mut pieces = geometry::transfers(offset, data.len() as u64);
        match (pieces.next(), pieces.next()) {
            (None, _) => {}
            (Some(piece), None) => self.write_piece(piece, Payload::Data(data)).await?,
            (Some(first), Some(second)) => {
                let mut at = 0;
                let all = [first, second].into_iter().chain(pieces);
                let writes = all.map(|piece| {
                    let part = data.slice(at..at + piece.len as usize);
                    at += piece.len as usize;
                    self.write_piece(piece, Payload::Data(part))
                });
                Box::pin(try_join_all(writes)).await?;
            }
        }
        Ok(Bytes::new())
    }

    /// The blocks at the ends that are covered in part are written as data, those between as zeroes.
    async fn zero(self: &Arc<Self>, offset: u64, len: u64) -> Result<Bytes, BlockError> {
        geometry::check(self.size(), offset, len)?;
        let end = offset + len;
        let first = offset.next_multiple_of(BLOCK_SIZE).min(end);
        let last = (end - end % BLOCK_SIZE).max(first);
        let edges = [(offset, first), (last, end)];
        let edges =
            edges.into_iter().flat_map(|(from, to)| geometry::transfers(from, to - from)).map(|piece| {
                let zeroes = Bytes::from(vec![0; piece.len as usize]);
                self.write_piece(piece, Payload::Data(zeroes))
            });
        try_join_all(edges).await?;
        for piece in geometry::pieces(first, last - first, MAX_ZEROES) {
            self.write_piece(piece, Payload::Zeroes).await?;
        }
        Ok(Bytes::new())
    }

    async fn read_piece(self: &Arc<Self>, piece: Piece) -> Result<Bytes, BlockError> {
        let _range = self.ranges.lock(piece.range(), Mode::Read).await;
        loop {
            self.leased().await;
            let reply = self.read_blocks(piece.segment, piece.block, piece.blocks).await?;
            // Only a lease that holds now says that nobody else has written meanwhile.
            if self.may_complete() {
                let head = piece.head as usize;
                return Ok(reply.data.slice(head..head + piece.len as usize));
            }
        }
    }

    /// Reads whole blocks from any replica in sync, the local one first. The caller holds the range.
    pub(super) async fn read_blocks(
        self: &Arc<Self>,
        segment: SegmentIndex,
        block: u32,
        blocks: u32,
    ) -> Result<ReadReply, BlockError> {
        let mut disk_error = None;
        loop {
            let mut seen = self.changed.seen();
            let readers = self.table.lock().readers(segment, self.rim.node, block / TURN);
            if readers.is_empty() {
                match disk_error.take() {
                    Some(text) => return Err(BlockError::Io(text)),
                    None => self.wait(&mut seen, None).await,
                }
                continue;
            }
            for target in readers {
                match self.read_replica(target, &self.layers.view(), segment, block, blocks).await {
                    Ok(reply) => return Ok(reply),
                    Err(CallError::Checksum) => {
                        return Box::pin(self.read_damaged(segment, block, blocks)).await;
                    }
                    Err(error) => {
                        if let CallError::Disk(text) = &error {
                            disk_error = Some(text.clone());
                        }
                        self.lose(&target, error.reason());
                    }
                }
            }
        }
    }

    /// Reads blocks one by one, each from whichever replica has it intact, and has the damaged ones repaired.
    async fn read_damaged(
        self: &Arc<Self>,
        segment: SegmentIndex,
        first: u32,
        blocks: u32,
    ) -> Result<ReadReply, BlockError> {
        let mut data = BytesMut::with_capacity(blocks as usize * BLOCK_SIZE as usize);
        let mut crcs = Vec::with_capacity(blocks as usize);
        for block in first..first + blocks {
            let readers = self.table.lock().readers(segment, self.rim.node, block / TURN);
            let mut damaged = false;
            let mut intact = None;
            for target in readers {
                match self.read_replica(target, &self.layers.view(), segment, block, 1).await {
                    Ok(reply) => {
                        intact = Some(reply);
                        break;
                    }
                    Err(CallError::Checksum) => damaged = true,
                    Err(error) => self.lose(&target, error.reason()),
                }
            }
            let Some(reply) = intact else {
                tracing::error!(volume = %self.id, %segment, block, "no intact copy of the block is left");
                self.metrics.unreadable.inc();
                return Err(BlockError::Io(format!("no intact copy of block {block} of segment {segment}")));
            };
            if damaged {
                let this = self.clone();
                self.spawn(async move { this.repair(segment, block).await });
            }
            data.extend_from_slice(&reply.data);
            crcs.extend_from_slice(&reply.crcs);
        }
        Ok(ReadReply { data: data.freeze(), crcs })
    }

    async fn write_piece(self: &Arc<Self>, piece: Piece, payload: Payload) -> Result<(), BlockError> {
        // Held to the end: while a point in time is held no write is under way.
        let _begun = self.layers.door.read().await;
        let range = self.ranges.lock(piece.range(), Mode::Write).await;
        self.leased().await;
        let part = self.layers.view().top(piece.segment);
        let content = match payload {
            Payload::Zeroes => WriteContent::Zeroes { blocks: piece.blocks, keep: part.keep },
            Payload::Data(data) if !piece.is_partial() => with_checksums(data),
            Payload::Data(data) => with_checksums(Box::pin(self.merge(piece, &data)).await?),
        };
        let policy = *self.policy.lock();
        let (version, compression) = (self.next_version(), policy.compression);
        let write = ReplicaWrite { block: piece.block, version, content, compression };
        let mut acked: Vec<Target> = Vec::new();
        'complete: loop {
            let mut seen = self.changed.seen();
            let missing = self.missing(piece.segment, &acked);
            let mut full = None;
            if !missing.is_empty() {
                full = self.send_write(part, &write, policy.ack(), missing, &mut acked).await;
            }
            if self.table.lock().write_complete(piece.segment, &acked) {
                break;
            }
            range.park();
            loop {
                self.wait(&mut seen, full).await;
                if self.table.lock().write_complete(piece.segment, &acked) {
                    break 'complete;
                }
                if !self.missing(piece.segment, &acked).is_empty() {
                    break;
                }
            }
            range.resume().await;
        }
        self.leased().await;
        Ok(())
    }

    /// Replicas that are to get a write and do not have it.
    fn missing(&self, segment: SegmentIndex, acked: &[Target]) -> Vec<Target> {
        if self.phase.get() == Phase::Opening {
            return Vec::new();
        }
        let mut targets = self.table.lock().write_targets(segment);
        targets.retain(|t| !acked.contains(t));
        targets
    }

    /// Sends a write to replicas at the same time. Those that fail are lost, unless nobody has room: then all are still
    /// equal, and the pause after which to try again is returned.
    async fn send_write(
        &self,
        part: Part,
        write: &ReplicaWrite,
        ack: AckWhen,
        targets: Vec<Target>,
        acked: &mut Vec<Target>,
    ) -> Option<Duration> {
        let sent = targets.iter().map(|target| self.write_replica(*target, part, write.clone(), ack));
        let results = join_all(sent).await;
        if acked.is_empty() && results.iter().all(|r| *r == Err(CallError::Full)) {
            return Some(FULL_RETRY);
        }
        for (target, result) in targets.into_iter().zip(results) {
            match result {
                Ok(()) => acked.push(target),
                Err(error) => self.lose(&target, error.reason()),
            }
        }
        None
    }

    /// Fills the parts of the first and last block that the guest does not write with what is there.
    async fn merge(self: &Arc<Self>, piece: Piece, data: &[u8]) -> Result<Bytes, BlockError> {
        let mut whole = BytesMut::zeroed(piece.blocks as usize * BLOCK_SIZE as usize);
        let mut edges = vec![piece.block];
        if piece.blocks > 1 {
            edges.push(piece.block + piece.blocks - 1);
        }
        for block in edges {
            let old = self.read_blocks(piece.segment, block, 1).await?;
            let at = (block - piece.block) as usize * BLOCK_SIZE as usize;
            whole[at..at + BLOCK_SIZE as usize].copy_from_slice(&old.data);
        }
        let head = piece.head as usize;
        whole[head..head + data.len()].copy_from_slice(data);
        Ok(whole.freeze())
    }

    /// Makes all writes durable that were completed before, on every replica in sync.
    pub(super) async fn flush_replicas(&self) {
        let mut acked: Vec<Target> = Vec::new();
        loop {
            let mut seen = self.changed.seen();
            let targets = {
                let table = self.table.lock();
                // Looked at again each time: a resync may have flushed a member meanwhile.
                acked.extend(table.flushed_members());
                let mut targets = table.flush_targets();
                targets.retain(|(t, _)| !acked.contains(t));
                targets
            };
            let flushes = targets.iter().map(|(target, written)| self.flush_replica(*target, *written));
            for (done, (target, _)) in join_all(flushes).await.into_iter().zip(&targets) {
                if done {
                    acked.push(*target);
                }
            }
            if self.table.lock().flush_complete(&acked) {
                break;
            }
            self.wait(&mut seen, None).await;
        }
        self.leased().await;
    }

    /// Flushes one replica's disk; false when it is lost.
    pub(super) async fn flush_replica(&self, target: Target, written: u64) -> bool {
        let op = ReplicaOp::Flush { disk: target.disk };
        match self.call(target, op, self.rim.timing.flush_deadline).await {
            Ok(ReplicaOutcome::Done) => {
                self.table.lock().note_flushed(&target, written);
                true
            }
            Ok(_) => {
                self.lose(&target, "the answer does not fit the request");
                false
            }
            Err(error) => {
                self.lose(&target, error.reason());
                false
            }
        }
    }

    /// Waits for a change of the member table, at most for `limit`.
    async fn wait(&self, seen: &mut Seen, limit: Option<Duration>) {
        self.waiting.fetch_add(1, Ordering::Relaxed);
        let waiting = scopeguard(|| {
            self.waiting.fetch_sub(1, Ordering::Relaxed);
        });
        match limit {
            // The end of the pause is no error.
            Some(limit) => drop(tokio::time::timeout(limit, self.changed.changed(seen)).await),
            None => self.changed.changed(seen).await,
        }
        drop(waiting);
    }
}

fn with_checksums(data: Bytes) -> WriteContent {
    let crcs = data.chunks_exact(BLOCK_SIZE as usize).map(crc32c::crc32c).collect();
    WriteContent::Data { data, crcs }
}

/// Runs a closure when dropped: a request may be dropped while it waits.
fn scopeguard<F: FnMut()>(run: F) -> impl Drop {
    struct Guard<F: FnMut()>(F);
    impl<F: FnMut()> Drop for Guard<F> {
        fn drop(&mut self) {
            (self.0)();
        }
    }
    Guard(run)
}
