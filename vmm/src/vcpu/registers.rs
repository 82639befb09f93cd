//! State of a vCPU before its first instruction. Application processors keep what KVM gives them: they wait for the INIT and SIPI of
//! the boot processor.

use kvm_bindings::{Msrs, kvm_lapic_state, kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs};
use kvm_ioctls::VcpuFd;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use crate::boot::Entry;
use crate::error::{VmError, kvm};
use crate::layout::{GDT_START, PAGE_TABLES_START};
use crate::memory::Memory;

const CR0_PE: u64 = 1 << 0;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// Bit 1 of RFLAGS is always set.
const RFLAGS_RESERVED: u64 = 1 << 1;
/// Memory type ranges: enabled, everything write-back. Without firmware nobody else would say so.
const MSR_MTRR_DEF_TYPE: u32 = 0x2ff;
const MTRR_ENABLED_WRITE_BACK: u64 = 1 << 11 | 6;
/// Fast string operations are on.
const MSR_MISC_ENABLE: u32 = 0x1a0;
const MISC_ENABLE_FAST_STRING: u64 = 1;

/// One flat segment of 4 GiB.
fn segment(index: u16, kind: u8, long: bool) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector: index * 8,
        type_: kind,
        present: 1,
        dpl: 0,
        db: (!long).into(),
        s: 1,
        l: long.into(),
        g: 1,
        ..Default::default()
    }
}

/// The descriptor that the processor would have loaded to get this segment.
fn descriptor(segment: &kvm_segment) -> u64 {
    let limit = u64::from(segment.limit >> 12);
    let access = u64::from(segment.type_)
        | u64::from(segment.s) << 4
        | u64::from(segment.dpl) << 5
        | u64::from(segment.present) << 7;
    let flags = u64::from(segment.l) << 1 | u64::from(segment.db) << 2 | u64::from(segment.g) << 3;
    limit & 0xffff | access << 40 | (limit >> 16) << 48 | flags << 52
}

/// Accessed execute/read code, accessed read/write data.
const CODE: u8 = 0b1011;
const DATA: u8 = 0b0011;

/// Writes the descriptor table that both entries use: null, code, data.
pub(crate) fn write_gdt(memory: &Memory, entry: Entry) -> Result<(), GuestMemoryError> {
    let long = matches!(entry, Entry::LongMode { .. });
    let table = [0, 0, descriptor(&segment(2, CODE, long)), descriptor(&segment(3, DATA, false))];
    for (index, descriptor) in table.iter().enumerate() {
        memory.write_obj(*descriptor, GuestAddress(GDT_START + 8 * index as u64))?;
    }
    Ok(())
}

/// Sets up the boot processor for the kernel's entry.
pub(crate) fn setup_boot_processor(vcpu: &VcpuFd, entry: Entry) -> Result<(), VmError> {
    let mut sregs = vcpu.get_sregs().map_err(kvm("KVM_GET_SREGS"))?;
    set_segments(&mut sregs, entry);
    let regs = match entry {
        Entry::LongMode { rip, zero_page } => {
            sregs.cr3 = PAGE_TABLES_START;
            sregs.cr4 |= CR4_PAE;
            sregs.cr0 = CR0_PE | CR0_ET | CR0_PG;
            sregs.efer |= EFER_LME | EFER_LMA;
            kvm_regs { rip, rsi: zero_page, rflags: RFLAGS_RESERVED, ..Default::default() }
        }
        Entry::ProtectedMode { rip, start_info } => {
            sregs.cr0 = CR0_PE | CR0_ET;
            sregs.cr4 = 0;
            kvm_regs { rip, rbx: start_info, rflags: RFLAGS_RESERVED, ..Default::default() }
        }
    };
    vcpu.set_sregs(&sregs).map_err(kvm("KVM_SET_SREGS"))?;
    vcpu.set_regs(&regs).map_err(kvm("KVM_SET_REGS"))
}

fn set_segments(sregs: &mut kvm_sregs, entry: Entry) {
    let long = matches!(entry, Entry::LongMode { .. });
    let data = segment(3, DATA, false);
    sregs.cs = segment(2, CODE, long);
    (sregs.ds, sregs.es, sregs.ss) = (data, data, data);
    (sregs.fs, sregs.gs) = (data, data);
    // A busy TSS is what the processor expects to be there; nothing reads it.
    sregs.tr = kvm_segment { limit: 0x67, type_: 0b1011, present: 1, ..Default::default() };
    sregs.gdt.base = GDT_START;
    sregs.gdt.limit = 4 * 8 - 1;
    sregs.idt.base = 0;
    sregs.idt.limit = 0;
}

/// What firmware would have set on every processor.
pub(crate) fn setup_model_specific(vcpu: &VcpuFd) -> Result<(), VmError> {
    let entry = |index, data| kvm_msr_entry { index, data, ..Default::default() };
    for entry in
        [entry(MSR_MTRR_DEF_TYPE, MTRR_ENABLED_WRITE_BACK), entry(MSR_MISC_ENABLE, MISC_ENABLE_FAST_STRING)]
    {
        let index = entry.index;
        let msrs = Msrs::from_entries(&[entry]).map_err(|_| VmError::MissingCapability("room for MSRs"))?;
        // KVM refuses what this processor does not have; then the guest does not look for it either.
        if vcpu.set_msrs(&msrs).map_err(kvm("KVM_SET_MSRS"))? == 0 {
            tracing::debug!(index, "MSR not there");
        }
    }
    Ok(())
}

/// Connects the local APIC's pins as on a PC: the PIC to LINT0, NMI to LINT1.
pub(crate) fn setup_local_apic(vcpu: &VcpuFd) -> Result<(), VmError> {
    const LVT_LINT0: usize = 0x350;
    const LVT_LINT1: usize = 0x360;
    const MODE_NMI: u32 = 0x4 << 8;
    const MODE_EXTINT: u32 = 0x7 << 8;
    let mut lapic = vcpu.get_lapic().map_err(kvm("KVM_GET_LAPIC"))?;
    set_delivery_mode(&mut lapic, LVT_LINT0, MODE_EXTINT);
    set_delivery_mode(&mut lapic, LVT_LINT1, MODE_NMI);
    vcpu.set_lapic(&lapic).map_err(kvm("KVM_SET_LAPIC"))
}

fn set_delivery_mode(lapic: &mut kvm_lapic_state, register: usize, mode: u32) {
    let old = lapic.regs[register..register + 4]
        .iter()
        .rev()
        .fold(0u32, |value, byte| value << 8 | *byte as u8 as u32);
    let new = old & !0x700 | mode;
    for (slot, byte) in lapic.regs[register..].iter_mut().zip(new.to_le_bytes()) {
        *slot = byte as _;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_are_those_of_the_manuals() {
        assert_eq!(descriptor(&segment(2, CODE, true)), 0x00af_9b00_0000_ffff);
        assert_eq!(descriptor(&segment(2, CODE, false)), 0x00cf_9b00_0000_ffff);
        assert_eq!(descriptor(&segment(3, DATA, false)), 0x00cf_9300_0000_ffff);
    }
}
