//! Replicas that are in sync and leave their set: the volume is moved, or has more copies than it should.
//!
//! The control plane says which one is to leave ([`Tenure::Leaves`](crate::config::Tenure)), the coordinator when. The
//! control plane knows only what was committed: a replica that it counts on may have vanished a moment ago, with writes that nobody has
//! flushed, and then the one that leaves would have been the last to have them. So a replica leaves by a commit of the
//! coordinator, made only when each of those that stay has just proven, by a flush, that it is there and has everything. If one
//! of them loses its power in the moment between the two, that is as if it had lost it just after.

use super::members::Target;
use super::{Coordinator, Phase};
use crate::control::CommitError;
use crate::ids::{DiskId, SegmentIndex};
use futures_util::future::join_all;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

/// How old the proof of those that stay may be.
pub(crate) const PROOF: Duration = Duration::from_secs(1);

/// Why a replica has not left.
enum NotNow {
    /// Something changed: whether it may leave is to be looked at anew.
    Changed,
    /// It is to be tried again.
    Failed,
}

impl Coordinator {
    /// Lets replicas go that are to leave, one after the other.
    pub(super) async fn run_releases(self: Arc<Self>) {
        loop {
            let mut seen = self.changed.seen();
            let leaving = match self.phase.get() {
                Phase::Open => self.table.lock().leaving(),
                _ => Vec::new(),
            };
            let mut failed = false;
            for (disk, segment) in leaving {
                failed |= matches!(self.release(disk, segment).await, Err(NotNow::Failed));
            }
            if failed {
                tokio::time::sleep(self.rim.timing.retry).await;
            } else {
                self.changed.changed(&mut seen).await;
            }
        }
    }

    async fn release(&self, disk: DiskId, segment: SegmentIndex) -> Result<(), NotNow> {
        let began = Instant::now();
        let staying = self.table.lock().staying(disk, segment).ok_or(NotNow::Changed)?;
        let flushed = tokio::time::timeout(PROOF, self.flush_targets(&staying)).await;
        if !flushed.map_err(|_| NotNow::Failed)? {
            return Err(NotNow::Changed);
        }
        let _one_at_a_time = self.commits.lock().await;
        if began.elapsed() >= PROOF {
            return Err(NotNow::Failed);
        }
        if self.table.lock().staying(disk, segment).as_ref() != Some(&staying) {
            return Err(NotNow::Changed);
        }
        match self.rim.control.replica_left(self.id, self.generation, segment, disk).await {
            Ok(config) => {
                tracing::info!(volume = %self.id, %disk, %segment, "replica let go");
                self.change(|table| table.configure(&config));
                Ok(())
            }
            Err(CommitError::Fenced) => {
                self.fence();
                Ok(())
            }
            Err(error) => {
                tracing::debug!(volume = %self.id, %disk, %segment, %error, "replica not let go yet");
                Err(NotNow::Failed)
            }
        }
    }

    /// Flushes all of them; false when one is lost.
    async fn flush_targets(&self, targets: &[Target]) -> bool {
        let flushes = targets.iter().map(|target| {
            let written = self.table.lock().written(target);
            self.flush_replica(*target, written)
        });
        join_all(flushes).await.into_iter().all(|done| done)
    }
}
