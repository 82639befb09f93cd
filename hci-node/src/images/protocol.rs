//! What the image worker says through its pipe, and what an export says over the network.
//!
//! A stream of frames, each with a head of 17 bytes (kind, two numbers, little endian) and a payload whose length the
//! head gives. First a [`Header`], then [`Extent`]s that follow each other without gap from the start to the end of the
//! disk, then an end with the number of extents and the SHA-256 of every byte before it. Instead of any frame the
//! worker may say in words why it gives up.
//!
//! The worker reads hostile files, so what it says is hostile too: [`Decoder`] takes nothing that breaks the rules,
//! and never holds more than one frame. It does no I/O.

use std::{fmt, io};

use bytes::{Buf, BufMut, Bytes, BytesMut};

use super::sha256::Sha256;
use crate::state::BLOCK_BYTES;

/// Of this build's frames. Both sides are the same executable, so that nothing else has to be understood.
const VERSION: u8 = 1;
/// Kind and two numbers.
const HEAD: usize = 17;
/// Zeroes are left out in pieces of this size: what the store allocates at a time.
const GRAIN: usize = 64 << 10;
/// The most data in one frame.
pub const MAX_DATA: u32 = 1 << 20;
/// The longest reason.
const MAX_REASON: usize = 1024;
/// The largest disk that is taken.
pub const MAX_DISK_BYTES: u64 = 64 << 40;

const HEADER: u8 = b'I';
const DATA: u8 = b'D';
const PRESENT: u8 = b'P';
const ZERO: u8 = b'Z';
const END: u8 = b'E';
const REFUSED: u8 = b'R';

/// How a disk is written down in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// As the guest sees it.
    Raw,
    /// QEMU's, version 2 or 3.
    Qcow2,
    /// VMware's, one file: monolithicSparse or streamOptimized.
    Vmdk,
}

impl Format {
    const fn code(self) -> u8 {
        match self {
            Self::Raw => 0,
            Self::Qcow2 => 1,
            Self::Vmdk => 2,
        }
    }

    fn from_code(code: u8) -> Option<Self> {
        [Self::Raw, Self::Qcow2, Self::Vmdk].into_iter().find(|format| format.code() == code)
    }

    /// Its usual name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
            Self::Vmdk => "vmdk",
        }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What is asked of the worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Mode {
    /// Walk all tables and say which ranges have data, without sending it.
    Probe,
    /// Send the data.
    Read,
}

impl Mode {
    /// As the worker's argument.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Probe => "probe",
            Self::Read => "read",
        }
    }
}

/// What the image is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// How it is written down.
    pub format: Format,
    /// The size that a guest sees, in whole blocks.
    pub size_bytes: u64,
    /// Where the first extent starts.
    pub start: u64,
}

/// A piece of the disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Extent {
    /// It has this content.
    Data {
        /// Where.
        offset: u64,
        /// Its bytes.
        data: Bytes,
    },
    /// It has content, which was not asked for.
    Present {
        /// Where.
        offset: u64,
        /// How much.
        length: u64,
    },
    /// It reads as zeroes.
    Zero {
        /// Where.
        offset: u64,
        /// How much.
        length: u64,
    },
}

impl Extent {
    /// The first offset behind it.
    pub fn end(&self) -> u64 {
        match self {
            Self::Data { offset, data } => offset + data.len() as u64,
            Self::Present { offset, length } | Self::Zero { offset, length } => offset + length,
        }
    }
}

/// What was decoded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The stream starts.
    Header(Header),
    /// A piece of the disk.
    Extent(Extent),
    /// All of it came, and came unchanged.
    End,
    /// The worker gives up, for this reason.
    Refused(String),
}

