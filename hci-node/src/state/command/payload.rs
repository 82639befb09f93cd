//! What commands carry: things that are to be created, and changes.

use serde::{Deserialize, Serialize};
use vmm::CpuModel;

use super::super::{ids::*, model::*};

/// A node that is about to become a member.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NewNode {
    /// Its id.
    pub id: NodeId,
    /// Its name.
    pub name: String,
    /// Where it is reached.
    pub addresses: NodeAddresses,
    /// Its public key.
    pub public_key_pem: String,
    /// The certificate it is given.
    pub certificate_pem: String,
}

/// A volume that is to be created.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NewVolume {
    /// Its id.
    pub id: VolumeId,
    /// Its name.
    pub name: String,
    /// Its size; rounded up to whole blocks.
    pub size_bytes: u64,
    /// How many copies.
    pub replicas: u8,
    /// Fewer in-sync copies than this make writes wait; the usual one when none.
    pub min_in_sync: Option<u8>,
    /// When a write counts as complete.
    pub durability: Durability,
    /// Whether what is written is compressed.
    pub compression: Compression,
}

/// What is to change about a volume; none stays as it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeChange {
    /// How many copies.
    pub replicas: Option<u8>,
    /// Fewer in-sync copies than this make writes wait.
    pub min_in_sync: Option<u8>,
    /// When a write counts as complete.
    pub durability: Option<Durability>,
    /// Whether what is written from then on is compressed.
    pub compression: Option<Compression>,
    /// What it may take of the pool's speed.
    pub limits: Option<VolumeLimits>,
}

/// A NIC that is to be created; its addresses are allocated while applying.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NewPort {
    /// Its id.
    pub id: PortId,
    /// The network that it is on.
    pub network: NetworkId,
}

/// A VM that is to be created.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NewVm {
    /// Its id.
    pub id: VmId,
    /// Its name.
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
    /// Its disks. The first one gets the contents of the image's disk, when the image has one.
    pub disks: Vec<NewVolume>,
    /// Its NICs.
    pub ports: Vec<NewPort>,
    /// The node that it should run on.
    pub preferred_node: Option<NodeId>,
    /// Where the first copies of its disks go: the node that the scheduler has in mind.
    pub near: Option<NodeId>,
    /// Whether it is started at once.
    pub desired: DesiredRun,
    /// What becomes of it after a crash.
    pub after_crash: AfterCrash,
    /// What its guest's cloud-init is told, if anything.
    pub cloud_init: Option<CloudInit>,
    /// What its runs can grow to.
    pub growth: Growth,
}

/// What is to change of a VM; the rest stays.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmChange {
    /// Number of virtual CPUs.
    pub vcpus: Option<u8>,
    /// What these show the guest.
    pub cpu_model: Option<CpuModel>,
    /// Memory.
    pub memory_bytes: Option<u64>,
    /// What becomes of it after a crash.
    pub after_crash: Option<AfterCrash>,
    /// What its next run can grow to.
    pub growth: Growth,
}

/// Why a VM is assigned.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum AssignReason {
    /// Somebody asked for it.
    Start,
    /// Its node was lost.
    Failover,
    /// Its process died.
    Crash,
}

/// A disk that a VM gets.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum GivenDisk {
    /// A volume that is there and that nobody has.
    Volume(VolumeId),
    /// A new one.
    New(NewVolume),
}
