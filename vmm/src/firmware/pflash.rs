//! A parallel flash chip with the Intel command set, as far as firmware uses it (JEDEC CFI, command set 0001h; the driver is
//! `QemuFlashFvbServicesRuntimeDxe` of edk2's OvmfPkg). Pure: the content is memory here, whoever wires it up stores what changes.
//!
//! A write is a command or, after one, its data. Programming clears bits and never sets them; erasing sets all bits of a block. Both are done
//! at once: nobody ever waits for them.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::state::Invalid;

/// Size of an erase block; what OVMF for 4 MiB images is built for.
pub(crate) const BLOCK: usize = 4096;

const READ_ARRAY: u8 = 0xff;
const READ_ID: u8 = 0x90;
const READ_STATUS: u8 = 0x70;
const CLEAR_STATUS: u8 = 0x50;
const PROGRAM: u8 = 0x10;
const PROGRAM_ALTERNATE: u8 = 0x40;
const ERASE: u8 = 0x20;
const CONFIRM: u8 = 0xd0;

const STATUS_READY: u8 = 1 << 7;
/// After it was cleared the status has no bit at all until something is done: by that edk2's driver tells a chip that is emulated from ROM.
const STATUS_CLEARED: u8 = 0;
const STATUS_ERASE_ERROR: u8 = 1 << 5;
const STATUS_PROGRAM_ERROR: u8 = 1 << 4;
/// Intel, and a chip of its that QEMU shows too.
const MANUFACTURER_AND_DEVICE: [u8; 2] = [0x89, 0x18];

/// What a read answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Mode {
    /// The content.
    ReadArray,
    /// The status.
    Status,
    /// Who made the chip.
    Id,
}

/// What the next write is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
enum Expects {
    Command,
    Data,
    Confirmation,
}

/// What a write did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Effect {
    None,
    /// Reads answer something else from now on.
    ModeChanged(Mode),
    /// These bytes were changed; the mode is [`Mode::Status`].
    Changed(Range<usize>),
}

/// The chip.
#[derive(Clone, Serialize, Deserialize)]
pub(crate) struct Pflash {
    content: Vec<u8>,
    mode: Mode,
    expects: Expects,
    status: u8,
}

impl Pflash {
    pub(crate) fn new(content: Vec<u8>) -> Self {
        Self { content, mode: Mode::ReadArray, expects: Expects::Command, status: STATUS_READY }
    }

    /// What reads answer.
    pub(crate) fn mode(&self) -> Mode {
        self.mode
    }

    /// Takes over the state of another chip, if it has the same size.
    pub(crate) fn adopt(&mut self, other: Self) -> Result<(), Invalid> {
        if other.content.len() != self.content.len() {
            return Err(Invalid::because("a chip of another size"));
        }
        *self = other;
        Ok(())
    }

    pub(crate) fn content(&self) -> &[u8] {
        &self.content
    }

    /// The last change could not be stored.
    pub(crate) fn fail(&mut self) {
        self.status |= STATUS_ERASE_ERROR | STATUS_PROGRAM_ERROR;
    }

    /// A guest's read, at any offset and of any length.
    pub(crate) fn read(&self, offset: u64, data: &mut [u8]) {
        for (at, byte) in (offset..).zip(data) {
            *byte = match self.mode {
                Mode::ReadArray => {
                    usize::try_from(at).ok().and_then(|at| self.content.get(at)).copied().unwrap_or(0xff)
                }
                Mode::Status => self.status,
                Mode::Id => MANUFACTURER_AND_DEVICE[(at & 1) as usize],
            };
        }
    }

    /// A guest's write, at any offset and of any length.
    pub(crate) fn write(&mut self, offset: u64, data: &[u8]) -> Effect {
        let (Ok(at), Some(first)) = (usize::try_from(offset), data.first()) else { return Effect::None };
        match std::mem::replace(&mut self.expects, Expects::Command) {
            Expects::Command => self.command(*first),
            Expects::Data => self.program(at, data),
            Expects::Confirmation if *first == CONFIRM => self.erase(at),
            Expects::Confirmation => {
                self.status |= STATUS_ERASE_ERROR | STATUS_PROGRAM_ERROR;
                Effect::None
            }
        }
    }

    fn command(&mut self, command: u8) -> Effect {
        let mode = match command {
            READ_ARRAY => Mode::ReadArray,
            READ_ID => Mode::Id,
            READ_STATUS => Mode::Status,
            CLEAR_STATUS => {
                self.status = STATUS_CLEARED;
                self.mode
            }
            PROGRAM | PROGRAM_ALTERNATE => {
                self.expects = Expects::Data;
                Mode::Status
            }
            ERASE => {
                self.expects = Expects::Confirmation;
                Mode::Status
            }
            _ => Mode::ReadArray,
        };
        if mode == self.mode {
            return Effect::None;
        }
        self.mode = mode;
        Effect::ModeChanged(mode)
    }

