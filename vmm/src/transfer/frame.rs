//! The frames of a stream, without what is in them.
//!
//! ```text
//! offset  size  field (little-endian)
//!      0     1  kind
//!      1     1  zero
//!      2     2  version of the payload
//!      4     4  length of the payload, at most MAX_PAYLOAD
//!      8     4  number of the frame, from 0
//!     12     4  CRC32C of all of the above and the payload
//!     16        payload
//! ```
//!
//! Numbers and checksums make what is lost, repeated, reordered or changed an error; the last frame makes a stream that was cut off one.
//! [`FrameReader`] keeps memory for what has arrived, not for what is announced.

use std::io::{Read, Write};

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::TransferError;

/// Largest payload: all devices of the largest machine fit.
pub(crate) const MAX_PAYLOAD: usize = 8 << 20;
const HEAD: usize = 16;
const CHECKED: usize = 12;

/// What a frame carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Kind {
    Start = 1,
    Memory = 2,
    Machine = 3,
    Processor = 4,
    Devices = 5,
    End = 6,
    Zeroes = 7,
}

impl Kind {
    const ALL: [Self; 7] =
        [Self::Start, Self::Memory, Self::Machine, Self::Processor, Self::Devices, Self::End, Self::Zeroes];

    fn of(code: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| *kind as u8 == code)
    }
}

/// A kind of frame whose payload is one value.
pub(crate) trait Part {
    /// The kind.
    const KIND: Kind;
    /// As errors call it.
    const NAME: &'static str;
    /// Raised with each change of [`Part::Body`].
    const VERSION: u16 = 1;
    /// The value.
    type Body: Serialize + DeserializeOwned;

    /// Reads a value of this version or an older one. One whose shape has changed overrides it and converts.
    fn decode(_version: u16, payload: &[u8]) -> Result<Self::Body, TransferError> {
        postcard::from_bytes(payload).map_err(|_| TransferError::Damaged("a part of it makes no sense"))
    }
}

/// Writes frames.
pub(crate) struct FrameWriter<W> {
    to: W,
    next: u32,
}

impl<W: Write> FrameWriter<W> {
    pub(crate) fn new(to: W) -> Self {
        Self { to, next: 0 }
    }

    /// Writes one whose payload is made of these pieces.
    pub(crate) fn frame(&mut self, kind: Kind, version: u16, payload: &[&[u8]]) -> Result<(), TransferError> {
        let length: usize = payload.iter().map(|piece| piece.len()).sum();
        if length > MAX_PAYLOAD {
            return Err(TransferError::Damaged("a part of it is too large"));
        }
        let mut head = [0; HEAD];
        head[0] = kind as u8;
        head[2..4].copy_from_slice(&version.to_le_bytes());
        head[4..8].copy_from_slice(&(length as u32).to_le_bytes());
        head[8..CHECKED].copy_from_slice(&self.next.to_le_bytes());
        let sum = payload
            .iter()
            .fold(crc32c::crc32c(&head[..CHECKED]), |sum, piece| crc32c::crc32c_append(sum, piece));
        head[CHECKED..].copy_from_slice(&sum.to_le_bytes());
        self.next = self.next.wrapping_add(1);
        self.to.write_all(&head)?;
        payload.iter().try_for_each(|piece| self.to.write_all(piece))?;
        Ok(())
    }

    /// Writes a value.
    pub(crate) fn part<P: Part>(&mut self, body: &P::Body) -> Result<(), TransferError> {
        let payload = postcard::to_stdvec(body)
            .map_err(|_| TransferError::Damaged("a part of it cannot be written"))?;
        self.frame(P::KIND, P::VERSION, &[&payload])
    }

    /// Where they go.
    pub(crate) fn get_mut(&mut self) -> &mut W {
        &mut self.to
    }

    /// Ends the stream.
    pub(crate) fn end(mut self) -> Result<(), TransferError> {
        self.frame(Kind::End, 1, &[])?;
        Ok(self.to.flush()?)
    }
}

/// The head of a frame.
#[derive(Debug, Clone, Copy)]
struct Head {
    kind: Kind,
    version: u16,
    length: usize,
    bytes: [u8; HEAD],
}

/// Reads frames.
pub(crate) struct FrameReader<'a> {
    from: &'a mut dyn Read,
    next: u32,
    /// One that was read but not taken.
    ahead: Option<Head>,
    payload: Vec<u8>,
}

impl<'a> FrameReader<'a> {
    pub(crate) fn new(from: &'a mut dyn Read) -> Self {
        Self { from, next: 0, ahead: None, payload: Vec::new() }
    }

    fn head(&mut self) -> Result<Head, TransferError> {
        if let Some(head) = self.ahead {
            return Ok(head);
        }
        let mut bytes = [0; HEAD];
        self.from.read_exact(&mut bytes)?;
        let [kind, zero, v0, v1, l0, l1, l2, l3, n0, n1, n2, n3, ..] = bytes;
        let kind =
            Kind::of(kind).filter(|_| zero == 0).ok_or(TransferError::Damaged("it is no such stream"))?;
        let length = u32::from_le_bytes([l0, l1, l2, l3]) as usize;
        if length > MAX_PAYLOAD {
            return Err(TransferError::Damaged("a part of it is too large"));
        }
        if u32::from_le_bytes([n0, n1, n2, n3]) != self.next {
            return Err(TransferError::Damaged("its parts are not in order"));
        }
        let head = Head { kind, version: u16::from_le_bytes([v0, v1]), length, bytes };
        self.ahead = Some(head);
        Ok(head)
    }

