//! A PS/2 keyboard, without I/O: what it answers to commands, and how keys become bytes.
//!
//! It speaks scan code set 2, as they all do after a reset, or set 1; behind a controller that translates, what arrives is set 1. It has
//! no third set: drivers that ask for it are told so, and take the second.
//!
//! What waits to be read is bounded. A key that does not fit is lost, its release never is.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

/// Keys pressed beyond this many waiting bytes are lost. Real keyboards keep 16.
const PRESS_LIMIT: usize = 64;
/// Nothing is kept beyond this: room for the release of all keys, and for answers.
const QUEUE_LIMIT: usize = 1024;

const ACKNOWLEDGE: u8 = 0xfa;
const RESEND: u8 = 0xfe;
const ECHO: u8 = 0xee;
const SELF_TEST_PASSED: u8 = 0xaa;
/// The first byte before keys of the second block (cursor keys and their like).
const EXTENDED: u8 = 0xe0;
const RELEASED_SET2: u8 = 0xf0;
const RELEASED_SET1: u8 = 0x80;

/// A key, by its code of set 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Key {
    /// 1 to 0x7f.
    code: u8,
    block: Block,
}

/// Whether a key's code has a prefix.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Block {
    Main,
    Extended,
}

impl Key {
    /// Of the main block.
    pub(super) const fn main(code: u8) -> Self {
        Self { code, block: Block::Main }
    }

    /// Of the extended block.
    pub(super) const fn extended(code: u8) -> Self {
        Self { code, block: Block::Extended }
    }

    /// From one byte, as RFB's extended key events have it: bit 7 stands for the prefix.
    pub(super) fn from_rfb(code: u32) -> Option<Self> {
        let code = u8::try_from(code).ok()?;
        match (code & 0x7f, code & 0x80) {
            (0, _) => None,
            (code, 0) => Some(Self::main(code)),
            (code, _) => Some(Self::extended(code)),
        }
    }
}

/// What happens to a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Action {
    Press,
    Release,
}

/// Codes of set 2 by those of set 1, from 1 on: IBM's table, by which controllers translate, the other way round.
const SET2: [u8; 0x7f] = [
    0x76, 0x16, 0x1e, 0x26, 0x25, 0x2e, 0x36, 0x3d, 0x3e, 0x46, 0x45, 0x4e, 0x55, 0x66, 0x0d, 0x15, 0x1d,
    0x24, 0x2d, 0x2c, 0x35, 0x3c, 0x43, 0x44, 0x4d, 0x54, 0x5b, 0x5a, 0x14, 0x1c, 0x1b, 0x23, 0x2b, 0x34,
    0x33, 0x3b, 0x42, 0x4b, 0x4c, 0x52, 0x0e, 0x12, 0x5d, 0x1a, 0x22, 0x21, 0x2a, 0x32, 0x31, 0x3a, 0x41,
    0x49, 0x4a, 0x59, 0x7c, 0x11, 0x29, 0x58, 0x05, 0x06, 0x04, 0x0c, 0x03, 0x0b, 0x83, 0x0a, 0x01, 0x09,
    0x77, 0x7e, 0x6c, 0x75, 0x7d, 0x7b, 0x6b, 0x73, 0x74, 0x79, 0x69, 0x72, 0x7a, 0x70, 0x71, 0x7f, 0x60,
    0x61, 0x78, 0x07, 0x0f, 0x17, 0x1f, 0x27, 0x2f, 0x37, 0x3f, 0x47, 0x4f, 0x56, 0x5e, 0x08, 0x10, 0x18,
    0x20, 0x28, 0x30, 0x38, 0x40, 0x48, 0x50, 0x57, 0x6f, 0x13, 0x19, 0x39, 0x51, 0x53, 0x5c, 0x5f, 0x62,
    0x63, 0x64, 0x65, 0x67, 0x68, 0x6a, 0x6d, 0x6e,
];

/// Which codes the keyboard sends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
enum Set {
    One,
    #[default]
    Two,
}

/// Whether the controller turns set 2 into set 1 on the way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Translation {
    On,
    Off,
}

/// Whether keys are reported.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
enum Scanning {
    #[default]
    On,
    Off,
}

