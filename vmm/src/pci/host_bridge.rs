//! Device 0: the Q35 host bridge, as far as an operating system looks for it. It has no registers of its own yet.

use super::config_space::{ConfigSpace, Identity};
use super::root::PciDevice;

/// The host bridge.
pub(crate) struct HostBridge(ConfigSpace);

impl HostBridge {
    pub(crate) fn new() -> Self {
        Self(ConfigSpace::new(Identity {
            vendor: 0x8086,
            device: 0x29c0,
            class: [0x06, 0x00, 0x00],
            revision: 0,
            subsystem_vendor: 0x1af4,
            subsystem: 0x1100,
        }))
    }
}

impl PciDevice for HostBridge {
    fn config_read(&self, offset: usize, data: &mut [u8]) {
        self.0.read(offset, data);
    }

    fn config_write(&self, _offset: usize, _data: &[u8]) {}

    fn decoded_memory(&self) -> Option<std::ops::Range<u64>> {
        None
    }

    fn memory_read(&self, _offset: u64, _data: &mut [u8]) {}

    fn memory_write(&self, _offset: u64, _data: &[u8]) {}
}
