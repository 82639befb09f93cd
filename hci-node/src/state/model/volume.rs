//! Volumes: replicated block devices, made of segments.

use serde::{Deserialize, Serialize};

use super::segment::*;
use crate::state::{ids::*, layers::Layers};

/// Size of a block: volumes are a multiple of it.
pub const BLOCK_BYTES: u64 = 4096;

/// Who a volume belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum VolumeOwner {
    /// Nobody: it was created on its own.
    None,
    /// A VM; it goes with it.
    Vm(VmId),
    /// The disk of an image.
    Image(ImageId),
    /// The suspension of a VM: it holds the VM's memory.
    Suspension(VmId),
}

/// Whether the last coordinator closed the volume in good order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Cleanliness {
    /// All in-sync replicas are identical.
    Clean,
    /// They may differ in writes never completed: the next coordinator makes them equal first.
    Unclean,
}

/// Content that a volume starts with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum VolumeFill {
    /// Zeroes: nothing to do.
    Blank,
    /// A copy of the image's disk, still to be made by the coordinator.
    CopyOf(VolumeId),
    /// Being imported by the coordinator from an upload.
    Import,
    /// The content is there.
    Done,
}

/// When a write counts as complete.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Durability {
    /// When all in-sync copies have it in their log; a flush makes it durable.
    #[default]
    WriteBack,
    /// When it is durable on all in-sync copies.
    WriteThrough,
}

/// Whether what is written is compressed on the disks. What is there already stays as it is until it is written again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Compression {
    /// It is not.
    #[default]
    Off,
    /// With LZ4, where that saves room.
    Lz4,
}

/// Limits of a volume, over reads and writes together; none is no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeLimits {
    /// Operations in a second.
    pub operations_per_second: Option<u64>,
    /// Bytes in a second.
    pub bytes_per_second: Option<u64>,
}

/// A replicated block device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Volume {
    /// Its id.
    pub id: VolumeId,
    /// Its name, unique.
    pub name: String,
    /// Its size, a multiple of the block.
    pub size_bytes: u64,
    /// How many copies it is meant to have.
    pub replicas: u8,
    /// Writes wait while fewer copies than this are in sync.
    pub min_in_sync: u8,
    /// Raised at every open.
    pub generation: Generation,
    /// The node that has it open.
    pub coordinator: Option<NodeId>,
    /// How it was closed last.
    pub cleanliness: Cleanliness,
    /// Its segments in order; the last one may be partial.
    pub segments: Vec<Segment>,
    /// Who it belongs to.
    pub owner: VolumeOwner,
    /// What it starts with.
    pub fill: VolumeFill,
    /// How often a disk left the in-sync sets. A return that was asked for before is refused.
    pub departures: u64,
    /// When it was created.
    pub created: Timestamp,
    /// What [`Self::min_in_sync`] becomes once all copies are there: raising it earlier would stop writes.
    pub min_wanted: u8,
    /// When a write counts as complete.
    pub durability: Durability,
    /// Whether what is written is compressed.
    pub compression: Compression,
    /// What it may take of the pool's speed.
    pub limits: VolumeLimits,
    /// The layers that its content lies in, and its snapshots.
    pub layers: Layers,
}

impl Volume {
    /// The smallest number of complete copies over all segments.
    pub fn fewest_in_sync(&self) -> usize {
        self.segments.iter().map(Segment::in_sync).min().unwrap_or(usize::from(self.replicas))
    }

    /// Whether some segment has fewer complete copies than wanted.
    pub fn is_degraded(&self) -> bool {
        self.fewest_in_sync() < usize::from(self.replicas)
    }

    /// Whether every segment has exactly the copies that it should have, all complete.
    pub fn is_settled(&self) -> bool {
        let wanted = usize::from(self.replicas);
        self.min_in_sync == self.min_wanted
            && self
                .segments
                .iter()
                .all(|segment| segment.replicas.len() == wanted && segment.in_sync() == wanted)
    }

    /// How many bytes of it a segment has.
    pub fn segment_bytes(&self, segment: SegmentIndex) -> u64 {
        SEGMENT_BYTES.min(self.size_bytes.saturating_sub(u64::from(segment.0) * SEGMENT_BYTES))
    }

    /// Its segments with their numbers.
    pub fn numbered(&self) -> impl Iterator<Item = (SegmentIndex, &Segment)> {
        (0..).map(SegmentIndex).zip(&self.segments)
    }

    /// Whether it holds the content it was created for, so that a VM may use it.
    pub fn is_filled(&self) -> bool {
        matches!(self.fill, VolumeFill::Blank | VolumeFill::Done)
    }
}
