//! The memory map told to the kernel, in the neutral form that both boot protocols write down in their own way.

use crate::layout::{
    ACPI_END, ACPI_START, EBDA_START, ECAM_SIZE, ECAM_START, HIGH_MEMORY_START, KVM_IDENTITY_MAP_START,
    KVM_PAGES_LEN,
};
use crate::memory::ram_ranges;

/// Whether the kernel may use a range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum RangeKind {
    /// RAM for the kernel's use (type 1 of E820 and of PVH).
    Usable,
    /// To be left alone (type 2 of both).
    Reserved,
}

impl RangeKind {
    /// The number that stands for it in both protocols.
    pub(crate) fn code(self) -> u32 {
        match self {
            Self::Usable => 1,
            Self::Reserved => 2,
        }
    }
}

/// A line of the memory map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct MapRange {
    pub(crate) start: u64,
    pub(crate) len: u64,
    pub(crate) kind: RangeKind,
}

fn range(kind: RangeKind, start: u64, end: u64) -> MapRange {
    MapRange { start, len: end - start, kind }
}

/// The map of a guest with `memory_size` bytes, ascending and without overlap.
pub(crate) fn memory_map(memory_size: u64) -> Vec<MapRange> {
    use RangeKind::{Reserved, Usable};
    let mut map = vec![range(Usable, 0, EBDA_START), range(Reserved, ACPI_START, ACPI_END)];
    for (start, len) in ram_ranges(memory_size) {
        map.push(range(Usable, start.max(HIGH_MEMORY_START), start + len));
    }
    map.push(range(Reserved, ECAM_START, ECAM_START + ECAM_SIZE));
    map.push(range(Reserved, KVM_IDENTITY_MAP_START, KVM_IDENTITY_MAP_START + KVM_PAGES_LEN));
    map.sort_by_key(|range| range.start);
    map
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::{GIB, MIB};

    #[test]
    fn the_map_ascends_without_overlap_and_holds_all_high_memory() {
        for size in [64 * MIB, 3 * GIB, 16 * GIB] {
            let map = memory_map(size);
            for pair in map.windows(2) {
                assert!(pair[0].start + pair[0].len <= pair[1].start, "{pair:?}");
            }
            let usable: u64 = map.iter().filter(|r| r.kind == RangeKind::Usable).map(|r| r.len).sum();
            assert_eq!(usable, size - MIB + EBDA_START);
        }
    }
}
