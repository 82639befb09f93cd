//! Power management: the PM1 registers of ACPI (power button, sleep) and the two classic ways to reset a PC (port 0xcf9 and the keyboard
//! controller's pulse).
//!
//! [`Pm1`] is the register model, without I/O; [`PowerDevice`] puts it on the bus, drives the system control interrupt and ends the guest.

use std::sync::Arc;

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use super::sci::{Level, Sci, Source};
use crate::bus::IoDevice;
use crate::lifecycle::{ExitReason, Lifecycle};
use crate::state::{Invalid, Stateful};

/// `SLP_TYP` that means S5, as the DSDT says.
pub(crate) const SLEEP_TYPE_S5: u8 = 5;
/// What the guest writes to the reset register.
pub(super) const RESET_VALUE: u8 = 0x06;

/// Bits of PM1 status and enable.
const POWER_BUTTON: u16 = 1 << 8;
const GLOBAL_LOCK: u16 = 1 << 5;
/// The clock's alarm, which never comes. Linux wants to enable it where there is a clock.
const CLOCK: u16 = 1 << 10;
/// Bits that exist in the enable register.
const ENABLE_MASK: u16 = POWER_BUTTON | GLOBAL_LOCK | CLOCK;
/// Bits of PM1 control.
const SCI_ENABLE: u16 = 1 << 0;
const SLEEP_TYPE_SHIFT: u16 = 10;
const SLEEP_TYPE_MASK: u16 = 0b111;
const SLEEP_ENABLE: u16 = 1 << 13;

/// Offsets from the PM1 event block.
const STATUS: u64 = 0;
const ENABLE: u64 = 2;
const CONTROL: u64 = 4;
/// Length of both blocks together.
pub(crate) const PM1_LEN: u64 = 6;

/// What a guest asked for by a register write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Request {
    None,
    PowerOff,
}

/// The PM1 registers.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
pub(crate) struct Pm1 {
    status: u16,
    enable: u16,
    control: u16,
}

impl Pm1 {
    /// Whether the system control interrupt is wanted.
    fn interrupt(&self) -> Level {
        Level::of(self.status & self.enable)
    }

    fn press(&mut self) {
        self.status |= POWER_BUTTON;
    }

    fn register(&self, offset: u64) -> u16 {
        match offset {
            STATUS => self.status,
            ENABLE => self.enable,
            // ACPI mode is the only one there is.
            CONTROL => self.control | SCI_ENABLE,
            _ => 0,
        }
    }

