//! The damaged blocks of a disk that are known and not repaired yet.

use crate::ids::{LayerRef, SegmentKey};
use crate::store::DamagedBlocks;
use parking_lot::Mutex;
use std::collections::BTreeSet;
use tokio::sync::Notify;

/// Blocks on the list at most.
const MOST: usize = 16384;

/// See the module. One for each open disk.
#[derive(Debug, Default)]
pub(crate) struct DamageList {
    list: Mutex<List>,
    changed: Notify,
}

#[derive(Debug, Default)]
struct List {
    blocks: BTreeSet<(SegmentKey, u32)>,
    repaired: u64,
}

impl DamageList {
    /// Puts blocks on the list; returns how many were not on it.
    pub(crate) fn add(&self, run: &DamagedBlocks) -> u64 {
        let mut list = self.list.lock();
        let room = MOST.saturating_sub(list.blocks.len());
        // What finds no room is found again by the next scrub.
        run.blocks.clone().take(room).filter(|block| list.blocks.insert((run.at, *block))).count() as u64
    }

    /// A block was read and is intact: somebody has written it since.
    pub(crate) fn remove(&self, at: SegmentKey, block: u32) {
        let mut list = self.list.lock();
        if list.blocks.remove(&(at, block)) {
            list.repaired += 1;
            self.changed.notify_one();
        }
    }

    /// Everything that is said of layers or parts of them that are removed.
    pub(crate) fn forget(&self, is_removed: impl Fn(&SegmentKey) -> bool) {
        let mut list = self.list.lock();
        let before = list.blocks.len();
        list.blocks.retain(|(at, _)| !is_removed(at));
        if list.blocks.len() < before {
            self.changed.notify_one();
        }
    }

    /// The blocks on the list that lie in these layers, a part of them.
    pub(crate) fn in_layers(&self, layers: &[LayerRef], skip: usize, most: usize) -> Vec<(SegmentKey, u32)> {
        let list = self.list.lock();
        let wanted =
            |at: &SegmentKey| layers.iter().any(|layer| (layer.volume, layer.layer) == (at.volume, at.layer));
        list.blocks.iter().filter(|(at, _)| wanted(at)).skip(skip).take(most).copied().collect()
    }

    /// The whole list.
    pub(crate) fn all(&self) -> Vec<DamagedBlocks> {
        runs(self.list.lock().blocks.iter().copied())
    }

    /// Blocks on the list.
    pub(crate) fn count(&self) -> u64 {
        self.list.lock().blocks.len() as u64
    }

    /// Blocks that left the list because they are intact again, since the disk was opened.
    pub(crate) fn repaired(&self) -> u64 {
        self.list.lock().repaired
    }

    /// Whether there is no room for more.
    pub(crate) fn is_full(&self) -> bool {
        self.list.lock().blocks.len() >= MOST
    }

    /// Waits until blocks have left the list, also since the last call.
    pub(crate) async fn changed(&self) {
        self.changed.notified().await;
    }
}

/// Joins neighbours.
pub(crate) fn runs(blocks: impl Iterator<Item = (SegmentKey, u32)>) -> Vec<DamagedBlocks> {
    let mut runs: Vec<DamagedBlocks> = Vec::new();
    for (at, block) in blocks {
        match runs.last_mut() {
            Some(last) if last.at == at && last.blocks.end == block => last.blocks.end += 1,
            _ => runs.push(DamagedBlocks { at, blocks: block..block + 1 }),
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::{LayerId, SegmentIndex, VolumeId};

    fn key(layer: u32) -> SegmentKey {
        SegmentKey { volume: VolumeId::default(), segment: SegmentIndex(1), layer: LayerId(layer) }
    }

    fn run(layer: u32, blocks: std::ops::Range<u32>) -> DamagedBlocks {
        DamagedBlocks { at: key(layer), blocks }
    }

    #[test]
    fn blocks_stay_until_they_are_intact_and_are_told_by_layer() {
        let list = DamageList::default();
        assert_eq!(list.add(&run(0, 3..6)), 3);
        assert_eq!(list.add(&run(0, 5..7)), 1, "known ones are no news");
        list.add(&run(2, 9..10));
        let top = LayerRef { volume: VolumeId::default(), layer: LayerId(0) };
        assert_eq!(list.in_layers(&[top], 0, 2), [(key(0), 3), (key(0), 4)]);
        assert_eq!(list.in_layers(&[top], 3, 2), [(key(0), 6)]);
        assert_eq!(list.all(), [run(0, 3..7), run(2, 9..10)]);
        list.remove(key(0), 4);
        list.remove(key(0), 4);
        assert_eq!((list.count(), list.repaired()), (4, 1));
        assert_eq!(list.all(), [run(0, 3..4), run(0, 5..7), run(2, 9..10)]);
        list.forget(|at| at.layer == LayerId(0));
        assert_eq!((list.all(), list.repaired()), (vec![run(2, 9..10)], 1));
    }

    #[test]
    fn the_list_has_an_end() {
        let list = DamageList::default();
        assert_eq!(list.add(&run(0, 0..MOST as u32 + 7)), MOST as u64);
        assert!(list.is_full());
        list.remove(key(0), 0);
        assert!(!list.is_full());
    }
}
