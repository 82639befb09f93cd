//! virtio-net: one pair of queues, offloads as the backend has them; address and MTU come from the VM's configuration.

use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_UFO, VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4,
    VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_HOST_UFO, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MRG_RXBUF,
    VIRTIO_NET_F_MTU,
};

use super::device::{Kind, Offer};
use super::session::Capabilities;
use crate::config::NicConfig;
use crate::virtio::device::DeviceType;

/// Up to and including the MTU: address, status, queue pairs, MTU.
const CONFIG_SIZE: usize = 12;
const MTU_AT: usize = 10;
const QUEUE_SIZE: u16 = 256;

/// What the VMM passes on if the backend offers it.
const PASSED_ON: u64 = 1 << VIRTIO_NET_F_CSUM
    | 1 << VIRTIO_NET_F_GUEST_CSUM
    | 1 << VIRTIO_NET_F_GUEST_TSO4
    | 1 << VIRTIO_NET_F_GUEST_TSO6
    | 1 << VIRTIO_NET_F_GUEST_ECN
    | 1 << VIRTIO_NET_F_GUEST_UFO
    | 1 << VIRTIO_NET_F_HOST_TSO4
    | 1 << VIRTIO_NET_F_HOST_TSO6
    | 1 << VIRTIO_NET_F_HOST_ECN
    | 1 << VIRTIO_NET_F_HOST_UFO
    | 1 << VIRTIO_NET_F_MRG_RXBUF;

/// A NIC.
pub(crate) struct Nic(pub(crate) NicConfig);

impl Kind for Nic {
    fn device_type(&self) -> DeviceType {
        DeviceType::Net
    }

    fn features_passed_on(&self) -> u64 {
        PASSED_ON
    }

    fn config_size(&self) -> usize {
        // All of it comes from the VM's configuration; the backend is not asked.
        0
    }

    fn max_queues(&self) -> u16 {
        2
    }

    fn offer(&self, backend: &Capabilities) -> Offer {
        let mut features = backend.features | 1 << VIRTIO_NET_F_MAC;
        let mut config = vec![0; CONFIG_SIZE];
        config[..6].copy_from_slice(&self.0.mac.0);
        if let Some(mtu) = self.0.mtu {
            features |= 1 << VIRTIO_NET_F_MTU;
            config[MTU_AT..MTU_AT + 2].copy_from_slice(&mtu.to_le_bytes());
        }
        Offer { features, config, queue_sizes: vec![QUEUE_SIZE; 2] }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::MacAddr;

    #[test]
    fn address_and_mtu_come_from_the_configuration() {
        let mac = MacAddr([2, 0, 0, 0, 0, 9]);
        let mut nic =
            Nic(NicConfig { id: "n".into(), socket: "/n".into(), mac, mtu: Some(1450), slot: None });
        let backend = Capabilities { features: 1 << VIRTIO_NET_F_CSUM, config: vec![], max_queues: 2 };
        let offer = nic.offer(&backend);
        assert_eq!(offer.config, [2, 0, 0, 0, 0, 9, 0, 0, 0, 0, 0xaa, 0x05]);
        assert_eq!(offer.features, 1 << VIRTIO_NET_F_CSUM | 1 << VIRTIO_NET_F_MAC | 1 << VIRTIO_NET_F_MTU);
        nic.0.mtu = None;
        assert_eq!(nic.offer(&backend).features & 1 << VIRTIO_NET_F_MTU, 0);
    }
}
