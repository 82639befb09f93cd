//! The tables: RSDP, XSDT, FADT, FACS, MADT, MCFG and DSDT. For a kernel that is booted directly they are written to guest memory once,
//! before the start; firmware fetches them ([`super::loader`]).
//!
//! Full (not hardware-reduced) ACPI, with a fixed power button on the PM1 block, because that is also what stock firmware expects.

use std::ops::Range;

use acpi_tables::Aml;
use acpi_tables::facs::FACS;
use acpi_tables::fadt::{FADT, FADTBuilder, Flags, PmProfile};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, ProcessorLocalApic};
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::dsdt;
use super::power::RESET_VALUE;
use crate::hotplug::registers::EVENT_BLOCK_LEN;
use crate::layout::{
    ACPI_END, ACPI_START, ECAM_START, HOTPLUG_PORT, IOAPIC_START, LAPIC_START, PM_TIMER_PORT,
    PM1_CONTROL_PORT, PM1_EVENT_PORT, RESET_PORT, SCI_IRQ,
};
use crate::memory::Memory;

pub(super) const OEM_ID: [u8; 6] = *b"HCI   ";
pub(super) const OEM_TABLE_ID: [u8; 8] = *b"HCIVMM  ";
pub(super) const OEM_REVISION: u32 = 1;
/// FADT `IAPC_BOOT_ARCH`: no VGA to probe, and none of the older devices but the clock, and the keyboard controller if there is a keyboard.
const BOOT_ARCH_NO_VGA: u16 = 1 << 2;
const BOOT_ARCH_8042: u16 = 1 << 1;

/// Whether there is a PS/2 keyboard.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Keyboard {
    Absent,
    Present,
}

/// What the tables tell of a machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Description {
    /// Processors that are there.
    pub(crate) vcpus: u8,
    /// Processors that there may be.
    pub(crate) max_vcpus: u8,
    /// Where configuration space is.
    pub(crate) ecam: u64,
    /// Memory of PCI functions above 4 GiB, if there is any.
    pub(crate) high_window: Option<Range<u64>>,
    pub(crate) keyboard: Keyboard,
}

impl Description {
    /// Of a machine whose devices are where the VMM put them.
    pub(crate) fn initial(vcpus: u8, max_vcpus: u8) -> Self {
        let keyboard = Keyboard::Absent;
        Self { vcpus, max_vcpus, ecam: ECAM_START, high_window: None, keyboard }
    }
}

/// All tables but the RSDP, one after the other, with pointers that count from the beginning.
pub(crate) struct Tables {
    pub(super) blob: Vec<u8>,
    /// Where pointers are, and their sizes.
    pub(super) pointers: Vec<(usize, usize)>,
    /// The tables that have a checksum.
    pub(super) summed: Vec<Range<usize>>,
    pub(super) xsdt: usize,
}

/// Where tables have their checksum (ACPI 6.5, 5.2.6).
pub(super) const CHECKSUM: usize = 9;
/// Where the FADT has its pointers to FACS and DSDT, and the 64-bit one to the DSDT (ACPI 6.5, 5.2.9).
const FADT_FACS: usize = 36;
const FADT_DSDT: usize = 40;
const FADT_X_DSDT: usize = 140;
/// Length of a table's header; the XSDT's entries follow.
const HEADER: usize = 36;
/// FACS needs 64; the others take it too.
pub(super) const ALIGNMENT: usize = 64;

impl Tables {
    /// Builds the tables of a machine.
    pub(crate) fn build(machine: &Description) -> Self {
        let mut tables = Self { blob: Vec::new(), pointers: Vec::new(), summed: Vec::new(), xsdt: 0 };
        let facs = tables.place(&FACS::new());
        let dsdt = tables.place_summed(&dsdt::build(machine));
        let fadt = tables.place_summed(&fadt(machine.keyboard, dsdt as u64, facs as u64));
        let pointers = [(FADT_FACS, 4), (FADT_DSDT, 4), (FADT_X_DSDT, 8)];
        tables.pointers.extend(pointers.map(|(at, size)| (fadt + at, size)));
        let others = [tables.place_summed(&madt(machine)), tables.place_summed(&mcfg(machine.ecam))];
        let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
        let entries = [fadt].into_iter().chain(others);
        entries.clone().for_each(|table| xsdt.add_entry(table as u64));
        tables.xsdt = tables.place_summed(&xsdt);
        let first = tables.xsdt + HEADER;
        tables.pointers.extend((0..entries.count()).map(|entry| (first + 8 * entry, 8)));
        tables
    }

