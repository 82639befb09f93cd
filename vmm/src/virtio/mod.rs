//! Virtio devices: what a device is ([`device`]), the register model of the modern PCI transport ([`transport`]), the PCI function that carries
//! both ([`pci`]), and the devices: [`rng`] here in the VMM, disks and NICs in vhost-user backends ([`vhost_user`]).

pub(crate) mod device;
pub(crate) mod pci;
pub(crate) mod rng;
pub(crate) mod transport;
pub(crate) mod vhost_user;
