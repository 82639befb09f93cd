//! One client, from its first byte to its last.

use std::collections::{BTreeSet, VecDeque};

use super::message::{self, Message, MessageError, Wish};
use super::pixels::{PixelFormat, Rgb};
use super::zrle::{self, CompressError, TILE, Zrle};
use crate::display::keyboard::{Action, Key};
use crate::display::pointer::{POSITION_MAX, PointerState};
use crate::display::ramfb::Size;
use crate::display::screen::{Change, Rectangle, Screen, Tiles};

/// No more is made for the client while this much waits. One rectangle, a row of tiles, may come on top.
const OUTPUT_LIMIT: usize = 256 << 10;

const VERSION: &[u8; 12] = b"RFB 003.008\n";
/// The security type by which nothing is asked: who may open the socket may use the display.
const SECURITY_NONE: u8 = 1;

const RAW: i32 = 0;
const ZRLE: i32 = 16;
const DESKTOP_SIZE: i32 = -223;
const EXTENDED_DESKTOP_SIZE: i32 = -308;
const EXTENDED_KEYS: i32 = -258;

/// Reasons and results of a change of size.
const BY_SERVER: u16 = 0;
const BY_THIS_CLIENT: u16 = 1;
const DONE: u16 = 0;
const PROHIBITED: u16 = 1;

/// What a client does to the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::display) enum Input {
    Key(Key, Action),
    Pointer(PointerState),
}

/// Why a client is dropped.
#[derive(Debug, thiserror::Error)]
pub(in crate::display) enum SessionError {
    /// It does not speak RFB.
    #[error("not a client of RFB 3")]
    Version,
    /// It wants to be asked for something.
    #[error("security type {0}, which was not offered")]
    Security(u8),
    /// Its message cannot be served.
    #[error(transparent)]
    Message(#[from] MessageError),
    /// Its update could not be compressed.
    #[error(transparent)]
    Compress(#[from] CompressError),
}

/// How the conversation begins depends on the version.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Version {
    V3,
    V7,
    V8,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Version,
    Security(Version),
    /// What follows is whether others may stay; they may.
    Init,
    Running,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Encoding {
    Raw,
    Zrle,
}

/// How the client takes a new size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Resizing {
    /// It does not. It goes on with the size that it was told first.
    No,
    Plain,
    Extended,
}

/// What the client has asked for and has not got.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Asked {
    No,
    Update,
}

/// Something to be said in the next update.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Announcement {
    /// Extended key events are understood.
    ExtendedKeys,
    /// The size, in the extended form: reason and result.
    Size(u16, u16),
}

/// Announcements that wait at most; a client that does not fetch them gets the first ones.
const MAX_ANNOUNCEMENTS: usize = 8;

/// A client.
pub(in crate::display) struct Session {
    phase: Phase,
    input: Vec<u8>,
    /// Bytes to come that are of no interest.
    skip: u32,
    output: VecDeque<u8>,
    format: PixelFormat,
    encoding: Encoding,
    zrle: Option<Zrle>,
    resizing: Resizing,
    /// What the client believes the size to be, and what it is.
    told: Size,
    size: Size,
    /// Tiles that the client does not have as they are.
    tiles: Tiles,
    asked: Asked,
    announcements: Vec<Announcement>,
    /// What is left of the update that is on its way.
    sending: VecDeque<Rectangle>,
    held: BTreeSet<Key>,
}

impl Session {
    /// A client that has just come.
    pub(in crate::display) fn new(size: Size) -> Self {
        Self {
            phase: Phase::Version,
            input: Vec::new(),
            skip: 0,
            output: VERSION.iter().copied().collect(),
            format: PixelFormat::NATIVE,
            encoding: Encoding::Raw,
            zrle: None,
            resizing: Resizing::No,
            told: size,
            size,
            tiles: Tiles::all(size),
            asked: Asked::No,
            announcements: Vec::new(),
            sending: VecDeque::new(),
            held: BTreeSet::new(),
        }
    }

    /// Takes what the client has sent. After an error the client is to be dropped.
    pub(in crate::display) fn receive(
        &mut self,
        mut data: &[u8],
        inputs: &mut Vec<Input>,
    ) -> Result<(), SessionError> {
        while !data.is_empty() {
            let skipped = data.len().min(self.skip as usize);
            self.skip -= skipped as u32;
            data = &data[skipped..];
            // Piece by piece, so that texts that follow are skipped before they are kept.
            let piece = data.len().min(1024);
            self.input.extend_from_slice(&data[..piece]);
            data = &data[piece..];
            while let Some(len) = self.step(inputs)? {
                self.input.drain(..len);
                let skipped = self.input.len().min(self.skip as usize);
                self.skip -= skipped as u32;
                self.input.drain(..skipped);
            }
        }
        Ok(())
    }

