//! What replicas of the simulated cluster are stored on: a simple model of a disk, or the real disk store on a simulated medium.
//!
//! The model is fast and permits all that the rules of a store permit; the real store is what is shipped. Both hold the same histories.

use super::client::HOT;
use super::dice::Dice;
use super::disk::{Key, SimDisk, Stored};
use crate::ids::{BLOCK_SIZE, BLOCKS_PER_SEGMENT, DiskId, LayerRef, SECTOR_SIZE, SegmentIndex, SegmentKey};
use crate::store::DiskStore;
use crate::store::disk::sim::driven::DrivenDisk;
use bytes::Bytes;
use std::collections::BTreeMap;
use std::sync::Arc;

/// Which of the two.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Kind {
    /// The model.
    Model,
    /// The real store.
    Store,
}

/// A disk of the simulated cluster. Survives the processes that use it.
pub(super) enum Disk {
    Model(Arc<SimDisk>),
    Store(DrivenDisk),
}

impl Disk {
    pub(super) fn new(kind: Kind, id: DiskId, dice: Dice) -> Self {
        match kind {
            Kind::Model => Self::Model(SimDisk::new(id, dice)),
            Kind::Store => Self::Store(DrivenDisk::new(id, dice)),
        }
    }

    /// The model, in stories that are told of it.
    pub(super) fn model(&self) -> &SimDisk {
        match self {
            Self::Model(disk) => disk,
            Self::Store(_) => panic!("not a model of a disk"),
        }
    }

    /// Opens it for a new process.
    pub(super) fn open(&self) -> Result<Arc<dyn DiskStore>, String> {
        match self {
            Self::Model(disk) => Ok(disk.open()),
            Self::Store(disk) => disk.open().map_err(|error| error.to_string()),
        }
    }

    /// Takes it away from the process that has it.
    pub(super) fn detach(&self) {
        match self {
            Self::Model(disk) => disk.detach(),
            Self::Store(disk) => disk.end(),
        }
    }

    /// Loses what was not flushed, or any part of it. Nobody has it open.
    pub(super) fn power_cut(&self) {
        match self {
            Self::Model(disk) => disk.power_cut(),
            Self::Store(disk) => disk.lose_unsynced(),
        }
    }

    /// Removes a layer that was given up long ago.
    pub(super) fn forget(&self, layer: LayerRef) {
        match self {
            Self::Model(disk) => disk.forget(layer),
            Self::Store(disk) => disk.forget(layer),
        }
    }

    /// What a block reads through layers, the top first. None when that cannot be known now: a store that nobody has open.
    pub(super) fn look(&self, chain: &[SegmentKey], block: u32) -> Option<Result<Bytes, String>> {
        match self {
            Self::Model(disk) => Some(Ok(disk.look(chain, block))),
            Self::Store(disk) => {
                let read = disk.look(chain, block)?;
                Some(read.map(|reply| reply.data).map_err(|error| error.to_string()))
            }
        }
    }

    /// What it holds of these layers where the workload writes, never-written blocks left out.
    pub(super) fn contents(&self, layers: &[LayerRef]) -> Result<BTreeMap<Key, Stored>, String> {
        let disk = match self {
            Self::Model(disk) => {
                let mut contents = disk.contents();
                contents.retain(|(at, _), _| layers.iter().any(|layer| layer.key(at.segment) == *at));
                return Ok(contents);
            }
            Self::Store(disk) => disk,
        };
        let sectors = BLOCK_SIZE / SECTOR_SIZE;
        let mut contents = BTreeMap::new();
        for (layer, block) in
            layers.iter().flat_map(|l| (HOT.start / sectors..HOT.end / sectors).map(move |b| (l, b)))
        {
            let per_segment = u64::from(BLOCKS_PER_SEGMENT);
            let (at, block) =
                (layer.key(SegmentIndex((block / per_segment) as u32)), (block % per_segment) as u32);
            let closed = || "nobody has the disk open".to_owned();
            let versions = disk.versions(at, block..block + 1).ok_or_else(closed)?;
            let Some(found) = versions.map_err(|error| error.to_string())?.first().copied() else { continue };
            let read = disk.look(&[at], block).ok_or_else(closed)?.map_err(|error| error.to_string())?;
            contents.insert((at, block), Stored::new(found.version, read.data));
        }
        Ok(contents)
    }
}
