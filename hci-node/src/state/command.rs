//! Commands: the only way in which the state changes.
//!
//! A command carries everything that is not in the state: the time, new ids, hashes of secrets, and which nodes the
//! leader cannot reach. Applying it is deterministic. Ids make it safe to send twice: creating something whose id is
//! there already changes nothing and succeeds.

use std::{collections::BTreeMap, net::Ipv4Addr};

use ipnet::Ipv4Net;
use serde::{Deserialize, Serialize};
use storage::KeySalt;
use vmm::Processor;

use super::{
    ids::*,
    layers::{FreezeStep, LayerRef},
    model::*,
    transfers::ImageSource,
};

mod payload;

pub use payload::*;

/// One entry of the replicated log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Command {
    /// When it was made, by the proposer's clock.
    pub at: Timestamp,
    /// The task that is to stand for it, if somebody asked for it.
    pub task: Option<TaskId>,
    /// What to do.
    pub op: Op,
}

impl Command {
    /// A command of the cluster itself, made now.
    pub fn now(op: Op) -> Self {
        Self { at: Timestamp::now(), task: None, op }
    }

    /// A command that somebody asked for: it gets a task.
    pub fn asked(op: Op) -> Self {
        Self { at: Timestamp::now(), task: Some(TaskId::random()), op }
    }
}

