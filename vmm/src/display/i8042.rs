//! The keyboard controller of a PC (8042) with a PS/2 keyboard behind it, at ports 0x60 and 0x64 with interrupt 1. There is no second
//! device: no mouse answers.
//!
//! [`Controller`] is the model, without I/O; [`I8042`] puts it on the bus, raises the interrupt and ends the guest that pulses the
//! processor's reset line. A guest without a display has only the latter ([`crate::acpi::power::KeyboardController`]).

use std::sync::Arc;

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

use super::keyboard::{Action, Key, Keyboard, Translation};
use crate::bus::IoDevice;
use crate::lifecycle::{ExitReason, Lifecycle};
use crate::state::{Invalid, Stateful};

/// Length of the ports: data, four that are others', command and status.
pub(crate) const PORTS_LEN: u64 = 5;
const DATA: u64 = 0;
const COMMAND: u64 = 4;

/// Bits of the status register.
const STATUS_OUTPUT_FULL: u8 = 1 << 0;
const STATUS_SYSTEM: u8 = 1 << 2;
const STATUS_COMMAND: u8 = 1 << 3;
const STATUS_UNLOCKED: u8 = 1 << 4;

/// Bits of the mode byte.
const MODE_INTERRUPT: u8 = 1 << 0;
const MODE_SYSTEM: u8 = 1 << 2;
const MODE_KEYBOARD_DISABLED: u8 = 1 << 4;
const MODE_MOUSE_DISABLED: u8 = 1 << 5;
const MODE_TRANSLATE: u8 = 1 << 6;
const MODE_AT_RESET: u8 = MODE_SYSTEM | MODE_MOUSE_DISABLED | MODE_TRANSLATE;

/// Bits of the output port: not in reset, address line 20 is on.
const OUTPUT_PORT: u8 = 0b11;
const NOT_IN_RESET: u8 = 1 << 0;
/// The input port: the keyboard is not locked.
const INPUT_PORT: u8 = 0x80;
const SELF_TEST_PASSED: u8 = 0x55;
const INTERFACE_FINE: u8 = 0;
/// The clock line of a device that is not there.
const INTERFACE_STUCK: u8 = 1;

/// What a guest asked for by a write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Request {
    None,
    Reset,
}

/// What the next byte at the data port is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
enum Expects {
    /// The keyboard.
    #[default]
    Keyboard,
    Mode,
    OutputPort,
    /// To come back as if the keyboard had sent it.
    Loop,
    /// The second device.
    Nobody,
}

/// Where a byte in the output buffer comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
enum Output {
    Controller(u8),
    Keyboard(u8),
}

/// The controller.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Controller {
    mode: u8,
    /// Whether the last write was a command.
    last_was_command: bool,
    tested: bool,
    expects: Expects,
    output: Option<Output>,
    /// What was last read, which the data port shows until there is something new.
    shown: u8,
    keyboard: Keyboard,
}

impl Default for Controller {
    fn default() -> Self {
        Self {
            mode: MODE_AT_RESET,
            last_was_command: false,
            tested: true,
            expects: Expects::default(),
            output: None,
            shown: 0,
            keyboard: Keyboard::default(),
        }
    }
}

impl Controller {
    fn translation(&self) -> Translation {
        if self.mode & MODE_TRANSLATE != 0 { Translation::On } else { Translation::Off }
    }

    fn status(&self) -> u8 {
        let mut status = STATUS_UNLOCKED;
        if self.output.is_some() {
            status |= STATUS_OUTPUT_FULL;
        }
        if self.tested {
            status |= STATUS_SYSTEM;
        }
        if self.last_was_command {
            status |= STATUS_COMMAND;
        }
        status
    }

    /// Whether there is a byte that the guest wants to be interrupted for.
    fn interrupt(&self) -> bool {
        self.mode & MODE_INTERRUPT != 0 && self.output.is_some()
    }

    /// Takes the next byte from the keyboard, if there is room for it and it is enabled.
    fn refill(&mut self) {
        if self.output.is_none() && self.mode & MODE_KEYBOARD_DISABLED == 0 {
            self.output = self.keyboard.take().map(Output::Keyboard);
        }
    }

    fn read_data(&mut self) -> u8 {
        if let Some(Output::Controller(byte) | Output::Keyboard(byte)) = self.output.take() {
            self.shown = byte;
        }
        self.refill();
        self.shown
    }

