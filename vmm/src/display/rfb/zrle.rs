//! ZRLE (RFC 6143, 7.7.6): tiles of 64 by 64 pixels, each in the shortest of a few ways, all through one zlib stream that lasts as long as
//! the client.

use std::collections::BTreeMap;

use miniz_oxide::deflate::core::{CompressorOxide, create_comp_flags_from_zip_params};
use miniz_oxide::deflate::stream::deflate;
use miniz_oxide::{MZError, MZFlush};

use super::pixels::{CompactFormat, Rgb};

/// Pixels of a tile in each direction.
pub(in crate::display) const TILE: u16 = 64;
/// Fast rather than small: screens are mostly plain, and the thread has other clients.
const LEVEL: i32 = 2;
/// With zlib's header.
const WINDOW_BITS: i32 = 15;
/// Most colours in a palette of runs, and in one of packed pixels.
const RUN_COLOURS: usize = 127;
const PACKED_COLOURS: usize = 16;
/// Space that output grows by.
const CHUNK: usize = 16 << 10;

/// Kinds of tiles.
const RAW: u8 = 0;
const SOLID: u8 = 1;
const PLAIN_RUNS: u8 = 128;

/// The stream of one client.
pub(super) struct Zrle {
    compressor: Box<CompressorOxide>,
}

/// The compressor gave up; it does not with sound arguments.
#[derive(Debug, thiserror::Error)]
#[error("compression failed: {0:?}")]
pub(in crate::display) struct CompressError(MZError);

impl Zrle {
    pub(super) fn new() -> Self {
        let flags = create_comp_flags_from_zip_params(LEVEL, WINDOW_BITS, 0);
        Self { compressor: Box::new(CompressorOxide::new(flags)) }
    }

    /// Appends the content of a rectangle: its length, and the tiles, compressed.
    pub(super) fn encode(&mut self, tiles: &[u8], out: &mut Vec<u8>) -> Result<(), CompressError> {
        let start = out.len();
        out.extend([0; 4]);
        let mut input = tiles;
        loop {
            let at = out.len();
            out.resize(at + CHUNK, 0);
            let result = deflate(&mut self.compressor, input, &mut out[at..], MZFlush::Sync);
            out.truncate(at + result.bytes_written);
            result.status.map_err(CompressError)?;
            input = &input[result.bytes_consumed..];
            // With space left, all of the input is consumed and flushed.
            if result.bytes_written < CHUNK {
                break;
            }
        }
        let len = (out.len() - start - 4) as u32;
        out[start..start + 4].copy_from_slice(&len.to_be_bytes());
        Ok(())
    }
}

/// Appends one tile of this width.
pub(super) fn tile(pixels: &[Rgb], width: usize, format: CompactFormat, out: &mut Vec<u8>) {
    let mut palette = BTreeMap::new();
    let mut runs = 0;
    let mut singles = 0;
    for run in pixels.chunk_by(|a, b| a == b) {
        runs += 1;
        singles += usize::from(run.len() == 1);
        if palette.len() <= RUN_COLOURS {
            let next = palette.len() as u8;
            palette.entry(run[0]).or_insert(next);
        }
    }
    let colours = palette.len();
    if colours == 1 {
        out.push(SOLID);
        return format.put(pixels[0], out);
    }
    // What follows the palette, at about its length: runs beyond 255 pixels are rare.
    let raw = pixels.len() * format.len();
    let plain_runs = runs * (format.len() + 1);
    let palette_runs =
        if colours <= RUN_COLOURS { colours * format.len() + 2 * runs - singles } else { usize::MAX };
    let packed = match bits_for(colours) {
        Some(bits) => colours * format.len() + (width * bits).div_ceil(8) * (pixels.len() / width),
        None => usize::MAX,
    };
    let least = raw.min(plain_runs).min(palette_runs).min(packed);
    if least == packed {
        put_palette(colours as u8, &palette, format, out);
        put_packed(pixels, width, &palette, bits_for(colours).unwrap_or(8), out);
    } else if least == palette_runs {
        put_palette(PLAIN_RUNS + colours as u8, &palette, format, out);
        for run in pixels.chunk_by(|a, b| a == b) {
            let index = palette.get(&run[0]).copied().unwrap_or(0);
            if run.len() == 1 {
                out.push(index);
            } else {
                out.push(index | PLAIN_RUNS);
                put_length(run.len(), out);
            }
        }
    } else if least == plain_runs {
        out.push(PLAIN_RUNS);
        for run in pixels.chunk_by(|a, b| a == b) {
            format.put(run[0], out);
            put_length(run.len(), out);
        }
    } else {
        out.push(RAW);
        pixels.iter().for_each(|pixel| format.put(*pixel, out));
    }
}

