//! What the control and the data process of a node say to each other.
//!
//! Two sockets, both with the framing of [`netfabric::rpc`]: on `data.sock` the data process serves the control
//! process (types that implement [`DataCall`]), on `control.sock` the control process serves the data process
//! ([`ControlCall`]). Whoever serves `control.sock` is the control plane as far as a data process can tell; a test
//! harness may do it.
//!
//! The types are postcard behind a version byte: fields never change within a version, enums grow at the end.
//! Everything sent to the data process is a whole state or idempotent, so that a message lost in a crash is repaired
//! by sending it again.

use std::{collections::BTreeMap, fmt, net::SocketAddr, path::PathBuf, time::Duration};

use netfabric::{NodeId, overlay::OverlayConfig};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use storage::KeySalt;
use storage::{
    config::{StorageConfig, VolumeConfig},
    control::FreezeStep,
    ids::{DiskId, FreezeId, Generation, LayerRef, SegmentIndex, SegmentKey, VolumeId},
    status::{Handover, StorageStatus},
};
use uuid::Uuid;

use super::disks::smart::Smart;

/// A call that the data process serves on `data.sock`.
pub trait DataCall: Serialize + DeserializeOwned + Send + Sync {
    /// Its number.
    const METHOD: u16;
    /// What it answers.
    type Reply: Serialize + DeserializeOwned + Send;
}

/// A call that the control process serves on `control.sock`.
pub trait ControlCall: Serialize + DeserializeOwned + Send + Sync {
    /// Its number.
    const METHOD: u16;
    /// What it answers.
    type Reply: Serialize + DeserializeOwned + Send;
}

macro_rules! calls {
    ($trait:ident: $($method:literal $call:ty => $reply:ty;)*) => {
        $(impl $trait for $call {
            const METHOD: u16 = $method;
            type Reply = $reply;
        })*
    };
}

calls! { DataCall:
    0x0101 Apply => Observed;
    0x0102 RenewLease => ();
    0x0103 Status => Observed;
    0x0104 Metrics => String;
    0x0105 VolumeRead => ();
    0x0106 VolumeWrite => ();
    0x0107 VolumeFlush => ();
    0x0108 CopyVolume => u64;
    0x0109 FormatDisk => FormattedDisk;
    0x010a ListDisks => Vec<LocalDisk>;
    0x010b DeleteVolume => ();
    0x010c DeleteParts => ();
    0x010d HandOver => Handover;
}

calls! { ControlCall:
    0x0201 Hello => ();
    0x0202 ReplicasOut => Result<VolumeConfig, CommitRefusal>;
    0x0203 ReplicaIn => Result<VolumeConfig, CommitRefusal>;
    0x0204 Opened => Result<(), CommitRefusal>;
    0x0205 ClosedClean => Result<(), CommitRefusal>;
    0x0206 FreezeProgress => Result<VolumeConfig, CommitRefusal>;
    0x0207 LayerMerged => Result<VolumeConfig, CommitRefusal>;
    0x0208 ReplicaLeft => Result<VolumeConfig, CommitRefusal>;
}

/// One run of the data process. A new one knows nothing of what the last one had open.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct DataInstance(pub Uuid);

impl DataInstance {
    /// A new run.
    pub fn random() -> Self {
        Self(Uuid::new_v4())
    }
}

impl fmt::Debug for DataInstance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DataInstance({})", self.0)
    }
}

/// A moment of the machine's monotonic clock, which all processes of a node share.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct MonotonicTime {
    nanos: u64,
}

impl MonotonicTime {
    /// Now.
    pub fn now() -> Self {
        // CLOCK_MONOTONIC exists on every Linux; if it did not, time would stand at zero and no lease would hold.
        let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC).map(Duration::from);
        Self { nanos: now.map_or(0, |now| u64::try_from(now.as_nanos()).unwrap_or(u64::MAX)) }
    }

    /// That much after now.
    pub fn after(duration: Duration) -> Self {
        let nanos = u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
        Self { nanos: Self::now().nanos.saturating_add(nanos) }
    }

    /// How long until then; zero when it has passed.
    pub fn remaining(self) -> Duration {
        Duration::from_nanos(self.nanos.saturating_sub(Self::now().nanos))
    }
}