    /// The kind of the next frame.
    pub(crate) fn peek(&mut self) -> Result<Kind, TransferError> {
        Ok(self.head()?.kind)
    }

    /// The next frame, which has to be of this kind: version and payload.
    pub(crate) fn frame(&mut self, kind: Kind) -> Result<(u16, &[u8]), TransferError> {
        let head = self.head()?;
        if head.kind != kind {
            return Err(TransferError::Damaged("its parts are not in order"));
        }
        (self.ahead, self.next) = (None, self.next.wrapping_add(1));
        self.payload.clear();
        self.from.take(head.length as u64).read_to_end(&mut self.payload)?;
        if self.payload.len() < head.length {
            return Err(TransferError::Damaged("it was cut off"));
        }
        let sum = crc32c::crc32c_append(crc32c::crc32c(&head.bytes[..CHECKED]), &self.payload);
        if sum.to_le_bytes() != head.bytes[CHECKED..] {
            return Err(TransferError::Damaged("a checksum differs"));
        }
        Ok((head.version, &self.payload))
    }

    /// The next frame's value.
    pub(crate) fn part<P: Part>(&mut self) -> Result<P::Body, TransferError> {
        let (found, payload) = self.frame(P::KIND)?;
        if found > P::VERSION {
            return Err(TransferError::Version { part: P::NAME, found, known: P::VERSION });
        }
        P::decode(found, payload)
    }

    /// Makes sure that the stream has ended as it should.
    pub(crate) fn end(mut self) -> Result<(), TransferError> {
        self.frame(Kind::End).map(|_| ())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    struct Word;

    impl Part for Word {
        const KIND: Kind = Kind::Start;
        const NAME: &'static str = "a word";
        const VERSION: u16 = 3;
        type Body = String;
    }

    fn written(words: &[String], memory: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut writer = FrameWriter::new(&mut bytes);
        for word in words {
            writer.part::<Word>(word).unwrap();
        }
        writer.frame(Kind::Memory, 1, &[memory, &[1]]).unwrap();
        writer.end().unwrap();
        bytes
    }

    fn read(mut bytes: &[u8]) -> Result<(Vec<String>, Vec<u8>), TransferError> {
        let mut reader = FrameReader::new(&mut bytes);
        let mut words = Vec::new();
        while reader.peek()? == Kind::Start {
            words.push(reader.part::<Word>()?);
        }
        let memory = reader.frame(Kind::Memory)?.1.to_vec();
        reader.end()?;
        Ok((words, memory))
    }

    fn words() -> impl Strategy<Value = Vec<String>> {
        prop::collection::vec("[a-z]{0,20}", 0..5)
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(words in words(), memory in prop::collection::vec(any::<u8>(), 0..5000)) {
            let (read, mut there) = read(&written(&words, &memory)).unwrap();
            prop_assert_eq!(read, words);
            prop_assert_eq!(there.pop(), Some(1));
            prop_assert_eq!(there, memory);
        }

        #[test]
        fn a_damaged_byte_is_noticed(words in words(), at in any::<prop::sample::Index>(), flip in 1u8..=255) {
            let mut bytes = written(&words, b"memory");
            let at = at.index(bytes.len());
            bytes[at] ^= flip;
            prop_assert!(read(&bytes).is_err());
        }

        #[test]
        fn a_damaged_stream_that_was_cut_off_never_looks_whole(words in words(), at in any::<prop::sample::Index>()) {
            let bytes = written(&words, b"memory");
            prop_assert!(read(&bytes[..at.index(bytes.len())]).is_err());
        }

        #[test]
        fn any_bytes_are_a_stream_or_an_error(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = read(&bytes);
        }
    }

    #[test]
    fn frames_that_change_places_are_noticed() {
        let words = ["one".to_owned(), "two".to_owned()];
        let bytes = written(&words, b"");
        let (first, rest) = bytes.split_at(HEAD + 4);
        let (second, rest) = rest.split_at(HEAD + 4);
        assert!(read(&[first, second, rest].concat()).is_ok());
        assert!(matches!(read(&[second, first, rest].concat()), Err(TransferError::Damaged(_))));
        assert!(matches!(read(&[first, rest].concat()), Err(TransferError::Damaged(_))));
        assert!(matches!(read(&[first, first, rest].concat()), Err(TransferError::Damaged(_))));
    }

    #[test]
    fn what_a_newer_release_wrote_is_refused_and_what_an_older_one_wrote_is_read() {
        let with = |version| {
            let mut bytes = Vec::new();
            let mut writer = FrameWriter::new(&mut bytes);
            writer.frame(Kind::Start, version, &[&postcard::to_stdvec("word").unwrap()]).unwrap();
            let mut from = &bytes[..];
            FrameReader::new(&mut from).part::<Word>()
        };
        assert_eq!(with(2).unwrap(), "word");
        assert!(matches!(with(4), Err(TransferError::Version { part: "a word", found: 4, known: 3 })));
    }

    #[test]
    fn an_announced_giant_is_refused_from_its_head() {
        let mut bytes = written(&[], b"");
        bytes[4..8].copy_from_slice(&u32::MAX.to_le_bytes());
        assert!(matches!(read(&bytes), Err(TransferError::Damaged("a part of it is too large"))));
    }
}
