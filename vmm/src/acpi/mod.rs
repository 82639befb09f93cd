//! ACPI: the tables that describe the machine to the guest ([`tables`], [`dsdt`], for firmware [`loader`]), the power-management
//! registers that they point to ([`power`]), and the port for panics that they name ([`panic`]).

mod dsdt;
pub(crate) mod loader;
pub(crate) mod panic;
pub(crate) mod power;
mod srat;
pub(crate) mod tables;
