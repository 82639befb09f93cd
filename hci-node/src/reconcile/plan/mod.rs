//! The planner: from the cluster state and what is observed on this node to what has to be done. Pure.
//!
//! It is called again and again and must be idempotent: what is done is not planned again, what was lost in a crash
//! is. It therefore looks only at facts (the state, the data process' answer, the VMs' directories), never at what was
//! planned before.
//!
//! | module | it plans |
//! |---|---|
//! | [`data`] | the data process' configuration; opening, filling, closing and removing volumes; disks |
//! | [`vms`] | starting, stopping and reporting VMs |
//! | [`boot_files`] | kernels and initramfs that this node should hold |
//! | [`convert`] | from the state's types to those of the libraries |

pub mod boot_files;
pub mod convert;
pub mod data;
pub mod vms;

#[cfg(test)]
mod tests;

use std::path::PathBuf;

use storage::KeySalt;
use vmm::{DeviceConfig, VmConfig};

use super::observed::{Observed, Standing, Vcpus};
use crate::{
    data::protocol::{DataConfig, NodeSecret},
    paths::NodePaths,
    state::{
        BootFile, Cleanliness, CloudInit, ClusterState, DiskId, FirmwareVariables, Generation, ImageId,
        ImagePart, LayerRef, Migration, NodeId, RunEpoch, SegmentIndex, Shape, TaskId, VmDevice, VmExit,
        VmId, VolumeId, WipePolicy, report::VmReport,
    },
    vmm_role::record::{Begin, Ended},
};

/// What a node has to do.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Plan {
    /// What the data process should be configured for; none when its configuration is to stay as it is.
    pub data: Option<DataConfig>,
    /// What else.
    pub actions: Vec<Action>,
    /// What the VMs here do, for the leader.
    pub vms: Vec<VmReport>,
}

