//! CPUID of each vCPU: what KVM supports, plus its APIC id and the topology (one socket, one thread to a core), minus
//! nested virtualization.

use kvm_bindings::{CpuId, kvm_cpuid_entry2};

/// Leaf 1 ECX.
const VMX: u32 = 1 << 5;
const TSC_DEADLINE: u32 = 1 << 24;
const HYPERVISOR: u32 = 1 << 31;
/// Leaf 1 EDX: the fields on logical processors are valid.
const HTT: u32 = 1 << 28;
/// Leaf 0x8000_0001 ECX.
const CMP_LEGACY: u32 = 1 << 1;
const SVM: u32 = 1 << 2;

/// Facts about the machine that the leaves need.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Topology {
    pub(crate) vcpus: u8,
    pub(crate) tsc_deadline: bool,
}

impl Topology {
    /// Bits of an APIC id that number cores.
    fn core_bits(self) -> u32 {
        u32::from(self.vcpus).next_power_of_two().trailing_zeros()
    }
}

/// The leaves for vCPU `id`.
pub(crate) fn for_vcpu(supported: &CpuId, topology: Topology, id: u8) -> CpuId {
    let mut cpuid = supported.clone();
    for entry in cpuid.as_mut_slice() {
        adjust(entry, topology, id);
    }
    cpuid
}

fn adjust(entry: &mut kvm_cpuid_entry2, topology: Topology, id: u8) {
    let vcpus = u32::from(topology.vcpus);
    match entry.function {
        0x1 => {
            entry.ecx = entry.ecx & !VMX | HYPERVISOR;
            set_bits(&mut entry.ecx, TSC_DEADLINE, topology.tsc_deadline);
            set_bits(&mut entry.edx, HTT, vcpus > 1);
            // Initial APIC id, number of logical processors; the CLFLUSH and brand fields stay.
            entry.ebx = entry.ebx & 0xffff | u32::from(id) << 24 | vcpus << 16;
        }
        // Intel's caches: the first two levels belong to a core, the others to the package.
        0x4 => {
            let level = entry.eax >> 5 & 0x7;
            let sharing = if level > 2 { vcpus - 1 } else { 0 };
            entry.eax =
                entry.eax & 0x3fff | sharing << 14 | ((1 << topology.core_bits()) - 1).min(0x3f) << 26;
        }
        // Extended topology: level 0 is the thread, level 1 the core.
        0xb | 0x1f => {
            let (shift, count, kind) = match entry.index {
                0 => (0, 1, 1),
                1 => (topology.core_bits(), vcpus, 2),
                _ => (0, 0, 0),
            };
            entry.eax = shift;
            entry.ebx = count;
            entry.ecx = entry.index & 0xff | kind << 8;
            entry.edx = id.into();
        }
        0x8000_0001 => {
            entry.ecx &= !SVM;
            set_bits(&mut entry.ecx, CMP_LEGACY, vcpus > 1);
        }
        // AMD: number of cores and the bits of the APIC id that number them.
        0x8000_0008 => entry.ecx = entry.ecx & !0xf0ff | topology.core_bits() << 12 | (vcpus - 1),
        // AMD SVM features: there is no SVM.
        0x8000_000a => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
        // AMD's caches, as leaf 4.
        0x8000_001d => {
            let level = entry.eax >> 5 & 0x7;
            let sharing = if level > 2 { vcpus - 1 } else { 0 };
            entry.eax = entry.eax & 0x3fff | sharing << 14;
        }
        // AMD: extended APIC id, core id, one thread to a core, node 0 of 1.
        0x8000_001e => {
            entry.eax = id.into();
            entry.ebx = id.into();
            entry.ecx = 0;
        }
        _ => {}
    }
}

fn set_bits(register: &mut u32, bits: u32, on: bool) {
    if on { *register |= bits } else { *register &= !bits }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaves(vcpus: u8, id: u8) -> Vec<kvm_cpuid_entry2> {
        let functions = [(1, 0), (0xb, 0), (0xb, 1), (0x8000_0001, 0), (0x8000_0008, 0), (0x8000_001e, 0)];
        let all_ones = u32::MAX;
        let entries: Vec<_> = functions
            .iter()
            .map(|(function, index)| kvm_cpuid_entry2 {
                function: *function,
                index: *index,
                eax: all_ones,
                ebx: all_ones,
                ecx: all_ones,
                edx: all_ones,
                ..Default::default()
            })
            .collect();
        let supported = CpuId::from_entries(&entries).unwrap();
        for_vcpu(&supported, Topology { vcpus, tsc_deadline: true }, id).as_slice().to_vec()
    }

    #[test]
    fn each_vcpu_knows_its_place() {
        let leaves = leaves(3, 2);
        assert_eq!(leaves[0].ebx >> 16, 2 << 8 | 3);
        assert_eq!((leaves[1].eax, leaves[1].ebx, leaves[1].edx), (0, 1, 2));
        assert_eq!((leaves[2].eax, leaves[2].ebx, leaves[2].ecx >> 8), (2, 3, 2));
        assert_eq!(leaves[4].ecx & 0xf0ff, 2 << 12 | 2);
        assert_eq!(leaves[5].eax, 2);
    }

    #[test]
    fn nested_virtualization_is_not_offered() {
        let leaves = leaves(1, 0);
        assert_eq!(leaves[0].ecx & (VMX | HYPERVISOR), HYPERVISOR);
        assert_eq!(leaves[0].edx & HTT, 0);
        assert_eq!(leaves[3].ecx & (SVM | CMP_LEGACY), 0);
    }
}
