//! Freezing: the moment at which a snapshot is taken, for one volume or for several on any nodes.
//!
//! ```text
//!  control plane               coordinator of each volume
//!  new top, stage "hold"  ──►  lets writes under way end, lets none begin, flushes all replicas in sync
//!                         ◄──  held
//!  all held: "switch"     ──►  goes over to the new top, lets writes begin again
//!                         ◄──  switched
//!  all switched: there is a snapshot
//! ```
//!
//! Between the last "held" and the first "switched" no volume of the group completes a write: that is the point in time. A
//! coordinator that held for too long lets go and says so, and then there is no snapshot, whatever the others did: a new top is no harm by
//! itself. As all replicas in sync are flushed while nobody writes, the frozen layer is the same on all of them and durable.

use super::{Coordinator, Phase};
use crate::config::FreezeStage;
use crate::control::{CommitError, FreezeStep};
use crate::ids::FreezeId;
use std::sync::Arc;
use std::time::Duration;

/// Longest pause of a guest's writes for a snapshot.
const LONGEST_HOLD: Duration = Duration::from_secs(2);
/// How often is asked whether the others hold, too, in case that the news does not come by itself.
const ASK_AGAIN: Duration = Duration::from_millis(50);

impl Coordinator {
    /// Carries out freezes, one after the other.
    pub(super) async fn run_freezes(self: Arc<Self>) {
        // Nothing was held for one that was pending before: it may have begun on behalf of a process that is gone.
        let mut done = self.layers.view().freeze.map(|freeze| freeze.id);
        if let Some(id) = done {
            self.report(id, FreezeStep::Abandoned).await;
        }
        loop {
            let mut seen = self.layers.changed.seen();
            let pending = self.layers.view().freeze.map(|freeze| freeze.id).filter(|id| done != Some(*id));
            match pending {
                Some(id) => {
                    self.phase.wait_for(|phase| phase == Phase::Open).await;
                    self.freeze(id).await;
                    done = Some(id);
                }
                None => self.layers.changed.changed(&mut seen).await,
            }
        }
    }

    async fn freeze(&self, id: FreezeId) {
        let switched = tokio::time::timeout(LONGEST_HOLD, self.hold(id)).await.unwrap_or(false);
        // Also without a snapshot: writes go to the top in the end.
        self.layers.switch();
        let step = if switched { FreezeStep::Switched } else { FreezeStep::Abandoned };
        tracing::info!(volume = %self.id, freeze = %id, ?step, "layer frozen");
        self.report(id, step).await;
    }

    /// Holds the volume until all volumes are held, then goes over. False when there will be no snapshot.
    async fn hold(&self, id: FreezeId) -> bool {
        let _held = self.layers.door.write().await;
        self.flush_replicas().await;
        loop {
            let mut seen = self.layers.changed.seen();
            let stage = match self.layers.pending(id).map(|freeze| freeze.stage) {
                Some(FreezeStage::Switch) => Some(FreezeStage::Switch),
                Some(FreezeStage::Hold) => match self.step(id, FreezeStep::Held).await {
                    Ok(stage) => stage,
                    Err(CommitError::Unavailable(_)) => Some(FreezeStage::Hold),
                    Err(_) => None,
                },
                None => None,
            };
            match stage {
                Some(FreezeStage::Switch) => {
                    self.layers.switch();
                    return true;
                }
                Some(FreezeStage::Hold) => {
                    // Asked again after a while in any case.
                    let _ = tokio::time::timeout(ASK_AGAIN, self.layers.changed.changed(&mut seen)).await;
                }
                None => return false,
            }
        }
    }

    /// Tells the control plane how far this volume is; answers the stage of the freeze after that, if it is still pending.
    async fn step(&self, id: FreezeId, step: FreezeStep) -> Result<Option<FreezeStage>, CommitError> {
        let config = self.rim.control.freeze_step(self.id, self.generation, id, step).await?;
        self.layers.configure(&config.layers);
        Ok(self.layers.pending(id).map(|freeze| freeze.stage))
    }

    /// The same until it has arrived.
    async fn report(&self, id: FreezeId, step: FreezeStep) {
        loop {
            match self.step(id, step).await {
                Ok(_) => return,
                Err(CommitError::Fenced) => return self.fence(),
                Err(CommitError::Refused(reason)) => {
                    tracing::warn!(volume = %self.id, freeze = %id, reason, "no snapshot");
                    return;
                }
                Err(CommitError::Unavailable(_)) => tokio::time::sleep(self.rim.timing.retry).await,
            }
        }
    }
}
