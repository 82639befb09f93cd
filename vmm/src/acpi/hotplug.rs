//! What the DSDT says of parts that come and go: a device with a method to eject it for each slot of disks and NICs, what there is to tell of processors
//! that may be added, and the methods that ACPI runs for the events. They read and write the registers of [`crate::hotplug`].
//!
//! The methods acknowledge before they notify, so that what comes meanwhile is another event.

use acpi_tables::aml::{
    Add, And, Arg, BufferData, Device, Equal, Field, FieldAccessType, FieldEntry, FieldLockRule,
    FieldUpdateRule, If, LessThan, Local, Method, MethodCall, Name, Notify, OpRegion, OpRegionSpace, Path,
    Return, Scope, Store, While, ZERO,
};
use acpi_tables::madt::{EnabledStatus, ProcessorLocalApic};
use acpi_tables::{Aml, AmlSink};

use super::tables::Description;
use crate::hotplug::registers::{ASKED, EJECT, LEN, PCI_EVENT, PLUGGED, SlotSet, TOLD, VCPU_EVENT, VCPUS};
use crate::layout::HOTPLUG_PORT;
use crate::pci::slots;

/// Values of notifications (ACPI 6.5, 5.6.6).
const DEVICE_CHECK: u8 = 1;
const EJECT_REQUEST: u8 = 3;
/// `_STA` of what is there and works.
const PRESENT: u8 = 0x0f;

/// Terms that were built already.
struct Terms(Vec<u8>);

impl Aml for Terms {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(&self.0);
    }
}

impl FromIterator<Terms> for Terms {
    fn from_iter<I: IntoIterator<Item = Terms>>(all: I) -> Self {
        Self(all.into_iter().flat_map(|terms| terms.0).collect())
    }
}

fn terms(all: &[&dyn Aml]) -> Terms {
    let mut bytes = Vec::new();
    all.iter().for_each(|term| term.to_aml_bytes(&mut bytes));
    Terms(bytes)
}

/// All of it, for the end of a DSDT which has the PCI root already.
pub(super) fn build(aml: &mut dyn AmlSink, machine: &Description) {
    aml.vec(&Scope::raw(Path::new("_SB_"), registers().0));
    aml.vec(&Scope::raw(Path::new("_SB_.PCI0"), pci_slots().0));
    let pci = MethodCall::new(Path::new("\\_SB_.PCI0.PCNT"), vec![]);
    let event = |number: u8| Path::new(&format!("_E{number:02X}"));
    let mut events = terms(&[&Method::new(event(PCI_EVENT), 0, true, vec![&pci])]).0;
    if machine.max_vcpus > machine.vcpus {
        aml.vec(&Scope::raw(Path::new("_SB_"), processors(machine).0));
        let vcpus = MethodCall::new(Path::new("\\_SB_.CPNT"), vec![]);
        events.extend(terms(&[&Method::new(event(VCPU_EVENT), 0, true, vec![&vcpus])]).0);
    }
    aml.vec(&Scope::raw(Path::new("_GPE"), events));
}

/// Names for the registers.
fn registers() -> Terms {
    let field = |access, entries| {
        Field::new(Path::new("HPRG"), access, FieldLockRule::NoLock, FieldUpdateRule::WriteAsZeroes, entries)
    };
    let counts = field(
        FieldAccessType::Byte,
        vec![
            FieldEntry::Reserved(8 * VCPUS as usize),
            FieldEntry::Named(*b"VCPU", 8),
            FieldEntry::Named(*b"TOLD", 8),
        ],
    );
    let sets = field(
        FieldAccessType::DWord,
        vec![
            FieldEntry::Reserved(8 * PLUGGED as usize),
            FieldEntry::Named(*b"PLGD", 32),
            FieldEntry::Named(*b"ASKD", 32),
            FieldEntry::Named(*b"EJCT", 32),
        ],
    );
    const _: () = assert!(TOLD == VCPUS + 1 && ASKED == PLUGGED + 4 && EJECT == ASKED + 4);
    let (port, len) = (HOTPLUG_PORT, LEN as u8);
    terms(&[&OpRegion::new(Path::new("HPRG"), OpRegionSpace::SystemIO, &port, &len), &counts, &sets])
}

