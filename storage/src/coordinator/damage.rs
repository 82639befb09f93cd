//! Repair of what scrubs have found, without anybody reading it.
//!
//! A replica server keeps a list of the blocks that are known to be damaged on its disk ([`crate::scrub`]). The coordinator asks each
//! replica in sync for it, soon after opening and then again and again, and rewrites what it hears of from a replica that is intact, as
//! it does after a read. It asks, rather than being told, because so nothing can get lost: a block stays on the list until
//! the replica has found it intact.

use super::members::Target;
use super::{Coordinator, Phase, geometry};
use crate::ids::LayerRef;
use crate::replica::protocol::{ReplicaOp, ReplicaOutcome};
use crate::store::DamagedBlocks;
use std::sync::Arc;
use std::time::Duration;

/// How often replicas are asked.
const ASK_EVERY: Duration = Duration::from_secs(15);
/// How soon they are asked again after a repair, to see that it is one.
const SEE: Duration = Duration::from_secs(1);
/// Opening has better things to do.
const FIRST: Duration = Duration::from_secs(2);

impl Coordinator {
    /// Has damage repaired while the volume is open.
    pub(super) async fn run_repairs(self: Arc<Self>) {
        self.phase.wait_for(|p| p == Phase::Open).await;
        tokio::time::sleep(FIRST).await;
        let mut before = 0;
        loop {
            self.phase.wait_for(|p| p == Phase::Open).await;
            let replicas = self.table.lock().with_segments_in_sync();
            let mut found = 0;
            for target in replicas {
                found += self.repair_replica(target).await;
            }
            // What is there for the second time is beyond repair for now.
            let pause = if found > before { SEE } else { ASK_EVERY };
            before = found;
            tokio::time::sleep(pause).await;
        }
    }

    /// Goes through one replica's list and returns how many blocks are on it. What cannot be repaired now stays on it and is passed over.
    async fn repair_replica(self: &Arc<Self>, target: Target) -> u32 {
        let mut skip = 0;
        loop {
            let view = self.layers.view();
            let op = ReplicaOp::Damaged { disk: target.disk, layers: view.all.clone(), skip };
            let answer = self.call(target, op, self.rim.timing.flush_deadline).await;
            // Whether the replica is lost is for others to find out.
            let Ok(ReplicaOutcome::Damaged(runs)) = answer else { return skip };
            if runs.is_empty() {
                return skip;
            }
            for run in runs {
                let layer = LayerRef { volume: run.at.volume, layer: run.at.layer };
                if !view.all.contains(&layer) || !self.has(&run) {
                    tracing::warn!(volume = %self.id, disk = %target.disk, ?run, "damage in what the volume does not have");
                    return skip;
                }
                skip += run.blocks.len() as u32;
                self.repair_layer(view.part(run.at.segment, layer), run.blocks).await;
            }
        }
    }

    /// Whether the blocks lie within the volume.
    fn has(&self, run: &DamagedBlocks) -> bool {
        run.blocks.start < run.blocks.end
            && u64::from(run.at.segment.0) * crate::ids::SEGMENT_SIZE < self.size()
            && run.blocks.end <= geometry::segment_blocks(self.size(), run.at.segment)
    }
}
