//! Interrupt routing: which line of KVM leads to which pin or message.
//!
//! Lines below [`MSI_GSI_START`] are the pins of the PIC and the IOAPIC, one to one. Every MSI-X vector has a line of its own above, whose
//! message changes as the guest writes its MSI-X table. KVM takes the whole table at each change.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE, KvmIrqRouting, kvm_irq_routing_entry,
};
use kvm_ioctls::VmFd;
use parking_lot::Mutex;
use vmm_sys_util::eventfd::EventFd;

use crate::error::{VmError, kvm};
use crate::layout::MSI_GSI_START;

/// A message-signalled interrupt: what is written where.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct MsiMessage {
    /// Address of the write.
    pub(crate) address: u64,
    /// Value of the write.
    pub(crate) data: u32,
}

/// An interrupt line of KVM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Gsi(pub(crate) u32);

struct Routes {
    msi: BTreeMap<Gsi, MsiMessage>,
    next: u32,
    /// Lines below `next` that nobody has any more.
    free: BTreeSet<Gsi>,
}

/// The routing table of a guest, and its interrupt lines.
pub(crate) struct Interrupts {
    vm: Arc<VmFd>,
    routes: Mutex<Routes>,
}

impl Interrupts {
    /// Sets up the lines of PIC and IOAPIC.
    pub(crate) fn new(vm: Arc<VmFd>) -> Result<Self, VmError> {
        let routes = Routes { msi: BTreeMap::new(), next: MSI_GSI_START, free: BTreeSet::new() };
        let interrupts = Self { vm, routes: Mutex::new(routes) };
        interrupts.commit(&interrupts.routes.lock().msi)?;
        Ok(interrupts)
    }

    /// A new line for a message.
    pub(crate) fn allocate(&self) -> Gsi {
        let mut routes = self.routes.lock();
        routes.free.pop_first().unwrap_or_else(|| {
            let gsi = Gsi(routes.next);
            routes.next += 1;
            gsi
        })
    }

    /// Gives lines back. Nothing is connected to them any more.
    pub(crate) fn release(&self, lines: &[Gsi]) -> Result<(), VmError> {
        let mut routes = self.routes.lock();
        let before = routes.msi.len();
        for gsi in lines {
            routes.msi.remove(gsi);
            routes.free.insert(*gsi);
        }
        if routes.msi.len() == before { Ok(()) } else { self.commit(&routes.msi) }
    }

    /// How many lines are in use, and how many messages are routed.
    #[cfg(test)]
    pub(crate) fn in_use(&self) -> (usize, usize) {
        let routes = self.routes.lock();
        ((routes.next - MSI_GSI_START) as usize - routes.free.len(), routes.msi.len())
    }

    /// Makes `gsi` send `message`.
    pub(crate) fn route(&self, gsi: Gsi, message: MsiMessage) -> Result<(), VmError> {
        let mut routes = self.routes.lock();
        if routes.msi.insert(gsi, message) == Some(message) {
            return Ok(());
        }
        self.commit(&routes.msi)
    }

    /// From now on, each write to `event` raises `gsi`. What was written before, while unconnected, raises it at once.
    pub(crate) fn connect(&self, event: &EventFd, gsi: Gsi) -> Result<(), VmError> {
        self.vm.register_irqfd(event, gsi.0).map_err(kvm("KVM_IRQFD"))
    }

    /// Writes to `event` stay in its counter from now on.
    pub(crate) fn disconnect(&self, event: &EventFd, gsi: Gsi) -> Result<(), VmError> {
        self.vm.unregister_irqfd(event, gsi.0).map_err(kvm("KVM_IRQFD (deassign)"))
    }

    /// Sets the level of a line of the IOAPIC.
    pub(crate) fn set_line(&self, irq: u32, active: bool) -> Result<(), VmError> {
        self.vm.set_irq_line(irq, active).map_err(kvm("KVM_IRQ_LINE"))
    }

    fn commit(&self, msi: &BTreeMap<Gsi, MsiMessage>) -> Result<(), VmError> {
        let entries: Vec<_> =
            pin_routes().chain(msi.iter().map(|(gsi, message)| msi_route(*gsi, *message))).collect();
        let table = KvmIrqRouting::from_entries(&entries)
            .map_err(|_| VmError::MissingCapability("room in the interrupt routing table"))?;
        self.vm.set_gsi_routing(&table).map_err(kvm("KVM_SET_GSI_ROUTING"))
    }
}

fn pin_routes() -> impl Iterator<Item = kvm_irq_routing_entry> {
    let pic = (0..16).map(|irq| match irq {
        0..8 => pin_route(irq, KVM_IRQCHIP_PIC_MASTER, irq),
        _ => pin_route(irq, KVM_IRQCHIP_PIC_SLAVE, irq - 8),
    });
    pic.chain((0..MSI_GSI_START).map(|irq| pin_route(irq, KVM_IRQCHIP_IOAPIC, irq)))
}

fn pin_route(gsi: u32, irqchip: u32, pin: u32) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry { gsi, type_: KVM_IRQ_ROUTING_IRQCHIP, ..Default::default() };
    entry.u.irqchip.irqchip = irqchip;
    entry.u.irqchip.pin = pin;
    entry
}

fn msi_route(gsi: Gsi, message: MsiMessage) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry { gsi: gsi.0, type_: KVM_IRQ_ROUTING_MSI, ..Default::default() };
    entry.u.msi.address_lo = message.address as u32;
    entry.u.msi.address_hi = (message.address >> 32) as u32;
    entry.u.msi.data = message.data;
    entry
}
