//! What a VM's firmware keeps: its boot entries above all.

use serde::{Deserialize, Serialize};

/// Most bytes that are kept of one VM's variables. Firmware's own fill a few thousand.
pub const MAX_VARIABLES: usize = 64 << 10;

/// A flash chip with variables, as the runs of bytes that are not erased.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FirmwareVariables {
    /// Size of the chip.
    len: u32,
    /// Where runs begin, and what they hold; ascending.
    runs: Vec<(u32, Vec<u8>)>,
}

/// What erased flash holds.
const ERASED: u8 = 0xff;
/// So many erased bytes end a run: fewer cost less inside than another run does.
const GAP: usize = 16;

impl FirmwareVariables {
    /// Of a chip with this content; none when it holds more than [`MAX_VARIABLES`].
    pub fn of(content: &[u8]) -> Option<Self> {
        let len = u32::try_from(content.len()).ok()?;
        let mut runs: Vec<(u32, Vec<u8>)> = Vec::new();
        let mut at = 0;
        while let Some(start) = content[at..].iter().position(|byte| *byte != ERASED).map(|skip| at + skip) {
            let mut end = start;
            for (index, byte) in content.iter().enumerate().skip(start) {
                if *byte != ERASED {
                    end = index + 1;
                } else if index >= end + GAP {
                    break;
                }
            }
            runs.push((start as u32, content[start..end].to_vec()));
            at = end;
        }
        let variables = Self { len, runs };
        (variables.kept() <= MAX_VARIABLES).then_some(variables)
    }

    /// How many bytes are kept.
    pub fn kept(&self) -> usize {
        self.runs.iter().map(|(_, bytes)| bytes.len()).sum()
    }

    /// The chip's content.
    pub fn content(&self) -> Vec<u8> {
        let mut content = vec![ERASED; self.len as usize];
        for (at, bytes) in &self.runs {
            let at = *at as usize;
            if let Some(place) = content.get_mut(at..at.saturating_add(bytes.len())) {
                place.copy_from_slice(bytes);
            }
        }
        content
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_chip_with_little_in_it_is_little() {
        let mut content = vec![ERASED; 528 << 10];
        content[0x40..0x1000].fill(7);
        content[0x41000] = 1;
        let variables = FirmwareVariables::of(&content).unwrap();
        assert_eq!((variables.kept(), variables.runs.len()), (0xfc1, 2));
        assert!(variables.content() == content);
        assert_eq!(FirmwareVariables::of(&[0; MAX_VARIABLES + 1]), None);
    }

    proptest! {
        #[test]
        fn content_survives(content in prop::collection::vec(prop_oneof![4 => Just(ERASED), 1 => any::<u8>()], 0..600)) {
            prop_assert_eq!(FirmwareVariables::of(&content).unwrap().content(), content);
        }
    }
}
