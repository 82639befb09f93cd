//! Opening a volume: announcing the generation to every replica that Raft holds as in sync, making them equal when the last
//! close was unclean, and only then serving (S5).
//!
//! The same is done again when a segment has lost every replica in sync while the volume is open (this node's network was
//! away for a moment): no replica is known to have everything then, and requests wait.

use super::geometry;
use super::layers::Part;
use super::members::{Contents, SlotState, Target};
use super::{Coordinator, Phase, diff};
use crate::config::CleanState;
use crate::control::CommitError;
use crate::ids::{DiskId, LayerRef, SegmentIndex};
use crate::replica::protocol::{MAX_STORED, PowerEpoch, ReplicaOp, ReplicaOutcome};
use futures_util::StreamExt;
use futures_util::future::{join_all, try_join_all};
use netfabric::NodeId;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use tokio::time::Instant;

/// Blocks whose versions are asked for in one message: 64 MiB worth, about 300 KiB of reply.
pub(super) const COMPARE_BLOCKS: u32 = 16384;
/// Segments compared at the same time.
const COMPARE_SEGMENTS: usize = 4;

/// A replica was lost; what was begun starts over with those left.
pub(super) struct Interrupted;

/// How a replica answered the announcement.
pub(super) enum Attached {
    /// A session began; `known` says whether this generation was announced to it before.
    Session { target: Target, power: PowerEpoch, known: bool },
    /// It did not, and why.
    Failed(String),
}

impl Coordinator {
    /// Opens, and opens again whenever that becomes necessary.
    pub(super) async fn run_phases(self: Arc<Self>) {
        let mut first = true;
        loop {
            self.open(first).await;
            let mut seen = self.changed.seen();
            while !self.table.lock().must_reopen() {
                self.changed.changed(&mut seen).await;
            }
            if !self.phase.change_if(|phase| {
                let reopens = *phase == Phase::Open;
                if reopens {
                    *phase = Phase::Opening;
                }
                reopens
            }) {
                return;
            }
            tracing::warn!(volume = %self.id, "a segment has no replica in sync: opening again");
            self.reopenings.fetch_add(1, Ordering::AcqRel);
            self.change(|table| table.detach_all("opening again"));
            first = false;
        }
    }

    async fn open(self: &Arc<Self>, first: bool) {
        let started = Instant::now();
        let mut unclean = !first || self.clean == CleanState::Unclean;
        loop {
            unclean |= self.attach_all(started).await;
            if unclean && self.reconcile_all().await.is_err() {
                continue;
            }
            if self.flush_all().await.is_err() {
                continue;
            }
            break;
        }
        if first && !self.record_opening().await {
            return;
        }
        if self.change(|table| table.opened()) == Contents::Incomplete {
            tracing::error!(volume = %self.id, "all replicas in sync lost power: writes that were not flushed may be gone");
            self.loss.store(true, Ordering::Release);
        }
        self.phase.change_if(|phase| {
            let opens = *phase == Phase::Opening;
            if opens {
                *phase = Phase::Open;
            }
            opens
        });
        // Requests sent nothing while the phase was Opening; have them look again.
        self.change(|_| ());
        let seconds = started.elapsed().as_secs_f64();
        tracing::info!(volume = %self.id, generation = %self.generation, seconds, "volume open");
    }

    /// Has the control plane confirm the generation again whenever the lease was renewed after it had lapsed: meanwhile the volume
    /// may have been opened elsewhere, and neither this node's replica nor its configuration need know yet.
    pub(super) async fn run_confirm(self: Arc<Self>) {
        let renewals = self.rim.lease.renewals();
        loop {
            self.phase.wait_for(|p| p == Phase::Open).await;
            let mut seen = renewals.seen();
            let unconfirmed = self.rim.lease.term().is_some_and(|term| self.confirmed.get() != Some(term));
            if unconfirmed && !self.record_opening().await {
                return;
            }
            if self.rim.lease.term().is_none_or(|term| self.confirmed.get() == Some(term)) {
                renewals.changed(&mut seen).await;
            }
        }
    }

    /// From here on the volume counts as unclean, and the generation is confirmed for this term of the lease. False when fenced.
    async fn record_opening(&self) -> bool {
        loop {
            // Looked at first: it is the term in which the commit was asked for that is confirmed.
            let term = self.rim.lease.term();
            match self.rim.control.opened(self.id, self.generation).await {
                Ok(()) => {
                    self.confirmed.set(term);
                    return true;
                }
                Err(CommitError::Fenced) => {
                    self.fence();
                    return false;
                }
                Err(error) => {
                    tracing::warn!(volume = %self.id, %error, "cannot record the opening yet");
                    tokio::time::sleep(self.rim.timing.retry).await;
                }
            }
        }
    }

