//! Messages between a coordinator and replica servers, one request and one reply each.
//!
//! Every request names the volume, the coordinator's generation and its session with one disk's replica. A **session** begins
//! with [`ReplicaOp::Attach`] and ends with the next one or with the replica server's process. A replica serves requests of the
//! current session only, so a message that was delayed for however long can never be applied after its coordinator gave up on it.

use crate::ids::{DiskId, Generation, LayerRef, SegmentIndex, SegmentKey, VolumeId};
use crate::store::{BlockVersion, Compression, DamagedBlocks, Keep, ReadReply, ReplicaWrite};
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use thiserror::Error;
use uuid::Uuid;

/// Counts the starts of a node's data process; durable, so that a new one is always higher.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Debug, Serialize, Deserialize)]
pub struct BootEpoch(pub u64);

/// From one start of a replica's machine to the next: what was written and not flushed in another one may be lost.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct PowerEpoch(pub Uuid);

/// One attachment of a coordinator to a replica. Higher ones end lower ones of the same generation.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Debug, Serialize, Deserialize)]
pub struct Session {
    /// Boot epoch of the coordinator's process.
    pub boot: BootEpoch,
    /// Number of the attachment within that process.
    pub number: u64,
}

/// A request to a replica server.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ReplicaRequest {
    /// The volume.
    pub volume: VolumeId,
    /// The coordinator's generation.
    pub generation: Generation,
    /// The coordinator's session with this replica.
    pub session: Session,
    /// What to do.
    pub op: ReplicaOp,
}

/// A part of a volume on one disk.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ReplicaAddress {
    /// The disk.
    pub disk: DiskId,
    /// The segment.
    pub segment: SegmentIndex,
    /// The layer.
    pub layer: LayerRef,
}

impl ReplicaAddress {
    /// What the store calls it.
    pub fn key(&self) -> SegmentKey {
        self.layer.key(self.segment)
    }
}

/// When a write may be answered.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum AckWhen {
    /// When it is logged.
    Logged,
    /// When it is durable.
    Durable,
}

/// Segments that one [`ReplicaOp::Stored`] asks for at most.
pub const MAX_STORED: u32 = 4096;

/// What a replica server is asked to do.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum ReplicaOp {
    /// Store the generation durably on the disk, end older sessions with it, wait for their requests to end, start this one.
    Attach {
        /// The disk.
        disk: DiskId,
    },
    /// Write blocks.
    Write {
        /// Where.
        at: ReplicaAddress,
        /// What.
        write: ReplicaWrite,
        /// When to answer.
        ack: AckWhen,
    },
    /// Read blocks, each from the first layer that has it.
    Read {
        /// Where, in the top layer.
        at: ReplicaAddress,
        /// The layers below, from the top down.
        below: Arc<[LayerRef]>,
        /// First block.
        block: u32,
        /// Number of blocks.
        blocks: u32,
    },
    /// List versions of blocks.
    Versions {
        /// Where.
        at: ReplicaAddress,
        /// First block.
        block: u32,
        /// Number of blocks.
        blocks: u32,
    },
    /// List the segments of which anything is stored in a layer.
    Stored {
        /// The disk.
        disk: DiskId,
        /// The layer.
        layer: LayerRef,
        /// First segment.
        first: SegmentIndex,
        /// Number of segments; at most [`MAX_STORED`].
        count: u32,
    },
    /// Copy blocks from a layer to the one above it, where that one does not have them.
    Merge {
        /// From where.
        at: ReplicaAddress,
        /// The layer above.
        into: LayerRef,
        /// First block.
        block: u32,
        /// Number of blocks.
        blocks: u32,
        /// Whether zeroes hide something below.
        keep: Keep,
        /// What becomes of the copied data.
        compression: Compression,
    },
    /// Make all that was written to the disk durable.
    Flush {
        /// The disk.
        disk: DiskId,
    },
    /// Say what is known to be damaged in some layers.
    Damaged {
        /// The disk.
        disk: DiskId,
        /// The layers.
        layers: Arc<[LayerRef]>,
        /// Blocks to leave out at the beginning.
        skip: u32,
    },
}

impl ReplicaOp {
    /// The disk that it is about.
    pub fn disk(&self) -> DiskId {
        match self {
            Self::Attach { disk }
            | Self::Flush { disk }
            | Self::Stored { disk, .. }
            | Self::Damaged { disk, .. } => *disk,
            Self::Write { at, .. }
            | Self::Read { at, .. }
            | Self::Versions { at, .. }
            | Self::Merge { at, .. } => at.disk,
        }
    }
}

/// The answer of a replica server.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ReplicaReply {
    /// Boot epoch of the answering process.
    pub boot: BootEpoch,
    /// Microseconds from the request's arrival to its answer.
    pub served_us: u32,
    /// The result.
    pub result: Result<ReplicaOutcome, ReplicaError>,
}

/// A successful answer.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum ReplicaOutcome {
    /// Attached.
    Attached {
        /// The generation that the disk had stored before.
        previous: Generation,
        /// Since when the disk's machine has had power.
        power: PowerEpoch,
    },
    /// Written or flushed.
    Done,
    /// Blocks.
    Data(ReadReply),
    /// Versions.
    Versions(Vec<BlockVersion>),
    /// Segments, ascending.
    Stored(Vec<SegmentIndex>),
    /// Damaged blocks, a part of them when there are many.
    Damaged(Vec<DamagedBlocks>),
}

/// Why a replica server refused or failed.
#[derive(Clone, PartialEq, Eq, Debug, Error, Serialize, Deserialize)]
pub enum ReplicaError {
    /// A higher generation is stored here.
    #[error("fenced: the volume was opened with generation {current}")]
    Fenced {
        /// The generation stored.
        current: Generation,
    },
    /// Not the current session (this process restarted, or a newer attachment exists).
    #[error("not attached")]
    NotAttached,
    /// The caller is not the node that attached with this generation.
    #[error("the caller does not coordinate the volume")]
    NotCoordinator,
    /// The disk is not here.
    #[error("no such disk")]
    NoSuchDisk,
    /// A block's content does not match its checksum.
    #[error("checksum error in block {block}")]
    Checksum {
        /// The block, within the segment.
        block: u32,
    },
    /// The disk is full.
    #[error("the disk is full")]
    Full,
    /// The disk failed.
    #[error("disk failed: {0}")]
    Failed(String),
    /// The request is malformed.
    #[error("invalid request: {0}")]
    Invalid(String),
}
