//! Tasks and events: what was asked for and what happened.

use serde::{Deserialize, Serialize};

use super::{device::VmDevice, image::ImagePart};
use crate::state::ids::*;

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
    /// The processors of that run are held.
    VmIsPaused(VmId, RunEpoch),
    /// The VM is suspended, and its volumes are closed.
    VmIsSuspended(VmId),
    /// The VM has arrived on the node that it was migrated to, and is seen there.
    VmIsMigrated(VmId),
    /// The VM goes on in a new process of its node.
    VmIsRenewed(VmId),
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
    /// The device is in the VM's machine, or is gone from it.
    DeviceSettled(VmId, VmDevice),
    /// The VM's machine is as large as it is to be.
    VmReshaped(VmId),
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
