//! One KVM guest: boots UEFI disks through stock OVMF, or a kernel directly; with vhost-user disks and NICs, a serial console on a socket
//! and nothing else in between.
//!
//! # What it is
//! [`VmConfig`] says what the guest is made of, [`Vm::start`] makes and runs it, [`VmHandle`] controls it from other threads, and
//! [`Vm::wait`] returns how it ended ([`ExitReason`]). [`VmHandle::save`] writes a guest down, [`VmHandle::migrate`] writes one
//! while it runs, and [`Vm::restore`] makes one that goes on from there. The machine is a small Q35-like PC: in-kernel interrupt controllers and timer, PCI
//! Express with modern virtio devices, ACPI, a 16550. The VMM moves no data itself: the guest's kicks go from KVM to the
//! vhost-user backend through an ioeventfd, the backend's interrupts to the guest through an irqfd.
//!
//! # Threads
//! - `vcpuN`: runs one vCPU and handles its exits on the buses (`bus`). Nothing it calls waits for a client or, beyond a bound, for a backend.
//! - `console`: feeds the console's clients.
//! - `display`: shows the screen to the display's clients, if the guest has a display; `tablet`: serves its pointer.
//! - one for each disk and NIC: keeps the connection to the backend (`virtio::vhost_user`), for ever.
//! - `rng`, `balloon`, `memory`, `seed`, `agent-port`: serve the random number generator, the balloon, the memory that is plugged, the seed disk and the
//!   guest agent's port.
//! - `vsock`: moves bytes between sockets of the guest and of the node.
//! - `throttle`: while the guest moves and writes faster than can be sent, holds it for a part of the time.
//! - `watchdog`: sleeps until the guest arms its watchdog and does not feed it.
//!
//! There is no async runtime. Whoever calls [`Vm::wait`] drives the end: first vCPUs, then devices, then the console. Until then that thread does
//! what it is asked for ([`VmHandle::ask`]): moving the guest, and devices and vCPUs that come and go ([`VmHandle::plug`]).
//!
//! # Invariants
//! - Whatever a guest writes to registers, tables and rings ends in an ignored write, a device that needs a reset, or
//!   the guest's own end; never in a panic, and never outside its memory.
//! - A backend's restart is normal. Its queues stall, the guest waits, nothing is lost; the contract is in `virtio::vhost_user`.
//! - Guest memory is a sealed memfd, known to this process and to the backends only.
//! - A guest ends once, with one reason; the first one counts.
//!
//! # Where to start reading
//! `vm` puts everything together. Then by subject: `config`, `layout` (the address map), `boot`, `firmware`, `vcpu`, `acpi`, `chipset`, `pci`,
//! `virtio`, `console`, `display`, `hotplug`, `state` (what devices save), `transfer` (a whole guest as a stream); what threads may ask of the kernel is in
//! [`isolation`].

mod acpi;
mod boot;
mod bus;
mod chipset;
mod config;
mod console;
mod display;
mod error;
mod firmware;
mod handle;
mod hotplug;
mod interrupts;
pub mod isolation;
mod kvm;
mod layout;
mod lifecycle;
mod memory;
mod pci;
mod resize;
mod socket;
mod state;
mod transfer;
mod vcpu;
mod virtio;
mod vm;
mod watchdog;

#[cfg(test)]
#[path = "../tests/guest/mod.rs"]
mod test_guest;

pub use boot::BootError;
pub use config::{
    BalloonConfig, Boot, ConfigError, DeviceConfig, DiskConfig, MacAddr, NicConfig, ParseMacError, VmConfig,
    VsockConfig,
};
pub use error::VmError;
pub use handle::{BackendState, DeviceStatus, Presence, VmHandle, VmState, VmStatus};
pub use hotplug::PlugError;
pub use lifecycle::ExitReason;
pub use pci::slots::DEVICE_SLOTS;
pub use resize::{MemoryError, MemoryStatus};
pub use state::{DeviceState, DevicesState, StateError};
pub use transfer::TransferError;
pub use transfer::migrate::{Destination, Migrated, MigrationOptions, MigrationProgress, MigrationSnapshot};
pub use vcpu::model::{CpuModel, Missing, ParseModelError, Processor};
pub use virtio::mem::BLOCK as MEMORY_BLOCK;
pub use virtio::vhost_user::SessionError;
pub use vm::{Inheritance, Vm};
