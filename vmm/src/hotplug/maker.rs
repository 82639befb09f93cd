//! Makes the parts of a guest of which more may come while it runs: vCPUs and virtio functions. The same for those that it begins with.

use std::sync::Arc;
use std::time::Duration;

use kvm_bindings::CpuId;
use kvm_ioctls::VmFd;
use parking_lot::Mutex;

use crate::boot::Entry;
use crate::config::DeviceConfig;
use crate::error::{VmError, kvm};
use crate::interrupts::Interrupts;
use crate::memory::Memory;
use crate::pci::{PciDevice, PciRoot};
use crate::transfer::Vcpu;
use crate::vcpu::cpuid::{self, Topology};
use crate::vcpu::registers;
use crate::virtio::device::{ConfigChange, VirtioDevice};
use crate::virtio::pci::{Parts, VirtioPci};
use crate::virtio::vhost_user::blk::Disk;
use crate::virtio::vhost_user::device::{Kind, VhostUser};
use crate::virtio::vhost_user::net::Nic;
use crate::virtio::vhost_user::worker::WorkerHandle;

/// Who sets processors up before the guest's kernel runs on them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum SetUp {
    /// The VMM, which loads that kernel.
    Vmm,
    /// Firmware, from the reset vector on.
    Firmware,
}

/// What parts are made with.
pub(crate) struct Maker {
    pub(crate) vm: Arc<VmFd>,
    pub(crate) memory: Memory,
    pub(crate) interrupts: Arc<Interrupts>,
    /// What KVM can show a guest.
    pub(crate) cpuid: CpuId,
    pub(crate) topology: Topology,
    pub(crate) set_up: SetUp,
}

/// Starts to dial a backend.
pub(crate) fn dial(device: DeviceConfig) -> Result<WorkerHandle, VmError> {
    let (id, socket) = (device.id().to_owned(), device.socket().to_owned());
    let kind: Box<dyn Kind> = match device {
        DeviceConfig::Disk(disk) => Box::new(Disk(disk)),
        DeviceConfig::Nic(nic) => Box::new(Nic(nic)),
    };
    WorkerHandle::spawn(&id, socket, kind)
}

impl Maker {
    /// A virtio device as the function of a slot.
    pub(crate) fn function(
        &self,
        slot: usize,
        device: impl VirtioDevice + 'static,
    ) -> Result<Arc<dyn PciDevice>, VmError> {
        self.telling(slot, device, |_, _| {})
    }

    /// One whose configuration changes: `tell` hands it what it tells its driver by.
    pub(crate) fn telling<D: VirtioDevice + 'static>(
        &self,
        slot: usize,
        device: D,
        tell: impl FnOnce(&D, Arc<ConfigChange>),
    ) -> Result<Arc<dyn PciDevice>, VmError> {
        let parts = self.parts(&device, slot)?;
        tell(&device, parts.change.clone());
        Ok(Arc::new(VirtioPci::new(Box::new(device), parts)?))
    }

    /// A disk or NIC as the function of a slot. Waits for its backend.
    pub(crate) fn vhost_user(
        &self,
        slot: usize,
        worker: WorkerHandle,
        timeout: Duration,
    ) -> Result<Arc<dyn PciDevice>, VmError> {
        self.telling(slot, VhostUser::new(worker, timeout)?, VhostUser::set_change)
    }

    fn parts(&self, device: &dyn VirtioDevice, slot: usize) -> Result<Parts, VmError> {
        let queues = device.queue_sizes().len();
        let bar = PciRoot::initial_bar(slot);
        Parts::new(self.vm.clone(), self.memory.clone(), self.interrupts.clone(), queues, bar)
    }

    /// A vCPU. The boot processor enters the kernel at `entry`; the others wait until the guest starts them.
    pub(crate) fn vcpu(&self, id: u8, entry: Option<Entry>) -> Result<Vcpu, VmError> {
        let vcpu = self.vm.create_vcpu(id.into()).map_err(kvm("KVM_CREATE_VCPU"))?;
        let cpuid = cpuid::for_vcpu(&self.cpuid, self.topology, id);
        vcpu.set_cpuid2(&cpuid).map_err(kvm("KVM_SET_CPUID2"))?;
        if self.set_up == SetUp::Vmm {
            registers::setup_model_specific(&vcpu)?;
            registers::setup_local_apic(&vcpu)?;
        }
        if let Some(entry) = entry.filter(|_| id == 0) {
            registers::setup_boot_processor(&vcpu, entry)?;
        }
        Ok(Vcpu { fd: Arc::new(Mutex::new(vcpu)), cpuid: Mutex::new(cpuid) })
    }
}