/// Bits of a packed pixel.
fn bits_for(colours: usize) -> Option<usize> {
    match colours {
        2 => Some(1),
        3..=4 => Some(2),
        5..=PACKED_COLOURS => Some(4),
        _ => None,
    }
}

fn put_palette(kind: u8, palette: &BTreeMap<Rgb, u8>, format: CompactFormat, out: &mut Vec<u8>) {
    out.push(kind);
    let mut colours: Vec<_> = palette.iter().map(|(colour, index)| (*index, *colour)).collect();
    colours.sort_unstable();
    colours.into_iter().for_each(|(_, colour)| format.put(colour, out));
}

/// Rows begin with a byte of their own; the first pixel is in its upper bits.
fn put_packed(pixels: &[Rgb], width: usize, palette: &BTreeMap<Rgb, u8>, bits: usize, out: &mut Vec<u8>) {
    for row in pixels.chunks(width) {
        for group in row.chunks(8 / bits) {
            let mut byte = 0;
            for (at, pixel) in group.iter().enumerate() {
                byte |= palette.get(pixel).copied().unwrap_or(0) << (8 - bits * (at + 1));
            }
            out.push(byte);
        }
    }
}

/// One less, in bytes that are added up; all but the last are 255.
fn put_length(len: usize, out: &mut Vec<u8>) {
    let mut rest = len - 1;
    while rest >= 255 {
        out.push(255);
        rest -= 255;
    }
    out.push(rest as u8);
}

#[cfg(test)]
pub(super) mod tests {
    use proptest::prelude::*;

    use super::super::pixels::PixelFormat;
    use super::*;

    /// The reverse of [`tile`], for the native format: reads a tile from the front.
    pub(in crate::display) fn read_tile(data: &mut &[u8], width: usize, height: usize) -> Vec<Rgb> {
        let mut byte = || {
            let (first, rest) = data.split_first().unwrap();
            *data = rest;
            *first
        };
        let count = width * height;
        let kind = byte();
        let pixel = |byte: &mut dyn FnMut() -> u8| u32::from_le_bytes([byte(), byte(), byte(), 0]);
        let length = |byte: &mut dyn FnMut() -> u8| {
            let mut len = 1;
            loop {
                let part = byte();
                len += usize::from(part);
                if part != 255 {
                    return len;
                }
            }
        };
        let mut pixels = Vec::new();
        match kind {
            RAW => (0..count).for_each(|_| pixels.push(pixel(&mut byte))),
            SOLID => pixels = vec![pixel(&mut byte); count],
            2..=16 => {
                let palette: Vec<_> = (0..kind).map(|_| pixel(&mut byte)).collect();
                let bits = bits_for(kind.into()).unwrap();
                for _ in 0..height {
                    let row: Vec<u8> = (0..(width * bits).div_ceil(8)).map(|_| byte()).collect();
                    for at in 0..width {
                        let index = row[at * bits / 8] >> (8 - bits - at * bits % 8) & ((1 << bits) - 1);
                        pixels.push(palette[usize::from(index)]);
                    }
                }
            }
            PLAIN_RUNS => {
                while pixels.len() < count {
                    let colour = pixel(&mut byte);
                    let len = length(&mut byte);
                    pixels.extend(vec![colour; len]);
                }
            }
            130.. => {
                let palette: Vec<_> = (0..kind - 128).map(|_| pixel(&mut byte)).collect();
                while pixels.len() < count {
                    let index = byte();
                    let colour = palette[usize::from(index & 0x7f)];
                    let len = if index & 0x80 == 0 { 1 } else { length(&mut byte) };
                    pixels.extend(vec![colour; len]);
                }
            }
            kind => panic!("no kind of tile: {kind}"),
        }
        assert_eq!(pixels.len(), count);
        pixels
    }