    /// Does what the input begins with, and says how long that was; none while more has to come.
    fn step(&mut self, inputs: &mut Vec<Input>) -> Result<Option<usize>, SessionError> {
        match self.phase {
            Phase::Version => {
                let Some(version) = self.input.first_chunk::<12>() else { return Ok(None) };
                let version = parse_version(version).ok_or(SessionError::Version)?;
                match version {
                    Version::V3 => {
                        self.output.extend(u32::from(SECURITY_NONE).to_be_bytes());
                        self.phase = Phase::Init;
                    }
                    Version::V7 | Version::V8 => {
                        self.output.extend([1, SECURITY_NONE]);
                        self.phase = Phase::Security(version);
                    }
                }
                Ok(Some(VERSION.len()))
            }
            Phase::Security(version) => match self.input.first() {
                Some(&SECURITY_NONE) => {
                    if version == Version::V8 {
                        self.output.extend(0u32.to_be_bytes());
                    }
                    self.phase = Phase::Init;
                    Ok(Some(1))
                }
                Some(other) => Err(SessionError::Security(*other)),
                None => Ok(None),
            },
            Phase::Init => {
                if self.input.is_empty() {
                    return Ok(None);
                }
                self.greet();
                self.phase = Phase::Running;
                Ok(Some(1))
            }
            Phase::Running => {
                let Some((message, len)) = message::read(&self.input)? else { return Ok(None) };
                self.hear(message, inputs);
                Ok(Some(len))
            }
        }
    }

    fn greet(&mut self) {
        const NAME: &[u8] = b"HCI";
        // The screen may have changed since the client came.
        self.told = self.size;
        for side in [self.told.width, self.told.height] {
            self.output.extend(side.to_be_bytes());
        }
        self.output.extend(self.format.bytes());
        self.output.extend((NAME.len() as u32).to_be_bytes());
        self.output.extend(NAME);
    }

    fn hear(&mut self, message: Message, inputs: &mut Vec<Input>) {
        match message {
            Message::Format(format) => self.format = format,
            Message::Encodings(encodings) => self.choose(&encodings),
            Message::Request { wish, area } => {
                if wish == Wish::All {
                    self.tiles.add_area(area);
                }
                self.asked = Asked::Update;
            }
            Message::Key(Some((key, action))) => {
                match action {
                    Action::Press => self.held.insert(key),
                    Action::Release => self.held.remove(&key),
                };
                inputs.push(Input::Key(key, action));
            }
            Message::Key(None) => {}
            Message::Pointer { buttons, x, y } => {
                let scale = |at: u16, side: u16| {
                    let last = u32::from(side.saturating_sub(1)).max(1);
                    // At most 15 bits.
                    (u32::from(at).min(last) * u32::from(POSITION_MAX) / last) as u16
                };
                let (x, y) = (scale(x, self.told.width), scale(y, self.told.height));
                inputs.push(Input::Pointer(PointerState { x, y, buttons }));
            }
            Message::Text(len) => self.skip = len,
            Message::Resize => {
                if self.resizing == Resizing::Extended {
                    self.announce(Announcement::Size(BY_THIS_CLIENT, PROHIBITED));
                }
            }
        }
    }

    fn choose(&mut self, encodings: &[i32]) {
        let known = encodings.iter().find_map(|encoding| match *encoding {
            RAW => Some(Encoding::Raw),
            ZRLE => Some(Encoding::Zrle),
            _ => None,
        });
        // Every client takes the raw one.
        self.encoding = known.unwrap_or(Encoding::Raw);
        let extended = self.resizing == Resizing::Extended;
        self.resizing = if encodings.contains(&EXTENDED_DESKTOP_SIZE) {
            Resizing::Extended
        } else if encodings.contains(&DESKTOP_SIZE) {
            Resizing::Plain
        } else {
            Resizing::No
        };
        if self.resizing == Resizing::Extended && !extended {
            self.announce(Announcement::Size(BY_SERVER, DONE));
        }
        if encodings.contains(&EXTENDED_KEYS) {
            self.announce(Announcement::ExtendedKeys);
        }
    }

    fn announce(&mut self, announcement: Announcement) {
        if self.announcements.len() < MAX_ANNOUNCEMENTS && !self.announcements.contains(&announcement) {
            self.announcements.push(announcement);
        }
    }

    /// Whether the client waits for something to change.
    pub(in crate::display) fn waits(&self) -> bool {
        self.phase == Phase::Running && self.asked == Asked::Update && self.sending.is_empty()
    }

    /// Whether the conversation has got beyond its beginning.
    pub(in crate::display) fn is_running(&self) -> bool {
        self.phase == Phase::Running
    }

    /// Takes note of what has happened to the screen.
    pub(in crate::display) fn screen_changed(&mut self, size: Size, change: &Change) {
        match change {
            Change::Size => {
                self.size = size;
                self.tiles = Tiles::all(size);
            }
            Change::Tiles(tiles) => self.tiles.add(tiles),
        }
    }

