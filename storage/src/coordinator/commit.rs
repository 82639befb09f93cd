//! Changes of the in-sync set: Raft commits, one at a time for a volume (S3).
//!
//! One at a time, because their order is what matters: a replica must not get back into the in-sync set by a commit that was
//! overtaken by the one that takes it out.

use super::members::Target;
use super::{Coordinator, Phase};
use crate::control::CommitError;
use crate::ids::{DiskId, SegmentIndex};
use std::sync::Arc;

impl Coordinator {
    /// Takes replicas out that missed something, until Raft has done so or they are equal again.
    pub(super) async fn run_commits(self: Arc<Self>) {
        loop {
            let mut seen = self.changed.seen();
            let mut again = false;
            for (disk, reason) in self.to_take_out() {
                again |= self.take_out(disk, reason).await.is_err();
            }
            if again {
                tokio::time::sleep(self.rim.timing.retry).await;
            } else {
                self.changed.changed(&mut seen).await;
            }
        }
    }

    /// While opening, a replica that was not reached yet is given time, but for one that may be out already.
    fn to_take_out(&self) -> Vec<(DiskId, String)> {
        let is_patient = self.phase.get() == Phase::Opening && !self.give_up.get();
        let table = self.table.lock();
        let mut out = table.to_take_out();
        out.retain(|(disk, _)| !is_patient || table.awaits_answer(*disk));
        out
    }

    /// Fails when it is to be tried again.
    async fn take_out(&self, disk: DiskId, reason: String) -> Result<(), ()> {
        let _one_at_a_time = self.commits.lock().await;
        if !self.to_take_out().iter().any(|(d, _)| *d == disk) {
            return Ok(());
        }
        match self.rim.control.replicas_out(self.id, self.generation, disk, reason.clone()).await {
            Ok(config) => {
                tracing::warn!(volume = %self.id, %disk, reason, "replica taken out of the in-sync set");
                self.change(|table| table.taken_out(disk, &config));
                let still_in = self.to_take_out().iter().any(|(d, _)| *d == disk);
                if still_in { Err(()) } else { Ok(()) }
            }
            Err(CommitError::Fenced) => {
                self.fence();
                Ok(())
            }
            Err(error @ CommitError::Unavailable(_)) => {
                tracing::debug!(volume = %self.id, %disk, %error, "replica not taken out yet");
                self.table.lock().not_answered(disk);
                Err(())
            }
            Err(error @ CommitError::Refused(_)) => {
                tracing::debug!(volume = %self.id, %disk, %error, "replica not taken out");
                self.change(|table| table.stays_in(disk));
                Err(())
            }
        }
    }

    /// Puts a replica of a segment in that is equal and durable, if its session still stands.
    pub(super) async fn put_in(&self, target: Target, segment: SegmentIndex) {
        loop {
            {
                let _one_at_a_time = self.commits.lock().await;
                if !self.table.lock().is_joining(&target, segment) {
                    return;
                }
                match self.rim.control.replica_in(self.id, self.generation, segment, target.disk).await {
                    Ok(_) => {
                        tracing::info!(volume = %self.id, disk = %target.disk, %segment, "replica in sync again");
                        return self.change(|table| table.joined(&target, segment));
                    }
                    Err(CommitError::Fenced) => return self.fence(),
                    Err(error) => {
                        tracing::debug!(volume = %self.id, disk = %target.disk, %error, "replica not put in yet");
                    }
                }
            }
            tokio::time::sleep(self.rim.timing.retry).await;
        }
    }
}
