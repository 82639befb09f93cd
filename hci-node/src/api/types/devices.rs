//! Resources around what a VM gets and loses while it runs.

use serde::{Deserialize, Serialize};

use crate::state::report::Executable;

/// `POST /v1/vms/NAME/disks`: either `volume` or `size_bytes`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AttachDisk {
    /// A volume that is there and that nobody has, by name or id.
    #[serde(default)]
    pub volume: Option<String>,
    /// The size of a new one.
    #[serde(default)]
    pub size_bytes: Option<u64>,
    /// The new one's name; made from the VM's when none.
    #[serde(default)]
    pub name: Option<String>,
    /// How many copies a new one has.
    #[serde(default)]
    pub replicas: Option<u8>,
}

/// `POST /v1/vms/NAME/disks/VOLUME/detach`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DetachDisk {
    /// Whether the volume is deleted with its data.
    #[serde(default)]
    pub delete: bool,
}

/// `POST /v1/vms/NAME/nics`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AttachNic {
    /// The network, by name or id.
    pub network: String,
}

/// How far a disk or NIC of a VM is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DeviceState {
    /// It is in the machine, or will be when that is made.
    Attached,
    /// The machine that runs is to get it.
    Attaching,
    /// The guest is asked to let go of it.
    Detaching,
}

/// How large the machine of a run is, and can become while it runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Machine {
    /// Its CPUs.
    pub vcpus: u8,
    /// The most that it can get without a restart.
    pub max_vcpus: u8,
    /// Its memory.
    pub memory_bytes: u64,
    /// The most that it can get without a restart.
    pub max_memory_bytes: u64,
    /// What its process runs: the executable that its node has, or one from before an upgrade; none while its node says nothing of it.
    #[serde(default)]
    pub executable: Option<Executable>,
}
