//! What the cluster is meant to be: the values that [`super::ClusterState`] is made of.
//!
//! All of them are stored with postcard, which does not describe itself: no `skip`, `flatten`, `untagged`, and
//! new fields or variants only at the end of a type.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{Ipv4Addr, SocketAddr},
};

use ipnet::Ipv4Net;
use serde::{Deserialize, Serialize};
use storage::KeySalt;

use super::{
    ids::*,
    layers::{LayerRef, Layers},
    transfers::ImageSource,
};

/// Size of a segment: the unit of placement.
pub const SEGMENT_BYTES: u64 = 1 << 30;
/// Size of a block: volumes are a multiple of it.
pub const BLOCK_BYTES: u64 = 4096;

/// Identity of the cluster.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cluster {
    /// Its id.
    pub id: ClusterId,
    /// Its name.
    pub name: String,
    /// Certificate of its own authority.
    pub ca_cert_pem: String,
    /// Private key of its authority. It is in the replicated state so that any leader can let a node join; the
    /// files that hold the state are readable by root only.
    pub ca_key_pem: CaKey,
    /// `sha256:…` of the authority's certificate.
    pub ca_fingerprint: String,
    /// When it was created.
    pub created: Timestamp,
}

/// A private key that never appears in logs.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct CaKey(pub String);

impl std::fmt::Debug for CaKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("CaKey(..)")
    }
}

/// Where a node is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeAddresses {
    /// Control mesh (UDP).
    pub control: SocketAddr,
    /// Storage mesh (UDP).
    pub storage: SocketAddr,
    /// Frames mesh (UDP).
    pub frames: SocketAddr,
    /// HTTPS API (TCP).
    pub api: SocketAddr,
}

/// Whether the leader has heard from a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Availability {
    /// Its lease is renewed.
    Available,
    /// Its lease ran out at this time; its guests have stopped.
    Lost {
        /// When the leader noticed.
        since: Timestamp,
    },
}

/// Whether a node is meant to carry anything.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum NodeService {
    /// It is.
    #[default]
    InService,
    /// Its VMs go elsewhere and no new ones come; its disks stay. For maintenance.
    Draining,
    /// Its VMs and its data go elsewhere, then it leaves the cluster.
    Leaving,
}

/// A member of the cluster.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Node {
    /// Its id, which is also in its certificate.
    pub id: NodeId,
    /// Its name, unique.
    pub name: String,
    /// Where it is reached.
    pub addresses: NodeAddresses,
    /// The public key it joined with; a repeated join with the same key gets the same answer.
    pub public_key_pem: String,
    /// The certificate it was given.
    pub certificate_pem: String,
    /// When it joined.
    pub joined: Timestamp,
    /// Whether it is there.
    pub availability: Availability,
    /// The failure domain that it shares with others: copies go to distinct racks when there are enough.
    pub rack: Option<String>,
    /// Whether it is meant to carry anything.
    pub service: NodeService,
}

impl Node {
    /// Whether its lease ran out.
    pub fn is_lost(&self) -> bool {
        matches!(self.availability, Availability::Lost { .. })
    }
}

/// How far a disk is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum DiskState {
    /// Its node is to prepare it.
    Preparing,
    /// It holds a store and takes replicas.
    Ready,
    /// Its node found it broken; it takes no new replicas.
    Failed {
        /// What is wrong.
        reason: String,
    },
}

/// Whether preparing a disk may destroy what is on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum WipePolicy {
    /// Refuse a disk that holds data.
    Refuse,
    /// Wipe it: the operator named it.
    Wipe,
}

/// Whether a disk is meant to hold replicas.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum DiskService {
    /// It is.
    #[default]
    InService,
    /// Its replicas are moved to other disks, then it leaves the pool.
    Draining,
    /// It was declared dead: nothing of it is counted on any more, and it leaves the pool once nothing refers to it.
    Dead,
}

/// Whether new replicas may be put on a disk. The leader compares what the disk's node reports with the pool's reserve;
/// it is in the state so that placement is the same on every node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum DiskRoom {
    /// They may.
    #[default]
    Free,
    /// What is left is the reserve.
    Reserved,
}

