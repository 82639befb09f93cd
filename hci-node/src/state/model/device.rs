//! What of a VM comes and goes while it runs: disks and NICs, each in a slot that it keeps, and the size of its machine.

use serde::{Deserialize, Serialize};

use crate::state::ids::*;

/// A disk or a NIC of a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum VmDevice {
    /// A disk: its volume.
    Disk(VolumeId),
    /// A NIC: its port.
    Nic(PortId),
}

/// Where a device is in the machine, and how far it is on its way in or out.
///
/// The slot is the device's address on the bus of the guest, where the guest finds it again after each start and each move.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DevicePlace {
    /// The slot, unique in its VM.
    pub slot: u8,
    /// How far it is.
    pub stage: DeviceStage,
}

/// How far a device is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum DeviceStage {
    /// The machine has it, or will have it when it is made.
    Present,
    /// The machine that is there is to get it.
    Joining,
    /// The guest is asked to let go of it.
    Leaving(AfterDetach),
}

/// What becomes of the volume of a disk that a VM loses. A NIC's port goes with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum AfterDetach {
    /// It stays, with its data, and nobody has it.
    Keep,
    /// It is deleted with its data.
    Delete,
}

/// How large a machine is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shape {
    /// Number of virtual CPUs.
    pub vcpus: u8,
    /// Memory.
    pub memory_bytes: u64,
}

/// What a machine can grow to while it runs, as far as somebody said so. It cannot be changed while it runs: the guest is told at its boot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Growth {
    /// Number of virtual CPUs.
    pub vcpus: Option<u8>,
    /// Memory.
    pub memory_bytes: Option<u64>,
}

/// Most virtual CPUs of a VM.
pub const MAX_VCPUS: u8 = 128;
/// Most memory of a VM.
pub const MAX_MEMORY_BYTES: u64 = 4 << 40;
/// A machine can grow to so many times what it is, when nothing was said.
const USUAL_GROWTH: u8 = 4;
/// And by this much memory at most: processors with few address bits have no room for more.
const USUAL_MORE_MEMORY: u64 = 64 << 30;

impl Growth {
    /// What a machine of this shape can grow to.
    pub fn most(&self, shape: Shape) -> Shape {
        let vcpus = self.vcpus.unwrap_or_else(|| shape.vcpus.saturating_mul(USUAL_GROWTH).min(MAX_VCPUS));
        let memory = self.memory_bytes.unwrap_or_else(|| {
            let times = shape.memory_bytes.saturating_mul(USUAL_GROWTH.into());
            times.min(shape.memory_bytes.saturating_add(USUAL_MORE_MEMORY)).min(MAX_MEMORY_BYTES)
        });
        let more = memory.saturating_sub(shape.memory_bytes);
        let memory_bytes = shape.memory_bytes + (more - more % vmm::MEMORY_BLOCK);
        Shape { vcpus: vcpus.max(shape.vcpus), memory_bytes }
    }
}