/// What to do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Op {
    // cluster, nodes, tokens
    /// The first command of every cluster.
    CreateCluster {
        /// Identity of the cluster.
        cluster: Box<Cluster>,
        /// The node that creates it.
        node: NewNode,
        /// The token that lets its creator in.
        admin: Token,
        /// A join token whose secret is agreed in advance (unattended installation).
        join: Option<Token>,
    },
    /// A node joins.
    AddNode {
        /// The node.
        node: NewNode,
        /// The token it showed; its secret was checked by the leader.
        token: TokenId,
    },
    /// A node is reached elsewhere now.
    SetNodeAddresses {
        /// The node.
        node: NodeId,
        /// Where.
        addresses: NodeAddresses,
    },
    /// The leader lost or found a node.
    SetAvailability {
        /// The node.
        node: NodeId,
        /// What it is now.
        availability: Availability,
    },
    /// A new token.
    CreateToken(Token),
    /// A token ends.
    RevokeToken(TokenId),

    // disks
    /// A disk is given to the pool; its node prepares it.
    AddDisk {
        /// Its new id.
        disk: DiskId,
        /// The node that it is in.
        node: NodeId,
        /// Device or directory.
        path: String,
        /// What may be destroyed.
        wipe: WipePolicy,
        /// What its key is made with, if it is to be encrypted.
        key_salt: Option<KeySalt>,
    },
    /// Its node has prepared it.
    DiskReady {
        /// The disk.
        disk: DiskId,
        /// Directory of the store.
        store: String,
        /// Capacity.
        capacity_bytes: u64,
    },
    /// Its node could not prepare it: it is forgotten again and its task fails.
    AbortDisk {
        /// The disk.
        disk: DiskId,
        /// Why.
        error: TaskError,
    },
    /// A disk broke, or works again (no reason).
    SetDiskHealth {
        /// The disk.
        disk: DiskId,
        /// What is wrong.
        failed: Option<String>,
    },

    // volumes
    /// A volume of its own.
    CreateVolume {
        /// What to create.
        volume: NewVolume,
        /// The node for the first copies.
        near: Option<NodeId>,
        /// Nodes that cannot take copies now.
        unreachable: Vec<NodeId>,
    },
    /// Removes a volume that nobody uses.
    DeleteVolume(VolumeId),
    /// A node removed the data of deleted volumes from these disks.
    VolumePurged {
        /// The deleted volume.
        volume: VolumeId,
        /// The disks that no longer hold anything of it.
        disks: Vec<DiskId>,
    },
    /// Opens a volume on a node: raises the generation and drops unreachable members in the same step.
    OpenVolume {
        /// The volume.
        volume: VolumeId,
        /// Its coordinator from now on.
        node: NodeId,
        /// The generation that the proposer saw: the command is good once.
        expected: Generation,
        /// Nodes whose leases have ended: their replicas are dropped, and they may be replaced as coordinators.
        unreachable: Vec<NodeId>,
    },
    /// The coordinator is about to serve: from now on the replicas may differ after a crash.
    VolumeOpened {
        /// The volume.
        volume: VolumeId,
        /// The coordinator's generation.
        generation: Generation,
    },
    /// The coordinator is done with it.
    CloseVolume {
        /// The volume.
        volume: VolumeId,
        /// The coordinator's generation.
        generation: Generation,
        /// Whether all replicas are identical and durable.
        cleanliness: Cleanliness,
    },
    /// A disk leaves the in-sync set of every segment.
    ReplicasOut {
        /// The volume.
        volume: VolumeId,
        /// The coordinator's generation.
        generation: Generation,
        /// The disk.
        disk: DiskId,
        /// Why.
        reason: String,
    },
    /// A resynced copy returns to the in-sync set of a segment.
    ReplicaIn {
        /// The volume.
        volume: VolumeId,
        /// The coordinator's generation.
        generation: Generation,
        /// The segment.
        segment: SegmentIndex,
        /// The disk.
        disk: DiskId,
        /// [`Volume::departures`](super::model::Volume::departures) when the coordinator asked: a proposal that was
        /// delayed must not undo a later departure.
        departures: u64,
    },
    /// A complete copy that was to leave its set does so: the coordinator knows that the others have everything.
    ReplicaLeft {
        /// The volume.
        volume: VolumeId,
        /// The coordinator's generation.
        generation: Generation,
        /// The segment.
        segment: SegmentIndex,
        /// The disk.
        disk: DiskId,
    },
    /// The coordinator has put the starting content into a volume.
    VolumeFilled {
        /// The volume.
        volume: VolumeId,
        /// The coordinator's generation.
        generation: Generation,
    },

    // images
    /// Declares an image and its parts.
    CreateImage {
        /// Its id.
        image: ImageId,
        /// Its name.
        name: String,
        /// Kernel command line.
        cmdline: String,
        /// The parts that will come.
        parts: Vec<ImagePart>,
    },
    /// A node has a verified upload of a part and takes it in. A disk gets its volume, open on that node.
    BeginImagePart {
        /// The image.
        image: ImageId,
        /// The part.
        part: ImagePart,
        /// The node that has it.
        node: NodeId,
        /// The volume to create, for a disk.
        volume: Option<NewVolume>,
        /// The file, for a kernel or initramfs.
        file: Option<BootFile>,
        /// Nodes that cannot take copies now.
        unreachable: Vec<NodeId>,
    },
    /// The part is in.
    CompleteImagePart {
        /// The image.
        image: ImageId,
        /// The part.
        part: ImagePart,
        /// The node that took it in.
        node: NodeId,
    },
    /// The part will not come in: all that was made for it is removed and its task fails.
    FailImagePart {
        /// The image.
        image: ImageId,
        /// The part.
        part: ImagePart,
        /// The node that had it.
        node: NodeId,
        /// Why.
        error: TaskError,
    },
    /// Removes an image that no VM uses.
    DeleteImage(ImageId),

    // networks
    /// A new overlay network.
    CreateNetwork {
        /// Its id.
        network: NetworkId,
        /// Its name.
        name: String,
        /// Its addresses.
        subnet: Ipv4Net,
        /// Its gateway; the first address when none.
        gateway: Option<Ipv4Addr>,
        /// MTU of its guests.
        mtu: u16,
        /// Name servers.
        dns: Vec<Ipv4Addr>,
        /// Domain.
        domain: String,
    },
    /// Removes a network without ports.
    DeleteNetwork(NetworkId),

    // VMs
    /// A new VM with its disks and NICs.
    CreateVm {
        /// What to create.
        vm: NewVm,
        /// Nodes that cannot take copies now.
        unreachable: Vec<NodeId>,
    },
    /// Changes what a VM is made of, from its next run on, or what becomes of it.
    SetVm {
        /// The VM.
        vm: VmId,
        /// What changes.
        change: VmChange,
    },
    /// Starts or stops a VM.
    SetVmDesired {
        /// The VM.
        vm: VmId,
        /// What is wanted.
        desired: DesiredRun,
    },
    /// Ends the present run of a VM and starts another.
    RestartVm(VmId),
    /// Removes a stopped VM with its disks and NICs.
    DeleteVm(VmId),
    /// Gives a VM to a node: a new run epoch; its volumes are opened there in the same step.
    AssignVm {
        /// The VM.
        vm: VmId,
        /// The node.
        node: NodeId,
        /// The run epoch that the proposer saw: the command is good once.
        expected: RunEpoch,
        /// Why.
        reason: AssignReason,
        /// Nodes whose leases have ended.
        unreachable: Vec<NodeId>,
    },
    /// A run of a VM has ended for good.
    VmExited {
        /// The VM.
        vm: VmId,
        /// Which run.
        epoch: RunEpoch,
        /// How.
        exit: VmExit,
    },
    /// Holds the processors of a VM's present run.
    PauseVm(VmId),
    /// Lets a paused VM run on, or has a suspended one go on where it was.
    ResumeVm(VmId),
    /// Has the present run of a VM written to a new volume, and ended.
    SuspendVm {
        /// The VM.
        vm: VmId,
        /// The volume; it is opened on the VM's node in the same step.
        volume: NewVolume,
        /// Nodes that cannot take copies now.
        unreachable: Vec<NodeId>,
    },
    /// A run is written, durably: from now on it is only to go on from there.
    VmSuspended {
        /// The VM.
        vm: VmId,
        /// Which run.
        epoch: RunEpoch,
        /// The volume's generation under which it was written.
        generation: Generation,
        /// How much of the volume it takes.
        bytes: u64,
        /// The processor that it ran on.
        processor: Processor,
    },
    /// A run was not written: it goes on, and the task fails.
    SuspensionFailed {
        /// The VM.
        vm: VmId,
        /// Which run.
        epoch: RunEpoch,
        /// Why.
        error: TaskError,
    },
    /// A run was made from what was saved and is about to begin: what was saved is forgotten.
    SuspensionUsed {
        /// The VM.
        vm: VmId,
        /// The run that begins.
        epoch: RunEpoch,
    },
    /// Gives up what a suspended VM would go on with.
    DiscardSuspension {
        /// The VM.
        vm: VmId,
        /// Whether it is started anew, or stays off.
        desired: DesiredRun,
    },
    /// Has the present run of a VM moved to another node while its guest runs.
    MigrateVm {
        /// The VM.
        vm: VmId,
        /// Where to.
        to: NodeId,
        /// How.
        terms: MigrationTerms,
    },
    /// The run on the other node has everything and is about to go on: VM, volumes and ports are there from now on.
    VmArrived {
        /// The VM.
        vm: VmId,
        /// The run that has arrived.
        epoch: RunEpoch,
    },
    /// A migration has come to nothing: the VM goes on where it is.
    MigrationFailed {
        /// The VM.
        vm: VmId,
        /// The run that would have arrived.
        epoch: RunEpoch,
        /// Why.
        error: TaskError,
    },
    /// Gives a migration up, because somebody wants it.
    CancelMigration(VmId),
    /// Has the present run of a VM go on in a new process of its node.
    RenewVm(VmId),
    /// It does, or goes on in the one that it was in.
    RenewalEnded {
        /// The VM.
        vm: VmId,
        /// The run.
        epoch: RunEpoch,
        /// Why it did not work, if it did not.
        error: Option<TaskError>,
    },
    /// The firmware of a running VM has stored something.
    StoreVariables {
        /// The VM.
        vm: VmId,
        /// Which run.
        epoch: RunEpoch,
        /// All that it keeps now.
        variables: FirmwareVariables,
    },

    // tasks
    /// How far a task is.
    UpdateTask {
        /// The task.
        task: TaskId,
        /// 0 to 1000.
        permille: u16,
        /// What it is doing or waiting for.
        message: String,
    },
    /// A task has ended.
    FinishTask {
        /// The task.
        task: TaskId,
        /// Why it failed.
        error: Option<TaskError>,
    },
    /// Something worth knowing happened that is no change by itself.
    Note {
        /// How much it matters.
        severity: Severity,
        /// What, as one word.
        kind: String,
        /// What it is about.
        subject: Subject,
        /// The sentence for people.
        message: String,
    },

    // replica sets
    /// A segment gets another copy: out of sync, to be filled by its volume's coordinator.
    AddReplica {
        /// The volume.
        volume: VolumeId,
        /// The segment.
        segment: SegmentIndex,
        /// Where the copy goes.
        disk: DiskId,
        /// The copy that leaves once this one is complete.
        replaces: Option<DiskId>,
    },
    /// A copy leaves its set, if enough others are complete; its data are removed later. A complete copy of an open volume is only
    /// marked: it leaves when the coordinator says so ([`Self::ReplicaLeft`]).
    RemoveReplica {
        /// The volume.
        volume: VolumeId,
        /// The segment.
        segment: SegmentIndex,
        /// Where the copy is.
        disk: DiskId,
    },
    /// The coordinator no longer uses copies that have left their sets.
    ReplicasReleased {
        /// The volume.
        volume: VolumeId,
        /// The coordinator's generation.
        generation: Generation,
        /// Where the copies were.
        disk: DiskId,
        /// Of which segments.
        segments: Vec<SegmentIndex>,
    },
    /// A node removed the data of copies that have left their sets.
    ReplicasPurged {
        /// The volume.
        volume: VolumeId,
        /// Where the copies were.
        disk: DiskId,
        /// Of which segments.
        segments: Vec<SegmentIndex>,
        /// In which layers.
        layers: Vec<LayerRef>,
    },

    // the pool, its disks and nodes
    /// Changes what holds for the pool as a whole.
    SetPoolPolicy(PoolPolicy),
    /// A disk is emptied and leaves the pool, is declared dead, or is in service again.
    SetDiskService {
        /// The disk.
        disk: DiskId,
        /// What it is meant to do.
        service: DiskService,
    },
    /// What a disk holds is verified now.
    ScrubDisk(DiskId),
    /// The leader saw that a scrub ended, or that blocks are damaged or repaired.
    NoteVerified {
        /// The disk.
        disk: DiskId,
        /// How it stands.
        verified: Verified,
    },
    /// The leader saw that a disk reached the reserve, or has room again.
    SetDiskRoom {
        /// The disk.
        disk: DiskId,
        /// Whether new replicas may be put on it.
        room: DiskRoom,
    },
    /// A disk that is to leave the pool and that nothing refers to any more is forgotten.
    RemoveDisk(DiskId),
    /// Says which failure domain a node is in.
    SetNodeRack {
        /// The node.
        node: NodeId,
        /// The rack; none takes the label away.
        rack: Option<String>,
    },
    /// A node is emptied for maintenance or for good, or is in service again.
    SetNodeService {
        /// The node.
        node: NodeId,
        /// What it is meant to do.
        service: NodeService,
    },
    /// A node that is to leave the cluster and carries nothing any more is forgotten.
    RemoveNode(NodeId),

    // volumes that change
    /// Changes what a volume is meant to be.
    SetVolume {
        /// The volume.
        volume: VolumeId,
        /// What changes.
        change: VolumeChange,
        /// Nodes that cannot take copies now.
        unreachable: Vec<NodeId>,
    },
    /// Makes a volume larger.
    GrowVolume {
        /// The volume.
        volume: VolumeId,
        /// Its new size.
        size_bytes: u64,
        /// Nodes that cannot take copies now.
        unreachable: Vec<NodeId>,
    },
    /// Kills the present run of a VM and starts another.
    ResetVm(VmId),

    // snapshots
    /// Takes snapshots of volumes, all at one point in time.
    TakeSnapshot {
        /// The new freeze.
        freeze: FreezeId,
        /// What the snapshots are called.
        name: String,
        /// The volumes, each with the id of its snapshot.
        volumes: BTreeMap<VolumeId, SnapshotId>,
    },
    /// How far a coordinator is with a freeze.
    FreezeProgress {
        /// The volume.
        volume: VolumeId,
        /// The coordinator's generation.
        generation: Generation,
        /// The freeze.
        freeze: FreezeId,
        /// How far it is.
        step: FreezeStep,
    },
    /// Gives a freeze up that takes too long.
    AbandonFreeze(FreezeId),
    /// Forgets a snapshot; what only it needs is removed.
    DeleteSnapshot {
        /// The volume.
        volume: VolumeId,
        /// The snapshot.
        snapshot: SnapshotId,
    },
    /// Puts a volume that nobody has open back to a snapshot.
    RestoreSnapshot {
        /// The volume.
        volume: VolumeId,
        /// The snapshot.
        snapshot: SnapshotId,
    },
    /// Makes a new volume with the content of a snapshot, without copying.
    CloneVolume {
        /// The new volume.
        volume: VolumeId,
        /// Its name.
        name: String,
        /// The volume that the snapshot is of.
        source: VolumeId,
        /// The snapshot.
        snapshot: SnapshotId,
    },
    /// A layer is durably in the one above it, on all complete copies.
    LayerMerged {
        /// The volume.
        volume: VolumeId,
        /// The coordinator's generation.
        generation: Generation,
        /// The layer.
        layer: LayerRef,
    },
    /// The coordinator no longer uses a layer that nothing refers to.
    LayerReleased {
        /// The volume that had it last.
        volume: VolumeId,
        /// The coordinator's generation.
        generation: Generation,
        /// The layer.
        layer: LayerRef,
    },
    /// A node removed the data of a layer that nothing refers to.
    LayerPurged {
        /// The layer.
        layer: LayerRef,
        /// The disk.
        disk: DiskId,
    },
    /// A node gets a part of an image by itself.
    FetchImagePart {
        /// The image.
        image: ImageId,
        /// The part.
        part: ImagePart,
        /// The node.
        node: NodeId,
        /// From where.
        source: ImageSource,
    },

    // exports
    /// A node is to read out a volume that nobody uses, or a snapshot of any volume.
    BeginExport {
        /// Its id.
        export: ExportId,
        /// The volume.
        volume: VolumeId,
        /// The snapshot, and the id of the clone to be made of it for the export.
        snapshot: Option<(SnapshotId, VolumeId)>,
        /// The node.
        node: NodeId,
    },
    /// It has been read, or will not be.
    EndExport(ExportId),

    // devices of VMs that come and go
    /// A VM gets a disk, also while it runs.
    AttachDisk {
        /// The VM.
        vm: VmId,
        /// The disk.
        disk: GivenDisk,
        /// Nodes whose leases have ended.
        unreachable: Vec<NodeId>,
    },
    /// A VM gets a NIC, also while it runs.
    AttachNic {
        /// The VM.
        vm: VmId,
        /// The NIC.
        port: NewPort,
    },
    /// A VM loses a disk or a NIC; while it runs, when its guest has let go of it.
    DetachDevice {
        /// The VM.
        vm: VmId,
        /// Which.
        device: VmDevice,
        /// What becomes of a disk's volume.
        then: AfterDetach,
    },
    /// A device that was to come is in the machine of this run.
    DeviceJoined {
        /// The VM.
        vm: VmId,
        /// Which run.
        epoch: RunEpoch,
        /// Which device.
        device: VmDevice,
    },
    /// The guest has let go of a device that was to go, and the machine of this run has it no more.
    DeviceLeft {
        /// The VM.
        vm: VmId,
        /// Which run.
        epoch: RunEpoch,
        /// Which device.
        device: VmDevice,
    },
    /// The machine of a run has the processors and the memory that it was to get.
    VmReshaped {
        /// The VM.
        vm: VmId,
        /// Which run.
        epoch: RunEpoch,
        /// Which shape.
        shape: Shape,
    },
}

