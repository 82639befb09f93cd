//! The register model of hotplug, without I/O: a block of general-purpose events (ACPI 6.5, 4.8.4.1) and, behind it, what the guest's ACPI code
//! ([`crate::acpi`]) reads and writes when such an event comes.
//!
//! | offset | bytes | read | written |
//! |---|---|---|---|
//! | 0 | 1 | events that have happened | clears the bits that are one |
//! | 1 | 1 | events that interrupt | as read |
//! | 2 | 1 | number of vCPUs | – |
//! | 3 | 1 | how many of them the guest has been told of | as read |
//! | 4 | 4 | slots that something was put into | clears the bits that are one |
//! | 8 | 4 | slots that the guest is asked to let go of | clears the bits that are one |
//! | 12 | 4 | 0 | lets go of the slots whose bits are one |
//!
//! Events are edges: the bit is cleared first, then the registers are looked at, so that what comes meanwhile comes as another event.
//!
//! A guest lets go of what it was asked for only: whether a device is to be there is for its owner to say.

use serde::{Deserialize, Serialize};

use crate::acpi::sci::Level;
use crate::pci::slots;
use crate::state::Invalid;

/// Events, as numbers of their methods.
pub(crate) const PCI_EVENT: u8 = 1;
pub(crate) const VCPU_EVENT: u8 = 2;
/// Events that exist.
const EVENTS: u8 = 1 << PCI_EVENT | 1 << VCPU_EVENT;

/// Length of the event block: status and enable.
pub(crate) const EVENT_BLOCK_LEN: u8 = 2;
/// Length of all registers.
pub(crate) const LEN: u64 = 16;
/// Offsets.
const STATUS: u64 = 0;
const ENABLE: u64 = 1;
pub(crate) const VCPUS: u64 = 2;
pub(crate) const TOLD: u64 = 3;
pub(crate) const PLUGGED: u64 = 4;
pub(crate) const ASKED: u64 = 8;
pub(crate) const EJECT: u64 = 12;

/// A set of slots, bit by bit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SlotSet(u32);

impl SlotSet {
    /// The slots in which devices come and go.
    const ALL: Self = Self((1 << slots::DISKS_AND_NICS.end) - (1 << slots::DISKS_AND_NICS.start));

    /// One slot; none if it is not one in which devices come and go.
    pub(crate) fn of(slot: u8) -> Self {
        Self(1u32.checked_shl(slot.into()).unwrap_or(0) & Self::ALL.0)
    }

    pub(crate) fn contains(self, slot: u8) -> bool {
        self.0 & Self::of(slot).0 != 0
    }

    pub(crate) fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// The slots, in order.
    pub(crate) fn iter(self) -> impl Iterator<Item = u8> {
        (0..32).filter(move |slot| self.contains(*slot))
    }

    /// As the mask that the registers have.
    pub(crate) fn mask(self) -> u32 {
        self.0
    }

    fn add(&mut self, other: Self) {
        self.0 |= other.0;
    }

    fn remove(&mut self, other: Self) {
        self.0 &= !other.0;
    }

    fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }

    fn is_within(self, other: Self) -> bool {
        self.without(other).is_empty()
    }
}

/// The registers, and what is behind them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Registers {
    status: u8,
    enable: u8,
    vcpus: u8,
    told: u8,
    plugged: SlotSet,
    asked: SlotSet,
    /// Slots that the guest was asked to let go of, whether it has acknowledged that or not.
    leaving: SlotSet,
    /// Slots that it has let go of, whose devices are still to be taken apart.
    ejected: SlotSet,
}

impl Registers {
    /// Of a guest that begins with so many vCPUs, all of which it finds by itself.
    pub(crate) fn new(vcpus: u8) -> Self {
        let none = SlotSet::default();
        let (plugged, asked, leaving, ejected) = (none, none, none, none);
        Self { status: 0, enable: 0, vcpus, told: vcpus, plugged, asked, leaving, ejected }
    }

