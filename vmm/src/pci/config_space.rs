//! Configuration space of a function: a register file with a mask of the writable bits, one optional 64-bit memory BAR, and a list of
//! capabilities. What registers mean beyond that is the device's business.

use serde::{Deserialize, Serialize};

use crate::state::Invalid;

/// Size of the conventional configuration space. The extended one (above) is empty.
pub(crate) const CONFIG_SIZE: usize = 256;

const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
const BAR0: usize = 0x10;
const SUBSYSTEM: usize = 0x2c;
const CAPABILITY_POINTER: usize = 0x34;
const FIRST_CAPABILITY: usize = 0x40;

const COMMAND_MEMORY: u16 = 1 << 1;
const COMMAND_BUS_MASTER: u16 = 1 << 2;
const COMMAND_INTX_DISABLE: u16 = 1 << 10;
const STATUS_CAPABILITIES: u8 = 1 << 4;
/// BAR type: memory, 64 bits.
const BAR_MEMORY_64: u8 = 0b100;

/// What identifies a function.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Identity {
    pub(crate) vendor: u16,
    pub(crate) device: u16,
    /// Class, subclass, programming interface.
    pub(crate) class: [u8; 3],
    pub(crate) revision: u8,
    pub(crate) subsystem_vendor: u16,
    pub(crate) subsystem: u16,
}

/// Saved content of a register file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Registers(Vec<u8>);

/// The register file.
pub(crate) struct ConfigSpace {
    registers: [u8; CONFIG_SIZE],
    writable: [u8; CONFIG_SIZE],
    /// Where the next capability goes, and where its address is written.
    next_capability: usize,
    last_pointer: usize,
}

impl ConfigSpace {
    pub(crate) fn new(identity: Identity) -> Self {
        let mut space = Self {
            registers: [0; CONFIG_SIZE],
            writable: [0; CONFIG_SIZE],
            next_capability: FIRST_CAPABILITY,
            last_pointer: CAPABILITY_POINTER,
        };
        let [class, subclass, interface] = identity.class;
        space.set(0, &identity.vendor.to_le_bytes());
        space.set(2, &identity.device.to_le_bytes());
        space.set(8, &[identity.revision, interface, subclass, class]);
        space.set(SUBSYSTEM, &identity.subsystem_vendor.to_le_bytes());
        space.set(SUBSYSTEM + 2, &identity.subsystem.to_le_bytes());
        let command = COMMAND_MEMORY | COMMAND_BUS_MASTER | COMMAND_INTX_DISABLE;
        space.allow(COMMAND, &command.to_le_bytes());
        // Cache line size and interrupt line are scratch registers of the system's.
        space.allow(0x0c, &[0xff]);
        space.allow(0x3c, &[0xff]);
        space
    }

    /// Makes BAR 0 and 1 a 64-bit memory BAR of `size` (a power of two), at `address` for a start.
    pub(crate) fn set_memory_bar(&mut self, address: u64, size: u64) {
        self.set(BAR0, &(address | u64::from(BAR_MEMORY_64)).to_le_bytes());
        self.allow(BAR0, &(!(size - 1)).to_le_bytes());
    }

    /// Makes bytes of the device's own a register with this content. `writable` masks the bits that the guest may write.
    pub(crate) fn add_register(&mut self, at: usize, content: &[u8], writable: &[u8]) {
        self.set(at, content);
        self.allow(at, writable);
    }

    /// Adds a capability and returns its offset. `writable` masks the bits of `body` that the guest may write.
    pub(crate) fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> usize {
        let at = self.next_capability;
        assert!(at + 2 + body.len() <= CONFIG_SIZE, "capabilities are fixed at build time and fit");
        self.registers[self.last_pointer] = at as u8;
        self.set(at, &[id, 0]);
        self.set(at + 2, body);
        self.allow(at + 2, writable);
        self.registers[STATUS] |= STATUS_CAPABILITIES;
        self.last_pointer = at + 1;
        self.next_capability = (at + 2 + body.len()).next_multiple_of(4);
        at
    }

    fn set(&mut self, at: usize, bytes: &[u8]) {
        self.registers[at..at + bytes.len()].copy_from_slice(bytes);
    }

    /// Lets the guest write these bits of the registers from `at` on.
    pub(crate) fn allow(&mut self, at: usize, mask: &[u8]) {
        self.writable[at..at + mask.len()].copy_from_slice(mask);
    }

