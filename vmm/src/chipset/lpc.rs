//! The LPC bridge of the ICH9, 00:1f.0 (Intel 316972, chapter 13): firmware sets up power management and interrupt routing in its registers.
//! Here both are fixed ([`crate::layout`]), so the registers keep what is written and change nothing.

use std::ops::Range;

use parking_lot::Mutex;

use crate::layout::PM1_EVENT_PORT;
use crate::pci::PciDevice;
use crate::pci::config_space::{self, ConfigSpace, Identity};
use crate::state::{Invalid, Stateful};

const COMMAND: usize = 0x04;
const PM_BASE: usize = 0x40;
const ACPI_CONTROL: usize = 0x44;
const PIRQ_A: usize = 0x60;
const PIRQ_E: usize = 0x68;
const RCBA: usize = 0xf0;

/// The bridge.
pub(crate) struct LpcBridge(Mutex<ConfigSpace>);

impl LpcBridge {
    pub(crate) fn new() -> Self {
        let mut config = ConfigSpace::new(Identity {
            vendor: 0x8086,
            device: 0x2918,
            class: [0x06, 0x01, 0x00],
            revision: 2,
            subsystem_vendor: 0x1af4,
            subsystem: 0x1100,
        });
        // It decodes ports, memory and the bus behind it, always: firmware looks for the serial port only then.
        config.add_register(COMMAND, &[0x07, 0], &[0; 2]);
        // Bit 0 says that it is an address of ports.
        config.add_register(
            PM_BASE,
            &(u32::from(PM1_EVENT_PORT) | 1).to_le_bytes(),
            &0xff80u32.to_le_bytes(),
        );
        config.add_register(ACPI_CONTROL, &[0], &[0x87]);
        for bank in [PIRQ_A, PIRQ_E] {
            // Not routed.
            config.add_register(bank, &[0x80; 4], &[0x8f; 4]);
        }
        config.add_register(RCBA, &[0; 4], &0xffff_c001u32.to_le_bytes());
        Self(Mutex::new(config))
    }
}

impl Stateful for LpcBridge {
    const KIND: &'static str = "lpc";
    type State = config_space::Registers;

    fn capture(&self) -> Result<Self::State, Invalid> {
        Ok(self.0.lock().capture())
    }

    fn adopt(&self, state: Self::State) -> Result<(), Invalid> {
        self.0.lock().adopt(&state)
    }
}

impl PciDevice for LpcBridge {
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
    fn firmware_finds_what_it_wrote() {
        let bridge = LpcBridge::new();
        let read = |at: usize| {
            let mut data = [0; 4];
            bridge.config_read(at, &mut data);
            u32::from_le_bytes(data)
        };
        assert_eq!((read(0), read(PM_BASE)), (0x2918_8086, 0x601));
        bridge.config_write(PM_BASE, &0x600u32.to_le_bytes());
        bridge.config_write(ACPI_CONTROL, &[0x80]);
        bridge.config_write(PIRQ_A, &[10, 10, 11, 11]);
        assert_eq!((read(PM_BASE), read(ACPI_CONTROL), read(PIRQ_A)), (0x601, 0x80, 0x0b0b_0a0a));
    }
}
