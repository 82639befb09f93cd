//! virtio-blk: which features are passed on, and what of the configuration is the VMM's to say.

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_GEOMETRY, VIRTIO_BLK_F_MQ,
    VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_TOPOLOGY,
    VIRTIO_BLK_F_WRITE_ZEROES,
};

use super::device::{Kind, Offer};
use super::session::Capabilities;
use crate::config::DiskConfig;
use crate::virtio::device::DeviceType;

/// Up to and including the limits for write-zeroes.
const CONFIG_SIZE: usize = 60;
const NUM_QUEUES_AT: usize = 34;
const QUEUE_SIZE: u16 = 256;

/// What the VMM passes on if the backend offers it.
const PASSED_ON: u64 = 1 << VIRTIO_BLK_F_SIZE_MAX
    | 1 << VIRTIO_BLK_F_SEG_MAX
    | 1 << VIRTIO_BLK_F_GEOMETRY
    | 1 << VIRTIO_BLK_F_RO
    | 1 << VIRTIO_BLK_F_BLK_SIZE
    | 1 << VIRTIO_BLK_F_FLUSH
    | 1 << VIRTIO_BLK_F_TOPOLOGY
    | 1 << VIRTIO_BLK_F_MQ
    | 1 << VIRTIO_BLK_F_DISCARD
    | 1 << VIRTIO_BLK_F_WRITE_ZEROES;

/// A disk.
pub(crate) struct Disk(pub(crate) DiskConfig);

impl Kind for Disk {
    fn device_type(&self) -> DeviceType {
        DeviceType::Block
    }

    fn features_passed_on(&self) -> u64 {
        PASSED_ON
    }

    fn config_size(&self) -> usize {
        CONFIG_SIZE
    }

    fn max_queues(&self) -> u16 {
        self.0.queues
    }

    fn offer(&self, backend: &Capabilities) -> Offer {
        let mut features = backend.features;
        let mut config = backend.config.clone();
        config.resize(CONFIG_SIZE, 0);
        let mut queues = 1;
        if features & 1 << VIRTIO_BLK_F_MQ != 0 {
            let offered = u16::from_le_bytes([config[NUM_QUEUES_AT], config[NUM_QUEUES_AT + 1]]);
            queues = self.0.queues.min(offered).min(backend.max_queues).max(1);
            if queues == 1 {
                features &= !(1 << VIRTIO_BLK_F_MQ);
            }
        }
        config[NUM_QUEUES_AT..NUM_QUEUES_AT + 2].copy_from_slice(&queues.to_le_bytes());
        if self.0.readonly {
            features |= 1 << VIRTIO_BLK_F_RO;
        }
        Offer { features, config, queue_sizes: vec![QUEUE_SIZE; queues.into()] }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk(queues: u16, readonly: bool) -> Disk {
        Disk(DiskConfig { id: "d".into(), socket: "/d".into(), queues, readonly, slot: None })
    }

    fn backend(features: u64, num_queues: u8, max_queues: u16) -> Capabilities {
        let mut config = vec![0; CONFIG_SIZE];
        config[0] = 8;
        config[NUM_QUEUES_AT] = num_queues;
        Capabilities { features, config, max_queues }
    }

    #[test]
    fn the_smallest_number_of_queues_wins() {
        let mq = 1 << VIRTIO_BLK_F_MQ;
        for (wanted, offered, possible, expected) in [(4, 2, 8, 2), (4, 8, 3, 3), (2, 8, 8, 2), (4, 0, 8, 1)]
        {
            let offer = disk(wanted, false).offer(&backend(mq, offered, possible));
            assert_eq!(offer.queue_sizes.len(), expected);
            assert_eq!(offer.config[NUM_QUEUES_AT], expected as u8);
            assert_eq!(offer.features & mq != 0, expected > 1);
        }
        assert_eq!(disk(4, false).offer(&backend(0, 4, 4)).queue_sizes.len(), 1);
    }

    #[test]
    fn readonly_is_told_whatever_the_backend_says() {
        assert_ne!(disk(1, true).offer(&backend(0, 1, 1)).features & 1 << VIRTIO_BLK_F_RO, 0);
        assert_eq!(disk(1, false).offer(&backend(0, 1, 1)).features & 1 << VIRTIO_BLK_F_RO, 0);
    }
}
