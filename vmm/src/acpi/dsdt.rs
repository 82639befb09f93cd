//! The DSDT: what the guest cannot discover by itself. The PCI root with its windows, the ECAM area as a motherboard resource (Linux uses
//! it only then), the serial port, the port for panics, the processors, parts that come and go ([`super::hotplug`]), and the sleep type of S5.

use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, Device, EISAName, IO, Interrupt, Memory32Fixed, Name, Package, Path,
    ResourceTemplate, Scope,
};
use acpi_tables::sdt::Sdt;
use acpi_tables::{Aml, AmlSink};

use super::hotplug;
use super::power::SLEEP_TYPE_S5;
use super::tables::{Description, Keyboard, OEM_ID, OEM_REVISION, OEM_TABLE_ID};
use crate::hotplug::registers::LEN as HOTPLUG_LEN;
use crate::layout::{
    COM1_IRQ, COM1_PORT, ECAM_SIZE, HOTPLUG_PORT, I8042_COMMAND_PORT, I8042_DATA_PORT, KEYBOARD_IRQ,
    PANIC_PORT, PCI_CONFIG_PORT, PCI_MMIO_END, PCI_MMIO_START, PM1_EVENT_PORT,
};

/// Builds the DSDT of a machine.
pub(super) fn build(machine: &Description) -> Sdt {
    let mut dsdt = Sdt::new(*b"DSDT", 36, 2, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    let mut aml = Vec::new();
    pci_root(&mut aml, machine);
    motherboard(&mut aml, machine.ecam);
    serial_port(&mut aml);
    if machine.keyboard == Keyboard::Present {
        keyboard(&mut aml);
    }
    panic_port(&mut aml);
    processors(&mut aml, machine);
    hotplug::build(&mut aml, machine);
    let s5 = SLEEP_TYPE_S5;
    Name::new(Path::new("_S5_"), &Package::new(vec![&s5, &s5, &0u8, &0u8])).to_aml_bytes(&mut aml);
    dsdt.append_slice(&aml);
    dsdt
}

fn pci_root(aml: &mut dyn AmlSink, machine: &Description) {
    let config_end = PCI_CONFIG_PORT + 7;
    let bus = AddressSpace::new_bus_number(0u16, 0u16);
    let config = IO::new(PCI_CONFIG_PORT, PCI_CONFIG_PORT, 1, 8);
    let low_ports = AddressSpace::new_io(0u16, PCI_CONFIG_PORT - 1, None);
    let high_ports = AddressSpace::new_io(config_end + 1, u16::MAX, None);
    let uncached = AddressSpaceCacheable::NotCacheable;
    let (first, last) = (PCI_MMIO_START as u32, (PCI_MMIO_END - 1) as u32);
    let low_memory = AddressSpace::new_memory(uncached, true, first, last, None);
    let high_memory = machine
        .high_window
        .as_ref()
        .map(|window| AddressSpace::new_memory(uncached, true, window.start, window.end - 1, None));
    let mut resources: Vec<&dyn Aml> = vec![&bus, &config, &low_ports, &high_ports, &low_memory];
    resources.extend(high_memory.iter().map(|window| window as &dyn Aml));
    Device::new(
        Path::new("_SB_.PCI0"),
        vec![
            &Name::new(Path::new("_HID"), &EISAName::new("PNP0A08")),
            &Name::new(Path::new("_CID"), &EISAName::new("PNP0A03")),
            &Name::new(Path::new("_SEG"), &0u8),
            &Name::new(Path::new("_BBN"), &0u8),
            &Name::new(Path::new("_UID"), &0u8),
            &Name::new(Path::new("_CRS"), &ResourceTemplate::new(resources)),
        ],
    )
    .to_aml_bytes(aml);
}

fn motherboard(aml: &mut dyn AmlSink, ecam: u64) {
    Device::new(
        Path::new("_SB_.MBRD"),
        vec![
            &Name::new(Path::new("_HID"), &EISAName::new("PNP0C02")),
            &Name::new(Path::new("_UID"), &0u8),
            &Name::new(
                Path::new("_CRS"),
                &ResourceTemplate::new(vec![
                    &Memory32Fixed::new(true, ecam as u32, ECAM_SIZE as u32),
                    &IO::new(PM1_EVENT_PORT, PM1_EVENT_PORT, 1, 12),
                    &IO::new(HOTPLUG_PORT, HOTPLUG_PORT, 1, HOTPLUG_LEN as u8),
                ]),
            ),
        ],
    )
    .to_aml_bytes(aml);
}

fn serial_port(aml: &mut dyn AmlSink) {
    Device::new(
        Path::new("_SB_.COM1"),
        vec![
            &Name::new(Path::new("_HID"), &EISAName::new("PNP0501")),
            &Name::new(Path::new("_UID"), &0u8),
            &Name::new(Path::new("_DDN"), &"COM1"),
            &Name::new(
                Path::new("_CRS"),
                &ResourceTemplate::new(vec![
                    &Interrupt::new(true, true, false, false, COM1_IRQ),
                    &IO::new(COM1_PORT, COM1_PORT, 1, 8),
                ]),
            ),
        ],
    )
    .to_aml_bytes(aml);
}

fn keyboard(aml: &mut dyn AmlSink) {
    Device::new(
        Path::new("_SB_.KBD_"),
        vec![
            &Name::new(Path::new("_HID"), &EISAName::new("PNP0303")),
            &Name::new(Path::new("_STA"), &0x0fu8),
            &Name::new(
                Path::new("_CRS"),
                &ResourceTemplate::new(vec![
                    &IO::new(I8042_DATA_PORT, I8042_DATA_PORT, 1, 1),
                    &IO::new(I8042_COMMAND_PORT, I8042_COMMAND_PORT, 1, 1),
                    &Interrupt::new(true, true, false, false, KEYBOARD_IRQ),
                ]),
            ),
        ],
    )
    .to_aml_bytes(aml);
}

/// The identity that drivers of pvpanic look for.
fn panic_port(aml: &mut dyn AmlSink) {
    Device::new(
        Path::new("_SB_.PEVT"),
        vec![
            &Name::new(Path::new("_HID"), &"QEMU0001"),
            &Name::new(Path::new("_STA"), &0x0fu8),
            &Name::new(
                Path::new("_CRS"),
                &ResourceTemplate::new(vec![&IO::new(PANIC_PORT, PANIC_PORT, 1, 1)]),
            ),
        ],
    )
    .to_aml_bytes(aml);
}

fn processors(aml: &mut dyn AmlSink, machine: &Description) {
    let mut devices = Vec::new();
    for id in 0..machine.max_vcpus {
        let methods = hotplug::processor_methods(id);
        let hid = Name::new(Path::new("_HID"), &"ACPI0007");
        let uid = Name::new(Path::new("_UID"), &id);
        let mut children: Vec<&dyn Aml> = vec![&hid, &uid];
        if id >= machine.vcpus {
            children.push(&methods);
        }
        Device::new(hotplug::processor_name(id), children).to_aml_bytes(&mut devices);
    }
    aml.vec(&Scope::raw(Path::new("_SB_"), devices));
}