    /// Makes what the client is to be sent, as far as that is not too much at once.
    pub(in crate::display) fn fill(&mut self, screen: &Screen) -> Result<(), SessionError> {
        if self.waits() {
            self.begin_update();
        }
        while self.output.len() < OUTPUT_LIMIT
            && let Some(rectangle) = self.sending.pop_front()
        {
            self.send(rectangle, screen)?;
        }
        Ok(())
    }

    /// Says what an update consists of; its rectangles follow.
    fn begin_update(&mut self) {
        let resized = self.told != self.size && self.resizing != Resizing::No;
        let mut announcements = std::mem::take(&mut self.announcements);
        if resized {
            self.told = self.size;
            announcements.retain(|announcement| *announcement != Announcement::Size(BY_SERVER, DONE));
            if self.resizing == Resizing::Extended {
                announcements.push(Announcement::Size(BY_SERVER, DONE));
            }
        } else {
            // The client makes its picture anew after a change of size: content comes with the next update.
            self.sending = self.tiles.take(self.told).into();
        }
        let plain = usize::from(resized && self.resizing == Resizing::Plain);
        let count = announcements.len() + plain + self.sending.len();
        if count == 0 {
            return;
        }
        self.asked = Asked::No;
        self.output.extend([0, 0]);
        // A screen has at most 4096 tiles.
        self.output.extend((count as u16).to_be_bytes());
        for announcement in announcements {
            match announcement {
                Announcement::ExtendedKeys => self.header([0, 0, 0, 0], EXTENDED_KEYS),
                Announcement::Size(reason, result) => {
                    let Size { width, height } = self.told;
                    self.header([reason, result, width, height], EXTENDED_DESKTOP_SIZE);
                    // One screen, whose number and flags are 0, at the origin.
                    self.output.extend([1, 0, 0, 0]);
                    self.output.extend([0; 8]);
                    self.output.extend([width.to_be_bytes(), height.to_be_bytes()].concat());
                    self.output.extend([0; 4]);
                }
            }
        }
        if plain > 0 {
            self.header([0, 0, self.told.width, self.told.height], DESKTOP_SIZE);
        }
    }

    fn header(&mut self, place: [u16; 4], encoding: i32) {
        self.output.extend(place.map(u16::to_be_bytes).concat());
        self.output.extend(encoding.to_be_bytes());
    }

    fn send(&mut self, rectangle: Rectangle, screen: &Screen) -> Result<(), SessionError> {
        let Rectangle { x, y, width, height } = rectangle;
        let mut pixels: Vec<Rgb> = Vec::new();
        let mut bytes = Vec::new();
        match self.encoding {
            Encoding::Raw => {
                self.header([x, y, width, height], RAW);
                screen.read(rectangle, &mut pixels);
                pixels.iter().for_each(|pixel| self.format.put(*pixel, &mut bytes));
                self.output.extend(bytes);
            }
            Encoding::Zrle => {
                self.header([x, y, width, height], ZRLE);
                let format = self.format.compact();
                // One row of tiles, as all rectangles here are.
                for left in (0..width).step_by(TILE.into()) {
                    let part = Rectangle { x: x + left, width: (width - left).min(TILE), ..rectangle };
                    pixels.clear();
                    screen.read(part, &mut pixels);
                    zrle::tile(&pixels, part.width.into(), format, &mut bytes);
                }
                let mut compressed = Vec::new();
                self.zrle.get_or_insert_with(Zrle::new).encode(&bytes, &mut compressed)?;
                self.output.extend(compressed);
            }
        }
        Ok(())
    }

    /// What waits to be sent, or the first part of it.
    pub(in crate::display) fn output(&self) -> &[u8] {
        match self.output.as_slices() {
            ([], rest) => rest,
            (first, _) => first,
        }
    }

    /// So much of it is sent.
    pub(in crate::display) fn sent(&mut self, len: usize) {
        self.output.drain(..len.min(self.output.len()));
    }

    /// Whether there is more to be made than waits now.
    pub(in crate::display) fn is_sending(&self) -> bool {
        !self.output.is_empty() || !self.sending.is_empty()
    }

    /// The keys that a client which goes leaves pressed.
    pub(in crate::display) fn held_keys(&self) -> impl Iterator<Item = Key> {
        self.held.iter().copied()
    }
}

/// Versions in between, and of some makers' own, count as the one below.
fn parse_version(version: &[u8; 12]) -> Option<Version> {
    let text = std::str::from_utf8(version).ok()?;
    let minor: u16 = text.strip_prefix("RFB 003.")?.strip_suffix('\n')?.parse().ok()?;
    Some(match minor {
        0..7 => Version::V3,
        7 => Version::V7,
        8.. => Version::V8,
    })
}

#[cfg(test)]
#[path = "session_tests.rs"]
mod tests;