    fn check(pixels: &[Rgb], width: usize) -> u8 {
        let mut out = Vec::new();
        tile(pixels, width, PixelFormat::NATIVE.compact(), &mut out);
        let mut data = &out[..];
        assert_eq!(read_tile(&mut data, width, pixels.len() / width), pixels);
        assert!(data.is_empty());
        assert!(out.len() <= 1 + pixels.len() * 3 + 3 * RUN_COLOURS);
        out[0]
    }

    #[test]
    fn each_tile_is_sent_in_a_short_way() {
        assert_eq!(check(&[7; 64 * 64], 64), SOLID);
        let text: Vec<Rgb> = (0..64 * 64u32).map(|at| (at * 7919) >> 3 & 1).collect();
        assert_eq!(check(&text, 64), 2);
        let few: Vec<Rgb> = (0..64 * 64u32).map(|at| (at * 7919) >> 3 & 15).collect();
        assert_eq!(check(&few, 64), 16);
        let bars: Vec<Rgb> = (0..64 * 64u32).map(|at| at / 32 % 20).collect();
        assert_eq!(check(&bars, 64), 128 + 20);
        let steps: Vec<Rgb> = (0..64 * 64u32).map(|at| at / 8).collect();
        assert_eq!(check(&steps, 64), PLAIN_RUNS);
        let noise: Vec<Rgb> = (0..64 * 64u32).map(|at| (at * 7919) & 0xff_ffff).collect();
        assert_eq!(check(&noise, 64), RAW);
        let long: Vec<Rgb> =
            (0..64 * 64u32).map(|at| if at < 2000 { at / 1000 } else { at * 4001 }).collect();
        check(&long, 64);
    }

    proptest! {
        #[test]
        fn tiles_of_any_shape_arrive(width in 1usize..64, height in 1usize..64, colours in 1u32..300, seed in any::<u32>(), run in 1u32..500) {
            let pixel = |at: u32| ((at / run).wrapping_add(seed)).wrapping_mul(2_654_435_761) % colours;
            let pixels: Vec<Rgb> = (0..(width * height) as u32).map(pixel).collect();
            check(&pixels, width);
        }

        #[test]
        fn the_stream_goes_on_from_rectangle_to_rectangle(rectangles in prop::collection::vec((any::<u8>(), 0usize..50_000, any::<bool>()), 1..4)) {
            let mut zrle = Zrle::new();
            let mut inflater = miniz_oxide::inflate::stream::InflateState::new(miniz_oxide::DataFormat::Zlib);
            for (seed, len, noisy) in rectangles {
                let plain: Vec<u8> = (0..len).map(|at| if noisy { (at * 7919 / 64) as u8 ^ seed } else { seed }).collect();
                let mut out = Vec::new();
                zrle.encode(&plain, &mut out).unwrap();
                let announced = u32::from_be_bytes([out[0], out[1], out[2], out[3]]) as usize;
                prop_assert_eq!(announced, out.len() - 4);
                let mut back = vec![0; len + 1];
                let result = miniz_oxide::inflate::stream::inflate(&mut inflater, &out[4..], &mut back, MZFlush::Sync);
                prop_assert_eq!((result.bytes_consumed, result.bytes_written), (announced, len));
                back.pop();
                prop_assert_eq!(back, plain);
            }
        }
    }
}