/// What a command that was accepted answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Outcome {
    /// It is done, or was done before.
    Done,
    /// The task that stands for it.
    Task(TaskId),
    /// The volume as it stands now.
    Volume(Box<Volume>),
}

/// Kind of a refusal: what callers act on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum RefusalKind {
    /// There is no such thing.
    NotFound,
    /// The request makes no sense.
    Invalid,
    /// The name or address is taken.
    Taken,
    /// Somebody uses it, or somebody was faster.
    Conflict,
    /// There is too little of something: nodes, disks, space, addresses.
    Capacity,
    /// The caller's generation is not current.
    Fenced,
    /// It would lose the last complete copy, or there is none in reach.
    Unsafe,
    /// The token is not good (any more).
    Token,
}

/// Why a command changed nothing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{detail}")]
pub struct Refusal {
    /// What callers act on.
    pub kind: RefusalKind,
    /// The sentence for people.
    pub detail: String,
    /// What to do next.
    pub next: String,
}

impl Refusal {
    /// A refusal.
    pub fn new(kind: RefusalKind, detail: impl Into<String>, next: impl Into<String>) -> Self {
        Self { kind, detail: detail.into(), next: next.into() }
    }
}

/// What applying a command answers.
pub type CommandResult = Result<Outcome, Refusal>;