    /// Whether a guest with this number of vCPUs can have these.
    pub(crate) fn check(&self, vcpus: u8) -> Result<(), Invalid> {
        let sets = [self.plugged, self.asked, self.leaving, self.ejected];
        let sound = (self.status | self.enable) & !EVENTS == 0
            && self.told <= self.vcpus
            && sets.into_iter().all(|set| set.is_within(SlotSet::ALL))
            && self.asked.is_within(self.leaving)
            && self.ejected.is_within(self.leaving);
        match (self.vcpus == vcpus, sound) {
            (true, true) => Ok(()),
            (false, _) => Err(Invalid::because("another number of processors")),
            (true, false) => Err(Invalid::because("bits that no register has")),
        }
    }

    /// What the system control interrupt is to be.
    pub(crate) fn interrupt(&self) -> Level {
        Level::of((self.status & self.enable).into())
    }

    /// A device was put into a slot.
    pub(crate) fn plug(&mut self, slot: u8) {
        self.plugged.add(SlotSet::of(slot));
        self.status |= 1 << PCI_EVENT;
    }

    /// The guest is to let go of a slot; if it has not yet, it is asked again.
    pub(crate) fn ask(&mut self, slot: u8) {
        let slot = SlotSet::of(slot).without(self.ejected);
        self.leaving.add(slot);
        self.asked.add(slot);
        self.status |= 1 << PCI_EVENT;
    }

    /// The device in a slot that the guest has let go of is no more.
    pub(crate) fn forget(&mut self, slot: u8) {
        let slot = SlotSet::of(slot);
        for set in [&mut self.plugged, &mut self.asked, &mut self.leaving, &mut self.ejected] {
            set.remove(slot);
        }
    }

    /// There are so many vCPUs now.
    pub(crate) fn set_vcpus(&mut self, vcpus: u8) {
        self.vcpus = vcpus;
        self.status |= 1 << VCPU_EVENT;
    }

    pub(crate) fn vcpus(&self) -> u8 {
        self.vcpus
    }

    pub(crate) fn leaving(&self) -> SlotSet {
        self.leaving
    }

    pub(crate) fn ejected(&self) -> SlotSet {
        self.ejected
    }

    fn byte(&self, at: u64) -> u8 {
        let of = |set: SlotSet, start: u64| set.0.to_le_bytes()[(at - start) as usize];
        match at {
            STATUS => self.status,
            ENABLE => self.enable,
            VCPUS => self.vcpus,
            TOLD => self.told,
            PLUGGED..ASKED => of(self.plugged, PLUGGED),
            ASKED..EJECT => of(self.asked, ASKED),
            _ => 0,
        }
    }

    /// A guest's read.
    pub(crate) fn read(&self, offset: u64, data: &mut [u8]) {
        for (at, byte) in (offset..).zip(data) {
            *byte = self.byte(at);
        }
    }

