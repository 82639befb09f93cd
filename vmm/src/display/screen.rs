//! What clients are shown: a copy of the frame buffer, made anew now and then while somebody looks, and which tiles of it changed.
//!
//! The copy is what is sent, so that all parts of an update are of one moment as far as the guest lets them, and what is compared: a frame buffer in the
//! guest's memory does not say what was written. Without a client there is no copy.

use super::ramfb::{Mode, PIXEL, Ramfb, Size};
use super::rfb::{Rgb, TILE};
use crate::memory::Memory;

/// Shown while the guest has no frame buffer.
const BLANK: Size = Size { width: 640, height: 480 };

/// A set of tiles of a screen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Tiles {
    columns: u16,
    set: Vec<bool>,
}

/// Tiles from left to right in a row of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Rectangle {
    pub(super) x: u16,
    pub(super) y: u16,
    pub(super) width: u16,
    pub(super) height: u16,
}

impl Tiles {
    /// None of a screen of this size.
    pub(super) fn none(size: Size) -> Self {
        let columns = size.width.div_ceil(TILE);
        let count = usize::from(columns) * usize::from(size.height.div_ceil(TILE));
        Self { columns, set: vec![false; count] }
    }

    /// All of a screen of this size.
    pub(super) fn all(size: Size) -> Self {
        let mut tiles = Self::none(size);
        tiles.set.fill(true);
        tiles
    }

    pub(super) fn is_empty(&self) -> bool {
        !self.set.contains(&true)
    }

    /// Adds those of another set of the same screen.
    pub(super) fn add(&mut self, others: &Self) {
        for (tile, other) in self.set.iter_mut().zip(&others.set) {
            *tile |= other;
        }
    }

    /// Adds those that touch an area.
    pub(super) fn add_area(&mut self, area: Rectangle) {
        if area.width == 0 || area.height == 0 {
            return;
        }
        let columns = usize::from(self.columns);
        let end = |from: u16, len: u16| usize::from(from.saturating_add(len).div_ceil(TILE));
        let first = usize::from(area.x / TILE);
        for row in self.set.chunks_mut(columns).take(end(area.y, area.height)).skip((area.y / TILE).into()) {
            let end = end(area.x, area.width).min(row.len());
            if let Some(tiles) = row.get_mut(first..end) {
                tiles.fill(true);
            }
        }
    }

    /// Takes all of them, as rectangles inside of this size: neighbours in a row are one.
    pub(super) fn take(&mut self, size: Size) -> Vec<Rectangle> {
        let mut rectangles: Vec<Rectangle> = Vec::new();
        for (at, tile) in self.set.iter_mut().enumerate() {
            if !std::mem::take(tile) {
                continue;
            }
            let columns = usize::from(self.columns);
            // Screens have at most 64 by 64 tiles.
            let (x, y) = ((at % columns) as u16 * TILE, (at / columns) as u16 * TILE);
            if x >= size.width || y >= size.height {
                continue;
            }
            let (width, height) = ((size.width - x).min(TILE), (size.height - y).min(TILE));
            match rectangles.last_mut() {
                Some(last) if last.y == y && last.x + last.width == x => last.width += width,
                _ => rectangles.push(Rectangle { x, y, width, height }),
            }
        }
        rectangles
    }
}

/// The copy.
pub(super) struct Screen {
    size: Size,
    /// Four bytes a pixel, line by line.
    pixels: Vec<u8>,
    mode: Option<Mode>,
    line: Vec<u8>,
}

/// What has happened to the screen.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Change {
    /// It has another size, and is new everywhere.
    Size,
    /// These tiles are new; often none.
    Tiles(Tiles),
}

impl Screen {
    /// A screen on which nothing has been shown yet.
    pub(super) fn new() -> Self {
        let mut screen = Self { size: BLANK, pixels: Vec::new(), mode: None, line: Vec::new() };
        screen.resize(BLANK);
        screen
    }

    pub(super) fn size(&self) -> Size {
        self.size
    }

    fn resize(&mut self, size: Size) {
        let line = usize::from(size.width) * PIXEL;
        self.size = size;
        self.pixels = vec![0; line * usize::from(size.height)];
        self.line = vec![0; line];
    }

    /// Copies what the guest shows now. What it has outside of its memory is black.
    pub(super) fn update(&mut self, ramfb: &Ramfb, memory: &Memory) -> Change {
        self.mode = ramfb.mode();
        let size = self.mode.map_or(BLANK, |mode| mode.size);
        let resized = size != self.size;
        if resized {
            self.resize(size);
        }
        let mut tiles = Tiles::none(size);
        let tile = usize::from(TILE) * PIXEL;
        for (y, shown) in (0..size.height).zip(self.pixels.chunks_mut(self.line.len())) {
            if !self.mode.is_some_and(|mode| mode.read_line(memory, y, &mut self.line)) {
                self.line.fill(0);
            }
            if self.line == shown {
                continue;
            }
            let row = usize::from(y / TILE) * usize::from(tiles.columns);
            for (column, (now, shown)) in self.line.chunks(tile).zip(shown.chunks_mut(tile)).enumerate() {
                if now != shown {
                    shown.copy_from_slice(now);
                    tiles.set[row + column] = true;
                }
            }
        }
        if resized { Change::Size } else { Change::Tiles(tiles) }
    }