/// A physical disk of the pool.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Disk {
    /// Its id, which is also on the disk.
    pub id: DiskId,
    /// The node that it is in.
    pub node: NodeId,
    /// Device (or directory) as the operator named it.
    pub path: String,
    /// Directory of its store, once prepared.
    pub store: Option<String>,
    /// Capacity, once prepared.
    pub capacity_bytes: u64,
    /// How far it is.
    pub state: DiskState,
    /// What may be destroyed while preparing it.
    pub wipe: WipePolicy,
    /// When it was added.
    pub added: Timestamp,
    /// Whether it is meant to hold replicas.
    pub service: DiskService,
    /// Whether new replicas may be put on it.
    pub room: DiskRoom,
    /// How often its verification was asked for.
    pub scrubs: u64,
    /// What its key is made with, if it is encrypted. Without it nobody can make the key again.
    pub key_salt: Option<KeySalt>,
}

impl Disk {
    /// Whether new replicas may be put on it, as far as the disk itself is concerned.
    pub fn takes_replicas(&self) -> bool {
        self.state == DiskState::Ready
            && self.service == DiskService::InService
            && self.room == DiskRoom::Free
    }
}

/// What holds for the pool as a whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PoolPolicy {
    /// How long a node may be lost before its replicas are rebuilt elsewhere.
    pub rebuild_grace_seconds: u32,
    /// Share of each disk that placement and rebuilding leave free.
    pub reserve_percent: u8,
    /// Segments that are copied to or away from one disk at a time.
    pub moves_per_disk: u8,
    /// Whether replicas are moved to even out how full the disks are.
    pub rebalancing: Rebalancing,
}

impl Default for PoolPolicy {
    fn default() -> Self {
        Self {
            rebuild_grace_seconds: 600,
            reserve_percent: 10,
            moves_per_disk: 2,
            rebalancing: Rebalancing::On,
        }
    }
}

/// Whether replicas are moved to even out how full the disks are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Rebalancing {
    /// In the background, while nothing is degraded.
    #[default]
    On,
    /// Never.
    Off,
}

/// Whether a replica has every completed write.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ReplicaState {
    /// It has.
    InSync,
    /// It lacks some, and is resynced.
    OutOfSync,
}

/// One copy of a segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Replica {
    /// The disk that holds it.
    pub disk: DiskId,
    /// The node that the disk is in.
    pub node: NodeId,
    /// Whether it is complete.
    pub state: ReplicaState,
    /// The copy of the same segment that leaves once this one is complete.
    pub replaces: Option<DiskId>,
}

/// Data of former copies on a disk, still to be removed there. While there is an entry for a volume and a disk, the
/// disk gets no new copies of that volume, so that removing can never hit anything that is in use.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Retired {
    /// The volume's generation when the latest of them left.
    pub generation: Generation,
    /// The segments.
    pub segments: BTreeSet<SegmentIndex>,
    /// Whether the coordinator of that generation may still use them.
    pub custody: Custody,
    /// The layers that the copies had. What another volume needs of them on the disk stays.
    pub layers: BTreeSet<LayerRef>,
}

/// Whether a coordinator may still use copies that have left their sets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Custody {
    /// It has not said that it does not.
    Coordinator,
    /// Nobody does.
    Nobody,
}

/// 1 GiB of a volume and where its copies are.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Segment {
    /// Its copies, on disks of distinct nodes; one that replaces another may be in the same node.
    pub replicas: Vec<Replica>,
}

impl Segment {
    /// The copy on a disk.
    pub fn on(&self, disk: DiskId) -> Option<&Replica> {
        self.replicas.iter().find(|replica| replica.disk == disk)
    }

    /// Whether a copy is to leave once another one is complete.
    pub fn is_replaced(&self, disk: DiskId) -> bool {
        self.replicas.iter().any(|replica| replica.replaces == Some(disk))
    }

    /// How many copies there are, not counting those that are to leave.
    pub fn staying(&self) -> usize {
        self.replicas.iter().filter(|replica| !self.is_replaced(replica.disk)).count()
    }

    /// How many copies are complete.
    pub fn in_sync(&self) -> usize {
        self.replicas.iter().filter(|replica| replica.state == ReplicaState::InSync).count()
    }
}

/// Who a volume belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum VolumeOwner {
    /// Nobody: it was created on its own.
    None,
    /// A VM; it goes with it.
    Vm(VmId),
    /// The disk of an image.
    Image(ImageId),
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

/// A kernel or initramfs: a file that every node holds under `images/<hash>` in its state directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BootFile {
    /// BLAKE3 of the content.
    pub hash: ContentHash,
    /// Its length.
    pub size_bytes: u64,
}