/// Makes the data process do what this says and nothing else. The configuration travels as [`DataConfig`] in the
/// bulk part, because it may exceed a header.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Apply {
    /// The instance that it is meant for. Another one refuses it: the volumes in it were opened for that instance.
    pub instance: DataInstance,
}

/// All that a data process does.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DataConfig {
    /// Revision of the cluster state that it was made from; shown in [`Observed`].
    pub revision: u64,
    /// The other nodes.
    pub peers: Vec<PeerConfig>,
    /// Disks of the pool in this node, and volumes that it coordinates.
    pub storage: StorageConfig,
    /// Networks, ports and who is where.
    pub overlay: OverlayConfig,
}

/// Another node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerConfig {
    /// Its id.
    pub node: NodeId,
    /// Its storage mesh.
    pub storage: SocketAddr,
    /// Its frames mesh.
    pub frames: SocketAddr,
}

/// The node's lease holds until then: the data process serves guests only while it does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RenewLease {
    /// When it ends.
    pub until: MonotonicTime,
}

/// Asks for [`Observed`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status;

/// Asks for the metrics in Prometheus' text format.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Metrics;

/// Reads from a volume that is open with internal access; the data is in the bulk part of the answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeRead {
    /// The volume.
    pub volume: VolumeId,
    /// Where.
    pub offset: u64,
    /// How much; at most [`netfabric::rpc::MAX_BULK`].
    pub length: u32,
}

/// Writes the bulk part to a volume that is open with internal access.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeWrite {
    /// The volume.
    pub volume: VolumeId,
    /// Where.
    pub offset: u64,
}

/// Makes all earlier writes durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeFlush {
    /// The volume.
    pub volume: VolumeId,
}

/// Copies a range between two volumes that are open with internal access, without what is zero. Answers how many
/// bytes it wrote.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CopyVolume {
    /// From where.
    pub source: VolumeId,
    /// To where.
    pub target: VolumeId,
    /// Where the range starts, in both.
    pub offset: u64,
    /// How long it is.
    pub length: u64,
}

/// What may be destroyed while a disk is prepared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Wipe {
    /// Nothing: a disk that holds data is refused.
    Refuse,
    /// Everything on it.
    Everything,
}

/// What becomes of the node's secret, of which the keys of its encrypted disks are made, when it is not there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum NodeSecret {
    /// It is made: nothing is encrypted with it yet.
    MayBeMade,
    /// Other disks of this node were encrypted with it: it is lost, and another one is not to take its place unnoticed.
    IsInUse,
}

/// Prepares a block device or a directory for the pool. Repeating it with the same id is harmless.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FormatDisk {
    /// The id that it gets; written to it.
    pub disk: DiskId,
    /// Block device, or directory.
    pub path: PathBuf,
    /// What may be destroyed.
    pub wipe: Wipe,
    /// What its key is made with, if it is to be encrypted.
    pub key_salt: Option<KeySalt>,
    /// See there.
    pub secret: NodeSecret,
}

/// A prepared disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FormattedDisk {
    /// The device or file of its store.
    pub store: PathBuf,
    /// Its capacity.
    pub capacity_bytes: u64,
}

/// Asks for the block devices of the node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ListDisks;

/// A block device of the node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LocalDisk {
    /// Its device.
    pub path: PathBuf,
    /// Its size.
    pub size_bytes: u64,
    /// Its model, as far as known.
    pub model: String,
    /// Its serial number, as far as known.
    pub serial: String,
    /// What it is used for.
    pub usage: DiskUsage,
}

