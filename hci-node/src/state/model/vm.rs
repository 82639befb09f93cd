//! VMs: what they are, whether and where they are meant to run.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use vmm::{CpuModel, Processor};

use super::cloud_init::CloudInit;
use super::device::{DevicePlace, DeviceStage, Growth, Shape, VmDevice};
use super::firmware::FirmwareVariables;
use crate::state::ids::*;

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

/// What a run of a VM is made with. It keeps that to its end, whatever is set meanwhile.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Make {
    /// Number of virtual CPUs.
    pub vcpus: u8,
    /// What these show the guest of its node's.
    pub cpu_model: CpuModel,
    /// Memory. While it is to become less, what it was until the guest has given the rest back.
    pub memory_bytes: u64,
    /// The memory that it booted with: it has at least that to its end.
    pub boot_memory_bytes: u64,
    /// What it can grow to while it runs.
    pub most: Shape,
}

impl Make {
    /// What it has now.
    pub fn shape(&self) -> Shape {
        Shape { vcpus: self.vcpus, memory_bytes: self.memory_bytes }
    }
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
    /// What it is made with.
    pub make: Make,
}

/// A run of a VM that is kept in a volume, to be gone on with.
///
/// The volume may be used while no processor of the VM has run since it was written: it is forgotten in the very step in which a run that was
/// made from it may begin.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Suspension {
    /// The volume. It belongs to this suspension and goes with it.
    pub volume: VolumeId,
    /// How far it is.
    pub stage: SuspensionStage,
}

/// How far a suspension is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum SuspensionStage {
    /// The present run is being written, and goes on if that fails.
    Saving {
        /// Which run.
        epoch: RunEpoch,
        /// The task that stands for it.
        task: Option<TaskId>,
    },
    /// All of it is there; that run does not go on.
    Saved(SavedRun),
}

/// A run that was written.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedRun {
    /// Which.
    pub epoch: RunEpoch,
    /// What it was made with.
    pub make: Make,
    /// The processor that it ran on.
    pub processor: Processor,
    /// How much of the volume it takes.
    pub bytes: u64,
    /// Since when.
    pub at: Timestamp,
}

/// A run of a VM that moves to another node while its guest runs.
///
/// Until the run there has arrived, in one step, the present one is the VM; from then on that one is, and the present one never runs again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Migration {
    /// The present run.
    pub from: RunEpoch,
    /// Where it goes.
    pub to: NodeId,
    /// The run that goes on there. The number is taken: no other run has it, whatever becomes of this one.
    pub epoch: RunEpoch,
    /// How it is done.
    pub terms: MigrationTerms,
    /// The task that stands for it.
    pub task: Option<TaskId>,
    /// How far it is.
    pub stage: MigrationStage,
}

/// A run of a VM that goes on in a new process of its node, made from the executable that the node has now.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Renewal {
    /// The run, which stays the same.
    pub epoch: RunEpoch,
}

/// How a migration is done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MigrationTerms {
    /// Bytes that may be sent in a second; none is no limit.
    pub bytes_per_second: Option<u64>,
    /// The longest pause that is taken for a guest that writes fast, in milliseconds; the VMM's own when none.
    pub longest_pause_ms: Option<u32>,
}

/// How far a migration is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum MigrationStage {
    /// The guest runs, and its volumes are open where it is.
    Copying,
    /// It is held, and its node closes its volumes.
    LettingGo,
}

/// What becomes of a VM whose run crashed: its VMM died, its guest panicked, or it did not feed its watchdog. A lost node is no crash.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AfterCrash {
    /// It is started again, after a pause that grows with each crash.
    #[default]
    Restart,
    /// It stays off, as it is, for somebody to look at.
    Stop,
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
    /// What these show the guest of its node's.
    pub cpu_model: CpuModel,
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
    /// What becomes of it when a run ends that neither it nor anybody else meant to end.
    pub after_crash: AfterCrash,
    /// The node that it should run on when that is possible.
    pub preferred_node: Option<NodeId>,
    /// The highest run epoch that was given away: raised at each assignment, and when a migration begins.
    pub epoch: RunEpoch,
    /// Where it runs; none while it is stopped or waits for a node.
    pub assignment: Option<Assignment>,
    /// The run that a restart asked to end: its node stops it, then the VM is assigned again.
    pub restart: Option<Restart>,
    /// How its last run ended.
    pub last_exit: Option<VmExit>,
    /// When it was created.
    pub created: Timestamp,
    /// What its guest's cloud-init is told, if anything.
    pub cloud_init: Option<CloudInit>,
    /// What its firmware keeps from run to run, once it has.
    pub firmware: Option<FirmwareVariables>,
    /// The run whose processors are held.
    pub paused: Option<RunEpoch>,
    /// The run that is being suspended, or is suspended.
    pub suspension: Option<Suspension>,
    /// Its present run's move to another node.
    pub migration: Option<Migration>,
    /// Its present run's move into a new process.
    pub renewal: Option<Renewal>,
    /// Where its disks and NICs are in its machine.
    pub devices: BTreeMap<VmDevice, DevicePlace>,
    /// What its runs can grow to.
    pub growth: Growth,
    /// What its present run is to become.
    pub reshaping: Option<Shape>,
}

impl Vm {
    /// What its next run is made with.
    pub fn make(&self) -> Make {
        let own = || {
            let shape = Shape { vcpus: self.vcpus, memory_bytes: self.memory_bytes };
            Make {
                vcpus: shape.vcpus,
                cpu_model: self.cpu_model,
                memory_bytes: shape.memory_bytes,
                boot_memory_bytes: shape.memory_bytes,
                most: self.growth.most(shape),
            }
        };
        self.saved().map_or_else(own, |saved| saved.make)
    }

    /// Its devices that are on their way in or out, with their slots.
    pub fn devices_under_way(&self) -> impl Iterator<Item = (VmDevice, DevicePlace)> {
        let places = self.devices.iter().map(|(device, place)| (*device, *place));
        places.filter(|(_, place)| place.stage != DeviceStage::Present)
    }

    /// The run that it goes on with next.
    pub fn saved(&self) -> Option<&SavedRun> {
        match &self.suspension.as_ref()?.stage {
            SuspensionStage::Saved(saved) => Some(saved),
            SuspensionStage::Saving { .. } => None,
        }
    }

    /// The present run, if it is being written.
    pub fn saving(&self) -> Option<RunEpoch> {
        match self.suspension.as_ref()?.stage {
            SuspensionStage::Saving { epoch, .. } => Some(epoch),
            SuspensionStage::Saved(_) => None,
        }
    }

    /// Whether that run was written and must not go on.
    pub fn is_written(&self, epoch: RunEpoch) -> bool {
        self.saved().is_some_and(|saved| saved.epoch == epoch)
    }

    /// The present run, if it is made from the saved one and has not begun.
    pub fn restoring(&self) -> Option<Assignment> {
        self.assignment.filter(|run| self.saved().is_some_and(|saved| saved.epoch != run.epoch))
    }

    /// The migration, if this is the run that it would go on with on that node.
    pub fn arriving(&self, node: NodeId) -> Option<Migration> {
        self.migration.filter(|migration| migration.to == node)
    }

    /// Whether it is suspended and nobody has asked for it to go on.
    pub fn is_suspended(&self) -> bool {
        self.saved().is_some() && self.assignment.is_none() && self.desired != DesiredRun::Running
    }
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
