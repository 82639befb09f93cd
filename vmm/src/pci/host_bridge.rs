//! Device 0: the Q35 host bridge (Intel 316966, chapter 5). Its one register with an effect is PCIEXBAR: firmware says there where
//! configuration space is in memory. The others (what is behind the addresses below 1 MiB) only keep what is written: all is RAM.

use std::ops::Range;

use parking_lot::Mutex;

use super::config_space::{self, ConfigSpace, Identity};
use super::root::PciDevice;
use crate::layout::{ECAM_START, MIB};
use crate::state::{Invalid, Stateful};

const PCIEXBAR: usize = 0x60;
const PCIEXBAR_ENABLE: u64 = 1;
/// Bits 1 and 2: 256, 128 or 64 MiB.
const PCIEXBAR_LENGTH: u64 = 0b110;
/// Bits of the address: as many as the chip has address lines, in units of the shortest length.
const PCIEXBAR_ADDRESS: u64 = 0xf_fc00_0000;
const PAM: usize = 0x90;
const SMRAM: usize = 0x9d;

/// The host bridge.
pub(crate) struct HostBridge(Mutex<ConfigSpace>);

impl HostBridge {
    /// With configuration space where it is when there is no firmware to put it anywhere.
    pub(crate) fn new() -> Self {
        let mut config = ConfigSpace::new(Identity {
            vendor: 0x8086,
            device: 0x29c0,
            class: [0x06, 0x00, 0x00],
            revision: 0,
            subsystem_vendor: 0x1af4,
            subsystem: 0x1100,
        });
        let writable = PCIEXBAR_ADDRESS | PCIEXBAR_LENGTH | PCIEXBAR_ENABLE;
        let ecam = ECAM_START | PCIEXBAR_ENABLE;
        config.add_register(PCIEXBAR, &ecam.to_le_bytes(), &writable.to_le_bytes());
        config.add_register(PAM, &[0; 7], &[0x33; 7]);
        config.add_register(SMRAM, &[0x02, 0x38], &[0x7f, 0x80]);
        Self(Mutex::new(config))
    }

    /// Where configuration space is in memory, if it is.
    pub(crate) fn ecam(&self) -> Option<Range<u64>> {
        let mut register = [0; 8];
        self.0.lock().read(PCIEXBAR, &mut register);
        let register = u64::from_le_bytes(register);
        let len = match (register & PCIEXBAR_LENGTH) >> 1 {
            0 => 256 * MIB,
            1 => 128 * MIB,
            2 => 64 * MIB,
            _ => return None,
        };
        let start = register & PCIEXBAR_ADDRESS & !(len - 1);
        (register & PCIEXBAR_ENABLE != 0).then(|| start..start + len)
    }
}

impl Stateful for HostBridge {
    const KIND: &'static str = "host-bridge";
    type State = config_space::Registers;

    fn capture(&self) -> Result<Self::State, Invalid> {
        Ok(self.0.lock().capture())
    }

    fn adopt(&self, state: Self::State) -> Result<(), Invalid> {
        self.0.lock().adopt(&state)
    }
}

impl PciDevice for HostBridge {
    fn config_read(&self, offset: usize, data: &mut [u8]) {
        self.0.lock().read(offset, data);
    }

    fn config_write(&self, offset: usize, data: &[u8]) {
        self.0.lock().write(offset, data);
    }

    fn decoded_memory(&self) -> Option<Range<u64>> {
        None
    }

    fn memory_read(&self, _offset: u64, _data: &mut [u8]) {}

    fn memory_write(&self, _offset: u64, _data: &[u8]) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn configuration_space_is_where_the_register_says() {
        let bridge = HostBridge::new();
        assert_eq!(bridge.ecam(), Some(0xe000_0000..0xf000_0000));
        let write = |value: u64| {
            bridge.config_write(PCIEXBAR + 4, &((value >> 32) as u32).to_le_bytes());
            bridge.config_write(PCIEXBAR, &(value as u32).to_le_bytes());
        };
        write(0xb000_0001);
        assert_eq!(bridge.ecam(), Some(0xb000_0000..0xc000_0000));
        write(0xb400_0005);
        assert_eq!(bridge.ecam(), Some(0xb400_0000..0xb800_0000));
        write(0xb000_0000);
        assert_eq!(bridge.ecam(), None);
        write(u64::MAX);
        assert_eq!(bridge.ecam(), None, "there is no such length");
    }
}
