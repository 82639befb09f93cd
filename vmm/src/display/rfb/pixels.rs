//! Pixel formats of clients (RFC 6143, 7.4), and pixels in them. Formats are true colour; with colour maps no client is served.

/// A pixel of the screen: `0x00RRGGBB`.
pub(in crate::display) type Rgb = u32;

/// Bits of a colour on the screen.
const MAX: u32 = 255;

/// How one colour lies in a pixel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Channel {
    max: u16,
    shift: u8,
}

impl Channel {
    fn scale(self, value: u32) -> u32 {
        // Rounded; at most 16 bits, shifted by less than 32.
        ((value * u32::from(self.max) + MAX / 2) / MAX) << self.shift
    }

    /// The bits that it can set.
    fn mask(self) -> u64 {
        u64::from(self.max) << self.shift
    }
}

/// Bytes of a pixel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Width {
    One,
    Two,
    Four,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Order {
    LittleEndian,
    BigEndian,
}

/// A true-colour format.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct PixelFormat {
    width: Width,
    depth: u8,
    order: Order,
    /// Red, green, blue.
    channels: [Channel; 3],
}

/// Length of a format in messages.
pub(super) const FORMAT_LEN: usize = 16;

impl PixelFormat {
    /// That of the screen: what is sent to clients that ask for nothing else.
    pub(super) const NATIVE: Self = Self {
        width: Width::Four,
        depth: 24,
        order: Order::LittleEndian,
        channels: [
            Channel { max: 255, shift: 16 },
            Channel { max: 255, shift: 8 },
            Channel { max: 255, shift: 0 },
        ],
    };

    /// Reads a client's wish. None where it is for a colour map, or makes no sense.
    pub(super) fn parse(bytes: &[u8; FORMAT_LEN]) -> Option<Self> {
        let [bits, depth, big_endian, true_colour, ..] = *bytes;
        let width = match bits {
            8 => Width::One,
            16 => Width::Two,
            32 => Width::Four,
            _ => return None,
        };
        let channel = |at: usize, shift: usize| {
            let channel =
                Channel { max: u16::from_be_bytes([bytes[at], bytes[at + 1]]), shift: bytes[shift] };
            (channel.shift < bits && channel.mask() >> bits == 0).then_some(channel)
        };
        let channels = [channel(4, 10)?, channel(6, 11)?, channel(8, 12)?];
        let order = if big_endian == 0 { Order::LittleEndian } else { Order::BigEndian };
        (true_colour != 0).then_some(Self { width, depth, order, channels })
    }

    /// The format as a message has it.
    pub(super) fn bytes(&self) -> [u8; FORMAT_LEN] {
        let mut bytes = [0; FORMAT_LEN];
        let bits = match self.width {
            Width::One => 8,
            Width::Two => 16,
            Width::Four => 32,
        };
        bytes[..4].copy_from_slice(&[bits, self.depth, u8::from(self.order == Order::BigEndian), 1]);
        for (at, channel) in self.channels.iter().enumerate() {
            bytes[4 + 2 * at..6 + 2 * at].copy_from_slice(&channel.max.to_be_bytes());
            bytes[10 + at] = channel.shift;
        }
        bytes
    }

    fn value(&self, rgb: Rgb) -> u32 {
        let [red, green, blue] = self.channels;
        red.scale(rgb >> 16 & 0xff) | green.scale(rgb >> 8 & 0xff) | blue.scale(rgb & 0xff)
    }

    /// Appends a pixel.
    pub(super) fn put(&self, rgb: Rgb, out: &mut Vec<u8>) {
        if *self == Self::NATIVE {
            out.extend((rgb & 0xff_ffff).to_le_bytes());
            return;
        }
        let value = self.value(rgb);
        match (self.width, self.order) {
            (Width::One, _) => out.push(value as u8),
            (Width::Two, Order::LittleEndian) => out.extend((value as u16).to_le_bytes()),
            (Width::Two, Order::BigEndian) => out.extend((value as u16).to_be_bytes()),
            (Width::Four, Order::LittleEndian) => out.extend(value.to_le_bytes()),
            (Width::Four, Order::BigEndian) => out.extend(value.to_be_bytes()),
        }
    }

    /// The format of compressed pixels.
    pub(super) fn compact(&self) -> CompactFormat {
        let mask = self.channels.iter().fold(0, |mask, channel| mask | channel.mask());
        let bytes = match self.width {
            Width::Four if self.depth <= 24 && mask >> 24 == 0 => Bytes::Low,
            Width::Four if self.depth <= 24 && mask & 0xff == 0 => Bytes::High,
            Width::One | Width::Two | Width::Four => Bytes::All,
        };
        CompactFormat { format: *self, bytes }
    }
}