/// A part of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum ImagePart {
    /// Kernel (bzImage or PVH ELF).
    Kernel,
    /// Initial RAM file system.
    Initramfs,
    /// Contents for the first disk of a VM.
    Disk,
}

impl ImagePart {
    /// Its name in paths of the API.
    pub fn name(self) -> &'static str {
        match self {
            Self::Kernel => "kernel",
            Self::Initramfs => "initramfs",
            Self::Disk => "disk",
        }
    }
}

/// How far a part of an image is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum PartState {
    /// Declared; nothing came yet.
    Awaiting,
    /// A node has the verified upload and takes it in.
    Importing {
        /// That node.
        node: NodeId,
        /// The volume it fills, for a disk.
        volume: Option<VolumeId>,
        /// The file it spreads, for a kernel or initramfs.
        file: Option<BootFile>,
        /// The task that shows its progress.
        task: Option<TaskId>,
    },
    /// A kernel or initramfs that is on the nodes.
    File(BootFile),
    /// A disk that is in the pool.
    Volume(VolumeId),
    /// A node gets it by itself.
    Fetching {
        /// That node.
        node: NodeId,
        /// From where.
        source: ImageSource,
        /// The task that shows its progress.
        task: Option<TaskId>,
    },
}

/// What VMs are made from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Image {
    /// Its id.
    pub id: ImageId,
    /// Its name, unique.
    pub name: String,
    /// Kernel command line that its VMs get unless they bring their own.
    pub cmdline: String,
    /// The parts that it was declared with.
    pub parts: BTreeMap<ImagePart, PartState>,
    /// When it was created.
    pub created: Timestamp,
}

impl Image {
    /// Whether every declared part is there.
    pub fn is_ready(&self) -> bool {
        self.parts.values().all(|part| matches!(part, PartState::File(_) | PartState::Volume(_)))
    }

    /// A boot file that is there.
    pub fn boot_file(&self, part: ImagePart) -> Option<BootFile> {
        match self.parts.get(&part) {
            Some(PartState::File(file)) => Some(*file),
            _ => None,
        }
    }

    /// The disk, if it has one that is there.
    pub fn disk(&self) -> Option<VolumeId> {
        match self.parts.get(&ImagePart::Disk) {
            Some(PartState::Volume(volume)) => Some(*volume),
            _ => None,
        }
    }
}

/// An overlay network.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Network {
    /// Its id.
    pub id: NetworkId,
    /// Its name, unique.
    pub name: String,
    /// Its number on the wire.
    pub vni: Vni,
    /// Its addresses.
    pub subnet: Ipv4Net,
    /// The virtual gateway, which is also the DHCP server.
    pub gateway: Ipv4Addr,
    /// MTU of its guests.
    pub mtu: u16,
    /// Name servers told to its guests.
    pub dns: Vec<Ipv4Addr>,
    /// Domain told to its guests.
    pub domain: String,
    /// When it was created.
    pub created: Timestamp,
}

/// A NIC of a VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Port {
    /// Its id.
    pub id: PortId,
    /// The network that it is on.
    pub network: NetworkId,
    /// The VM that it belongs to.
    pub vm: VmId,
    /// Its Ethernet address, unique in the cluster.
    pub mac: MacAddr,
    /// Its address, unique in its network.
    pub ip: Ipv4Addr,
}

/// Whether a VM is meant to run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum DesiredRun {
    /// It is.
    Running,
    /// It is not.
    Stopped(StopMode),
}

/// How a VM is stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum StopMode {
    /// Press the power button; kill after a minute.
    Graceful,
    /// Kill at once.
    Force,
}

/// A run that is to end so that the next one starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Restart {
    /// Which run.
    pub epoch: RunEpoch,
    /// How it is ended.
    pub mode: StopMode,
}

/// Where a VM runs now.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Assignment {
    /// The node.
    pub node: NodeId,
    /// The run epoch of this assignment.
    pub epoch: RunEpoch,
    /// Since when.
    pub since: Timestamp,
}

/// A virtual machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Vm {
    /// Its id.
    pub id: VmId,
    /// Its name, unique; its hostname too.
    pub name: String,
    /// Number of virtual CPUs.
    pub vcpus: u8,
    /// Memory.
    pub memory_bytes: u64,
    /// The image that it boots.
    pub image: ImageId,
    /// Kernel command line; the image's when none.
    pub cmdline: Option<String>,
    /// Its disks in order.
    pub disks: Vec<VolumeId>,
    /// Its NICs in order.
    pub ports: Vec<PortId>,
    /// Whether it is meant to run.
    pub desired: DesiredRun,
    /// The node that it should run on when that is possible.
    pub preferred_node: Option<NodeId>,
    /// Raised at each assignment.
    pub epoch: RunEpoch,
    /// Where it runs; none while it is stopped or waits for a node.
    pub assignment: Option<Assignment>,
    /// The run that a restart asked to end: its node stops it, then the VM is assigned again.
    pub restart: Option<Restart>,
    /// How its last run ended.
    pub last_exit: Option<VmExit>,
    /// When it was created.
    pub created: Timestamp,
}