    /// Appends the pixels of a part, line by line; black beyond the edge.
    pub(super) fn read(&self, part: Rectangle, into: &mut Vec<Rgb>) {
        let stride = usize::from(self.size.width) * PIXEL;
        let first = usize::from(part.x) * PIXEL;
        for y in usize::from(part.y)..usize::from(part.y) + usize::from(part.height) {
            let end = into.len() + usize::from(part.width);
            let line = self.pixels.get(y * stride..(y + 1) * stride).and_then(|line| line.get(first..));
            let pixels = line.unwrap_or_default().chunks_exact(PIXEL).take(part.width.into());
            into.extend(pixels.map(|pixel| u32::from_le_bytes([pixel[0], pixel[1], pixel[2], 0])));
            into.resize(end, 0);
        }
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::display::ramfb;
    use crate::firmware::fw_cfg::WritableFile;
    use crate::layout::MIB;
    use crate::memory;

    const SIZE: Size = Size { width: 200, height: 100 };
    const AT: u64 = MIB;
    const STRIDE: u32 = 1024;

    fn pixel(screen: &Screen, x: u16, y: u16) -> Rgb {
        let mut pixels = Vec::new();
        screen.read(Rectangle { x, y, width: 1, height: 1 }, &mut pixels);
        let [pixel] = pixels[..] else { panic!("one pixel") };
        pixel
    }

    #[test]
    fn changed_tiles_are_found() {
        let memory = memory::create(16 * MIB).unwrap();
        let ramfb = Ramfb::default();
        let mut screen = Screen::new();
        assert_eq!(screen.update(&ramfb, &memory), Change::Tiles(Tiles::none(BLANK)));
        ramfb.write(0, &ramfb::setup(AT, SIZE, STRIDE));
        assert_eq!(screen.update(&ramfb, &memory), Change::Size);
        let none = Change::Tiles(Tiles::none(SIZE));
        assert_eq!(screen.update(&ramfb, &memory), none);
        let put = |x: u64, y: u64| {
            memory.write_slice(&[3, 2, 1, 0], GuestAddress(AT + y * u64::from(STRIDE) + x * 4)).unwrap();
        };
        put(199, 99);
        put(0, 64);
        put(64, 99);
        let Change::Tiles(mut tiles) = screen.update(&ramfb, &memory) else { panic!("no new size") };
        assert_eq!((pixel(&screen, 199, 99), pixel(&screen, 198, 99)), (0x01_0203, 0));
        let [left, right] = tiles.take(SIZE)[..] else { panic!("two areas") };
        assert_eq!(left, Rectangle { x: 0, y: 64, width: 128, height: 36 });
        assert_eq!(right, Rectangle { x: 192, y: 64, width: 8, height: 36 });
        assert!(tiles.is_empty());
        assert_eq!(screen.update(&ramfb, &memory), none);
        // Beyond the visible part of a line.
        put(200, 5);
        assert_eq!(screen.update(&ramfb, &memory), none);
    }

    #[test]
    fn a_frame_buffer_outside_of_memory_is_black() {
        let memory = memory::create(16 * MIB).unwrap();
        let ramfb = Ramfb::default();
        ramfb.write(0, &ramfb::setup(u64::MAX - 5, SIZE, 0));
        let mut screen = Screen::new();
        assert_eq!(screen.update(&ramfb, &memory), Change::Size);
        assert_eq!(pixel(&screen, 199, 99), 0);
        assert_eq!(pixel(&screen, u16::MAX, u16::MAX), 0);
    }

    #[test]
    fn areas_are_cut_to_the_screen() {
        let all = Rectangle { x: 0, y: 0, width: u16::MAX, height: u16::MAX };
        let mut tiles = Tiles::none(SIZE);
        tiles.add_area(all);
        assert_eq!(tiles, Tiles::all(SIZE));
        let covered: u32 =
            tiles.take(SIZE).iter().map(|part| u32::from(part.width) * u32::from(part.height)).sum();
        assert_eq!(covered, 200 * 100);
        tiles.add_area(Rectangle { x: u16::MAX, y: u16::MAX, ..all });
        tiles.add_area(Rectangle { x: 10, y: 10, width: 0, height: 9 });
        assert!(tiles.is_empty());
        tiles.add_area(Rectangle { x: 63, y: 63, width: 2, height: 1 });
        assert_eq!(tiles.take(SIZE), [Rectangle { x: 0, y: 0, width: 128, height: 64 }]);
        // A client that does not know of a larger size is sent its part.
        let mut tiles = Tiles::all(SIZE);
        let small = Size { width: 70, height: 10 };
        assert_eq!(tiles.take(small), [Rectangle { x: 0, y: 0, width: 70, height: 10 }]);
    }
}
