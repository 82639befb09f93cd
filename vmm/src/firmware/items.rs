//! What firmware asks the machine: the items of fw_cfg that OVMF reads (QEMU, docs/specs/fw_cfg; OvmfPkg of edk2).

use std::sync::Arc;

use uuid::Uuid;

use super::fw_cfg::{Content, FwCfg, FwCfgBuilder};
use super::smbios;
use crate::acpi::loader::{self, Files, LOADER_FILE, RSDP_FILE, TABLES_FILE};
use crate::acpi::tables::{Description, Tables};
use crate::boot::e820;
use crate::display::{RAMFB_FILE, Ramfb};
use crate::memory::{Memory, ram_ranges};

/// Selector of the number of processors that are there at the start.
const CPUS: u16 = 0x05;
/// Selector of the switch that has the firmware look at [`BOOT_MENU_WAIT_FILE`].
const BOOT_MENU: u16 = 0x0e;
/// Selector of the largest number of processors.
const MAX_CPUS: u16 = 0x0f;
/// How long the firmware waits for a key, in milliseconds.
const BOOT_MENU_WAIT_FILE: &str = "etc/boot-menu-wait";
const BOOT_ORDER_FILE: &str = "bootorder";
/// Up to where memory may be plugged: memory of PCI functions lies above.
const RESERVED_END_FILE: &str = "etc/reserved-memory-end";
const E820_FILE: &str = "etc/e820";
const SYSTEM_STATES_FILE: &str = "etc/system-states";
/// Of the sleep states S0 to S5, those that are there (bit 7), with their sleep types: no suspend to memory or disk.
const SYSTEM_STATES: [u8; 6] = [0x80, 0, 0, 1, 2, 0x80 | crate::acpi::power::SLEEP_TYPE_S5];

/// What is told of a machine.
pub(crate) struct Machine {
    pub(crate) id: Uuid,
    pub(crate) vcpus: u8,
    pub(crate) max_vcpus: u8,
    pub(crate) memory_size: u64,
    /// End of memory that may be plugged, if there is any, rounded up as windows of PCI functions begin.
    pub(crate) reserved_end: Option<u64>,
    /// PCI slots to boot from, first one first.
    pub(crate) boot_slots: Vec<usize>,
    /// The machine as the firmware has set it up by the time that it asks for the tables.
    pub(crate) describe: Arc<dyn Fn() -> Description + Send + Sync>,
    /// Its frame buffer, if it has one.
    pub(crate) ramfb: Option<Arc<Ramfb>>,
}

/// Makes the device that tells it.
pub(crate) fn build(machine: &Machine, memory: &Memory) -> FwCfg {
    let count = |vcpus: u8| u16::from(vcpus).to_le_bytes().to_vec();
    let tables = smbios::build(machine.id);
    let mut items = FwCfgBuilder::default();
    if let Some(ramfb) = &machine.ramfb {
        items = items.file(RAMFB_FILE, Content::Writable(ramfb.clone()));
    }
    if let Some(end) = machine.reserved_end {
        items = items.file(RESERVED_END_FILE, Content::Bytes(end.to_le_bytes().to_vec()));
    }
    items
        .item(CPUS, count(machine.vcpus))
        .item(MAX_CPUS, count(machine.max_vcpus))
        .item(BOOT_MENU, 1u16.to_le_bytes().to_vec())
        .file(BOOT_MENU_WAIT_FILE, Content::Bytes(0u16.to_le_bytes().to_vec()))
        .file(BOOT_ORDER_FILE, Content::Bytes(boot_order(&machine.boot_slots)))
        .file(E820_FILE, Content::Bytes(memory_map(machine.memory_size)))
        .file(SYSTEM_STATES_FILE, Content::Bytes(SYSTEM_STATES.to_vec()))
        .file(smbios::ANCHOR_FILE, Content::Bytes(tables.anchor))
        .file(smbios::TABLES_FILE, Content::Bytes(tables.tables))
        .file(RSDP_FILE, on_select(machine, |files| files.rsdp))
        .file(TABLES_FILE, on_select(machine, |files| files.tables))
        .file(LOADER_FILE, on_select(machine, |files| files.commands))
        .build(memory.clone())
}

fn on_select(machine: &Machine, pick: fn(Files) -> Vec<u8>) -> Content {
    let describe = machine.describe.clone();
    Content::OnSelect(Arc::new(move || pick(loader::files(Tables::build(&describe())))))
}

/// Open Firmware paths of virtio disks, one a line, as OVMF's boot manager compares them with its own.
fn boot_order(slots: &[usize]) -> Vec<u8> {
    let mut order: Vec<u8> =
        slots.iter().flat_map(|slot| format!("/pci@i0cf8/scsi@{slot:x}/disk@0,0\n").into_bytes()).collect();
    if !order.is_empty() {
        order.push(0);
    }
    order
}

/// RAM and what lies in between, as `struct e820_entry`: address and length of 8 bytes, type of 4.
fn memory_map(memory_size: u64) -> Vec<u8> {
    use crate::layout::{KVM_IDENTITY_MAP_START, KVM_PAGES_LEN};
    let ram = ram_ranges(memory_size).into_iter().map(|(start, len)| (start, len, e820::RangeKind::Usable));
    let kvm = (KVM_IDENTITY_MAP_START, KVM_PAGES_LEN, e820::RangeKind::Reserved);
    let entry = |(start, len, kind): (u64, u64, e820::RangeKind)| {
        [&start.to_le_bytes()[..], &len.to_le_bytes(), &kind.code().to_le_bytes()].concat()
    };
    ram.chain([kvm]).flat_map(entry).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::GIB;

    #[test]
    fn the_boot_order_is_a_text_with_an_end() {
        assert_eq!(boot_order(&[2, 17]), b"/pci@i0cf8/scsi@2/disk@0,0\n/pci@i0cf8/scsi@11/disk@0,0\n\0");
        assert_eq!(boot_order(&[]), b"");
    }

    #[test]
    fn the_memory_map_has_all_memory() {
        let map = memory_map(8 * GIB);
        assert_eq!(map.len(), 3 * 20);
        let usable: u64 = map
            .chunks(20)
            .filter(|entry| entry[16] == 1)
            .map(|entry| u64::from_le_bytes(entry[8..16].try_into().unwrap()))
            .sum();
        assert_eq!(usable, 8 * GIB);
    }
}