/// How a run of a VM ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum VmExit {
    /// The guest shut itself down.
    GuestShutdown,
    /// It was stopped by order.
    Stopped,
    /// Its process died or could not start.
    Crashed(String),
    /// Its node was lost.
    NodeLost,
}

/// What a token is good for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum TokenKind {
    /// Joining, this many times more.
    Join {
        /// Uses left.
        uses_left: u32,
    },
    /// The API, all of it.
    Admin,
}

/// A secret that lets somebody in; only its hash is known.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Token {
    /// Its id, part of the token string.
    pub id: TokenId,
    /// What it is good for.
    pub kind: TokenKind,
    /// Hash of the secret.
    pub secret: SecretHash,
    /// When it was created.
    pub created: Timestamp,
    /// When it ends.
    pub expires: Option<Timestamp>,
    /// The nodes that joined with it.
    pub used_by: BTreeSet<NodeId>,
}

/// What a task or an event is about.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Subject {
    /// The cluster as such.
    Cluster,
    /// A node.
    Node(NodeId),
    /// A disk.
    Disk(DiskId),
    /// A volume.
    Volume(VolumeId),
    /// An image.
    Image(ImageId),
    /// A network.
    Network(NetworkId),
    /// A VM.
    Vm(VmId),
    /// A token.
    Token(TokenId),
}

/// When a task is done. The leader of the moment compares it with what the nodes report; no message can be missed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Goal {
    /// At once.
    Applied,
    /// The VM runs, in a run epoch of at least this.
    VmRuns(VmId, RunEpoch),
    /// The VM has no assignment and its volumes are closed.
    VmIsStopped(VmId),
    /// The disk takes replicas.
    DiskReady(DiskId),
    /// That part of the image is there.
    ImagePartReady(ImageId, ImagePart),
    /// The disk has left the pool.
    DiskGone {
        /// The disk.
        disk: DiskId,
        /// Segments with a copy on it when it was asked for.
        segments: u32,
    },
    /// No VM is assigned to the node and it has no volume open.
    NodeDrained(NodeId),
    /// The node has left the cluster.
    NodeGone {
        /// The node.
        node: NodeId,
        /// Segments with a copy on its disks when it was asked for.
        segments: u32,
    },
    /// Every segment of the volume has its copies.
    VolumeSettled(VolumeId),
    /// The snapshots are taken.
    SnapshotTaken(FreezeId),
}

/// How far a task is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum TaskState {
    /// It is worked on.
    Running,
    /// Its goal is reached.
    Done,
    /// It will not be reached.
    Failed(TaskError),
}

/// Why a task failed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TaskError {
    /// What happened.
    pub detail: String,
    /// What to do next.
    pub next: String,
}

/// A change that somebody asked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Task {
    /// Its id.
    pub id: TaskId,
    /// What is done, as noun and verb: `vm create`.
    pub kind: String,
    /// What it is about.
    pub subject: Subject,
    /// Name of the subject when the task was made; it may be gone by now.
    pub subject_name: String,
    /// How far it is.
    pub state: TaskState,
    /// 0 to 1000.
    pub permille: u16,
    /// What it is doing or waiting for.
    pub message: String,
    /// When it is done.
    pub goal: Goal,
    /// When it was asked for.
    pub created: Timestamp,
    /// When it ended.
    pub finished: Option<Timestamp>,
}

/// How much an event matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Severity {
    /// Good to know.
    Info,
    /// Something is less than it should be.
    Warning,
    /// Something does not work.
    Critical,
}

/// Something that happened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// Its number; never used twice.
    pub sequence: u64,
    /// When.
    pub at: Timestamp,
    /// How much it matters.
    pub severity: Severity,
    /// What, as one word: `node-lost`.
    pub kind: String,
    /// What it is about.
    pub subject: Subject,
    /// Name of the subject at that time.
    pub subject_name: String,
    /// The sentence for people.
    pub message: String,
}
