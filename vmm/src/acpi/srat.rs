//! The SRAT (ACPI 6.5, 5.2.16): which memory there may be. Only guests have one that can plug memory: their kernels learn from it how far
//! addresses of memory may go, which they cannot tell from what is there when they boot.

use acpi_tables::sdt::Sdt;

use super::tables::{OEM_ID, OEM_REVISION, OEM_TABLE_ID};
use crate::memory::{Layout, ram_ranges};

const ENABLED: u32 = 1;
const HOT_PLUGGABLE: u32 = 2;

/// Builds the table of a machine whose processors and memory all are of one domain.
pub(super) fn build(vcpus: u8, memory: Layout) -> Sdt {
    let mut srat = Sdt::new(*b"SRAT", 36, 3, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    // A field that has to be 1, and one that is reserved.
    srat.append_slice(&1u32.to_le_bytes());
    srat.append_slice(&[0; 8]);
    for id in 0..vcpus {
        srat.append_slice(&processor(id));
    }
    for (start, length) in ram_ranges(memory.boot) {
        srat.append_slice(&range(start, length, ENABLED));
    }
    if let Some(region) = memory.region() {
        srat.append_slice(&range(region.start, region.end - region.start, ENABLED | HOT_PLUGGABLE));
    }
    srat
}

/// A local APIC of domain 0.
fn processor(id: u8) -> [u8; 16] {
    let mut entry = [0; 16];
    entry[1] = 16;
    entry[3] = id;
    entry[4..8].copy_from_slice(&ENABLED.to_le_bytes());
    entry
}

/// Memory of domain 0.
fn range(start: u64, length: u64, flags: u32) -> [u8; 40] {
    let mut entry = [0; 40];
    (entry[0], entry[1]) = (1, 40);
    entry[8..16].copy_from_slice(&start.to_le_bytes());
    entry[16..24].copy_from_slice(&length.to_le_bytes());
    entry[28..32].copy_from_slice(&flags.to_le_bytes());
    entry
}

#[cfg(test)]
mod tests {
    use acpi_tables::Aml;

    use super::*;
    use crate::layout::GIB;

    #[test]
    fn all_memory_is_in_it_and_what_may_come_is_marked() {
        let memory = Layout { boot: 4 * GIB, pluggable: 3 * GIB };
        let mut table = Vec::new();
        build(2, memory).to_aml_bytes(&mut table);
        assert_eq!(table.len(), 48 + 2 * 16 + 3 * 40);
        let ranges: Vec<_> = table[80..]
            .chunks(40)
            .map(|entry| {
                let number = |at: usize| u64::from_le_bytes(entry[at..at + 8].try_into().unwrap());
                (number(8), number(16), entry[28])
            })
            .collect();
        let region = memory.region().unwrap();
        assert_eq!(ranges.last(), Some(&(region.start, 3 * GIB, 3)));
        assert_eq!(ranges[..2].iter().map(|(_, length, _)| length).sum::<u64>(), 4 * GIB);
        assert!(region.start >= ranges[1].0 + ranges[1].1);
    }
}
