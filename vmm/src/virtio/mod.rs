//! Virtio devices: what a device is ([`device`]), the register model of the modern PCI transport ([`transport`]), the PCI function that carries
//! both ([`pci`]), and the devices: disks and NICs in vhost-user backends ([`vhost_user`]), the others here in the VMM ([`local`]): the random number
//! generator ([`rng`]), the guest agent's port ([`port`]) and the seed disk ([`seed`]).

pub(crate) mod device;
pub(crate) mod local;
pub(crate) mod pci;
pub(crate) mod port;
pub(crate) mod rng;
pub(crate) mod seed;
#[cfg(test)]
pub(crate) mod test_driver;
pub(crate) mod transport;
pub(crate) mod vhost_user;
