//! Dispatch of guest accesses to devices by address. One [`Bus`] for ports, one for memory-mapped I/O; both are fixed once the guest
//! runs (what moves, PCI BARs, is dispatched by [`crate::pci::PciRoot`]).
//!
//! As on hardware, reading where nothing is gives all ones, and writing there does nothing.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::state::Saved;

/// A device behind a fixed range of addresses. Offsets are relative to the range; an access may reach past its end, and has any length
/// from 1 to 8: hostile guests choose both.
pub(crate) trait IoDevice: Saved + Send + Sync {
    /// Fills `data`, which holds all ones before.
    fn read(&self, offset: u64, data: &mut [u8]);
    /// Takes `data`.
    fn write(&self, offset: u64, data: &[u8]);
}

/// Devices by address.
#[derive(Default)]
pub(crate) struct Bus {
    devices: BTreeMap<u64, (u64, Arc<dyn IoDevice>)>,
}

impl Bus {
    /// Adds a device. Ranges come from [`crate::layout`] and do not overlap.
    pub(crate) fn insert(&mut self, start: u64, len: u64, device: Arc<dyn IoDevice>) {
        let previous = self.devices.insert(start, (len, device));
        debug_assert!(previous.is_none(), "two devices at {start:#x}");
    }

    /// All devices with their addresses.
    pub(crate) fn devices(&self) -> impl Iterator<Item = (u64, &dyn Saved)> {
        self.devices.iter().map(|(start, (_, device))| (*start, device.as_ref() as &dyn Saved))
    }

    /// A guest's read.
    pub(crate) fn read(&self, address: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let Some((offset, device)) = self.find(address) {
            device.read(offset, data);
        }
    }

    /// A guest's write.
    pub(crate) fn write(&self, address: u64, data: &[u8]) {
        match self.find(address) {
            Some((offset, device)) => device.write(offset, data),
            None => tracing::trace!(address, ?data, "write to nowhere"),
        }
    }

    fn find(&self, address: u64) -> Option<(u64, &dyn IoDevice)> {
        let (start, (len, device)) = self.devices.range(..=address).next_back()?;
        let offset = address - start;
        (offset < *len).then(|| (offset, device.as_ref()))
    }
}

#[cfg(test)]
mod tests {
    use parking_lot::Mutex;

    use super::*;

    use crate::state::{Invalid, Stateful};

    struct Echo(Mutex<Vec<(u64, Vec<u8>)>>);

    impl Stateful for Echo {
        const KIND: &'static str = "echo";
        type State = ();
        fn capture(&self) -> Result<(), Invalid> {
            Ok(())
        }
        fn adopt(&self, (): ()) -> Result<(), Invalid> {
            Ok(())
        }
    }

    impl IoDevice for Echo {
        fn read(&self, offset: u64, data: &mut [u8]) {
            data.fill(offset as u8);
        }
        fn write(&self, offset: u64, data: &[u8]) {
            self.0.lock().push((offset, data.to_vec()));
        }
    }

    #[test]
    fn accesses_reach_the_device_that_covers_them() {
        let device = Arc::new(Echo(Mutex::default()));
        let mut bus = Bus::default();
        bus.insert(0x100, 8, device.clone());
        let mut data = [0; 2];
        bus.read(0x104, &mut data);
        assert_eq!(data, [4, 4]);
        bus.read(0x108, &mut data);
        assert_eq!(data, [0xff, 0xff]);
        bus.read(0xff, &mut data);
        assert_eq!(data, [0xff, 0xff]);
        bus.write(0x107, &[1]);
        bus.write(0x108, &[1]);
        assert_eq!(*device.0.lock(), [(7, vec![1])]);
    }
}