    /// A guest's write. Returns the slots that it has let go of by that.
    pub(crate) fn write(&mut self, offset: u64, data: &[u8]) -> SlotSet {
        let mut freed = SlotSet::default();
        for (at, byte) in (offset..).zip(data) {
            let bits = |start: u64| SlotSet(u32::from(*byte) << (8 * (at - start)));
            match at {
                STATUS => self.status &= !byte,
                ENABLE => self.enable = byte & EVENTS,
                TOLD => self.told = (*byte).min(self.vcpus),
                PLUGGED..ASKED => self.plugged.remove(bits(PLUGGED)),
                ASKED..EJECT => self.asked.remove(bits(ASKED)),
                EJECT..LEN => freed.add(SlotSet(bits(EJECT).0 & self.leaving.0).without(self.ejected)),
                _ => {}
            }
        }
        self.ejected.add(freed);
        self.plugged.remove(freed);
        self.asked.remove(freed);
        freed
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn read32(registers: &Registers, offset: u64) -> u32 {
        let mut data = [0; 4];
        registers.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn an_event_interrupts_until_it_is_acknowledged_and_says_which_slot() {
        let mut registers = Registers::new(1);
        registers.plug(5);
        assert_eq!(registers.interrupt(), Level::Released, "not enabled yet");
        registers.write(ENABLE, &[0xff]);
        assert_eq!(registers.interrupt(), Level::Asserted);
        registers.write(STATUS, &[1 << PCI_EVENT]);
        assert_eq!(registers.interrupt(), Level::Released);
        assert_eq!(read32(&registers, PLUGGED), 1 << 5);
        registers.plug(6);
        registers.write(PLUGGED, &(1u32 << 5).to_le_bytes());
        assert_eq!(read32(&registers, PLUGGED), 1 << 6, "what came meanwhile stays");
    }

    #[test]
    fn a_guest_lets_go_of_what_it_was_asked_for_and_of_nothing_else() {
        let mut registers = Registers::new(1);
        assert_eq!(registers.write(EJECT, &[0xff; 4]), SlotSet::default());
        registers.ask(9);
        assert_eq!(read32(&registers, ASKED), 1 << 9);
        registers.write(ASKED, &(1u32 << 9).to_le_bytes());
        assert_eq!(read32(&registers, ASKED), 0);
        assert!(registers.leaving().contains(9), "it still is to let go");
        registers.ask(9);
        assert_eq!(read32(&registers, ASKED), 1 << 9, "asked again");
        assert_eq!(registers.write(EJECT, &[0xff; 4]), SlotSet::of(9));
        assert_eq!(registers.write(EJECT, &[0xff; 4]), SlotSet::default(), "once");
        registers.ask(9);
        assert_eq!(read32(&registers, ASKED), 0, "it has let go already");
        registers.forget(9);
        assert_eq!(
            registers,
            Registers { status: 1 << PCI_EVENT, ..Registers::new(1) },
            "as if nothing had ever been there"
        );
    }

    #[test]
    fn a_guest_is_told_of_vcpus_until_it_says_that_it_was() {
        let mut registers = Registers::new(1);
        registers.write(ENABLE, &[1 << VCPU_EVENT]);
        registers.set_vcpus(3);
        assert_eq!(registers.interrupt(), Level::Asserted);
        let mut counts = [0; 2];
        registers.read(VCPUS, &mut counts);
        assert_eq!(counts, [3, 1]);
        registers.write(VCPUS, &[200, 200]);
        registers.read(VCPUS, &mut counts);
        assert_eq!(counts, [3, 3], "not of more than there are");
    }

    #[derive(Debug, Clone)]
    enum Step {
        Write(u64, Vec<u8>),
        Plug(u8),
        Ask(u8),
        Forget,
        Vcpus(u8),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            (0u64..20, prop::collection::vec(any::<u8>(), 1..9)).prop_map(|(at, data)| Step::Write(at, data)),
            any::<u8>().prop_map(|slot| Step::Plug(slot % 40)),
            any::<u8>().prop_map(|slot| Step::Ask(slot % 40)),
            Just(Step::Forget),
            (1u8..9).prop_map(Step::Vcpus),
        ]
    }

    proptest! {
        #[test]
        fn whatever_is_written_only_slots_that_were_asked_for_are_let_go_once(
            steps in prop::collection::vec(step(), 0..60)
        ) {
            let mut registers = Registers::new(1);
            let mut asked = std::collections::BTreeSet::new();
            for step in steps {
                match step {
                    Step::Write(at, data) => {
                        for slot in registers.write(at, &data).iter() {
                            prop_assert!(asked.remove(&slot), "slot {}", slot);
                            prop_assert!(slots::DISKS_AND_NICS.contains(&usize::from(slot)));
                        }
                        registers.read(at, &mut vec![0; data.len()]);
                    }
                    Step::Plug(slot) => registers.plug(slot),
                    Step::Ask(slot) => {
                        if !registers.ejected().contains(slot) {
                            asked.insert(slot);
                        }
                        registers.ask(slot);
                    }
                    Step::Forget => registers.ejected().iter().for_each(|slot| registers.forget(slot)),
                    Step::Vcpus(vcpus) => registers.set_vcpus(registers.vcpus().max(vcpus)),
                }
                prop_assert_eq!(registers.check(registers.vcpus()), Ok(()));
            }
        }
    }
}