/// What a block device is used for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum DiskUsage {
    /// Nothing; it could be added to the pool.
    Blank,
    /// Nothing now, but it holds something, named here; adding it needs leave to wipe it.
    Holds(String),
    /// It is in use, for what is named here.
    InUse(String),
    /// It is this disk of a pool.
    Pool(DiskId),
}

/// Removes what this node's disks hold of a volume. Idempotent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeleteVolume {
    /// The volume.
    pub volume: VolumeId,
}

/// Removes what a disk of this node holds of segments in layers that nobody needs there any more. Idempotent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeleteParts {
    /// The disk.
    pub disk: DiskId,
    /// The segments, each in one layer.
    pub parts: Vec<SegmentKey>,
}

/// Closes a volume whose VM moves to another node, and answers whether it is clean. Its socket stays, and what is asked for there waits. Idempotent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HandOver {
    /// The volume.
    pub volume: VolumeId,
    /// The generation that is open.
    pub generation: Generation,
}

/// What a data process does now.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Observed {
    /// Which run of the process answers.
    pub instance: DataInstance,
    /// Revision of the configuration that is applied; none before the first.
    pub revision: Option<u64>,
    /// Whether it serves guests.
    pub lease: LeaseState,
    /// Whether the meshes and the storage are up; before the node has an identity they are not.
    pub readiness: Readiness,
    /// Its disks and the volumes that it has open. A disk that is not there is in it as failed.
    pub storage: StorageStatus,
    /// What its disks say of themselves; those that say nothing are not in it.
    pub smart: BTreeMap<DiskId, Smart>,
}

/// Whether the data process can take a configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Readiness {
    /// The node has no identity yet.
    Unjoined,
    /// It can.
    Ready,
}

/// Whether the lease holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum LeaseState {
    /// It does.
    Held,
    /// It ran out, or none was given yet: I/O waits and ports are silent.
    Lapsed,
}

/// The data process has started and can take a configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// Which run of it.
    pub instance: DataInstance,
}

/// Takes a disk out of the in-sync set of every segment; answers the volume as it now stands.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReplicasOut {
    /// The volume.
    pub volume: VolumeId,
    /// The coordinator's generation.
    pub generation: Generation,
    /// The disk.
    pub disk: DiskId,
    /// Why, for people.
    pub reason: String,
}

/// Puts a resynced replica back; answers the volume as it now stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReplicaIn {
    /// The volume.
    pub volume: VolumeId,
    /// The coordinator's generation.
    pub generation: Generation,
    /// The segment.
    pub segment: SegmentIndex,
    /// The disk.
    pub disk: DiskId,
}

/// A replica in sync that was to leave its set does so; answers the volume as it now stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReplicaLeft {
    /// The volume.
    pub volume: VolumeId,
    /// The coordinator's generation.
    pub generation: Generation,
    /// The segment.
    pub segment: SegmentIndex,
    /// The disk.
    pub disk: DiskId,
}

/// The coordinator is about to serve.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Opened {
    /// The volume.
    pub volume: VolumeId,
    /// The coordinator's generation.
    pub generation: Generation,
}

/// The coordinator has ended, and all replicas in sync are identical and durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClosedClean {
    /// The volume.
    pub volume: VolumeId,
    /// The coordinator's generation.
    pub generation: Generation,
}

/// How far a volume is with a freeze; answers the volume as it now stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FreezeProgress {
    /// The volume.
    pub volume: VolumeId,
    /// The coordinator's generation.
    pub generation: Generation,
    /// The freeze.
    pub freeze: FreezeId,
    /// How far it is.
    pub step: FreezeStep,
}

/// A layer is in the one above it now; answers the volume as it now stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerMerged {
    /// The volume.
    pub volume: VolumeId,
    /// The coordinator's generation.
    pub generation: Generation,
    /// The layer.
    pub layer: LayerRef,
}

/// Why the control plane did not commit.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum CommitRefusal {
    /// The generation is not the current one.
    Fenced,
    /// It would break a rule, named here.
    Refused(String),
    /// There is no majority now, or the control process is busy: try again.
    Unavailable(String),
}
