//! VMs: what they are, whether and where they are meant to run.

use serde::{Deserialize, Serialize};
use vmm::CpuModel;

use super::cloud_init::CloudInit;
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
    /// What its guest's cloud-init is told, if anything.
    pub cloud_init: Option<CloudInit>,
    /// What its firmware keeps from run to run, once it has.
    pub firmware: Option<FirmwareVariables>,
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