    fn place(&mut self, table: &dyn Aml) -> usize {
        let at = self.blob.len().next_multiple_of(ALIGNMENT);
        self.blob.resize(at, 0);
        table.to_aml_bytes(&mut self.blob);
        at
    }

    fn place_summed(&mut self, table: &dyn Aml) -> usize {
        let at = self.place(table);
        self.summed.push(at..self.blob.len());
        at
    }

    /// Puts the tables and the RSDP into low memory, where a guest that is told nothing looks for them; returns where the RSDP is.
    pub(crate) fn write(mut self, memory: &Memory) -> Result<GuestAddress, GuestMemoryError> {
        let start = ACPI_START + ALIGNMENT as u64;
        let end = start + self.blob.len() as u64;
        if end > ACPI_END {
            return Err(GuestMemoryError::InvalidGuestAddress(GuestAddress(end)));
        }
        for (at, size) in &self.pointers {
            let field = &mut self.blob[*at..at + size];
            let mut value = [0; 8];
            value[..*size].copy_from_slice(field);
            let value = u64::from_le_bytes(value) + start;
            field.copy_from_slice(&value.to_le_bytes()[..*size]);
        }
        for table in &self.summed {
            let table = &mut self.blob[table.clone()];
            table[CHECKSUM] = 0;
            table[CHECKSUM] = table.iter().fold(0u8, |sum, byte| sum.wrapping_sub(*byte));
        }
        memory.write_slice(&self.blob, GuestAddress(start))?;
        memory.write_slice(&self.rsdp(start), GuestAddress(ACPI_START))?;
        Ok(GuestAddress(ACPI_START))
    }

    /// The RSDP of tables that begin at an address.
    pub(super) fn rsdp(&self, start: u64) -> Vec<u8> {
        bytes(&Rsdp::new(OEM_ID, start + self.xsdt as u64))
    }
}

fn bytes(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

fn io_register(port: u16, bits: u8, access: AccessSize) -> GAS {
    GAS::new(AddressSpace::SystemIo, bits, 0, access, port.into())
}

fn fadt(keyboard: Keyboard, dsdt: u64, facs: u64) -> FADT {
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt)
        .preferred_pm_profile(PmProfile::EnterpriseServer)
        .flag(Flags::Wbinvd)
        .flag(Flags::ProcC1)
        .flag(Flags::SlpButton)
        .flag(Flags::FixRtc)
        .flag(Flags::ResetRegSup)
        .flag(Flags::TmrValExt);
    // All of these addresses are below 4 GiB; the 32-bit fields are what ACPICA prefers when both are set.
    fadt.dsdt = (dsdt as u32).into();
    fadt.firmware_ctrl = (facs as u32).into();
    fadt.sci_int = (SCI_IRQ as u16).into();
    fadt.pm1a_evt_blk = u32::from(PM1_EVENT_PORT).into();
    fadt.pm1_evt_len = 4;
    fadt.pm1a_cnt_blk = u32::from(PM1_CONTROL_PORT).into();
    fadt.pm1_cnt_len = 2;
    fadt.pm_tmr_blk = u32::from(PM_TIMER_PORT).into();
    fadt.pm_tmr_len = 4;
    fadt.gpe0_blk = u32::from(HOTPLUG_PORT).into();
    fadt.gpe0_blk_len = EVENT_BLOCK_LEN;
    fadt.x_gpe0_blk = io_register(HOTPLUG_PORT, 8 * EVENT_BLOCK_LEN, AccessSize::ByteAccess);
    fadt.x_pm_tmr_blk = io_register(PM_TIMER_PORT, 32, AccessSize::DwordAccess);
    fadt.x_pm1a_evt_blk = io_register(PM1_EVENT_PORT, 32, AccessSize::WordAccess);
    fadt.x_pm1a_cnt_blk = io_register(PM1_CONTROL_PORT, 16, AccessSize::WordAccess);
    fadt.reset_reg = io_register(RESET_PORT, 8, AccessSize::ByteAccess);
    fadt.reset_value = RESET_VALUE;
    // C2 and C3 do not exist: latencies above these bounds say so.
    fadt.p_lvl2_lat = 101.into();
    fadt.p_lvl3_lat = 1001.into();
    fadt.iapc_boot_arch = match keyboard {
        Keyboard::Absent => BOOT_ARCH_NO_VGA.into(),
        Keyboard::Present => (BOOT_ARCH_NO_VGA | BOOT_ARCH_8042).into(),
    };
    fadt.finalize()
}

