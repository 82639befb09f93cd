//! ACPI: the tables that describe the machine to the guest ([`tables`], [`dsdt`]) and the power-management registers that
//! they point to ([`power`]).

pub(crate) mod dsdt;
pub(crate) mod power;
pub(crate) mod tables;