    fn program(&mut self, at: usize, data: &[u8]) -> Effect {
        let range = at..at.saturating_add(data.len());
        let Some(cells) = self.content.get_mut(range.clone()) else {
            self.status |= STATUS_PROGRAM_ERROR;
            return Effect::None;
        };
        cells.iter_mut().zip(data).for_each(|(cell, bits)| *cell &= bits);
        self.status |= STATUS_READY;
        Effect::Changed(range)
    }

    fn erase(&mut self, at: usize) -> Effect {
        let start = at - at % BLOCK;
        let range = start..start.saturating_add(BLOCK).min(self.content.len());
        let Some(cells) = self.content.get_mut(range.clone()).filter(|cells| !cells.is_empty()) else {
            self.status |= STATUS_ERASE_ERROR;
            return Effect::None;
        };
        cells.fill(0xff);
        self.status |= STATUS_READY;
        Effect::Changed(range)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn chip() -> Pflash {
        Pflash::new(vec![0x5a; 3 * BLOCK])
    }

    fn byte(chip: &Pflash, at: u64) -> u8 {
        let mut data = [0];
        chip.read(at, &mut data);
        data[0]
    }

    /// What edk2's driver does to find out whether there is flash: `QemuFlashDetected`.
    #[test]
    fn the_driver_sees_a_flash_and_no_ram() {
        let mut chip = chip();
        assert_eq!(chip.write(16, &[CLEAR_STATUS]), Effect::None);
        assert_eq!(byte(&chip, 16), 0x5a, "RAM would have kept the command");
        assert_eq!(chip.write(16, &[READ_STATUS]), Effect::ModeChanged(Mode::Status));
        assert_eq!(byte(&chip, 16), STATUS_CLEARED);
        assert_eq!(chip.write(16, &[READ_ARRAY]), Effect::ModeChanged(Mode::ReadArray));
        assert_eq!(chip.content(), [0x5a; 3 * BLOCK]);
    }

    #[test]
    fn programming_clears_bits_and_erasing_sets_those_of_a_block() {
        let mut chip = chip();
        chip.write(BLOCK as u64 + 9, &[ERASE]);
        assert_eq!(chip.write(BLOCK as u64 + 9, &[CONFIRM]), Effect::Changed(BLOCK..2 * BLOCK));
        for (at, value) in [(BLOCK + 1, 0x0f), (BLOCK + 1, 0xf1)] {
            chip.write(at as u64, &[PROGRAM]);
            assert_eq!(chip.write(at as u64, &[value]), Effect::Changed(at..at + 1));
        }
        assert_eq!(byte(&chip, 0), STATUS_READY);
        chip.write(0, &[READ_ARRAY]);
        assert_eq!(byte(&chip, BLOCK as u64 + 1), 0x01);
        assert_eq!((byte(&chip, BLOCK as u64), byte(&chip, BLOCK as u64 - 1)), (0xff, 0x5a));
    }

    #[test]
    fn what_goes_wrong_is_in_the_status_until_it_is_cleared() {
        let mut chip = chip();
        chip.write(0, &[ERASE]);
        assert_eq!(chip.write(0, &[READ_ARRAY]), Effect::None, "no confirmation");
        assert_eq!(byte(&chip, 0) & STATUS_ERASE_ERROR, STATUS_ERASE_ERROR);
        chip.write(0, &[CLEAR_STATUS]);
        assert_eq!(byte(&chip, 0), STATUS_CLEARED);
        chip.fail();
        assert_eq!(byte(&chip, 0) & STATUS_ERASE_ERROR, STATUS_ERASE_ERROR);
        assert_eq!(chip.content(), [0x5a; 3 * BLOCK]);
    }

    proptest! {
        #[test]
        fn hostile_writes_change_only_what_they_say(writes in prop::collection::vec(
            (prop_oneof![0u64..16_000, any::<u64>()], prop::collection::vec(prop_oneof![any::<u8>(), Just(PROGRAM), Just(ERASE), Just(CONFIRM)], 0..9)), 0..80)
        ) {
            let mut chip = chip();
            for (offset, data) in writes {
                let before = chip.content().to_vec();
                let effect = chip.write(offset, &data);
                let changed = match effect { Effect::Changed(range) => range, _ => 0..0 };
                for (at, (old, new)) in before.iter().zip(chip.content()).enumerate() {
                    prop_assert!(changed.contains(&at) || old == new);
                }
                let mut out = vec![0; data.len()];
                chip.read(offset, &mut out);
            }
            prop_assert_eq!(chip.content().len(), 3 * BLOCK);
        }
    }
}