/// One thing to do. Each can be repeated.
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    /// Raise a volume's generation so that this data process may serve it.
    OpenVolume {
        /// The volume.
        volume: VolumeId,
        /// The generation that is to be raised.
        expected: Generation,
        /// Nodes whose leases have ended.
        unreachable: Vec<NodeId>,
    },
    /// Tell the cluster that this node is done with a volume.
    CloseVolume {
        /// The volume.
        volume: VolumeId,
        /// The generation that was open.
        generation: Generation,
        /// What is known about its replicas.
        cleanliness: Cleanliness,
    },
    /// Copy an image's disk into a new volume.
    FillVolume {
        /// The new volume.
        volume: VolumeId,
        /// Its generation.
        generation: Generation,
        /// The image's disk.
        source: VolumeId,
        /// How much.
        size_bytes: u64,
    },
    /// Remove what this node holds of a deleted volume.
    PurgeVolume {
        /// The volume.
        volume: VolumeId,
        /// Disks of this node that hold something of it.
        disks: Vec<DiskId>,
    },
    /// Tell the cluster that the coordinator here no longer uses copies that have left their sets.
    ReleaseReplicas {
        /// The volume.
        volume: VolumeId,
        /// The coordinator's generation.
        generation: Generation,
        /// Where the copies were.
        disk: DiskId,
        /// Of which segments.
        segments: Vec<SegmentIndex>,
    },
    /// Remove what a disk of this node holds of copies that have left their sets.
    PurgeReplicas {
        /// The volume.
        volume: VolumeId,
        /// The disk.
        disk: DiskId,
        /// Of which segments.
        segments: Vec<SegmentIndex>,
        /// In which layers.
        layers: Vec<LayerRef>,
        /// What of that nobody else needs there.
        parts: Vec<(LayerRef, SegmentIndex)>,
    },
    /// Tell the cluster that the coordinator here no longer uses a layer that nothing refers to.
    ReleaseLayer {
        /// The volume.
        volume: VolumeId,
        /// The coordinator's generation.
        generation: Generation,
        /// The layer.
        layer: LayerRef,
    },
    /// Remove what a disk of this node holds of a layer that nothing refers to.
    PurgeLayer {
        /// The layer.
        layer: LayerRef,
        /// The disk.
        disk: DiskId,
        /// How many segments it may have.
        segments: u32,
    },
    /// Prepare a disk for the pool.
    PrepareDisk {
        /// The disk.
        disk: DiskId,
        /// Device or directory.
        path: PathBuf,
        /// What may be destroyed.
        wipe: WipePolicy,
        /// What its key is made with, if it is to be encrypted.
        key_salt: Option<KeySalt>,
        /// Whether the node's secret is in use already.
        secret: NodeSecret,
    },
    /// Tell the cluster that a disk broke or works again.
    ReportDisk {
        /// The disk.
        disk: DiskId,
        /// What is wrong.
        failed: Option<String>,
    },
    /// Get a kernel or initramfs from a node that has it.
    FetchBootFile {
        /// Which.
        file: BootFile,
        /// Who may have it, the likeliest first.
        from: Vec<NodeId>,
    },
    /// Remove a kernel or initramfs that no image has any more.
    RemoveBootFile {
        /// Which.
        file: crate::state::ContentHash,
    },
    /// See whether a kernel or initramfs that was uploaded here is on the other nodes, and tell the cluster when it is.
    SpreadBootFile {
        /// The image.
        image: ImageId,
        /// The part.
        part: ImagePart,
        /// The file.
        file: BootFile,
        /// The nodes that should have it.
        to: Vec<NodeId>,
    },
    /// Start a VMM.
    StartVm {
        /// The VM.
        vm: VmId,
        /// Which run.
        epoch: RunEpoch,
        /// What it is made of.
        config: Box<VmConfig>,
        /// What its seed disk is made from.
        cloud_init: Option<CloudInit>,
        /// What its firmware keeps, if it has run before.
        firmware: Option<FirmwareVariables>,
        /// What it begins with.
        begin: Begin,
    },
    /// Hold a VM's processors, or let them run.
    SetVcpus {
        /// The VM.
        vm: VmId,
        /// Which run.
        epoch: RunEpoch,
        /// Which of both.
        to: Vcpus,
    },
    /// Write a run to its volume, and tell the cluster when it is there, or that it will not be.
    SaveVm {
        /// The VM.
        vm: VmId,
        /// Which run.
        epoch: RunEpoch,
        /// The volume.
        volume: VolumeId,
        /// Its generation.
        generation: Generation,
        /// Bytes of the run's memory.
        memory_bytes: u64,
        /// The task that is told how far it is.
        task: Option<TaskId>,
    },
    /// Bring a run the state that it goes on with, tell the cluster that it is used up, and let the run begin.
    RestoreVm {
        /// The VM.
        vm: VmId,
        /// Which run.
        epoch: RunEpoch,
        /// The volume.
        volume: VolumeId,
        /// How much of it.
        bytes: u64,
    },
    /// Bring a run to another node, and tell the cluster if it did not get there.
    MigrateVm {
        /// The VM.
        vm: VmId,
        /// Which run, and where to.
        migration: Migration,
    },
    /// Have a run go on in a new process, and tell the cluster whether it does.
    RenewVm {
        /// The VM.
        vm: VmId,
        /// Which run.
        epoch: RunEpoch,
        /// What it is made of.
        config: Box<VmConfig>,
        /// Whether its processors run from then on.
        vcpus: Vcpus,
    },
    /// Bring a run's machine to what it is to have, and tell the cluster of each thing that is done.
    AdaptVm {
        /// The VM.
        vm: VmId,
        /// Which run.
        epoch: RunEpoch,
        /// Devices that it is to get.
        join: Vec<(VmDevice, DeviceConfig)>,
        /// Devices that its guest is to let go of, and what its VMM calls them.
        leave: Vec<(VmDevice, String)>,
        /// How large it is to be.
        shape: Option<Shape>,
    },
    /// Press a VM's power button.
    PressPowerButton {
        /// The VM.
        vm: VmId,
        /// Which run.
        epoch: RunEpoch,
    },
    /// Kill a VMM.
    KillVm {
        /// The VM.
        vm: VmId,
        /// Which run.
        epoch: RunEpoch,
        /// Why: [`Ended::Killed`] or [`Ended::LeaseLapsed`].
        why: Ended,
    },
    /// Tell the cluster how a run ended.
    ReportExit {
        /// The VM.
        vm: VmId,
        /// Which run.
        epoch: RunEpoch,
        /// How.
        exit: VmExit,
    },
    /// Remove the records of a run that the cluster has done with.
    ForgetRun {
        /// The VM.
        vm: VmId,
        /// Which run.
        epoch: RunEpoch,
    },
}

