//! UEFI firmware: stock OVMF, which expects a Q35 machine and asks it about itself.
//!
//! - [`flash`] is where its code runs and where its variables are; [`pflash`] is the chip's model, [`store`] keeps the variables,
//!   [`variables`] tells a damaged store.
//! - [`fw_cfg`] answers its questions, [`items`] says what, [`smbios`] who the machine is. ACPI tables come from [`crate::acpi`].

pub(crate) mod flash;
pub(crate) mod fw_cfg;
pub(crate) mod items;
mod pflash;
mod smbios;
pub(crate) mod store;
mod variables;