    /// A guest's read, at any offset and of any length. What lies beyond reads as zeroes.
    pub(crate) fn read(&self, offset: usize, data: &mut [u8]) {
        for (at, byte) in (offset..).zip(data) {
            *byte = self.registers.get(at).copied().unwrap_or(0);
        }
    }

    /// A guest's write, at any offset and of any length.
    pub(crate) fn write(&mut self, offset: usize, data: &[u8]) {
        for (at, byte) in (offset..).zip(data) {
            if let (Some(register), Some(mask)) = (self.registers.get_mut(at), self.writable.get(at)) {
                *register = *register & !mask | byte & mask;
            }
        }
    }

    /// The content.
    pub(crate) fn capture(&self) -> Registers {
        Registers(self.registers.to_vec())
    }

    /// Takes over content that a guest can have written to this very function.
    pub(crate) fn adopt(&mut self, state: &Registers) -> Result<(), Invalid> {
        self.check(state)?;
        self.registers.copy_from_slice(&state.0);
        Ok(())
    }

    /// Whether [`ConfigSpace::adopt`] would take it.
    pub(crate) fn check(&self, state: &Registers) -> Result<(), Invalid> {
        if state.0.len() != CONFIG_SIZE {
            return Err(Invalid::because("configuration space of another size"));
        }
        let registers = state.0.iter().zip(&self.registers).zip(&self.writable);
        match registers.into_iter().position(|((new, old), writable)| (new ^ old) & !writable != 0) {
            Some(at) => Err(Invalid(format!("another function: read-only register {at:#x} differs"))),
            None => Ok(()),
        }
    }

    /// The 16-bit register at `at`.
    pub(crate) fn u16_at(&self, at: usize) -> u16 {
        let mut bytes = [0; 2];
        self.read(at, &mut bytes);
        u16::from_le_bytes(bytes)
    }

    /// The 32-bit register at `at`.
    pub(crate) fn u32_at(&self, at: usize) -> u32 {
        let mut bytes = [0; 4];
        self.read(at, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    /// Where the function answers to memory accesses now, if it does.
    pub(crate) fn decoded_bar(&self) -> Option<u64> {
        let enabled = self.u16_at(COMMAND) & COMMAND_MEMORY != 0;
        let low = u64::from(self.u32_at(BAR0) & !0xf);
        enabled.then(|| low | u64::from(self.u32_at(BAR0 + 4)) << 32)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn space() -> ConfigSpace {
        let mut space = ConfigSpace::new(Identity {
            vendor: 0x1af4,
            device: 0x1042,
            class: [1, 0x80, 0],
            revision: 1,
            subsystem_vendor: 0x1af4,
            subsystem: 2,
        });
        space.set_memory_bar(0xc000_0000, 0x8000);
        space.add_capability(0x11, &[7, 0, 0, 0, 0, 0, 0, 0, 0, 0], &[0, 0xc0]);
        space
    }

    #[test]
    fn bars_tell_their_size_and_move() {
        let mut space = space();
        assert_eq!(space.decoded_bar(), None);
        space.write(BAR0, &[0xff; 8]);
        assert_eq!((space.u32_at(BAR0), space.u32_at(BAR0 + 4)), (0xffff_8004, 0xffff_ffff));
        space.write(BAR0, &0xd000_1234u64.to_le_bytes());
        space.write(COMMAND, &[2]);
        assert_eq!(space.decoded_bar(), Some(0xd000_0000));
    }

    #[test]
    fn capabilities_form_a_list() {
        let mut space = space();
        let second = space.add_capability(0x09, &[0; 14], &[]);
        let first = space.registers[CAPABILITY_POINTER] as usize;
        assert_eq!(space.registers[first], 0x11);
        assert_eq!(space.registers[first + 1] as usize, second);
        assert_eq!(space.registers[second + 1], 0);
        assert_eq!(space.registers[STATUS] & STATUS_CAPABILITIES, STATUS_CAPABILITIES);
    }

    proptest! {
        #[test]
        fn guests_change_only_what_is_writable(writes in prop::collection::vec((0usize..300, prop::collection::vec(any::<u8>(), 0..9)), 0..50)) {
            let mut space = space();
            let before = space.registers;
            for (offset, data) in &writes {
                space.write(*offset, data);
                let mut out = vec![0; data.len()];
                space.read(*offset, &mut out);
            }
            for (at, (old, new)) in before.iter().zip(&space.registers).enumerate() {
                prop_assert_eq!((old ^ new) & !space.writable[at], 0);
            }
        }
    }
}
