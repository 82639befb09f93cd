//! Planted bugs: does the checker find what it is there to find?
//!
//! Each flaw makes what lies between a coordinator and the replicas of other nodes behave as a wrong implementation would. A run with a flaw must
//! be found wrong within a few seeds; a checker that stays silent proves nothing when it is silent about the real thing.

use super::dice::Dice;
use crate::ids::{DiskId, LayerId, LayerRef, VolumeId};
use crate::replica::protocol::{ReplicaAddress, ReplicaOp, ReplicaOutcome, ReplicaReply, ReplicaRequest};
use crate::replica::server::ReplicaServer;
use netfabric::NodeId;
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

/// What is done wrong.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Flaw {
    /// Some writes are acknowledged and never carried out: a completion without a member of the in-sync set.
    MissingMember,
    /// Flushes are acknowledged and not carried out.
    DroppedFlush,
    /// Whoever asks is served: neither generation nor session is looked at.
    UncheckedGeneration,
    /// Some blocks that differ are not told to the resync.
    ForgottenBlock,
    /// Some writes are carried out a second time, later: a stale log record applied.
    StaleRecord,
    /// Some writes land in the layer that was frozen, too.
    ThawedLayer,
}

pub(super) const FLAWS: [Flaw; 6] = [
    Flaw::MissingMember,
    Flaw::DroppedFlush,
    Flaw::UncheckedGeneration,
    Flaw::ForgottenBlock,
    Flaw::StaleRecord,
    Flaw::ThawedLayer,
];

/// How many requests in a hundred a flaw hits that does not hit all.
const HIT_PERCENT: u64 = 5;
/// How late messages are that a check of generation and session would refuse, at most.
const LATE_MICROS: u64 = 8_000_000;
/// How much later a stale record is applied, at most.
const STALE_MICROS: u64 = 40_000;

/// Replica servers behind a flaw, if any.
pub(super) struct Flawed {
    flaw: Mutex<Option<Flaw>>,
    dice: Dice,
    /// Who attached last, and the request with which.
    attached: Mutex<BTreeMap<(VolumeId, DiskId), (NodeId, ReplicaRequest)>>,
}

impl Flawed {
    pub(super) fn new(dice: Dice) -> Self {
        Self { flaw: Mutex::new(None), dice, attached: Mutex::default() }
    }

    pub(super) fn plant(&self, flaw: Flaw) {
        *self.flaw.lock() = Some(flaw);
    }

    /// Has a server carry out a request, or not quite.
    pub(super) async fn handle(
        &self,
        server: &Arc<ReplicaServer>,
        from: NodeId,
        request: ReplicaRequest,
    ) -> ReplicaReply {
        // Only a flaw rolls dice: without one a seed is the run that it always was.
        let flaw = *self.flaw.lock();
        let Some(flaw) = flaw else { return server.handle(from, request).await };
        let hit = self.dice.percent(HIT_PERCENT);
        match (flaw, &request.op) {
            (Flaw::MissingMember, ReplicaOp::Write { .. }) if hit => {
                self.pretend(server, from, request).await
            }
            (Flaw::DroppedFlush, ReplicaOp::Flush { .. }) => self.pretend(server, from, request).await,
            (Flaw::UncheckedGeneration, op) => {
                let key = (request.volume, op.disk());
                if matches!(op, ReplicaOp::Attach { .. }) {
                    let reply = server.handle(from, request.clone()).await;
                    if reply.result.is_ok() {
                        self.attached.lock().insert(key, (from, request));
                    }
                    return reply;
                }
                if hit {
                    // As a network may: so late that its coordinator has long given it up.
                    tokio::time::sleep(self.dice.micros(LATE_MICROS)).await;
                }
                let current = self.attached.lock().get(&key).cloned();
                let Some((owner, attach)) = current else { return server.handle(from, request).await };
                server.handle(owner, ReplicaRequest { op: request.op, ..attach }).await
            }
            (Flaw::ForgottenBlock, ReplicaOp::Versions { .. }) => {
                let mut reply = server.handle(from, request).await;
                if let Ok(ReplicaOutcome::Versions(versions)) = &mut reply.result {
                    versions.retain(|_| !self.dice.percent(HIT_PERCENT));
                }
                reply
            }
            (Flaw::StaleRecord, ReplicaOp::Write { .. }) if hit => {
                let (server, again, delay) =
                    (server.clone(), request.clone(), self.dice.micros(STALE_MICROS));
                let reply = server.handle(from, request).await;
                tokio::spawn(async move {
                    tokio::time::sleep(delay + Duration::from_millis(1)).await;
                    server.handle(from, again).await
                });
                reply
            }
            (Flaw::ThawedLayer, ReplicaOp::Write { at, write, ack }) if hit && at.layer.layer.0 > 0 => {
                let layer = LayerRef { layer: LayerId(at.layer.layer.0 - 1), ..at.layer };
                let at = ReplicaAddress { layer, ..*at };
                let op = ReplicaOp::Write { at, write: write.clone(), ack: *ack };
                // What comes of it is not looked at: it is what should not be there.
                let _ = server.handle(from, ReplicaRequest { op, ..request.clone() }).await;
                server.handle(from, request).await
            }
            _ => server.handle(from, request).await,
        }
    }

    /// Answers as if the request had been carried out, if it would have been served: something harmless is asked instead.
    async fn pretend(
        &self,
        server: &Arc<ReplicaServer>,
        from: NodeId,
        request: ReplicaRequest,
    ) -> ReplicaReply {
        let disk = request.op.disk();
        let harmless = match request.op {
            ReplicaOp::Write { at, .. } => {
                ReplicaOp::Read { at, below: std::sync::Arc::default(), block: 0, blocks: 1 }
            }
            _ => ReplicaOp::Versions {
                at: ReplicaAddress { disk, segment: crate::ids::SegmentIndex(0), layer: LayerRef::default() },
                block: 0,
                blocks: 1,
            },
        };
        let mut reply = server.handle(from, ReplicaRequest { op: harmless, ..request }).await;
        reply.result = reply.result.map(|_| ReplicaOutcome::Done);
        reply
    }
}
