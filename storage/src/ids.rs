//! Identifiers, sizes and units of storage.
//!
//! Newtypes, so that a disk cannot be taken for a volume nor a block number for a byte offset.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;
use uuid::Uuid;

/// Size of a block in bytes: the unit of checksum, of versions, of resync and of repair.
pub const BLOCK_SIZE: u64 = 4096;
/// Size of a segment in bytes: the unit of placement; each segment has its own replica set.
pub const SEGMENT_SIZE: u64 = 1 << 30;
/// Blocks in one full segment.
pub const BLOCKS_PER_SEGMENT: u32 = (SEGMENT_SIZE / BLOCK_SIZE) as u32;
/// Smallest unit a guest may address.
pub const SECTOR_SIZE: u64 = 512;
/// Most layers that a read may have to go through; a snapshot that would make more is refused.
pub const MAX_DEPTH: usize = 32;
/// Largest piece of data in one replica message (a larger guest request is cut at this size).
pub const MAX_TRANSFER: u64 = 4 << 20;

macro_rules! uuid_id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
        pub struct $name(pub Uuid);

        impl $name {
            /// A new random id.
            pub fn random() -> Self {
                Self(Uuid::new_v4())
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.as_hyphenated().fmt(f)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}({})", stringify!($name), self.0.as_hyphenated())
            }
        }

        impl FromStr for $name {
            type Err = uuid::Error;

            fn from_str(s: &str) -> Result<Self, Self::Err> {
                s.parse().map(Self)
            }
        }
    };
}

uuid_id!(
    /// A physical disk given to the cluster.
    DiskId
);
uuid_id!(
    /// A volume: a virtual block device for a guest.
    VolumeId
);
uuid_id!(
    /// One freezing of the top layers of one or several volumes at one point in time.
    FreezeId
);

/// How often a volume was opened; raised through Raft at every open. Replicas refuse all but the highest.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Debug, Serialize, Deserialize)]
pub struct Generation(pub u64);

impl fmt::Display for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Number of a segment within its volume.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Debug, Serialize, Deserialize)]
pub struct SegmentIndex(pub u32);

impl fmt::Display for SegmentIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Number of a layer of a volume (snapshots freeze one and start the next). Volumes without snapshots have layer 0 only.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Debug, Serialize, Deserialize)]
pub struct LayerId(pub u32);

impl fmt::Display for LayerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A layer, anywhere in the cluster: its number and the volume that it was made for. Layers of a clone have parents in
/// another volume; a layer keeps its name when that volume is deleted and clones still need it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Debug, Serialize, Deserialize)]
pub struct LayerRef {
    /// The volume that it was made for.
    pub volume: VolumeId,
    /// Its number there.
    pub layer: LayerId,
}

impl LayerRef {
    /// The part of it that one replica of a segment holds.
    pub fn key(self, segment: SegmentIndex) -> SegmentKey {
        SegmentKey { volume: self.volume, segment, layer: self.layer }
    }
}

impl fmt::Display for LayerRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.volume, self.layer)
    }
}

/// Identifies one write of one volume; stored with every block that the write touched.
///
/// Unique and monotonic within a volume: equal versions of a block mean equal content, of two versions the higher one
/// was written later. The default value is lower than that of any write and stands for "never written".
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Debug, Serialize, Deserialize)]
pub struct Version {
    /// Generation of the coordinator that made the write.
    pub generation: u64,
    /// Position among the writes of that generation.
    pub sequence: u64,
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.generation, self.sequence)
    }
}

/// A size in bytes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Debug, Serialize, Deserialize)]
pub struct ByteSize(pub u64);

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Names the part of a volume that one replica on one disk holds: a segment in one layer.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub struct SegmentKey {
    /// The volume.
    pub volume: VolumeId,
    /// The segment within the volume.
    pub segment: SegmentIndex,
    /// The layer of the volume.
    pub layer: LayerId,
}