/// A command whose parameter is to come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
enum Parameter {
    /// Lamps, rate of repetition, repetition of single keys: taken, without effect.
    Ignored,
    Set,
}

/// The keyboard.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(super) struct Keyboard {
    set: Set,
    scanning: Scanning,
    expects: Option<Parameter>,
    queue: VecDeque<u8>,
    last_sent: u8,
}

impl Keyboard {
    /// Whether saved state can be that of a keyboard.
    pub(super) fn is_sound(&self) -> bool {
        self.queue.len() <= QUEUE_LIMIT
    }

    /// The next byte for the controller.
    pub(super) fn take(&mut self) -> Option<u8> {
        let byte = self.queue.pop_front()?;
        self.last_sent = byte;
        Some(byte)
    }

    /// Presses or releases a key.
    pub(super) fn key(&mut self, key: Key, action: Action, translation: Translation) {
        if self.scanning == Scanning::Off || (action == Action::Press && self.queue.len() >= PRESS_LIMIT) {
            return;
        }
        if key.block == Block::Extended {
            self.push(EXTENDED);
        }
        match (self.set, translation) {
            (Set::Two, Translation::Off) => {
                if action == Action::Release {
                    self.push(RELEASED_SET2);
                }
                // Codes begin at 1 and end with the table.
                self.push(SET2.get(usize::from(key.code).wrapping_sub(1)).copied().unwrap_or(0));
            }
            (Set::One, _) | (Set::Two, Translation::On) => self.push(match action {
                Action::Press => key.code,
                Action::Release => key.code | RELEASED_SET1,
            }),
        }
    }

    /// A byte from the driver.
    pub(super) fn command(&mut self, byte: u8, translation: Translation) {
        match self.expects.take() {
            // What is no parameter is the next command.
            Some(parameter) if byte < 0xed => return self.parameter(parameter, byte, translation),
            _ => {}
        }
        match byte {
            0xed | 0xf3 | 0xfb..=0xfd => {
                self.expects = Some(Parameter::Ignored);
                self.push(ACKNOWLEDGE);
            }
            ECHO => self.push(ECHO),
            0xf0 => {
                self.expects = Some(Parameter::Set);
                self.push(ACKNOWLEDGE);
            }
            0xf2 => {
                // The second byte is 0x83, which a controller translates like any other.
                let second = match translation {
                    Translation::On => 0x41,
                    Translation::Off => 0x83,
                };
                [ACKNOWLEDGE, 0xab, second].into_iter().for_each(|byte| self.push(byte));
            }
            0xf4 => {
                self.queue.clear();
                self.scanning = Scanning::On;
                self.push(ACKNOWLEDGE);
            }
            0xf5 => {
                *self = Self { scanning: Scanning::Off, ..Self::default() };
                self.push(ACKNOWLEDGE);
            }
            0xf6 => {
                *self = Self::default();
                self.push(ACKNOWLEDGE);
            }
            // Which keys repeat: those of set 3 only, in which no key is sent.
            0xf7..=0xfa => self.push(ACKNOWLEDGE),
            RESEND => {
                let last = self.last_sent;
                self.push(last);
            }
            0xff => {
                *self = Self::default();
                self.push(ACKNOWLEDGE);
                self.push(SELF_TEST_PASSED);
            }
            _ => self.push(RESEND),
        }
    }

    fn parameter(&mut self, parameter: Parameter, value: u8, translation: Translation) {
        match (parameter, value) {
            (Parameter::Ignored, _) => self.push(ACKNOWLEDGE),
            (Parameter::Set, 0) => {
                self.push(ACKNOWLEDGE);
                self.push(match (self.set, translation) {
                    (Set::One, Translation::Off) => 1,
                    (Set::One, Translation::On) => 0x43,
                    (Set::Two, Translation::Off) => 2,
                    (Set::Two, Translation::On) => 0x41,
                });
            }
            (Parameter::Set, 1) => self.choose(Set::One),
            (Parameter::Set, 2) => self.choose(Set::Two),
            (Parameter::Set, _) => self.push(RESEND),
        }
    }

    fn choose(&mut self, set: Set) {
        self.set = set;
        self.push(ACKNOWLEDGE);
    }

