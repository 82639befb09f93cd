//! Observed state: what nodes see, as they tell the leader with every renewal of their lease.
//!
//! It is never replicated; the leader keeps the latest report of each node in memory.

use std::{collections::BTreeSet, net::IpAddr};

use serde::{Deserialize, Serialize};
use vmm::{CpuModel, Processor};

use super::ids::*;
use crate::data::disks::smart::Smart;

/// All that a node tells.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeReport {
    /// The machine.
    pub machine: MachineReport,
    /// What its data process and VMMs do.
    pub local: LocalReport,
    /// Boot files that it holds.
    pub boot_files: Vec<ContentHash>,
}

/// What the reconciler of a node sees: filled in beside the data process and the VMMs.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LocalReport {
    /// Its disks of the pool.
    pub disks: Vec<DiskReport>,
    /// The volumes that it coordinates.
    pub volumes: Vec<VolumeReport>,
    /// The VMs that run on it, or ended on it.
    pub vms: Vec<VmReport>,
    /// Whether the data process answers.
    pub data_process: ProcessState,
}

/// Whether a process is there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum ProcessState {
    /// It is not.
    #[default]
    Away,
    /// It answers.
    Up,
}

/// The machine of a node.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineReport {
    /// Version of the executable.
    pub version: String,
    /// Memory in all.
    pub memory_bytes: u64,
    /// Memory that could be used now.
    pub memory_available_bytes: u64,
    /// CPUs.
    pub cpus: u16,
    /// What its processors can show guests; nothing when it has no KVM.
    pub cpu_models: BTreeSet<CpuModel>,
    /// What they are; none when it has no KVM.
    pub processor: Option<Processor>,
    /// Since when it runs.
    pub booted: Timestamp,
    /// Disks that could be given to the pool.
    pub candidates: Vec<CandidateDisk>,
}

/// A local disk that is not in the pool.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CandidateDisk {
    /// Its device.
    pub path: String,
    /// Its size.
    pub size_bytes: u64,
    /// Model and serial number, as far as known.
    pub model: String,
    /// What is on it, when it is not blank: it needs `--wipe` then.
    pub holds: Option<String>,
}

/// How a disk of the pool is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskReport {
    /// The disk.
    pub disk: DiskId,
    /// Capacity.
    pub capacity_bytes: u64,
    /// Used.
    pub used_bytes: u64,
    /// How it is.
    pub health: DiskHealth,
    /// How its verification stands.
    pub scrub: ScrubReport,
    /// What it says of itself, if anything.
    pub smart: Option<Smart>,
    /// The volumes of which it holds anything, by id.
    pub volumes: Vec<HeldVolume>,
}

/// What a disk holds of a volume, snapshots included.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HeldVolume {
    /// The volume.
    pub volume: VolumeId,
    /// Bytes that its data would take if none were compressed.
    pub data_bytes: u64,
    /// Bytes that they take.
    pub stored_bytes: u64,
}

/// How the verification of a disk stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ScrubReport {
    /// Whether it is under way.
    pub progress: ScrubProgress,
    /// When the last one ended.
    pub last_end: Option<Timestamp>,
    /// Bytes verified by the present one, or else by the last one.
    pub checked_bytes: u64,
    /// Blocks that the present one, or else the last one, found damaged.
    pub found_blocks: u64,
    /// Blocks known to be damaged and not repaired yet.
    pub damaged_blocks: u64,
    /// Blocks repaired since the disk was opened.
    pub repaired_blocks: u64,
}

/// Whether a disk is being verified.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum ScrubProgress {
    /// It waits for its time.
    #[default]
    Idle,
    /// It is.
    Running,
}

/// How a disk is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum DiskHealth {
    /// Well.
    Ok,
    /// It takes no more writes.
    Full,
    /// It returns errors.
    Failed(String),
}

/// How a coordinated volume is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeReport {
    /// The volume.
    pub volume: VolumeId,
    /// The generation that is open.
    pub generation: Generation,
    /// What its coordinator does.
    pub state: VolumeRunState,
    /// Blocks that out-of-sync replicas still lack.
    pub resync_blocks_left: u64,
}

/// What a coordinator does.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum VolumeRunState {
    /// It announces its generation and makes the replicas equal.
    Opening,
    /// It serves.
    Open,
    /// I/O waits, and for what.
    Waiting(String),
    /// A newer generation exists.
    Fenced,
}

/// How a VM is on its node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmReport {
    /// The VM.
    pub vm: VmId,
    /// Which run.
    pub epoch: RunEpoch,
    /// What it does.
    pub state: VmRunState,
    /// What the agent in its guest says, if there is one that answers.
    pub agent: Option<AgentReport>,
    /// What its process runs.
    pub executable: Executable,
}

/// Which executable a process runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Executable {
    /// The one that its node has.
    #[default]
    Present,
    /// One that was replaced since.
    Older,
}

/// What the agent in a guest says. It is the guest's word.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AgentReport {
    /// Its version.
    pub version: String,
    /// The guest's network interfaces.
    pub interfaces: Vec<GuestInterface>,
}

/// A network interface of a guest, as the guest has set it up.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestInterface {
    /// The guest's name for it.
    pub name: String,
    /// Its Ethernet address, if it has one.
    pub mac: Option<String>,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
}

/// What a run of a VM does.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum VmRunState {
    /// Something it needs is not there yet, and what.
    Waiting(String),
    /// Its vCPUs run.
    Running,
    /// Its vCPUs are held.
    Paused,
    /// It was asked to stop.
    Stopping,
    /// Its process is gone.
    Exited,
}
