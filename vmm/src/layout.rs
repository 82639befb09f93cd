//! The guest's address map: one place for every fixed address, so that ACPI, the boot code and the buses cannot
//! disagree.
//!
//! The map is that of a Q35 machine (RAM below 2.75 GiB, the PCI hole above it, the rest of the RAM from 4 GiB on), because
//! stock UEFI firmware expects it. Low memory below 1 MiB holds what the VMM hands to the kernel at start.

/// One KiB.
pub(crate) const KIB: u64 = 1 << 10;
/// One MiB.
pub(crate) const MIB: u64 = 1 << 20;
/// One GiB.
pub(crate) const GIB: u64 = 1 << 30;

/// Global descriptor table for the first instruction.
pub(crate) const GDT_START: u64 = 0x500;
/// `hvm_start_info` of a PVH kernel.
pub(crate) const PVH_INFO_START: u64 = 0x6000;
/// Module list of a PVH kernel.
pub(crate) const PVH_MODULES_START: u64 = 0x6040;
/// Memory map of a PVH kernel.
pub(crate) const PVH_MEMMAP_START: u64 = 0x6100;
/// `boot_params` (the "zero page") of a bzImage.
pub(crate) const ZERO_PAGE_START: u64 = 0x7000;
/// First of the six pages of the identity map for 64-bit entry.
pub(crate) const PAGE_TABLES_START: u64 = 0x9000;
/// Kernel command line.
pub(crate) const CMDLINE_START: u64 = 0x2_0000;
/// Longest command line with its final NUL; what Linux on x86 accepts.
pub(crate) const CMDLINE_MAX: usize = 2048;
/// End of conventional memory; the EBDA would start here.
pub(crate) const EBDA_START: u64 = 0x9_fc00;
/// RSDP and the ACPI tables, up to 1 MiB.
pub(crate) const ACPI_START: u64 = 0xe_0000;
/// End of the ACPI area.
pub(crate) const ACPI_END: u64 = MIB;
/// Where kernels are loaded: above all of the above.
pub(crate) const HIGH_MEMORY_START: u64 = MIB;

/// RAM below 4 GiB ends here at most.
pub(crate) const LOW_RAM_MAX: u64 = 0xb000_0000;
/// RAM above the hole starts here.
pub(crate) const HIGH_RAM_START: u64 = 4 * GIB;

/// 32-bit window for PCI memory BARs.
pub(crate) const PCI_MMIO_START: u64 = 0xc000_0000;
/// End (exclusive) of the 32-bit window.
pub(crate) const PCI_MMIO_END: u64 = 0xe000_0000;
/// End of what the guest's processors can address at most.
pub(crate) const PHYSICAL_END: u64 = 1 << 52;
/// Where firmware may put configuration space: OVMF of 2022 and that of 2025.
pub(crate) const ECAM_PLACES: [u64; 2] = [0xb000_0000, 0xe000_0000];
/// Length of each of these places.
pub(crate) const ECAM_PLACE_LEN: u64 = 256 * MIB;
/// PCI Express enhanced configuration space, before firmware moves it.
pub(crate) const ECAM_START: u64 = 0xe000_0000;
/// Only bus 0 exists: 32 devices of 8 functions of 4 KiB.
pub(crate) const ECAM_SIZE: u64 = MIB;
/// IOAPIC registers (in the kernel).
pub(crate) const IOAPIC_START: u32 = 0xfec0_0000;
/// Local APIC registers (in the kernel).
pub(crate) const LAPIC_START: u32 = 0xfee0_0000;
/// Page that Intel's KVM needs for its identity map.
pub(crate) const KVM_IDENTITY_MAP_START: u64 = 0xfeff_c000;
/// Length of all of KVM's own pages.
pub(crate) const KVM_PAGES_LEN: u64 = 0x4000;
/// Three pages that Intel's KVM needs for real mode.
pub(crate) const KVM_TSS_START: u64 = 0xfeff_d000;

/// fw_cfg: selector, data, DMA address.
pub(crate) const FW_CFG_PORT: u16 = 0x510;
/// Real-time clock: index and data.
pub(crate) const CMOS_PORT: u16 = 0x70;
/// First serial port.
pub(crate) const COM1_PORT: u16 = 0x3f8;
/// Its interrupt line.
pub(crate) const COM1_IRQ: u32 = 4;
/// PCI configuration mechanism #1: address and data.
pub(crate) const PCI_CONFIG_PORT: u16 = 0xcf8;
/// Reset control register, inside the ports of the former.
pub(crate) const RESET_PORT: u16 = 0xcf9;
/// Keyboard controller: data.
pub(crate) const I8042_DATA_PORT: u16 = 0x60;
/// The keyboard's interrupt line.
pub(crate) const KEYBOARD_IRQ: u32 = 1;
/// Keyboard controller: command and status. Without a display, the reset pulse only.
pub(crate) const I8042_COMMAND_PORT: u16 = 0x64;
/// ACPI PM1 event block (status and enable).
pub(crate) const PM1_EVENT_PORT: u16 = 0x600;
/// Where guests say that they have panicked, as with QEMU.
pub(crate) const PANIC_PORT: u16 = 0x505;
/// ACPI PM1 control block.
pub(crate) const PM1_CONTROL_PORT: u16 = 0x604;
/// ACPI PM timer.
pub(crate) const PM_TIMER_PORT: u16 = 0x608;
/// General-purpose events of ACPI, with the registers of what comes and goes behind them.
pub(crate) const HOTPLUG_PORT: u16 = 0x620;
/// System control interrupt of ACPI.
pub(crate) const SCI_IRQ: u32 = 9;
/// First interrupt line that is free for MSI routes; the IOAPIC has those below.
pub(crate) const MSI_GSI_START: u32 = 24;