    fn push(&mut self, byte: u8) {
        if self.queue.len() < QUEUE_LIMIT {
            self.queue.push_back(byte);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: Key = Key::main(0x1e);
    const UP: Key = Key::extended(0x48);

    fn sent(keyboard: &mut Keyboard) -> Vec<u8> {
        std::iter::from_fn(|| keyboard.take()).collect()
    }

    fn press_and_release(keyboard: &mut Keyboard, key: Key, translation: Translation) -> Vec<u8> {
        keyboard.key(key, Action::Press, translation);
        keyboard.key(key, Action::Release, translation);
        sent(keyboard)
    }

    #[test]
    fn keys_are_sent_in_the_set_that_the_driver_expects() {
        let mut keyboard = Keyboard::default();
        assert_eq!(press_and_release(&mut keyboard, A, Translation::On), [0x1e, 0x9e]);
        assert_eq!(press_and_release(&mut keyboard, UP, Translation::On), [0xe0, 0x48, 0xe0, 0xc8]);
        assert_eq!(press_and_release(&mut keyboard, A, Translation::Off), [0x1c, 0xf0, 0x1c]);
        assert_eq!(press_and_release(&mut keyboard, UP, Translation::Off), [0xe0, 0x75, 0xe0, 0xf0, 0x75]);
        keyboard.command(0xf0, Translation::Off);
        keyboard.command(1, Translation::Off);
        assert_eq!(sent(&mut keyboard), [0xfa, 0xfa]);
        assert_eq!(press_and_release(&mut keyboard, A, Translation::Off), [0x1e, 0x9e]);
    }

    #[test]
    fn no_two_keys_have_the_same_code_of_set_2() {
        let mut codes = SET2.to_vec();
        codes.sort_unstable();
        codes.dedup();
        assert_eq!(codes.len(), SET2.len());
        assert!(!codes.contains(&EXTENDED) && !codes.contains(&RELEASED_SET2));
        // F7 and Escape, from IBM's table.
        assert_eq!((SET2[0x41 - 1], SET2[0]), (0x83, 0x76));
    }

    #[test]
    fn drivers_find_a_keyboard_and_set_it_up() {
        let mut keyboard = Keyboard::default();
        // What Linux sends: identity, lamps, rate, scanning.
        for byte in [0xf2, 0xed, 0, 0xf3, 0, 0xf4] {
            keyboard.command(byte, Translation::On);
        }
        assert_eq!(sent(&mut keyboard), [0xfa], "scanning begins with an empty queue");
        // What firmware sends: reset, set 2.
        for byte in [0xff, 0xf0, 2, 0xf0, 0] {
            keyboard.command(byte, Translation::On);
        }
        assert_eq!(sent(&mut keyboard), [0xfa, 0xaa, 0xfa, 0xfa, 0xfa, 0xfa, 0x41]);
        keyboard.command(0xf5, Translation::On);
        assert_eq!(sent(&mut keyboard), [0xfa]);
        assert!(press_and_release(&mut keyboard, A, Translation::On).is_empty(), "not scanning");
        keyboard.command(0xf0, Translation::On);
        keyboard.command(3, Translation::On);
        keyboard.command(0x10, Translation::On);
        assert_eq!(sent(&mut keyboard), [0xfa, 0xfe, 0xfe], "no set 3, no such command");
    }

    #[test]
    fn a_driver_that_reads_nothing_bounds_what_waits_and_misses_no_release() {
        let mut keyboard = Keyboard::default();
        for _ in 0..1000 {
            keyboard.key(A, Action::Press, Translation::On);
        }
        keyboard.key(A, Action::Release, Translation::On);
        assert_eq!(sent(&mut keyboard).last(), Some(&0x9e));
        for _ in 0..10_000 {
            keyboard.command(0xee, Translation::On);
        }
        assert!(keyboard.is_sound());
    }

    #[test]
    fn keys_of_rfb_have_their_prefix_in_bit_7() {
        assert_eq!(Key::from_rfb(0x1e), Some(A));
        assert_eq!(Key::from_rfb(0xc8), Some(UP));
        assert_eq!(Key::from_rfb(0), None);
        assert_eq!(Key::from_rfb(0x80), None);
        assert_eq!(Key::from_rfb(0x1e00), None);
    }
}