    fn write_data(&mut self, byte: u8) -> Request {
        self.last_was_command = false;
        match std::mem::take(&mut self.expects) {
            Expects::Keyboard => {
                // Talking to the keyboard enables it.
                self.mode &= !MODE_KEYBOARD_DISABLED;
                self.keyboard.command(byte, self.translation());
            }
            Expects::Mode => self.mode = byte,
            Expects::OutputPort if byte & NOT_IN_RESET == 0 => return Request::Reset,
            Expects::OutputPort | Expects::Nobody => {}
            Expects::Loop => self.output = Some(Output::Keyboard(byte)),
        }
        self.refill();
        Request::None
    }

    fn write_command(&mut self, command: u8) -> Request {
        self.last_was_command = true;
        self.expects = Expects::default();
        match command {
            0x20 => self.answer(self.mode),
            0x60 => self.expects = Expects::Mode,
            0xa7 => self.mode |= MODE_MOUSE_DISABLED,
            0xa8 => self.mode &= !MODE_MOUSE_DISABLED,
            0xa9 => self.answer(INTERFACE_STUCK),
            0xaa => {
                self.tested = true;
                self.mode = MODE_AT_RESET;
                self.answer(SELF_TEST_PASSED);
            }
            0xab => self.answer(INTERFACE_FINE),
            0xad => self.mode |= MODE_KEYBOARD_DISABLED,
            0xae => self.mode &= !MODE_KEYBOARD_DISABLED,
            0xc0 => self.answer(INPUT_PORT),
            0xd0 => self.answer(OUTPUT_PORT),
            0xd1 => self.expects = Expects::OutputPort,
            0xd2 => self.expects = Expects::Loop,
            0xd3 | 0xd4 => self.expects = Expects::Nobody,
            // Pulses of the output lines whose bits are not set.
            0xf0..=0xff if command & NOT_IN_RESET == 0 => return Request::Reset,
            _ => {}
        }
        self.refill();
        Request::None
    }

    /// The answer takes the place of what was there, as the driver that has asked reads it next. What the keyboard had sent would be lost,
    /// had a driver not to disable or empty it first.
    fn answer(&mut self, byte: u8) {
        self.output = Some(Output::Controller(byte));
    }

    fn key(&mut self, key: Key, action: Action) {
        self.keyboard.key(key, action, self.translation());
        self.refill();
    }
}

/// The controller on the bus.
pub(crate) struct I8042 {
    controller: Mutex<Controller>,
    interrupt: EventFd,
    lifecycle: Arc<Lifecycle>,
}

impl I8042 {
    /// Writes to `interrupt` raise interrupt 1.
    pub(crate) fn new(interrupt: EventFd, lifecycle: Arc<Lifecycle>) -> Self {
        Self { controller: Mutex::default(), interrupt, lifecycle }
    }

    /// Presses or releases a key.
    pub(super) fn key(&self, key: Key, action: Action) {
        self.change(|controller| controller.key(key, action));
    }

    /// Does something to the controller, and raises the interrupt if there is something new to read.
    fn change<T>(&self, act: impl FnOnce(&mut Controller) -> T) -> T {
        let mut controller = self.controller.lock();
        let had = controller.interrupt();
        let result = act(&mut controller);
        if !had && controller.interrupt() {
            self.raise();
        }
        result
    }

    fn raise(&self) {
        if let Err(error) = self.interrupt.write(1) {
            tracing::debug!(%error, "keyboard interrupt lost");
        }
    }
}

impl Stateful for I8042 {
    const KIND: &'static str = "i8042";
    type State = Controller;

    fn capture(&self) -> Result<Controller, Invalid> {
        Ok(self.controller.lock().clone())
    }

    fn adopt(&self, state: Controller) -> Result<(), Invalid> {
        if !state.keyboard.is_sound() {
            return Err(Invalid::because("more keys than a keyboard keeps"));
        }
        let mut controller = self.controller.lock();
        *controller = state;
        // One that was on its way may be lost; one too many is harmless.
        if controller.interrupt() {
            self.raise();
        }
        Ok(())
    }
}

impl IoDevice for I8042 {
    fn read(&self, offset: u64, data: &mut [u8]) {
        match (offset, data) {
            (DATA, [byte]) => {
                let mut controller = self.controller.lock();
                *byte = controller.read_data();
                // The line goes down with the read, and up again for the next byte.
                if controller.interrupt() {
                    self.raise();
                }
            }
            (COMMAND, [byte]) => *byte = self.controller.lock().status(),
            _ => {}
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let request = match (offset, data) {
            (DATA, &[byte]) => self.change(|controller| controller.write_data(byte)),
            (COMMAND, &[byte]) => self.change(|controller| controller.write_command(byte)),
            _ => Request::None,
        };
        if request == Request::Reset {
            self.lifecycle.end(ExitReason::Reset);
        }
    }
}

#[cfg(test)]
mod tests {
    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    use super::*;