fn madt(machine: &Description) -> Sdt {
    /// The machine also has a pair of 8259 PICs.
    const PCAT_COMPAT: u32 = 1;
    /// Interrupt source override, for the SCI: active high, level triggered.
    const SOURCE_OVERRIDE: [u8; 10] = [2, 10, 0, SCI_IRQ as u8, SCI_IRQ as u8, 0, 0, 0, 0b1101, 0];
    /// NMI on LINT1 of all processors.
    const LAPIC_NMI: [u8; 6] = [4, 6, 0xff, 0, 0, 1];
    let mut madt = Sdt::new(*b"APIC", 36, 5, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    madt.append_slice(&LAPIC_START.to_le_bytes());
    madt.append_slice(&PCAT_COMPAT.to_le_bytes());
    for id in 0..machine.max_vcpus {
        let status = match id < machine.vcpus {
            true => EnabledStatus::Enabled,
            false => EnabledStatus::DisabledOnlineCapable,
        };
        madt.append_slice(&bytes(&ProcessorLocalApic::new(id, id, status)));
    }
    madt.append_slice(&bytes(&IoApic::new(0, IOAPIC_START, 0)));
    madt.append_slice(&SOURCE_OVERRIDE);
    madt.append_slice(&LAPIC_NMI);
    madt
}

fn mcfg(ecam: u64) -> MCFG {
    let mut mcfg = MCFG::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    mcfg.add_ecam(ecam, 0, 0, 0);
    mcfg
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::MIB;

    fn read(memory: &Memory, at: u64, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        memory.read_slice(&mut data, GuestAddress(at)).unwrap();
        data
    }

    fn table(memory: &Memory, at: u64) -> Vec<u8> {
        let len: u32 = memory.read_obj(GuestAddress(at + 4)).unwrap();
        read(memory, at, len as usize)
    }

    fn sums_to_zero(bytes: &[u8]) -> bool {
        bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)) == 0
    }

    #[test]
    fn a_guest_finds_every_table_from_the_rsdp() {
        let memory = crate::memory::create(16 * MIB).unwrap();
        let rsdp_at = Tables::build(&Description::initial(4, 6)).write(&memory).unwrap();
        let rsdp = read(&memory, rsdp_at.0, 36);
        assert_eq!(&rsdp[..8], b"RSD PTR ");
        assert!(sums_to_zero(&rsdp[..20]) && sums_to_zero(&rsdp));
        let xsdt = table(&memory, u64::from_le_bytes(rsdp[24..32].try_into().unwrap()));
        assert!(sums_to_zero(&xsdt));
        let mut signatures = Vec::new();
        for entry in xsdt[36..].chunks(8) {
            let table = table(&memory, u64::from_le_bytes(entry.try_into().unwrap()));
            assert!(sums_to_zero(&table), "{:?}", &table[..4]);
            if &table[..4] == b"FACP" {
                let dsdt = self::table(&memory, u32::from_le_bytes(table[40..44].try_into().unwrap()).into());
                assert_eq!(&dsdt[..4], b"DSDT");
                assert!(sums_to_zero(&dsdt));
                let facs = u32::from_le_bytes(table[36..40].try_into().unwrap());
                assert_eq!(facs % 64, 0);
                assert_eq!(read(&memory, facs.into(), 4), b"FACS");
            }
            signatures.push(table[..4].to_vec());
        }
        assert_eq!(signatures, [b"FACP", b"APIC", b"MCFG"]);
    }

    #[test]
    fn a_keyboard_is_told_of_only_where_there_is_one() {
        let arch_and_name = |keyboard| {
            let tables = Tables::build(&Description { keyboard, ..Description::initial(1, 1) });
            let fadt = tables.blob.windows(4).position(|at| at == b"FACP").unwrap();
            let named = tables.blob.windows(4).any(|at| at == b"KBD_");
            (u16::from_le_bytes([tables.blob[fadt + 109], tables.blob[fadt + 110]]), named)
        };
        assert_eq!(arch_and_name(Keyboard::Absent), (BOOT_ARCH_NO_VGA, false));
        assert_eq!(arch_and_name(Keyboard::Present), (BOOT_ARCH_NO_VGA | BOOT_ARCH_8042, true));
    }

    #[test]
    fn tables_of_the_largest_machine_fit() {
        let memory = crate::memory::create(16 * MIB).unwrap();
        Tables::build(&Description::initial(1, 254)).write(&memory).unwrap();
    }
}
