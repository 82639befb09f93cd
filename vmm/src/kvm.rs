//! The KVM side of a guest: checks what this host's KVM can do, makes the VM with its in-kernel interrupt controllers
//! and timer, and gives it its memory.

use std::sync::Arc;

use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, KVM_MEM_LOG_DIRTY_PAGES, KVM_PIT_SPEAKER_DUMMY, kvm_pit_config,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, Kvm, VmFd};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use crate::error::{VmError, kvm};
use crate::layout::{KVM_IDENTITY_MAP_START, KVM_TSS_START};
use crate::memory::{Memory, PAGE};
use crate::vcpu::model::CpuModel;

/// What the VMM cannot do without.
const REQUIRED: [(Cap, &str); 5] = [
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::Pit2, "KVM_CAP_PIT2"),
    (Cap::Irqfd, "KVM_CAP_IRQFD"),
    (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
];

/// What 64-bit processors have at least.
const SMALLEST_WIDTH: u32 = 36;

/// A VM without vCPUs yet.
pub(crate) struct KvmGuest {
    pub(crate) vm: Arc<VmFd>,
    /// What of it the guest is shown.
    pub(crate) cpuid: CpuId,
    pub(crate) tsc_deadline: bool,
    /// The model-specific registers that it keeps for a guest.
    pub(crate) msrs: Vec<u32>,
}

/// Opens KVM and makes a VM around this memory, whose processors are to look like this model.
pub(crate) fn create(memory: &Memory, model: CpuModel) -> Result<KvmGuest, VmError> {
    let system = Kvm::new().map_err(kvm("open /dev/kvm"))?;
    for (cap, name) in REQUIRED {
        if !system.check_extension(cap) {
            return Err(VmError::MissingCapability(name));
        }
    }
    let supported =
        system.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(kvm("KVM_GET_SUPPORTED_CPUID"))?;
    let cpuid = model.shape(&supported)?;
    check_width(memory, address_bits(&supported))?;
    let vm = system.create_vm().map_err(kvm("KVM_CREATE_VM"))?;
    // Only Intel needs these two; both have to come before the first vCPU.
    if vm.check_extension(Cap::SetIdentityMapAddr) {
        vm.set_identity_map_address(KVM_IDENTITY_MAP_START).map_err(kvm("KVM_SET_IDENTITY_MAP_ADDR"))?;
    }
    if vm.check_extension(Cap::SetTssAddr) {
        vm.set_tss_address(KVM_TSS_START as usize).map_err(kvm("KVM_SET_TSS_ADDR"))?;
    }
    vm.create_irq_chip().map_err(kvm("KVM_CREATE_IRQCHIP"))?;
    let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
    vm.create_pit2(pit).map_err(kvm("KVM_CREATE_PIT2"))?;
    map_memory(&vm, memory, DirtyLog::Off)?;
    let tsc_deadline = system.check_extension(Cap::TscDeadlineTimer);
    let msrs = system.get_msr_index_list().map_err(kvm("KVM_GET_MSR_INDEX_LIST"))?;
    Ok(KvmGuest { vm: Arc::new(vm), cpuid, tsc_deadline, msrs: msrs.as_slice().to_vec() })
}

/// Bits of a physical address (leaf 0x8000_0008, EAX).
fn address_bits(cpuid: &CpuId) -> u32 {
    let leaf = cpuid.as_slice().iter().find(|leaf| leaf.function == 0x8000_0008);
    leaf.map_or(SMALLEST_WIDTH, |leaf| leaf.eax & 0xff)
}

/// Firmware puts large PCI windows above the memory: the upper half of the addresses is for them.
fn check_width(memory: &Memory, bits: u32) -> Result<(), VmError> {
    let end = memory.iter().map(|region| region.last_addr().0).max().unwrap_or(0);
    if end >> bits.saturating_sub(1).min(63) > 0 {
        return Err(VmError::AddressWidth { memory: memory.iter().map(|region| region.len()).sum(), bits });
    }
    Ok(())
}

/// Whether KVM keeps a record of the pages that the guest writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum DirtyLog {
    /// It does not.
    Off,
    /// It does, from now on.
    On,
}

/// Gives the VM its memory, or changes how it has it. One slot for each stretch, from 0.
pub(crate) fn map_memory(vm: &VmFd, memory: &Memory, log: DirtyLog) -> Result<(), VmError> {
    let flags = match log {
        DirtyLog::Off => 0,
        DirtyLog::On => KVM_MEM_LOG_DIRTY_PAGES,
    };
    for (slot, region) in memory.iter().enumerate() {
        let start = region.start_addr();
        let host = memory.get_host_address(GuestAddress(start.0)).map_err(|error| VmError::Memory {
            what: "host address",
            source: std::io::Error::other(error),
        })?;
        let slot = kvm_userspace_memory_region {
            slot: slot as u32,
            guest_phys_addr: start.0,
            memory_size: region.len(),
            userspace_addr: host as u64,
            flags,
        };
        // SAFETY: the range is a mapping of `memory`. KVM follows its host mappings: if it is unmapped before the last handle of
        // the VM is gone, guest accesses fail; and no vCPU runs any more by then.
        unsafe { vm.set_user_memory_region(slot) }.map_err(kvm("KVM_SET_USER_MEMORY_REGION"))?;
    }
    Ok(())
}

/// What the guest, and KVM for it, has written since the last time: for each stretch of RAM its first page and a bit a page.
pub(crate) fn take_dirty(vm: &VmFd, memory: &Memory) -> Result<Vec<(u64, Vec<u64>)>, kvm_ioctls::Error> {
    let log = |(slot, region): (usize, &<Memory as GuestMemoryBackend>::R)| {
        let pages = vm.get_dirty_log(slot as u32, region.len() as usize)?;
        Ok((region.start_addr().0 / PAGE, pages))
    };
    memory.iter().enumerate().map(log).collect()
}