/// The worker broke the rules.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProtocolError {
    /// No such kind of frame.
    #[error("a frame of an unknown kind")]
    UnknownKind,
    /// Another build's frames, or a disk that cannot be.
    #[error("a header that makes no sense")]
    BadHeader,
    /// A frame where it may not be.
    #[error("a frame out of order")]
    OutOfOrder,
    /// An extent that leaves a gap, overlaps, or is not in whole blocks.
    #[error("an extent in the wrong place")]
    BadExtent,
    /// The end does not fit what came before.
    #[error("an end that does not match what was sent")]
    BadEnd,
    /// A reason that is too long.
    #[error("a reason that is too long")]
    BadReason,
    /// Bytes after the end.
    #[error("bytes after the end")]
    AfterEnd,
    /// It stopped before the end.
    #[error("it stopped before the end")]
    CutOff,
}

fn head(kind: u8, first: u64, second: u64) -> [u8; HEAD] {
    let mut bytes = [0; HEAD];
    let mut rest = bytes.as_mut_slice();
    rest.put_u8(kind);
    rest.put_u64_le(first);
    rest.put_u64_le(second);
    bytes
}

/// Writes frames: the worker's side.
pub struct Encoder<W> {
    to: W,
    hash: Sha256,
    extents: u64,
}

impl<W: io::Write> Encoder<W> {
    /// Writes to this pipe.
    pub fn new(to: W) -> Self {
        Self { to, hash: Sha256::new(), extents: 0 }
    }

    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.hash.update(bytes);
        self.to.write_all(bytes)
    }

    /// Starts.
    pub fn header(&mut self, header: &Header) -> io::Result<()> {
        let about = u64::from(header.format.code()) | u64::from(VERSION) << 8;
        self.put(&head(HEADER, header.size_bytes, about))?;
        self.put(&header.start.to_le_bytes())
    }

    /// A piece with its content.
    pub fn data(&mut self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.extents += 1;
        self.put(&head(DATA, offset, data.len() as u64))?;
        self.put(data)
    }

    /// A piece that has content.
    pub fn present(&mut self, offset: u64, length: u64) -> io::Result<()> {
        self.extents += 1;
        self.put(&head(PRESENT, offset, length))
    }

    /// A piece of zeroes.
    pub fn zero(&mut self, offset: u64, length: u64) -> io::Result<()> {
        self.extents += 1;
        self.put(&head(ZERO, offset, length))
    }

    /// A piece without what is zero in it.
    pub fn sparse(&mut self, offset: u64, piece: &[u8]) -> io::Result<()> {
        let is_zero = |grain: &[u8]| grain.iter().all(|byte| *byte == 0);
        let mut grains = piece.chunks(GRAIN).peekable();
        let mut at = 0;
        while let Some(grain) = grains.next() {
            let (zero, start) = (is_zero(grain), at);
            at += grain.len();
            while let Some(next) = grains.next_if(|next| is_zero(next) == zero) {
                at += next.len();
            }
            if zero {
                self.zero(offset + start as u64, (at - start) as u64)?;
            } else {
                self.data(offset + start as u64, &piece[start..at])?;
            }
        }
        Ok(())
    }

    /// Where the frames go.
    pub fn writer(&mut self) -> &mut W {
        &mut self.to
    }

    /// All was sent.
    pub fn end(mut self) -> io::Result<W> {
        let sum = self.hash.finish();
        self.to.write_all(&head(END, self.extents, sum.len() as u64))?;
        self.to.write_all(&sum)?;
        self.to.flush()?;
        Ok(self.to)
    }

    /// Gives up.
    pub fn refuse(mut self, reason: &str) -> io::Result<W> {
        let mut end = reason.len().min(MAX_REASON);
        while !reason.is_char_boundary(end) {
            end -= 1;
        }
        self.to.write_all(&head(REFUSED, 0, end as u64))?;
        self.to.write_all(&reason.as_bytes()[..end])?;
        self.to.flush()?;
        Ok(self.to)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// Nothing came yet.
    New,
    /// Extents come; up to here the disk is known.
    At(u64),
    /// Nothing may come any more.
    Over,
}