/// What an action is about. Two actions with the same key are never under way at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum ActionKey {
    /// A volume being opened or closed.
    Volume(VolumeId),
    /// A volume being filled.
    Fill(VolumeId),
    /// A volume being removed.
    Purge(VolumeId),
    /// Copies of a volume on a disk being let go.
    Release(VolumeId, DiskId),
    /// Copies of a volume being removed from a disk.
    PurgeReplicas(VolumeId, DiskId),
    /// A layer being let go or removed from a disk; none while it is let go.
    Layer(LayerRef, Option<DiskId>),
    /// A disk.
    Disk(DiskId),
    /// A boot file.
    BootFile(crate::state::ContentHash),
    /// The spreading of an image's part.
    Spread(ImageId, ImagePart),
    /// A VM's process.
    Vm(VmId),
    /// What a VM's machine has, which a guest may keep waiting for ever.
    Machine(VmId),
    /// The end of a VM's process by force, which waits for nothing else about it.
    Kill(VmId),
}

impl Action {
    /// What it is about.
    pub fn key(&self) -> ActionKey {
        match self {
            Self::OpenVolume { volume, .. } | Self::CloseVolume { volume, .. } => ActionKey::Volume(*volume),
            Self::FillVolume { volume, .. } => ActionKey::Fill(*volume),
            Self::PurgeVolume { volume, .. } => ActionKey::Purge(*volume),
            Self::ReleaseReplicas { volume, disk, .. } => ActionKey::Release(*volume, *disk),
            Self::PurgeReplicas { volume, disk, .. } => ActionKey::PurgeReplicas(*volume, *disk),
            Self::ReleaseLayer { layer, .. } => ActionKey::Layer(*layer, None),
            Self::PurgeLayer { layer, disk, .. } => ActionKey::Layer(*layer, Some(*disk)),
            Self::PrepareDisk { disk, .. } | Self::ReportDisk { disk, .. } => ActionKey::Disk(*disk),
            Self::FetchBootFile { file, .. } => ActionKey::BootFile(file.hash),
            Self::RemoveBootFile { file } => ActionKey::BootFile(*file),
            Self::SpreadBootFile { image, part, .. } => ActionKey::Spread(*image, *part),
            Self::KillVm { vm, .. } => ActionKey::Kill(*vm),
            Self::AdaptVm { vm, .. } => ActionKey::Machine(*vm),
            Self::StartVm { vm, .. }
            | Self::SetVcpus { vm, .. }
            | Self::SaveVm { vm, .. }
            | Self::RestoreVm { vm, .. }
            | Self::MigrateVm { vm, .. }
            | Self::RenewVm { vm, .. }
            | Self::PressPowerButton { vm, .. }
            | Self::ReportExit { vm, .. }
            | Self::ForgetRun { vm, .. } => ActionKey::Vm(*vm),
        }
    }
}

/// What the planner looks at.
#[derive(Clone, Copy)]
pub struct View<'a> {
    /// This node.
    pub me: NodeId,
    /// Its paths.
    pub paths: &'a NodePaths,
    /// The replicated state.
    pub state: &'a ClusterState,
    /// What is seen here.
    pub observed: &'a Observed,
}

/// Plans.
pub fn plan(view: View<'_>) -> Plan {
    match view.observed.standing {
        Standing::Lapsed => {
            Plan { data: None, actions: vms::kill_all(view.observed), vms: vms::reports(view) }
        }
        // The state may be older than what was decided about this node's VMs and volumes: nothing is begun.
        Standing::CatchingUp | Standing::Unknown => {
            Plan { data: None, actions: Vec::new(), vms: vms::reports(view) }
        }
        Standing::Leased => {
            let mut actions = Vec::new();
            let data = data::plan(view, &mut actions);
            vms::plan(view, &mut actions);
            boot_files::plan(view, &mut actions);
            Plan { data, actions, vms: vms::reports(view) }
        }
    }
}

/// Nodes whose leases have ended, as the leader decided.
pub(super) fn lost_nodes(state: &ClusterState) -> Vec<NodeId> {
    use crate::state::Availability;
    let lost = state.nodes.values().filter(|node| matches!(node.availability, Availability::Lost { .. }));
    lost.map(|node| node.id).collect()
}