    /// Announces the generation until every replica that Raft holds as in sync has stored it. Those that cannot be reached are
    /// given up after a while, so that they are taken out by a commit. True when some replica knew the generation already: then
    /// this is not its first opening, whatever the configuration says about the last close.
    async fn attach_all(self: &Arc<Self>, started: Instant) -> bool {
        let mut known_before = false;
        loop {
            let mut seen = self.changed.seen();
            let missing = self.table.lock().missing();
            let attempts = missing.iter().map(|(disk, node)| self.attach(*disk, *node));
            for ((disk, _), attached) in missing.iter().zip(join_all(attempts).await) {
                match attached {
                    Attached::Session { target, power, known } => {
                        known_before |= known;
                        self.change(|table| table.attached(target.disk, target.session, power, true));
                    }
                    Attached::Failed(reason) => {
                        tracing::debug!(volume = %self.id, %disk, reason, "replica not attached");
                        self.table.lock().unreachable(*disk, &reason);
                        let late = started.elapsed() >= self.rim.timing.open_grace;
                        if late && !self.give_up.set(true) {
                            self.change(|_| ());
                        }
                    }
                }
            }
            if self.table.lock().ready_to_open() {
                self.give_up.set(false);
                return known_before;
            }
            // A change may be a commit that took a missing replica out.
            drop(tokio::time::timeout(self.rim.timing.retry, self.changed.changed(&mut seen)).await);
        }
    }

    /// Asks a replica to start a session.
    pub(super) async fn attach(&self, disk: DiskId, node: NodeId) -> Attached {
        let target = Target { disk, node, session: self.next_session() };
        match self.call(target, ReplicaOp::Attach { disk }, self.rim.timing.member_deadline).await {
            Ok(ReplicaOutcome::Attached { previous, power }) => {
                Attached::Session { target, power, known: previous >= self.generation }
            }
            Ok(_) => Attached::Failed("the answer does not fit the request".into()),
            Err(error) => Attached::Failed(error.reason().to_owned()),
        }
    }

    async fn reconcile_all(self: &Arc<Self>) -> Result<(), Interrupted> {
        let view = self.layers.view();
        let mut parts = Vec::new();
        for layer in view.unsettled() {
            let stored = self.stored_anywhere(*layer).await?;
            parts.extend(stored.into_iter().map(|segment| view.part(segment, *layer)));
        }
        let work = parts.into_iter().map(|part| self.reconcile(part));
        let mut results = futures_util::stream::iter(work).buffer_unordered(COMPARE_SEGMENTS);
        while let Some(result) = results.next().await {
            result?;
        }
        Ok(())
    }

    /// The segments of which any replica has anything in a layer: a large volume that is thin is opened as fast as a small one.
    async fn stored_anywhere(&self, layer: LayerRef) -> Result<BTreeSet<SegmentIndex>, Interrupted> {
        let targets = self.table.lock().opening_members();
        let segments = geometry::segment_count(self.size());
        let mut stored = BTreeSet::new();
        for first in (0..segments).step_by(MAX_STORED as usize) {
            let range = first..segments.min(first.saturating_add(MAX_STORED));
            let lists = try_join_all(targets.iter().map(|(target, _)| async {
                self.stored(*target, layer, range.clone()).await.map_err(|error| {
                    self.lose(target, error.reason());
                    Interrupted
                })
            }));
            stored.extend(lists.await?.into_iter().flatten());
        }
        Ok(stored)
    }

    /// Makes the replicas of a segment equal in one layer. Nobody writes meanwhile.
    async fn reconcile(self: &Arc<Self>, part: Part) -> Result<(), Interrupted> {
        let segment = part.segment;
        let targets = self.table.lock().in_state(segment, SlotState::Opening);
        if targets.len() < 2 {
            return Ok(());
        }
        let end = geometry::segment_blocks(self.size(), segment);
        let mut block = 0;
        while block < end {
            let blocks = COMPARE_BLOCKS.min(end - block);
            let lists = try_join_all(targets.iter().map(|target| async {
                self.versions(*target, part, block, blocks).await.map_err(|error| {
                    self.lose(target, error.reason());
                    Interrupted
                })
            }))
            .await?;
            let fixes = diff::reconcile(&lists);
            if !fixes.is_empty() {
                let count: u32 = fixes.iter().map(|f| f.blocks).sum();
                tracing::info!(volume = %self.id, %segment, blocks = count, "replicas differ after an unclean close");
                self.metrics.reconciled_blocks.inc_by(u64::from(count));
                self.reconcile_blocks(part, &targets, &lists, fixes).await?;
            }
            block += blocks;
        }
        Ok(())
    }

    /// Makes durable what all replicas agree on, so that what is read from now on stays.
    async fn flush_all(&self) -> Result<(), Interrupted> {
        let targets: Vec<(Target, u64)> = self.table.lock().opening_members();
        let flushed = join_all(targets.iter().map(|(t, written)| self.flush_replica(*t, *written))).await;
        if flushed.into_iter().all(|ok| ok) { Ok(()) } else { Err(Interrupted) }
    }
}