/// Which bytes of a pixel are sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Bytes {
    All,
    /// The three lower ones.
    Low,
    /// The three upper ones.
    High,
}

/// The pixels of ZRLE: without the byte that no colour uses, if there is one (RFC 6143, 7.7.5: CPIXEL).
#[derive(Debug, Clone, Copy)]
pub(super) struct CompactFormat {
    format: PixelFormat,
    bytes: Bytes,
}

impl CompactFormat {
    /// Appends a pixel.
    pub(super) fn put(&self, rgb: Rgb, out: &mut Vec<u8>) {
        let value = match self.bytes {
            Bytes::All => return self.format.put(rgb, out),
            Bytes::Low => self.format.value(rgb),
            Bytes::High => self.format.value(rgb) >> 8,
        };
        let [a, b, c, _] = value.to_le_bytes();
        out.extend(match self.format.order {
            Order::LittleEndian => [a, b, c],
            Order::BigEndian => [c, b, a],
        });
    }

    /// Bytes of a pixel.
    pub(super) fn len(&self) -> usize {
        match (self.bytes, self.format.width) {
            (Bytes::Low | Bytes::High, _) => 3,
            (Bytes::All, Width::One) => 1,
            (Bytes::All, Width::Two) => 2,
            (Bytes::All, Width::Four) => 4,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn format(bits: u8, depth: u8, big: u8, max: [u16; 3], shift: [u8; 3]) -> Option<PixelFormat> {
        let mut bytes = vec![bits, depth, big, 1];
        max.iter().for_each(|max| bytes.extend(max.to_be_bytes()));
        bytes.extend(shift);
        bytes.extend([0; 3]);
        PixelFormat::parse(&bytes.try_into().unwrap())
    }

    fn put(format: PixelFormat, rgb: Rgb) -> (Vec<u8>, Vec<u8>) {
        let (mut full, mut compact) = (Vec::new(), Vec::new());
        format.put(rgb, &mut full);
        format.compact().put(rgb, &mut compact);
        assert_eq!(compact.len(), format.compact().len());
        (full, compact)
    }

    #[test]
    fn pixels_are_sent_as_clients_ask() {
        let native = PixelFormat::parse(&PixelFormat::NATIVE.bytes()).unwrap();
        assert_eq!(native, PixelFormat::NATIVE);
        assert_eq!(put(native, 0xff11_2233), (vec![0x33, 0x22, 0x11, 0], vec![0x33, 0x22, 0x11]));
        let other = format(32, 24, 1, [255; 3], [0, 8, 16]).unwrap();
        assert_eq!(put(other, 0x11_2233), (vec![0, 0x33, 0x22, 0x11], vec![0x33, 0x22, 0x11]));
        let upper = format(32, 24, 0, [255; 3], [8, 16, 24]).unwrap();
        assert_eq!(put(upper, 0x11_2233), (vec![0, 0x11, 0x22, 0x33], vec![0x11, 0x22, 0x33]));
        let deep = format(32, 30, 0, [1023; 3], [20, 10, 0]).unwrap();
        assert_eq!(put(deep, 0xff_0000), (vec![0, 0, 0xf0, 0x3f], vec![0, 0, 0xf0, 0x3f]));
        let small = format(16, 16, 0, [31, 63, 31], [11, 5, 0]).unwrap();
        assert_eq!(put(small, 0xff_0000), (vec![0, 0xf8], vec![0, 0xf8]));
        let tiny = format(8, 6, 0, [3, 3, 3], [4, 2, 0]).unwrap();
        assert_eq!(put(tiny, 0xff_00ff), (vec![0b11_0011], vec![0b11_0011]));
    }

    #[test]
    fn formats_that_make_no_sense_are_refused() {
        assert_eq!(format(24, 24, 0, [255; 3], [16, 8, 0]), None);
        assert_eq!(format(16, 16, 0, [255; 3], [16, 8, 0]), None);
        assert_eq!(format(32, 24, 0, [255; 3], [255, 8, 0]), None);
        assert_eq!(format(8, 8, 0, [7, 7, 256], [0, 3, 0]), None);
        let mut mapped = PixelFormat::NATIVE.bytes();
        mapped[3] = 0;
        assert_eq!(PixelFormat::parse(&mapped), None);
    }

    proptest! {
        #[test]
        fn whatever_is_accepted_can_be_used(bytes in any::<[u8; FORMAT_LEN]>(), bits in prop::sample::select(vec![8u8, 16, 32]), rgb in any::<u32>()) {
            let mut bytes = bytes;
            bytes[0] = bits;
            if let Some(format) = PixelFormat::parse(&bytes) {
                let (full, _) = put(format, rgb);
                prop_assert_eq!(full.len(), usize::from(bits / 8));
            }
        }
    }
}
