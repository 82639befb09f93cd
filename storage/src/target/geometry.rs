//! What the device tells a guest about itself: feature bits and configuration space.

use super::Access;
use crate::ids::{BLOCK_SIZE, MAX_TRANSFER, SECTOR_SIZE};
use netfabric::dirty_log::LOG_ALL;
use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO,
    VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

/// Entries of a queue at most.
pub(super) const QUEUE_SIZE: u16 = 256;
/// Data of one request at most.
pub(super) const MAX_REQUEST_BYTES: u64 = MAX_TRANSFER;
/// Sectors of one discard or write-zeroes at most (64 MiB).
pub(super) const MAX_DISCARD_SECTORS: u32 = 128 << 10;
/// Data segments of one request: all of a queue's descriptors but header and status.
const SEG_MAX: u32 = QUEUE_SIZE as u32 - 2;
/// Bytes of one segment; with `SEG_MAX` of them a request stays within its limit.
const SIZE_MAX: u32 = 16 << 10;
const _: () = assert!(SEG_MAX as u64 * SIZE_MAX as u64 <= MAX_REQUEST_BYTES);
/// Size of `struct virtio_blk_config` up to the fields of write-zeroes.
const CONFIG_LEN: usize = 60;

/// The virtio and vhost-user features that are offered.
pub(super) fn features(access: Access) -> u64 {
    let bits = [
        VIRTIO_F_VERSION_1,
        VIRTIO_RING_F_INDIRECT_DESC,
        VIRTIO_RING_F_EVENT_IDX,
        VIRTIO_BLK_F_SIZE_MAX,
        VIRTIO_BLK_F_SEG_MAX,
        VIRTIO_BLK_F_BLK_SIZE,
        VIRTIO_BLK_F_TOPOLOGY,
        VIRTIO_BLK_F_FLUSH,
        VIRTIO_BLK_F_MQ,
    ];
    let vhost_user = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() | LOG_ALL;
    let more: &[u32] = match access {
        Access::ReadOnly => &[VIRTIO_BLK_F_RO],
        Access::ReadWrite => &[VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_WRITE_ZEROES],
    };
    bits.iter().chain(more).fold(vhost_user, |all, bit| all | 1 << bit)
}

/// The vhost-user protocol features that are offered.
pub(super) fn protocol_features() -> VhostUserProtocolFeatures {
    VhostUserProtocolFeatures::CONFIG
        | VhostUserProtocolFeatures::MQ
        | VhostUserProtocolFeatures::REPLY_ACK
        | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
        | VhostUserProtocolFeatures::LOG_SHMFD
}

/// The configuration space.
pub(super) fn config(size: u64, queues: u16) -> [u8; CONFIG_LEN] {
    let mut out = [0; CONFIG_LEN];
    let mut put = |at: usize, bytes: &[u8]| out[at..at + bytes.len()].copy_from_slice(bytes);
    let block_exponent = (BLOCK_SIZE / SECTOR_SIZE).trailing_zeros() as u8;
    put(0, &(size / SECTOR_SIZE).to_le_bytes());
    put(8, &SIZE_MAX.to_le_bytes());
    put(12, &SEG_MAX.to_le_bytes());
    put(20, &(SECTOR_SIZE as u32).to_le_bytes());
    put(24, &[block_exponent, 0]);
    put(26, &1u16.wrapping_shl(u32::from(block_exponent)).to_le_bytes());
    put(28, &((1u32 << 20) / SECTOR_SIZE as u32).to_le_bytes());
    put(34, &queues.to_le_bytes());
    put(36, &MAX_DISCARD_SECTORS.to_le_bytes());
    put(40, &1u32.to_le_bytes());
    put(44, &((BLOCK_SIZE / SECTOR_SIZE) as u32).to_le_bytes());
    put(48, &MAX_DISCARD_SECTORS.to_le_bytes());
    put(52, &1u32.to_le_bytes());
    put(56, &[1]);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn configuration_is_what_a_driver_reads() {
        let config = config(1 << 30, 4);
        assert_eq!(config[0..8], (1u64 << 21).to_le_bytes());
        assert_eq!(config[20..24], 512u32.to_le_bytes());
        // Physical blocks of 2^3 sectors, minimal I/O of 8 sectors.
        assert_eq!(config[24..28], [3, 0, 8, 0]);
        assert_eq!(config[34..36], 4u16.to_le_bytes());
        assert_eq!(config[44..48], 8u32.to_le_bytes());
    }

    #[test]
    fn a_read_only_device_offers_no_discard() {
        assert_eq!(features(Access::ReadOnly) & (1 << VIRTIO_BLK_F_DISCARD), 0);
        assert_ne!(features(Access::ReadOnly) & (1 << VIRTIO_BLK_F_RO), 0);
        assert_eq!(features(Access::ReadWrite) & (1 << VIRTIO_BLK_F_RO), 0);
    }
}
