//! ACPI: the tables that describe the machine to the guest ([`tables`], [`dsdt`], for firmware [`loader`]), the power-management
//! registers that they point to ([`power`]; their interrupt is [`sci`]), the port for panics that they name ([`panic`]), and what they say about parts
//! that come and go ([`hotplug`]).

mod dsdt;
mod hotplug;
pub(crate) mod loader;
pub(crate) mod panic;
pub(crate) mod power;
pub(crate) mod sci;
pub(crate) mod tables;
