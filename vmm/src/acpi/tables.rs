//! The tables, written to guest memory once, before the start: RSDP, XSDT, FADT, FACS, MADT, MCFG and DSDT.
//!
//! Full (not hardware-reduced) ACPI, with a fixed power button on the PM1 block, because that is also what stock firmware expects.

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
use crate::layout::{
    ACPI_END, ACPI_START, ECAM_START, IOAPIC_START, LAPIC_START, PM1_CONTROL_PORT, PM1_EVENT_PORT,
    RESET_PORT, SCI_IRQ,
};
use crate::memory::Memory;

pub(super) const OEM_ID: [u8; 6] = *b"HCI   ";
pub(super) const OEM_TABLE_ID: [u8; 8] = *b"HCIVMM  ";
pub(super) const OEM_REVISION: u32 = 1;
/// FADT `IAPC_BOOT_ARCH`: no VGA to probe, no CMOS clock (guests have kvmclock); also none of the older devices.
const BOOT_ARCH_NO_VGA: u16 = 1 << 2;
const BOOT_ARCH_NO_CMOS_RTC: u16 = 1 << 5;

/// Writes all tables and returns where the RSDP is.
pub(crate) fn write(memory: &Memory, vcpus: u8) -> Result<GuestAddress, GuestMemoryError> {
    // The RSDP comes first, on the paragraph where a guest that is told nothing looks for it.
    let rsdp_at = ACPI_START;
    let mut writer = Writer { memory, next: rsdp_at + 64 };
    let dsdt = writer.place(&dsdt::build(vcpus))?;
    let facs = writer.place(&FACS::new())?;
    let tables = [writer.place(&fadt(dsdt, facs))?, writer.place(&madt(vcpus))?, writer.place(&mcfg())?];
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    for table in tables {
        xsdt.add_entry(table);
    }
    let xsdt = writer.place(&xsdt)?;
    memory.write_slice(&bytes(&Rsdp::new(OEM_ID, xsdt)), GuestAddress(rsdp_at))?;
    Ok(GuestAddress(rsdp_at))
}

/// Lays tables one after the other.
struct Writer<'a> {
    memory: &'a Memory,
    next: u64,
}

impl Writer<'_> {
    /// FACS needs 64; the others take it too.
    const ALIGNMENT: u64 = 64;

    fn place(&mut self, table: &dyn Aml) -> Result<u64, GuestMemoryError> {
        let table = bytes(table);
        let at = self.next;
        let end = at + table.len() as u64;
        if end > ACPI_END {
            return Err(GuestMemoryError::InvalidGuestAddress(GuestAddress(end)));
        }
        self.memory.write_slice(&table, GuestAddress(at))?;
        self.next = end.next_multiple_of(Self::ALIGNMENT);
        Ok(at)
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

fn fadt(dsdt: u64, facs: u64) -> FADT {
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt)
        .preferred_pm_profile(PmProfile::EnterpriseServer)
        .flag(Flags::Wbinvd)
        .flag(Flags::ProcC1)
        .flag(Flags::SlpButton)
        .flag(Flags::FixRtc)
        .flag(Flags::ResetRegSup);
    // All of these addresses are below 4 GiB; the 32-bit fields are what ACPICA prefers when both are set.
    fadt.dsdt = (dsdt as u32).into();
    fadt.firmware_ctrl = (facs as u32).into();
    fadt.sci_int = (SCI_IRQ as u16).into();
    fadt.pm1a_evt_blk = u32::from(PM1_EVENT_PORT).into();
    fadt.pm1_evt_len = 4;
    fadt.pm1a_cnt_blk = u32::from(PM1_CONTROL_PORT).into();
    fadt.pm1_cnt_len = 2;
    fadt.x_pm1a_evt_blk = io_register(PM1_EVENT_PORT, 32, AccessSize::WordAccess);
    fadt.x_pm1a_cnt_blk = io_register(PM1_CONTROL_PORT, 16, AccessSize::WordAccess);
    fadt.reset_reg = io_register(RESET_PORT, 8, AccessSize::ByteAccess);
    fadt.reset_value = RESET_VALUE;
    // C2 and C3 do not exist: latencies above these bounds say so.
    fadt.p_lvl2_lat = 101.into();
    fadt.p_lvl3_lat = 1001.into();
    fadt.iapc_boot_arch = (BOOT_ARCH_NO_VGA | BOOT_ARCH_NO_CMOS_RTC).into();
    fadt.finalize()
}

fn madt(vcpus: u8) -> Sdt {
    /// The machine also has a pair of 8259 PICs.
    const PCAT_COMPAT: u32 = 1;
    /// Interrupt source override, for the SCI: active high, level triggered.
    const SOURCE_OVERRIDE: [u8; 10] = [2, 10, 0, SCI_IRQ as u8, SCI_IRQ as u8, 0, 0, 0, 0b1101, 0];
    /// NMI on LINT1 of all processors.
    const LAPIC_NMI: [u8; 6] = [4, 6, 0xff, 0, 0, 1];
    let mut madt = Sdt::new(*b"APIC", 36, 5, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    madt.append_slice(&LAPIC_START.to_le_bytes());
    madt.append_slice(&PCAT_COMPAT.to_le_bytes());
    for id in 0..vcpus {
        madt.append_slice(&bytes(&ProcessorLocalApic::new(id, id, EnabledStatus::Enabled)));
    }
    madt.append_slice(&bytes(&IoApic::new(0, IOAPIC_START, 0)));
    madt.append_slice(&SOURCE_OVERRIDE);
    madt.append_slice(&LAPIC_NMI);
    madt
}

fn mcfg() -> MCFG {
    let mut mcfg = MCFG::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    mcfg.add_ecam(ECAM_START, 0, 0, 0);
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
        let rsdp_at = write(&memory, 4).unwrap();
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
    fn tables_of_the_largest_machine_fit() {
        let memory = crate::memory::create(16 * MIB).unwrap();
        write(&memory, 254).unwrap();
    }
}