/// Understands frames: the parent's side.
#[derive(Debug)]
pub struct Decoder {
    mode: Mode,
    stage: Stage,
    size: u64,
    hash: Sha256,
    extents: u64,
    buffer: BytesMut,
}

impl Decoder {
    /// For the answer to a question of this kind.
    pub fn new(mode: Mode) -> Self {
        Self { mode, stage: Stage::New, size: 0, hash: Sha256::new(), extents: 0, buffer: BytesMut::new() }
    }

    /// Where to put what was read.
    pub fn buffer(&mut self) -> &mut BytesMut {
        &mut self.buffer
    }

    /// The pipe was closed.
    pub fn closed(&self) -> Result<(), ProtocolError> {
        if self.stage == Stage::Over && self.buffer.is_empty() { Ok(()) } else { Err(ProtocolError::CutOff) }
    }

    /// The next frame, if all of it is there.
    pub fn decode(&mut self) -> Result<Option<Event>, ProtocolError> {
        if self.stage == Stage::Over {
            return if self.buffer.is_empty() { Ok(None) } else { Err(ProtocolError::AfterEnd) };
        }
        let Some(mut fields) = self.buffer.get(..HEAD) else { return Ok(None) };
        let (kind, first, second) = (fields.get_u8(), fields.get_u64_le(), fields.get_u64_le());
        let payload = self.check(kind, first, second)?;
        if self.buffer.len() < HEAD + payload {
            // So that the rest is read in few calls.
            self.buffer.reserve(HEAD + payload - self.buffer.len());
            return Ok(None);
        }
        let frame = self.buffer.split_to(HEAD + payload).freeze();
        let payload = frame.slice(HEAD..);
        if !matches!(kind, END | REFUSED) {
            self.hash.update(&frame);
        }
        self.take(kind, first, second, payload).map(Some)
    }

    /// Whether a frame may come now, and how long its payload is. Nothing is kept for a frame that may not.
    fn check(&self, kind: u8, first: u64, second: u64) -> Result<usize, ProtocolError> {
        let extent = |limit: u64| match self.stage {
            Stage::At(at) => {
                let fits = first == at
                    && second > 0
                    && second <= limit
                    && second.is_multiple_of(BLOCK_BYTES)
                    && first.checked_add(second).is_some_and(|end| end <= self.size);
                fits.then_some(()).ok_or(ProtocolError::BadExtent)
            }
            _ => Err(ProtocolError::OutOfOrder),
        };
        match kind {
            HEADER if self.stage == Stage::New => Ok(8),
            DATA if self.mode == Mode::Read => {
                extent(u64::from(MAX_DATA))?;
                usize::try_from(second).map_err(|_| ProtocolError::BadExtent)
            }
            PRESENT if self.mode == Mode::Probe => extent(u64::MAX).map(|()| 0),
            ZERO => extent(u64::MAX).map(|()| 0),
            END if self.stage == Stage::At(self.size) => {
                let fits = first == self.extents && second == Sha256::LENGTH as u64;
                fits.then_some(Sha256::LENGTH).ok_or(ProtocolError::BadEnd)
            }
            REFUSED => match usize::try_from(second) {
                Ok(length) if length <= MAX_REASON => Ok(length),
                _ => Err(ProtocolError::BadReason),
            },
            HEADER | DATA | PRESENT | END => Err(ProtocolError::OutOfOrder),
            _ => Err(ProtocolError::UnknownKind),
        }
    }

    fn take(
        &mut self,
        kind: u8,
        first: u64,
        second: u64,
        mut payload: Bytes,
    ) -> Result<Event, ProtocolError> {
        let extent = match kind {
            HEADER => return self.start(first, second, payload.get_u64_le()),
            END => {
                let hash = std::mem::take(&mut self.hash).finish();
                self.stage = Stage::Over;
                return if hash[..] == payload { Ok(Event::End) } else { Err(ProtocolError::BadEnd) };
            }
            REFUSED => {
                self.stage = Stage::Over;
                return Ok(Event::Refused(printable(&payload)));
            }
            DATA => Extent::Data { offset: first, data: payload },
            PRESENT => Extent::Present { offset: first, length: second },
            _ => Extent::Zero { offset: first, length: second },
        };
        self.extents += 1;
        self.stage = Stage::At(extent.end());
        Ok(Event::Extent(extent))
    }

