//! What the control plane wants of this node's storage: one declarative value, given whole each time.

use crate::ids::{ByteSize, DiskId, FreezeId, Generation, LayerId, LayerRef, SegmentIndex, VolumeId};
use crate::key::KeySalt;
use crate::store::Compression;
use netfabric::NodeId;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// Everything this node's storage is to have and do. [`crate::Storage::apply`] converges to it.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct StorageConfig {
    /// Disks of this node that belong to the pool.
    pub disks: Vec<DiskConfig>,
    /// Volumes that this node coordinates now (has open).
    pub volumes: Vec<VolumeConfig>,
    /// Volumes that another node has open and that this one may get: their sockets are served.
    pub standby: Vec<StandbyConfig>,
}

/// A volume whose target is ready on this node while another has it open: a VMM can connect, requests wait.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct StandbyConfig {
    /// The volume.
    pub id: VolumeId,
    /// Its size; a multiple of the block size.
    pub size: ByteSize,
    /// The socket that the target listens on; that of [`Access::VhostUser`] once the volume is open here.
    pub socket: PathBuf,
}

/// One local disk.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct DiskConfig {
    /// The disk.
    pub id: DiskId,
    /// The device or file that its store lives on.
    pub path: PathBuf,
    /// What its key is made with, if it is encrypted.
    pub key_salt: Option<KeySalt>,
    /// How many verifications were asked for so far, by the way of those that are due by themselves. A higher number than before begins
    /// one, unless one is under way.
    pub scrubs: u64,
}

/// A volume that this node has open, with its replica sets as last committed through Raft.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct VolumeConfig {
    /// The volume.
    pub id: VolumeId,
    /// Its size; a multiple of the block size.
    pub size: ByteSize,
    /// The generation given to this opening.
    pub generation: Generation,
    /// Writes wait while fewer replicas of a segment are in sync.
    pub min_in_sync: u8,
    /// When a write counts as complete.
    pub durability: Durability,
    /// Whether what is written from now on is compressed on the disks.
    pub compression: Compression,
    /// Whether the last close made all replicas equal.
    pub clean: CleanState,
    /// All segments, by ascending index from 0, without holes.
    pub segments: Vec<SegmentConfig>,
    /// Who uses the volume on this node.
    pub access: Access,
    /// How much its user may do.
    pub limits: Limits,
    /// The layers that its content lies in.
    pub layers: LayersConfig,
}

/// The layers of a volume.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct LayersConfig {
    /// Raised with each change: an older configuration never replaces a newer one.
    pub revision: u64,
    /// What reads go through, top first; never empty. Writes go to the top, but for the time until a freeze.
    pub chain: Vec<LayerRef>,
    /// Further layers that every replica in sync holds: of snapshots taken before the volume was restored.
    pub kept: Vec<LayerRef>,
    /// How many layers from the top on replicas may differ in after a crash: those that no freeze made equal.
    pub unsettled: u32,
    /// A freeze that is under way. The top of the chain is its new layer.
    pub freeze: Option<Freeze>,
    /// A layer of the chain that is to be merged into the one above it.
    pub merge: Option<LayerRef>,
}

impl LayersConfig {
    /// Of a volume without snapshots.
    pub fn single(volume: VolumeId) -> Self {
        let chain = vec![LayerRef { volume, layer: LayerId::default() }];
        Self { chain, unsettled: 1, ..Self::default() }
    }
}

/// A freeze that is under way.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Freeze {
    /// Which one.
    pub id: FreezeId,
    /// How far it is.
    pub stage: FreezeStage,
}

/// How far a freeze is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum FreezeStage {
    /// Each coordinator is to hold its volume's writes and to say when it does.
    Hold,
    /// All hold: each goes over to the new layer, and lets writes go on.
    Switch,
}

/// Limits of a volume, over reads and writes together; none is no limit.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Limits {
    /// Operations in a second.
    pub operations_per_second: Option<u64>,
    /// Bytes in a second.
    pub bytes_per_second: Option<u64>,
}

/// The replica set of one segment.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct SegmentConfig {
    /// Which segment.
    pub index: SegmentIndex,
    /// Its replicas, on distinct nodes.
    pub replicas: Vec<ReplicaConfig>,
}

/// One replica of a segment.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ReplicaConfig {
    /// The disk that holds it.
    pub disk: DiskId,
    /// The node that holds the disk.
    pub node: NodeId,
    /// Whether it holds every completed write.
    pub state: ReplicaState,
    /// Whether it is to stay.
    pub tenure: Tenure,
}

/// Whether a replica stays in its set. One that holds every completed write leaves the set of an open volume by a commit of its
/// coordinator ([`crate::control::ControlPlane::replica_left`]): nobody else knows whether the others still hold all of it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub enum Tenure {
    /// It does.
    #[default]
    Stays,
    /// It is to leave as soon as the others hold everything without it.
    Leaves,
}

/// Whether a replica is a member of its segment's in-sync set. Changes by Raft commit only.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum ReplicaState {
    /// Holds every completed write.
    InSync,
    /// May lack writes; is brought back by resync.
    OutOfSync,
}

/// When a write is reported as complete.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub enum Durability {
    /// When all in-sync replicas have it in their log; durable after the next flush.
    #[default]
    WriteBack,
    /// When it is durable on all in-sync replicas.
    WriteThrough,
}

/// How the volume was last closed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum CleanState {
    /// All replicas in sync were flushed and equal.
    Clean,
    /// The coordinator vanished: replicas may differ in writes never flushed.
    Unclean,
}

/// Who uses an open volume on this node.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Access {
    /// A VM, through vhost-user-blk on this socket.
    VhostUser {
        /// The socket that the target listens on.
        socket: PathBuf,
    },
    /// This process: image import and copies, through [`crate::Storage::read`] and its siblings.
    Internal,
}
