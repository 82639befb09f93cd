//! The system control interrupt: one level-triggered line that several register blocks share. It is asserted as long as one of them asks for it.

use std::sync::Arc;

use parking_lot::Mutex;

use crate::interrupts::Interrupts;
use crate::layout::SCI_IRQ;

/// Who asks for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Source {
    /// The PM1 registers.
    Power,
    /// The general-purpose events.
    Hotplug,
}

/// What one of them wants of the line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Level {
    Asserted,
    Released,
}

impl Level {
    /// Asserted as long as an event that is enabled has not been acknowledged.
    pub(crate) fn of(pending: u16) -> Self {
        if pending == 0 { Self::Released } else { Self::Asserted }
    }
}

/// The line.
pub(crate) struct Sci {
    interrupts: Arc<Interrupts>,
    levels: Mutex<[Level; 2]>,
}

impl Sci {
    pub(crate) fn new(interrupts: Arc<Interrupts>) -> Self {
        Self { interrupts, levels: Mutex::new([Level::Released; 2]) }
    }

    /// What `source` wants from now on. To be called under the lock of its registers, so that levels come in the order of their changes.
    pub(crate) fn drive(&self, source: Source, level: Level) {
        let mut levels = self.levels.lock();
        levels[source as usize] = level;
        if let Err(error) = self.interrupts.set_line(SCI_IRQ, levels.contains(&Level::Asserted)) {
            tracing::error!(%error, "cannot drive the system control interrupt");
        }
    }
}

#[cfg(test)]
mod tests {
    use kvm_bindings::{KVM_IRQCHIP_IOAPIC, kvm_irqchip};

    use super::*;
    use crate::layout::{MIB, SCI_IRQ};
    use crate::vcpu::model::CpuModel;
    use crate::{kvm, memory};

    #[test]
    fn it_is_asserted_as_long_as_anybody_asks_for_it() {
        let memory = memory::create(16 * MIB).unwrap();
        let Ok(guest) = kvm::create(&memory, CpuModel::Host) else { return eprintln!("SKIPPED: no KVM") };
        let sci = Sci::new(Arc::new(Interrupts::new(guest.vm.clone()).unwrap()));
        let asserted = || {
            let mut chip = kvm_irqchip { chip_id: KVM_IRQCHIP_IOAPIC, ..Default::default() };
            guest.vm.get_irqchip(&mut chip).unwrap();
            // SAFETY: this chip was asked for, so this member of the union is the one that KVM filled.
            unsafe { chip.chip.ioapic.irr >> SCI_IRQ & 1 == 1 }
        };
        let steps = [
            (Source::Power, Level::Asserted, true),
            (Source::Hotplug, Level::Asserted, true),
            (Source::Power, Level::Released, true),
            (Source::Hotplug, Level::Released, false),
        ];
        for (source, level, expected) in steps {
            sci.drive(source, level);
            assert_eq!(asserted(), expected, "{source:?} {level:?}");
        }
    }
}