    fn start(&mut self, size: u64, about: u64, start: u64) -> Result<Event, ProtocolError> {
        let [format, version, rest @ ..] = about.to_le_bytes();
        let format = Format::from_code(format).ok_or(ProtocolError::BadHeader)?;
        let sane = version == VERSION
            && rest == [0; 6]
            && (BLOCK_BYTES..=MAX_DISK_BYTES).contains(&size)
            && size.is_multiple_of(BLOCK_BYTES)
            && start.is_multiple_of(BLOCK_BYTES)
            && start <= size;
        if !sane {
            return Err(ProtocolError::BadHeader);
        }
        (self.size, self.stage) = (size, Stage::At(start));
        Ok(Event::Header(Header { format, size_bytes: size, start }))
    }
}

/// Text of a process that reads hostile files, made safe for a terminal.
pub fn printable(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    text.trim().chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn decode(mode: Mode, bytes: &[u8], piece: usize) -> Result<Vec<Event>, ProtocolError> {
        let mut decoder = Decoder::new(mode);
        let mut events = Vec::new();
        for part in bytes.chunks(piece.max(1)) {
            decoder.buffer().extend_from_slice(part);
            while let Some(event) = decoder.decode()? {
                events.push(event);
            }
        }
        decoder.closed()?;
        Ok(events)
    }

    /// A disk of some blocks from `start` on; none is a block of zeroes.
    fn encode(start: u64, blocks: &[Option<u8>]) -> (Vec<u8>, Vec<Event>) {
        let size_bytes = start + blocks.len() as u64 * BLOCK_BYTES;
        let header = Header { format: Format::Qcow2, size_bytes, start };
        let mut bytes = Vec::new();
        let mut events = vec![Event::Header(header)];
        let mut encoder = Encoder::new(&mut bytes);
        encoder.header(&header).unwrap();
        for (offset, block) in (start..).step_by(BLOCK_BYTES as usize).zip(blocks) {
            let extent = match block {
                Some(byte) => {
                    let data = vec![*byte; BLOCK_BYTES as usize];
                    encoder.data(offset, &data).unwrap();
                    Extent::Data { offset, data: data.into() }
                }
                None => {
                    encoder.zero(offset, BLOCK_BYTES).unwrap();
                    Extent::Zero { offset, length: BLOCK_BYTES }
                }
            };
            events.push(Event::Extent(extent));
        }
        encoder.end().unwrap();
        events.push(Event::End);
        (bytes, events)
    }

    fn blocks() -> impl Strategy<Value = Vec<Option<u8>>> {
        prop::collection::vec(any::<Option<u8>>(), 1..6)
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(start in 0u64..4, blocks in blocks(), piece in 1usize..9000) {
            let (bytes, events) = encode(start * BLOCK_BYTES, &blocks);
            prop_assert_eq!(decode(Mode::Read, &bytes, piece), Ok(events));
        }

        #[test]
        fn no_changed_byte_passes(blocks in blocks(), at in any::<prop::sample::Index>(), flip in 1u8..=255) {
            let (mut bytes, _) = encode(0, &blocks);
            let at = at.index(bytes.len());
            bytes[at] ^= flip;
            let decoded = decode(Mode::Read, &bytes, 4096);
            let gave_up = |events: &Vec<Event>| matches!(events.last(), Some(Event::Refused(_)));
            prop_assert!(decoded.is_err() || decoded.as_ref().is_ok_and(gave_up), "{:?}", decoded);
        }

        #[test]
        fn a_stream_that_is_cut_off_never_looks_complete(blocks in blocks(), at in any::<prop::sample::Index>()) {
            let (bytes, _) = encode(0, &blocks);
            let cut = &bytes[..at.index(bytes.len())];
            prop_assert_eq!(decode(Mode::Read, cut, 4096).unwrap_err(), ProtocolError::CutOff);
        }

        #[test]
        fn noise_never_panics_and_is_never_kept(noise in prop::collection::vec(any::<u8>(), 0..4000)) {
            let mut decoder = Decoder::new(Mode::Read);
            decoder.buffer().extend_from_slice(&noise);
            while let Ok(Some(_)) = decoder.decode() {}
            prop_assert!(decoder.buffer().capacity() <= noise.len().max(2 * MAX_DATA as usize) + HEAD);
        }
    }

    #[test]
    fn gaps_overlaps_and_early_ends_are_refused() {
        let stream = |extents: &[(u64, u64)]| {
            let mut bytes = Vec::new();
            let mut encoder = Encoder::new(&mut bytes);
            let header = Header { format: Format::Raw, size_bytes: 4 * BLOCK_BYTES, start: 0 };
            encoder.header(&header).unwrap();
            for (block, blocks) in extents {
                encoder.zero(block * BLOCK_BYTES, blocks * BLOCK_BYTES).unwrap();
            }
            encoder.end().unwrap();
            decode(Mode::Read, &bytes, usize::MAX)
        };
        assert!(stream(&[(0, 4)]).is_ok());
        assert_eq!(stream(&[(1, 3)]), Err(ProtocolError::BadExtent), "a gap");
        assert_eq!(stream(&[(0, 2), (1, 3)]), Err(ProtocolError::BadExtent), "an overlap");
        assert_eq!(stream(&[(0, 5)]), Err(ProtocolError::BadExtent), "beyond the disk");
        assert_eq!(stream(&[(0, 2)]), Err(ProtocolError::OutOfOrder), "an early end");
    }

    #[test]
    fn data_comes_only_when_asked_for() {
        let (bytes, _) = encode(0, &[Some(1)]);
        assert_eq!(decode(Mode::Probe, &bytes, 4096), Err(ProtocolError::OutOfOrder));
    }

    #[test]
    fn a_reason_is_short_and_printable() {
        let mut bytes = Vec::new();
        Encoder::new(&mut bytes).refuse(&format!("no\x1b[2J {}", "ä".repeat(4000))).unwrap();
        let events = decode(Mode::Read, &bytes, 100).unwrap();
        let [Event::Refused(reason)] = &events[..] else { panic!("{events:?}") };
        assert!(reason.starts_with("no [2J ä") && reason.len() <= MAX_REASON);
    }

    #[test]
    fn zeroes_within_data_are_left_out() {
        let mut piece = vec![0; 4 * GRAIN + 4096];
        piece[2 * GRAIN] = 1;
        piece[4 * GRAIN + 1] = 2;
        let mut sent = Vec::new();
        let mut encoder = Encoder::new(&mut sent);
        let format = Format::Raw;
        encoder.header(&Header { format, size_bytes: piece.len() as u64, start: 0 }).unwrap();
        encoder.sparse(0, &piece).unwrap();
        encoder.end().unwrap();
        let mut decoder = Decoder::new(Mode::Read);
        decoder.buffer().extend_from_slice(&sent);
        let mut extents = Vec::new();
        while let Some(event) = decoder.decode().unwrap() {
            if let Event::Extent(extent) = event {
                extents.push(extent);
            }
        }
        let grain = GRAIN as u64;
        let data = |from: usize, to: usize| Bytes::copy_from_slice(&piece[from..to]);
        assert_eq!(
            extents,
            [
                Extent::Zero { offset: 0, length: 2 * grain },
                Extent::Data { offset: 2 * grain, data: data(2 * GRAIN, 3 * GRAIN) },
                Extent::Zero { offset: 3 * grain, length: grain },
                Extent::Data { offset: 4 * grain, data: data(4 * GRAIN, piece.len()) },
            ]
        );
    }
}
