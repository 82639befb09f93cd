//! A viewer for tests: a client of RFB 3.8 that keeps a picture of the screen and types. Pixels come uncompressed.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

const RAW: i32 = 0;
const DESKTOP_SIZE: i32 = -223;
const EXTENDED_KEYS: i32 = -258;
/// How long the server may take to answer.
const PATIENCE: Duration = Duration::from_secs(60);
/// X11's symbol of Return.
pub const RETURN: u32 = 0xff0d;
const SHIFT: u32 = 0xffe1;

/// What a screen shows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Picture {
    /// Pixels in a line.
    pub width: u16,
    /// Lines.
    pub height: u16,
    /// `0x00RRGGBB`, line by line.
    pub pixels: Vec<u32>,
}

impl Picture {
    fn new(width: u16, height: u16) -> Self {
        Self { width, height, pixels: vec![0; usize::from(width) * usize::from(height)] }
    }

    /// How many pixels have which colour.
    pub fn colours(&self) -> BTreeMap<u32, usize> {
        let mut colours = BTreeMap::new();
        for pixel in &self.pixels {
            *colours.entry(*pixel).or_default() += 1;
        }
        colours
    }

    /// The picture as a file (PPM).
    pub fn ppm(&self) -> Vec<u8> {
        let mut file = format!("P6 {} {} 255\n", self.width, self.height).into_bytes();
        for pixel in &self.pixels {
            let [_, red, green, blue] = pixel.to_be_bytes();
            file.extend([red, green, blue]);
        }
        file
    }
}

/// A viewer that is attached.
#[derive(Debug)]
pub struct Viewer {
    stream: UnixStream,
    picture: Picture,
}

impl Viewer {
    /// Attaches to the display on this socket.
    pub fn attach(socket: &Path) -> Result<Self> {
        let stream = UnixStream::connect(socket).context("the display is not served")?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        let mut viewer = Self { stream, picture: Picture::new(0, 0) };
        ensure!(viewer.read(12)? == b"RFB 003.008\n", "another version");
        viewer.stream.write_all(b"RFB 003.008\n")?;
        ensure!(viewer.read(2)? == [1, 1], "another security type than none");
        viewer.stream.write_all(&[1])?;
        ensure!(viewer.read(4)? == [0; 4], "refused");
        viewer.stream.write_all(&[1])?;
        let (width, height) = (viewer.short()?, viewer.short()?);
        let format = viewer.read(16)?;
        ensure!(format[..4] == [32, 24, 0, 1], "another format than 32 bits, blue first: {format:?}");
        let name = viewer.word()?;
        viewer.read(name as usize)?;
        viewer.picture = Picture::new(width, height);
        let mut encodings = vec![2, 0, 0, 3];
        for encoding in [RAW, DESKTOP_SIZE, EXTENDED_KEYS] {
            encodings.extend(encoding.to_be_bytes());
        }
        viewer.stream.write_all(&encodings)?;
        Ok(viewer)
    }

    /// The screen as it is now, all of it.
    pub fn look(&mut self) -> Result<&Picture> {
        loop {
            let mut request = vec![3, 0, 0, 0, 0, 0];
            request.extend(self.picture.width.to_be_bytes());
            request.extend(self.picture.height.to_be_bytes());
            self.stream.write_all(&request)?;
            if self.update()? {
                return Ok(&self.picture);
            }
        }
    }

    /// Takes an update, and says whether it had pixels.
    fn update(&mut self) -> Result<bool> {
        let head = self.read(4)?;
        ensure!(head[0] == 0, "a message of type {}", head[0]);
        let count = u16::from_be_bytes([head[2], head[3]]);
        let mut pixels = false;
        for _ in 0..count {
            let (x, y) = (usize::from(self.short()?), usize::from(self.short()?));
            let (width, height) = (self.short()?, self.short()?);
            match self.word()?.cast_signed() {
                RAW => {
                    pixels = true;
                    let line = usize::from(width);
                    let data = self.read(line * usize::from(height) * 4)?;
                    let stride = usize::from(self.picture.width);
                    for (at, pixel) in data.chunks_exact(4).enumerate() {
                        let at = (y + at / line) * stride + x + at % line;
                        let target =
                            self.picture.pixels.get_mut(at).context("a pixel outside of the screen")?;
                        *target = u32::from_le_bytes([pixel[0], pixel[1], pixel[2], 0]);
                    }
                }
                DESKTOP_SIZE => self.picture = Picture::new(width, height),
                EXTENDED_KEYS => {}
                other => bail!("encoding {other}, which was not asked for"),
            }
        }
        Ok(pixels)
    }

    /// Presses and releases a key by its symbol: a character, or one of X11's.
    pub fn press(&mut self, symbol: u32) -> Result<()> {
        let shifted = char::from_u32(symbol)
            .is_some_and(|c| c.is_ascii_uppercase() || "!@#$%^&*()_+{}|:\"~<>?".contains(c));
        if shifted {
            self.key(SHIFT, 1)?;
        }
        self.key(symbol, 1)?;
        self.key(symbol, 0)?;
        if shifted {
            self.key(SHIFT, 0)?;
        }
        Ok(())
    }

    fn key(&mut self, symbol: u32, down: u8) -> Result<()> {
        let mut event = vec![4, down, 0, 0];
        event.extend(symbol.to_be_bytes());
        Ok(self.stream.write_all(&event)?)
    }

    /// Presses and releases a key by its code of set 1.
    pub fn press_code(&mut self, code: u32) -> Result<()> {
        for down in [1, 0] {
            let mut event = vec![255, 0, 0, down, 0, 0, 0, 0];
            event.extend(code.to_be_bytes());
            self.stream.write_all(&event)?;
        }
        Ok(())
    }

    /// Puts the pointer there, with these buttons pressed.
    pub fn point(&mut self, x: u16, y: u16, buttons: u8) -> Result<()> {
        let mut event = vec![5, buttons];
        event.extend(x.to_be_bytes());
        event.extend(y.to_be_bytes());
        Ok(self.stream.write_all(&event)?)
    }

    fn read(&mut self, len: usize) -> Result<Vec<u8>> {
        let mut data = vec![0; len];
        self.stream.read_exact(&mut data).context("the display says nothing more")?;
        Ok(data)
    }

    fn short(&mut self) -> Result<u16> {
        let data = self.read(2)?;
        Ok(u16::from_be_bytes([data[0], data[1]]))
    }

    fn word(&mut self) -> Result<u32> {
        let data = self.read(4)?;
        Ok(u32::from_be_bytes([data[0], data[1], data[2], data[3]]))
    }
}
