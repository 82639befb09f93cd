//! What the kernel keeps for the guest beside its processors: interrupt controllers, timer, clock.

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_clock_data, kvm_irqchip,
    kvm_pit_state2,
};
use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};

use super::frame::{Kind, Part};
use super::{TransferError, kvm};

/// The chips, in the order in which they are kept.
const CHIPS: [u32; 3] = [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC];

/// All of it. The structures are those of the kernel's interface, which never change.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct MachineState {
    chips: [kvm_irqchip; 3],
    timer: kvm_pit_state2,
    /// Nanoseconds that the guest's clock shows.
    clock: u64,
}

impl Part for MachineState {
    const KIND: Kind = Kind::Machine;
    const NAME: &'static str = "a machine";
    type Body = Self;
}

impl MachineState {
    pub(super) fn capture(vm: &VmFd) -> Result<Self, TransferError> {
        let mut chips = CHIPS.map(|chip_id| kvm_irqchip { chip_id, ..Default::default() });
        for chip in &mut chips {
            vm.get_irqchip(chip).map_err(kvm("KVM_GET_IRQCHIP"))?;
        }
        let timer = vm.get_pit2().map_err(kvm("KVM_GET_PIT2"))?;
        let clock = vm.get_clock().map_err(kvm("KVM_GET_CLOCK"))?.clock;
        Ok(Self { chips, timer, clock })
    }

    /// Before the processors, whose local controllers listen to these.
    pub(super) fn restore_controllers(&self, vm: &VmFd) -> Result<(), TransferError> {
        for (chip_id, saved) in CHIPS.into_iter().zip(&self.chips) {
            let chip = kvm_irqchip { chip_id, ..*saved };
            vm.set_irqchip(&chip).map_err(kvm("KVM_SET_IRQCHIP"))?;
        }
        Ok(())
    }

    /// Time goes on from here.
    pub(super) fn restore_time(&self, vm: &VmFd) -> Result<(), TransferError> {
        vm.set_pit2(&self.timer).map_err(kvm("KVM_SET_PIT2"))?;
        let clock = kvm_clock_data { clock: self.clock, ..Default::default() };
        vm.set_clock(&clock).map_err(kvm("KVM_SET_CLOCK"))
    }
}
