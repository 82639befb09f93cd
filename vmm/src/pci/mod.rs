//! PCI Express, bus 0 only: configuration space by ECAM and by ports 0xcf8/0xcfc, memory BARs, MSI-X.
//!
//! [`config_space`] and [`msix`] are register models without I/O; [`root`] dispatches the guest's accesses.

pub(crate) mod config_space;
pub(crate) mod host_bridge;
pub(crate) mod msix;
pub(crate) mod root;
pub(crate) mod slots;

pub(crate) use root::{PciDevice, PciRoot};