    fn read(&self, offset: u64, data: &mut [u8]) {
        for (at, byte) in (offset..).zip(data) {
            *byte = self.register(at & !1).to_le_bytes()[(at & 1) as usize];
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Request {
        let mut request = Request::None;
        for (at, byte) in (offset..).zip(data) {
            let shift = 8 * (at & 1);
            let value = u16::from(*byte) << shift;
            let keep = !(0xffu16 << shift);
            match at & !1 {
                STATUS => self.status &= !value,
                ENABLE => self.enable = (self.enable & keep | value) & ENABLE_MASK,
                CONTROL => {
                    self.control = (self.control & keep | value) & !SLEEP_ENABLE;
                    let sleep_type = self.control >> SLEEP_TYPE_SHIFT & SLEEP_TYPE_MASK;
                    if value & SLEEP_ENABLE != 0 && sleep_type == u16::from(SLEEP_TYPE_S5) {
                        request = Request::PowerOff;
                    }
                }
                _ => {}
            }
        }
        request
    }
}

/// The PM1 block on the bus.
pub(crate) struct PowerDevice {
    registers: Mutex<Pm1>,
    sci: Arc<Sci>,
    lifecycle: Arc<Lifecycle>,
}

impl PowerDevice {
    pub(crate) fn new(sci: Arc<Sci>, lifecycle: Arc<Lifecycle>) -> Self {
        Self { registers: Mutex::default(), sci, lifecycle }
    }

    /// Presses the power button.
    pub(crate) fn press_power_button(&self) {
        let mut registers = self.registers.lock();
        registers.press();
        self.drive(&registers);
    }

    /// Called under the lock, so that levels reach KVM in the order of the register changes.
    fn drive(&self, registers: &Pm1) {
        self.sci.drive(Source::Power, registers.interrupt());
    }
}

impl Stateful for PowerDevice {
    const KIND: &'static str = "pm1";
    type State = Pm1;

    fn capture(&self) -> Result<Pm1, Invalid> {
        Ok(*self.registers.lock())
    }

    fn adopt(&self, state: Pm1) -> Result<(), Invalid> {
        let bits = state.enable | state.status;
        if bits & !ENABLE_MASK != 0 || state.control & SLEEP_ENABLE != 0 {
            return Err(Invalid::because("bits that no register has"));
        }
        let mut registers = self.registers.lock();
        *registers = state;
        self.drive(&registers);
        Ok(())
    }
}

impl IoDevice for PowerDevice {
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.registers.lock().read(offset, data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let mut registers = self.registers.lock();
        let request = registers.write(offset, data);
        self.drive(&registers);
        drop(registers);
        if request == Request::PowerOff {
            self.lifecycle.end(ExitReason::Shutdown);
        }
    }
}

/// Whether this write to port 0xcf9 asks for a reset (bit 2: reset the processor).
pub(crate) fn is_reset_write(value: u8) -> bool {
    value & 0x04 != 0
}

/// The keyboard controller, as far as it resets the processor. There is no keyboard: its status register reads as "nothing there, ready".
pub(crate) struct KeyboardController {
    lifecycle: Arc<Lifecycle>,
}

impl KeyboardController {
    /// "Pulse output lines", of which the lowest is the processor's reset.
    const PULSE_RESET: u8 = 0xfe;

    pub(crate) fn new(lifecycle: Arc<Lifecycle>) -> Self {
        Self { lifecycle }
    }
}

/// It has no state.
impl Stateful for KeyboardController {
    const KIND: &'static str = "keyboard-controller";
    type State = ();

    fn capture(&self) -> Result<(), Invalid> {
        Ok(())
    }

    fn adopt(&self, (): ()) -> Result<(), Invalid> {
        Ok(())
    }
}

impl IoDevice for KeyboardController {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, _offset: u64, data: &[u8]) {
        if data == [Self::PULSE_RESET] {
            self.lifecycle.end(ExitReason::Reset);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read16(pm1: &Pm1, offset: u64) -> u16 {
        let mut data = [0; 2];
        pm1.read(offset, &mut data);
        u16::from_le_bytes(data)
    }

    #[test]
    fn the_power_button_interrupts_until_acknowledged() {
        let mut pm1 = Pm1::default();
        pm1.press();
        assert_eq!(pm1.interrupt(), Level::Released, "not enabled yet");
        pm1.write(ENABLE, &POWER_BUTTON.to_le_bytes());
        assert_eq!(pm1.interrupt(), Level::Asserted);
        assert_eq!(read16(&pm1, STATUS), POWER_BUTTON);
        pm1.write(STATUS, &POWER_BUTTON.to_le_bytes());
        assert_eq!(pm1.interrupt(), Level::Released);
        assert_eq!(read16(&pm1, STATUS), 0);
    }

    #[test]
    fn bytes_and_words_reach_the_same_registers() {
        let mut pm1 = Pm1::default();
        pm1.write(STATUS, &[0, 0, 0, 1]);
        assert_eq!(read16(&pm1, ENABLE), POWER_BUTTON);
        pm1.write(ENABLE + 1, &[0]);
        assert_eq!(read16(&pm1, ENABLE), 0);
        let mut all = [0xff; 8];
        pm1.read(0, &mut all);
        assert_eq!(all, [0, 0, 0, 0, SCI_ENABLE as u8, 0, 0, 0]);
    }

    #[test]
    fn only_s5_with_sleep_enable_powers_off() {
        let control = |sleep_type: u16, enable: u16| (sleep_type << SLEEP_TYPE_SHIFT | enable).to_le_bytes();
        let mut pm1 = Pm1::default();
        assert_eq!(pm1.write(CONTROL, &control(5, 0)), Request::None);
        assert_eq!(pm1.write(CONTROL, &control(3, SLEEP_ENABLE)), Request::None);
        assert_eq!(pm1.write(CONTROL, &control(5, SLEEP_ENABLE)), Request::PowerOff);
    }
}