fn slot_name(slot: u8) -> Path {
    Path::new(&format!("S{slot:03X}"))
}

fn pci_slots() -> Terms {
    let all = || slots::DISKS_AND_NICS.map(|slot| slot as u8);
    let devices: Terms = all()
        .map(|slot| {
            let bit = SlotSet::of(slot).mask();
            let eject = terms(&[&Store::new(&Path::new("EJCT"), &bit)]);
            terms(&[&Device::new(
                slot_name(slot),
                vec![
                    &Name::new(Path::new("_ADR"), &(u32::from(slot) << 16)),
                    &Name::new(Path::new("_SUN"), &slot),
                    &Method::new(Path::new("_EJ0"), 1, true, vec![&eject]),
                ],
            )])
        })
        .collect();
    // Tells each slot whose bit is in the first argument what the second one says.
    let tell: Terms = all()
        .map(|slot| {
            let bit = SlotSet::of(slot).mask();
            terms(&[&If::new(&And::new(&ZERO, &Arg(0), &bit), vec![&Notify::new(&slot_name(slot), &Arg(1))])])
        })
        .collect();
    let (plugged, asked) = (Path::new("PLGD"), Path::new("ASKD"));
    let take = |set: &Path, notification: u8| {
        terms(&[
            &Store::new(&Local(0), set),
            &Store::new(set, &Local(0)),
            &MethodCall::new(Path::new("TELL"), vec![&Local(0), &notification]),
        ])
    };
    terms(&[
        &devices,
        &Method::new(Path::new("TELL"), 2, true, vec![&tell]),
        &Method::new(
            Path::new("PCNT"),
            0,
            true,
            vec![&take(&plugged, DEVICE_CHECK), &take(&asked, EJECT_REQUEST)],
        ),
    ])
}

/// The name of a processor.
pub(super) fn processor_name(id: u8) -> Path {
    Path::new(&format!("C{id:03X}"))
}

/// What more there is to say of a processor that may come later than its identity.
pub(super) fn processor_methods(id: u8) -> impl Aml {
    let mut entry = Vec::new();
    ProcessorLocalApic::new(id, id, EnabledStatus::Enabled).to_aml_bytes(&mut entry);
    let there = terms(&[&If::new(&LessThan::new(&id, &Path::new("VCPU")), vec![&Return::new(&PRESENT)])]);
    terms(&[
        &Method::new(Path::new("_STA"), 0, true, vec![&there, &Return::new(&ZERO)]),
        &Name::new(Path::new("_MAT"), &BufferData::new(entry)),
    ])
}

fn processors(machine: &Description) -> Terms {
    let tell: Terms = (machine.vcpus..machine.max_vcpus)
        .map(|id| {
            terms(&[&If::new(
                &Equal::new(&Arg(0), &id),
                vec![&Notify::new(&processor_name(id), &DEVICE_CHECK)],
            )])
        })
        .collect();
    let (next, end, told) = (Local(0), Local(1), Path::new("TOLD"));
    let more = LessThan::new(&next, &end);
    let one = MethodCall::new(Path::new("CPTL"), vec![&next]);
    let step = Add::new(&next, &next, &1u8);
    terms(&[
        &Method::new(Path::new("CPTL"), 1, true, vec![&tell]),
        &Method::new(
            Path::new("CPNT"),
            0,
            true,
            vec![
                &Store::new(&next, &told),
                &Store::new(&end, &Path::new("VCPU")),
                &While::new(&more, vec![&one, &step]),
                &Store::new(&told, &end),
            ],
        ),
    ])
}
