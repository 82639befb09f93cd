//! Virtio features of a port.

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_GUEST_USO4, VIRTIO_NET_F_GUEST_USO6, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6,
    VIRTIO_NET_F_HOST_USO, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU, VIRTIO_NET_F_STATUS,
};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use crate::overlay::frame::vnet::{Checksum, Gso, VnetHeader};

/// What a port offers. UFO, which fragments IP, is left out on purpose.
const OFFERED: [u32; 16] = [
    VIRTIO_F_VERSION_1,
    VIRTIO_RING_F_EVENT_IDX,
    VIRTIO_RING_F_INDIRECT_DESC,
    VIRTIO_NET_F_MRG_RXBUF,
    VIRTIO_NET_F_CSUM,
    VIRTIO_NET_F_GUEST_CSUM,
    VIRTIO_NET_F_HOST_TSO4,
    VIRTIO_NET_F_HOST_TSO6,
    VIRTIO_NET_F_HOST_USO,
    VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_GUEST_USO4,
    VIRTIO_NET_F_GUEST_USO6,
    VIRTIO_NET_F_MAC,
    VIRTIO_NET_F_MTU,
    VIRTIO_NET_F_STATUS,
];

/// A set of virtio features.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Features(pub(crate) u64);

impl Features {
    /// All that a port offers.
    pub(crate) fn offered() -> Self {
        Self(OFFERED.iter().fold(0, |bits, feature| bits | 1 << feature))
    }

    fn has(self, feature: u32) -> bool {
        self.0 >> feature & 1 == 1
    }

    /// Frames are preceded by a header of 12 bytes only in virtio 1; older drivers are not served.
    pub(crate) fn is_modern(self) -> bool {
        self.has(VIRTIO_F_VERSION_1)
    }

    /// The guest tells by index, not by flag, when it wants to be interrupted.
    pub(crate) fn has_event_idx(self) -> bool {
        self.has(VIRTIO_RING_F_EVENT_IDX)
    }

    /// A received frame may lie in several buffers.
    pub(crate) fn can_merge_buffers(self) -> bool {
        self.has(VIRTIO_NET_F_MRG_RXBUF)
    }

    /// The guest takes a frame with such a header as it is.
    pub(crate) fn can_receive(self, header: &VnetHeader) -> bool {
        let segmentation = match header.gso {
            Gso::None => true,
            Gso::TcpV4 => self.has(VIRTIO_NET_F_GUEST_TSO4),
            Gso::TcpV6 => self.has(VIRTIO_NET_F_GUEST_TSO6),
            Gso::Udp => self.has(VIRTIO_NET_F_GUEST_USO4) && self.has(VIRTIO_NET_F_GUEST_USO6),
        };
        segmentation && (header.checksum == Checksum::Complete || self.has(VIRTIO_NET_F_GUEST_CSUM))
    }
}
