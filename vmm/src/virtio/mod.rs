//! Virtio devices: what a device is ([`device`]), the register model of the modern PCI transport ([`transport`]), the PCI function that carries
//! both ([`pci`]), and the devices: disks and NICs in vhost-user backends ([`vhost_user`]), the others here in the VMM ([`local`]): the random number
//! generator ([`rng`]), the balloon ([`balloon`]), memory that is plugged
//! ([`mem`]), the guest agent's port ([`port`]), sockets ([`vsock`]) and the seed disk ([`seed`]).

pub(crate) mod balloon;
pub(crate) mod device;
pub(crate) mod local;
pub(crate) mod mem;
pub(crate) mod pci;
pub(crate) mod port;
pub(crate) mod rng;
pub(crate) mod seed;
#[cfg(test)]
pub(crate) mod test_driver;
pub(crate) mod transport;
pub(crate) mod vhost_user;
pub(crate) mod vsock;