    const A: Key = Key::main(0x1e);

    struct Machine {
        device: I8042,
        interrupt: EventFd,
        lifecycle: Arc<Lifecycle>,
    }

    impl Machine {
        fn new() -> Self {
            let interrupt = EventFd::new(EFD_NONBLOCK).unwrap();
            let lifecycle = Arc::<Lifecycle>::default();
            let device = I8042::new(interrupt.try_clone().unwrap(), lifecycle.clone());
            Self { device, interrupt, lifecycle }
        }

        fn read(&self, offset: u64) -> u8 {
            let mut byte = [0xff];
            self.device.read(offset, &mut byte);
            byte[0]
        }

        /// All that there is to read.
        fn drain(&self) -> Vec<u8> {
            let full = || self.read(COMMAND) & STATUS_OUTPUT_FULL != 0;
            std::iter::from_fn(|| full().then(|| self.read(DATA))).collect()
        }

        fn command(&self, command: u8, parameters: &[u8]) -> Vec<u8> {
            self.device.write(COMMAND, &[command]);
            parameters.iter().for_each(|byte| self.device.write(DATA, &[*byte]));
            self.drain()
        }

        /// Interrupts since the last call.
        fn interrupts(&self) -> u64 {
            self.interrupt.read().unwrap_or(0)
        }
    }

    #[test]
    fn a_driver_sets_the_controller_up_and_is_interrupted_for_each_byte() {
        let machine = Machine::new();
        assert_eq!(machine.command(0xaa, &[]), [SELF_TEST_PASSED]);
        assert_eq!(machine.command(0xab, &[]), [INTERFACE_FINE]);
        assert_eq!(machine.command(0x20, &[]), [MODE_AT_RESET]);
        machine.device.key(A, Action::Press);
        assert_eq!(machine.interrupts(), 0, "not asked for");
        assert_eq!(machine.drain(), [0x1e]);
        machine.command(0x60, &[MODE_AT_RESET | MODE_INTERRUPT]);
        machine.device.key(A, Action::Release);
        machine.device.key(A, Action::Press);
        assert_eq!(machine.interrupts(), 1, "one byte at a time");
        assert_eq!(machine.read(DATA), 0x9e);
        assert_eq!(machine.interrupts(), 1, "for the next one");
        assert_eq!(machine.drain(), [0x1e]);
        assert_eq!(machine.interrupts(), 0);
    }

    #[test]
    fn a_disabled_keyboard_keeps_its_keys() {
        let machine = Machine::new();
        machine.command(0xad, &[]);
        machine.device.key(A, Action::Press);
        assert!(machine.drain().is_empty());
        assert_eq!(machine.command(0xae, &[]), [0x1e]);
        machine.device.write(DATA, &[0xf2]);
        assert_eq!(machine.drain(), [0xfa, 0xab, 0x41]);
    }

    #[test]
    fn there_is_no_mouse() {
        let machine = Machine::new();
        assert_eq!(machine.command(0xa9, &[]), [INTERFACE_STUCK]);
        assert!(machine.command(0xd4, &[0xff]).is_empty());
        assert!(machine.command(0xd3, &[0x5a]).is_empty());
        assert_eq!(machine.command(0xd2, &[0x5a]), [0x5a]);
    }

    #[test]
    fn both_ways_to_reset_the_processor_end_the_guest() {
        for (command, parameters) in [(0xfe, &[][..]), (0xd1, &[0x02])] {
            let machine = Machine::new();
            machine.command(0xd1, &[0x03]);
            machine.command(0xff, &[]);
            assert_eq!(machine.lifecycle.ended(), None);
            machine.command(command, parameters);
            assert_eq!(machine.lifecycle.ended(), Some(ExitReason::Reset));
        }
    }

    #[test]
    fn keys_that_wait_are_saved() {
        let (old, new) = (Machine::new(), Machine::new());
        old.command(0x60, &[MODE_INTERRUPT]);
        old.device.key(A, Action::Press);
        old.device.key(A, Action::Release);
        new.device.adopt(old.device.capture().unwrap()).unwrap();
        assert_eq!(new.interrupts(), 1);
        assert_eq!(new.drain(), [0x1c, 0xf0, 0x1c], "without translation");
    }
}
