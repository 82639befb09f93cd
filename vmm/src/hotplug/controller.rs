//! The registers of hotplug on the bus: they drive the system control interrupt, and what the guest lets go of disappears from its bus at once. Taking
//! it apart, which may take a while, is for the main thread ([`super`]).

use std::sync::{Arc, OnceLock, Weak};

use parking_lot::Mutex;

use super::registers::{Registers, SlotSet};
use crate::acpi::sci::{Sci, Source};
use crate::bus::IoDevice;
use crate::pci::PciRoot;
use crate::state::{Invalid, Stateful, Unsaved};

/// Has what the guest has let go of taken apart.
type TakeApart = Box<dyn Fn() + Send + Sync>;

/// The registers on the bus.
pub(crate) struct Controller {
    registers: Mutex<Registers>,
    sci: Arc<Sci>,
    /// Weak: handles may outlive the guest, and do not keep its devices.
    root: Weak<PciRoot>,
    take_apart: OnceLock<TakeApart>,
}

impl Controller {
    /// Of a guest that begins with so many vCPUs.
    pub(crate) fn new(vcpus: u8, sci: Arc<Sci>, root: Weak<PciRoot>) -> Self {
        Self { registers: Mutex::new(Registers::new(vcpus)), sci, root, take_apart: OnceLock::new() }
    }

    /// Says whom to tell that the guest has let go of a device. Set once.
    pub(crate) fn on_ejection(&self, take_apart: TakeApart) {
        let _ = self.take_apart.set(take_apart);
    }

    /// A device was put into a slot: tells the guest.
    pub(crate) fn plug(&self, slot: u8) {
        self.change(|registers| registers.plug(slot));
    }

    /// Asks the guest to let go of a slot.
    pub(crate) fn ask(&self, slot: u8) {
        self.change(|registers| registers.ask(slot));
    }

    /// The device that was in a slot that the guest has let go of is no more.
    pub(crate) fn forget(&self, slot: u8) {
        self.change(|registers| registers.forget(slot));
    }

    /// There are so many vCPUs now: tells the guest.
    pub(crate) fn set_vcpus(&self, vcpus: u8) {
        self.change(|registers| registers.set_vcpus(vcpus));
    }

    /// How many there are.
    pub(crate) fn vcpus(&self) -> u8 {
        self.registers.lock().vcpus()
    }

    /// The slots that the guest is to let go of.
    pub(crate) fn leaving(&self) -> SlotSet {
        self.registers.lock().leaving()
    }

    /// The slots that it has let go of, whose devices are still there.
    pub(crate) fn ejected(&self) -> SlotSet {
        self.registers.lock().ejected()
    }

    fn change(&self, change: impl FnOnce(&mut Registers)) {
        let mut registers = self.registers.lock();
        change(&mut registers);
        self.sci.drive(Source::Hotplug, registers.interrupt());
    }

    fn hide(&self, slots: SlotSet) {
        if let Some(root) = self.root.upgrade() {
            slots.iter().for_each(|slot| root.hide(slot.into()));
        }
    }

    fn tell(&self) {
        if let Some(take_apart) = self.take_apart.get() {
            take_apart();
        }
    }
}

impl Stateful for Controller {
    const KIND: &'static str = "hotplug";
    /// Releases before this one had no hotplug; the ACPI tables of their guests do not speak of it.
    const UNSAVED: Unsaved = Unsaved::AsNew;
    type State = Registers;

    fn capture(&self) -> Result<Registers, Invalid> {
        Ok(*self.registers.lock())
    }

    fn adopt(&self, state: Registers) -> Result<(), Invalid> {
        let mut registers = self.registers.lock();
        state.check(registers.vcpus())?;
        *registers = state;
        self.sci.drive(Source::Hotplug, registers.interrupt());
        self.hide(state.ejected());
        drop(registers);
        if !state.ejected().is_empty() {
            self.tell();
        }
        Ok(())
    }
}

impl IoDevice for Controller {
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.registers.lock().read(offset, data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let mut registers = self.registers.lock();
        let freed = registers.write(offset, data);
        self.sci.drive(Source::Hotplug, registers.interrupt());
        // Under the lock: once its slot counts as free, nobody finds the device there.
        self.hide(freed);
        drop(registers);
        if !freed.is_empty() {
            self.tell();
        }
    }
}
