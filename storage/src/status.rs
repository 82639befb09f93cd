//! What storage reports about itself: observed state, for the leader and for people.

use crate::ids::{ByteSize, DiskId, Generation, VolumeId};
use netfabric::NodeId;
use serde::{Deserialize, Serialize};

/// The state of this node's storage at one moment.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
pub struct StorageStatus {
    /// Volumes open on this node.
    pub volumes: Vec<VolumeStatus>,
    /// Disks of this node.
    pub disks: Vec<DiskStatus>,
}

/// The state of an open volume.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct VolumeStatus {
    /// The volume.
    pub id: VolumeId,
    /// Its generation here.
    pub generation: Generation,
    /// What it is doing.
    pub state: VolumeState,
    /// Its replicas, one entry for each disk that holds any segment.
    pub replicas: Vec<ReplicaStatus>,
}

/// How a volume was handed over.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Handover {
    /// Every request was carried out, and all replicas are equal and flushed, which is recorded.
    Clean,
    /// Requests may have been cut short, or it could not be recorded: the next opening compares the replicas.
    Unclean,
}

/// What an open volume is doing.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum VolumeState {
    /// Announcing the generation and making replicas equal; I/O waits.
    Opening,
    /// Serving I/O.
    Open,
    /// I/O (or a part of it) waits; the text says for what.
    Waiting(String),
    /// A newer generation exists: this coordinator completes nothing any more.
    Fenced,
    /// Closed.
    Closed,
}

/// The state of one disk's replicas of a volume.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct ReplicaStatus {
    /// The disk.
    pub disk: DiskId,
    /// Its node.
    pub node: NodeId,
    /// The state of the replicas on it.
    pub state: MemberState,
    /// Segments whose replica on this disk is in sync.
    pub segments_in_sync: u32,
    /// Segments with a replica on this disk.
    pub segments: u32,
    /// Progress of a resync, running or the last one finished.
    pub resync: Option<ResyncProgress>,
}

/// How the coordinator sees a disk that holds replicas.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum MemberState {
    /// All its segments are in sync.
    InSync,
    /// Takes new writes while the blocks that it lacks are copied.
    Syncing,
    /// Takes no writes; the text says why.
    Out(String),
}

/// Progress of bringing a replica back.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct ResyncProgress {
    /// Blocks whose versions were compared.
    pub blocks_compared: u64,
    /// Blocks that differed and were copied.
    pub blocks_copied: u64,
    /// Blocks known to differ and not copied yet.
    pub blocks_left: u64,
}

/// The state of a local disk.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct DiskStatus {
    /// The disk.
    pub id: DiskId,
    /// Space.
    pub usage: DiskUsage,
    /// Whether it can be used.
    pub health: DiskHealth,
    /// How its verification stands.
    pub scrub: ScrubStatus,
    /// The volumes of which it holds anything, by id: what is in their place, not what is in the log.
    pub volumes: Vec<VolumeUsage>,
}

/// How the verification of a disk stands.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct ScrubStatus {
    /// Whether it is under way.
    pub state: ScrubState,
    /// When the last one ended, in seconds since 1970; none when there was none yet.
    pub last_end: Option<u64>,
    /// Bytes that the present one has verified, or else the last one did.
    pub checked: ByteSize,
    /// Damaged blocks that it found and that were not known before.
    pub found: u64,
    /// Blocks known to be damaged and not repaired yet.
    pub damaged: u64,
    /// Blocks found intact again, after a repair for example, since the disk was opened.
    pub repaired: u64,
}

/// Whether a disk is being verified.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub enum ScrubState {
    /// Waits for its time.
    #[default]
    Idle,
    /// Under way.
    Running,
}

/// Space on a disk.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct DiskUsage {
    /// Bytes in use.
    pub used: ByteSize,
    /// Bytes there are.
    pub total: ByteSize,
}

/// What a disk holds of a volume, all of its layers together.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct VolumeUsage {
    /// The volume.
    pub volume: VolumeId,
    /// Bytes that its data would take if none were compressed; whole slots.
    pub data: ByteSize,
    /// Bytes that they take.
    pub stored: ByteSize,
}

/// Whether a disk can be used.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum DiskHealth {
    /// Works.
    Ok,
    /// Returned an I/O error; not used any more.
    Failed(String),
    /// Has no room: refuses writes, serves reads and deletes.
    Full,
}
