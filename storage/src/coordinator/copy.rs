//! Carrying out what `diff` found: copying blocks between replicas.

use super::Coordinator;
use super::call::CallError;
use super::diff::Fix;
use super::layers::Part;
use super::members::Target;
use super::open::Interrupted;
use super::ranges::Mode;
use super::resync::volume_range;
use crate::ids::{SegmentIndex, Version};
use crate::replica::protocol::AckWhen;
use crate::store::{BlockVersion, ReplicaWrite, WriteContent, thin};
use futures_util::StreamExt;
use futures_util::future::join_all;
use std::ops::Range;
use std::sync::Arc;

/// Copies under way at the same time for one replica or one segment.
const COPIES: usize = 16;

impl Coordinator {
    /// Carries out fixes between these replicas; the indexes in the fixes are theirs. The caller sees to it that nobody else
    /// writes these blocks.
    pub(super) async fn apply_fixes(
        &self,
        part: Part,
        replicas: &[Target],
        fixes: Vec<Fix>,
    ) -> Result<(), FixError> {
        let work = fixes.into_iter().map(|fix| self.apply_fix(part, replicas, fix));
        let mut results = futures_util::stream::iter(work).buffer_unordered(COPIES);
        while let Some(result) = results.next().await {
            result?;
        }
        Ok(())
    }

    async fn apply_fix(&self, part: Part, replicas: &[Target], fix: Fix) -> Result<(), FixError> {
        let content = if fix.version == Version::default() {
            WriteContent::Zeroes { blocks: fix.blocks, keep: part.keep }
        } else {
            let mut found = None;
            for source in fix.sources.iter().map(|i| replicas[*i]) {
                match self.read_layer(source, part, fix.block, fix.blocks).await {
                    Ok(reply) => {
                        found = Some(reply);
                        break;
                    }
                    Err(CallError::Checksum) => {}
                    Err(error) => {
                        self.lose(&source, error.reason());
                        return Err(FixError::Lost);
                    }
                }
            }
            thin(found.ok_or(FixError::Damaged(fix.clone()))?, part.keep)
        };
        let compression = self.policy.lock().compression;
        let write = ReplicaWrite { block: fix.block, version: fix.version, content, compression };
        let targets: Vec<Target> = fix.targets.iter().map(|i| replicas[*i]).collect();
        let writes = targets.iter().map(|t| self.write_replica(*t, part, write.clone(), AckWhen::Logged));
        let mut lost = false;
        for (target, result) in targets.iter().zip(join_all(writes).await) {
            if let Err(error) = result {
                self.lose(target, error.reason());
                lost = true;
            }
        }
        if lost { Err(FixError::Lost) } else { Ok(()) }
    }

    /// Makes replicas equal that all count as in sync. Where the chosen version cannot be read, the next one is taken: it was
    /// not acknowledged by all, or all are damaged, and then nothing can be done but to leave the block and say so.
    pub(super) async fn reconcile_blocks(
        &self,
        part: Part,
        replicas: &[Target],
        lists: &[Vec<BlockVersion>],
        fixes: Vec<Fix>,
    ) -> Result<(), Interrupted> {
        for fix in fixes {
            match self.apply_fix(part, replicas, fix).await {
                Ok(()) => {}
                Err(FixError::Lost) => return Err(Interrupted),
                Err(FixError::Damaged(fix)) => {
                    for block in fix.block..fix.block + fix.blocks {
                        self.choose_readable(part, replicas, lists, block).await?;
                    }
                }
            }
        }
        Ok(())
    }

    async fn choose_readable(
        &self,
        part: Part,
        replicas: &[Target],
        lists: &[Vec<BlockVersion>],
        block: u32,
    ) -> Result<(), Interrupted> {
        let version_at = |list: &Vec<BlockVersion>| {
            list.iter().find(|v| v.block == block).map_or(Version::default(), |v| v.version)
        };
        let versions: Vec<Version> = lists.iter().map(version_at).collect();
        let mut order: Vec<usize> = (0..replicas.len()).collect();
        order.sort_by_key(|i| std::cmp::Reverse(versions[*i]));
        for source in order {
            let targets = (0..replicas.len()).filter(|i| *i != source).collect();
            let fix = Fix { block, blocks: 1, version: versions[source], sources: vec![source], targets };
            match self.apply_fix(part, replicas, fix).await {
                Ok(()) => return Ok(()),
                Err(FixError::Lost) => return Err(Interrupted),
                Err(FixError::Damaged(_)) => {}
            }
        }
        tracing::error!(volume = %self.id, segment = %part.segment, block, "no intact copy of the block is left");
        self.metrics.unreadable.inc();
        Ok(())
    }

    /// Rewrites damaged copies of a block of replicas in sync from an intact one.
    pub(super) async fn repair(self: Arc<Self>, segment: SegmentIndex, block: u32) {
        let view = self.layers.view();
        // The damaged copy is in the first layer that has the block, or in one above on a replica that is ahead with a merge.
        for layer in view.chain.iter() {
            self.repair_layer(view.part(segment, *layer), block..block + 1).await;
        }
    }

    /// The same for blocks in one layer.
    pub(super) async fn repair_layer(self: &Arc<Self>, part: Part, blocks: Range<u32>) {
        for block in blocks {
            let _range = self.ranges.lock(volume_range(part.segment, block..block + 1), Mode::Copy).await;
            self.repair_block(part, block).await;
        }
    }

    async fn repair_block(self: &Arc<Self>, part: Part, block: u32) {
        let replicas = self.table.lock().readers(part.segment, self.rim.node, 0);
        let (mut sources, mut targets) = (Vec::new(), Vec::new());
        for (i, replica) in replicas.iter().enumerate() {
            match self.read_layer(*replica, part, block, 1).await {
                Ok(_) => sources.push(i),
                Err(CallError::Checksum) => targets.push(i),
                Err(error) => self.lose(replica, error.reason()),
            }
        }
        if targets.is_empty() {
            return;
        }
        let count = targets.len() as u64;
        for source in sources {
            let version = match self.versions(replicas[source], part, block, 1).await {
                Ok(versions) => versions.first().map_or(Version::default(), |v| v.version),
                Err(error) => return self.lose(&replicas[source], error.reason()),
            };
            // A replica that is behind with a merge does not have the block here: another one does.
            if version == Version::default() {
                continue;
            }
            let fix = Fix { block, blocks: 1, version, sources: vec![source], targets: targets.clone() };
            if self.apply_fix(part, &replicas, fix).await.is_ok() {
                self.metrics.repaired_blocks.inc_by(count);
                tracing::warn!(volume = %self.id, segment = %part.segment, block, "damaged block repaired");
            }
            return;
        }
    }
}

/// Why a fix was not carried out.
pub(super) enum FixError {
    /// A replica was lost.
    Lost,
    /// No source could be read.
    Damaged(Fix),
}
