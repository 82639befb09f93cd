//! ramfb: a frame buffer in the guest's own memory (QEMU, `hw/display/ramfb.c`). The guest writes to a file of fw_cfg where it is and how it is
//! laid out; there is nothing else to the device. Stock firmware drives it, and hands it to the kernel as the frame buffer of EFI.
//!
//! Every field comes from a guest: what describes no frame buffer inside of bounds is as good as none, and pixels are read through
//! `vm-memory` only, so that an address outside the guest's memory reads as black.

use parking_lot::Mutex;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use crate::firmware::fw_cfg::WritableFile;
use crate::memory::Memory;

/// The file's name, by which firmware finds the device.
pub(crate) const FILE: &str = "etc/ramfb";
/// Length of its content: address, format, flags, width, height, bytes a line; all of them big-endian.
const LEN: usize = 28;
/// The format of Linux's `DRM_FORMAT_XRGB8888`, the only one there is: four bytes a pixel, blue first.
const XRGB8888: u32 = u32::from_le_bytes(*b"XR24");
/// Bytes of a pixel.
pub(super) const PIXEL: usize = 4;
/// Most pixels in each direction.
pub(super) const MAX_SIDE: u16 = 4096;

/// Width and height in pixels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Size {
    pub(super) width: u16,
    pub(super) height: u16,
}

/// A frame buffer that makes sense by itself; whether its address does is seen when it is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Mode {
    pub(super) size: Size,
    address: u64,
    /// Bytes from a line to the next one.
    stride: u32,
}

impl Mode {
    fn parse(content: &[u8; LEN]) -> Option<Self> {
        let word =
            |at: usize| u32::from_be_bytes([content[at], content[at + 1], content[at + 2], content[at + 3]]);
        let address = u64::from(word(0)) << 32 | u64::from(word(4));
        let side = |value: u32| u16::try_from(value).ok().filter(|side| (1..=MAX_SIDE).contains(side));
        let size = Size { width: side(word(16))?, height: side(word(20))? };
        let line = u32::from(size.width) * PIXEL as u32;
        let stride = match word(24) {
            0 => line,
            stride => stride,
        };
        (word(8) == XRGB8888 && stride >= line).then_some(Self { size, address, stride })
    }

    /// Reads a line. False, and nothing read, where it is not in the guest's memory.
    pub(super) fn read_line(&self, memory: &Memory, line: u16, into: &mut [u8]) -> bool {
        let offset = u64::from(self.stride) * u64::from(line);
        let Some(at) = self.address.checked_add(offset).map(GuestAddress) else { return false };
        memory.check_range(at, into.len()) && memory.read_slice(into, at).is_ok()
    }
}

/// The device.
#[derive(Default)]
pub(crate) struct Ramfb {
    content: Mutex<[u8; LEN]>,
}

impl Ramfb {
    /// The frame buffer that the guest has set up, if it has.
    pub(super) fn mode(&self) -> Option<Mode> {
        Mode::parse(&self.content.lock())
    }
}

impl WritableFile for Ramfb {
    fn content(&self) -> Vec<u8> {
        self.content.lock().to_vec()
    }

    fn write(&self, offset: usize, data: &[u8]) {
        let mut content = self.content.lock();
        if let Some(target) = content.get_mut(offset..offset.saturating_add(data.len())) {
            target.copy_from_slice(data);
        }
        let mode = Mode::parse(&content);
        tracing::debug!(?mode, "the guest sets its frame buffer up");
    }
}

/// What a driver writes to set up a frame buffer.
#[cfg(test)]
pub(super) fn setup(address: u64, size: Size, stride: u32) -> Vec<u8> {
    let mut content = address.to_be_bytes().to_vec();
    for word in [XRGB8888, 0, size.width.into(), size.height.into(), stride] {
        content.extend(word.to_be_bytes());
    }
    content
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::layout::MIB;
    use crate::memory;

    const SIZE: Size = Size { width: 800, height: 600 };

    fn mode(content: &[u8]) -> Option<Mode> {
        let ramfb = Ramfb::default();
        ramfb.write(0, content);
        ramfb.mode()
    }

    #[test]
    fn a_guest_sets_up_its_frame_buffer() {
        assert_eq!(Ramfb::default().mode(), None);
        let set = setup(0x1234_5678_9abc, SIZE, 0);
        assert_eq!(mode(&set), Some(Mode { size: SIZE, address: 0x1234_5678_9abc, stride: 3200 }));
        assert_eq!(mode(&setup(0, SIZE, 4096)).map(|mode| mode.stride), Some(4096));
    }

    #[test]
    fn what_is_no_frame_buffer_counts_as_none() {
        let large = Size { width: MAX_SIDE + 1, height: 1 };
        let flat = Size { width: 16, height: 0 };
        let mut other = setup(0, SIZE, 0);
        other[8..12].copy_from_slice(&u32::from_le_bytes(*b"RG16").to_be_bytes());
        for content in [setup(0, large, 0), setup(0, flat, 0), setup(0, SIZE, 3199), other] {
            assert_eq!(mode(&content), None, "{content:x?}");
        }
    }

    #[test]
    fn lines_are_read_inside_of_memory_only() {
        let memory = memory::create(16 * MIB).unwrap();
        let size = Size { width: 16, height: 2 };
        let at = 16 * MIB - 192;
        memory.write_slice(&[7; 64], GuestAddress(at + 128)).unwrap();
        let mode = mode(&setup(at, size, 128)).unwrap();
        let mut line = [0; 64];
        assert!(mode.read_line(&memory, 1, &mut line));
        assert_eq!(line, [7; 64]);
        assert!(!mode.read_line(&memory, 2, &mut line));
    }

    proptest! {
        #[test]
        fn no_content_leads_outside_of_memory(words in prop::collection::vec(any::<u32>(), 5), address in any::<u64>(), sane in any::<bool>(), line in any::<u16>()) {
            let memory = memory::create(16 * MIB).unwrap();
            let mut content = address.to_be_bytes().to_vec();
            words.iter().for_each(|word| content.extend(word.to_be_bytes()));
            if sane {
                let size = Size { width: words[2] as u16 % MAX_SIDE + 1, height: words[3] as u16 % MAX_SIDE + 1 };
                content = setup(address, size, words[4]);
            }
            if let Some(mode) = mode(&content) {
                let mut bytes = vec![0; usize::from(mode.size.width) * PIXEL];
                mode.read_line(&memory, line, &mut bytes);
            }
        }
    }
}
