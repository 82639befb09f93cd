//! The wire format. Every datagram starts with this header, numbers in network byte order:
//!
//! | bytes | field | |
//! |---|---|---|
//! | 0 | version | 1 |
//! | 1 | index | of this piece, from 0 |
//! | 2 | count | of pieces, at least 1 |
//! | 3 | reserved | 0, ignored by receivers |
//! | 4..8 | network | VNI |
//! | 8..12 | frame | number that the pieces of one frame share |
//! | 12..16 | length | of the whole: virtio-net header and frame |
//!
//! After it the piece's bytes. All pieces but the last are equally long and fill a packet, which is what UDP
//! segmentation offload wants.

use bytes::{BufMut, Bytes, BytesMut};

use crate::overlay::frame::packet::ETHERNET_HEADER;
use crate::overlay::frame::vnet::{MAX_FRAME, VNET_HEADER};
use crate::overlay::id::Vni;

const VERSION: u8 = 1;
/// Length of the header.
pub(crate) const PIECE_HEADER: usize = 16;
/// Shortest and longest whole.
const LENGTHS: std::ops::RangeInclusive<usize> = VNET_HEADER + ETHERNET_HEADER..=VNET_HEADER + MAX_FRAME;
/// The switch looks at the headers in the first piece, which therefore has to hold them. QUIC never offers less.
const MIN_DATAGRAM: usize = 512;

/// The header of a piece.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct PieceHeader {
    pub(crate) index: u8,
    pub(crate) count: u8,
    pub(crate) vni: Vni,
    pub(crate) frame: u32,
    pub(crate) length: u32,
}

impl PieceHeader {
    fn encode(&self, out: &mut BytesMut) {
        out.put_slice(&[VERSION, self.index, self.count, 0]);
        out.put_u32(self.vni.get());
        out.put_u32(self.frame);
        out.put_u32(self.length);
    }

    /// Takes the header off a datagram; nothing if the datagram is no piece of a frame.
    pub(crate) fn take(datagram: &mut Bytes) -> Option<Self> {
        let bytes: [u8; PIECE_HEADER] = datagram.get(..PIECE_HEADER)?.try_into().ok()?;
        let word = |at: usize| u32::from_be_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let header = Self {
            index: bytes[1],
            count: bytes[2],
            vni: Vni::try_from(word(4)).ok()?,
            frame: word(8),
            length: word(12),
        };
        let body = datagram.len() - PIECE_HEADER;
        let length = usize::try_from(header.length).ok()?;
        let is_sound = bytes[0] == VERSION
            && header.index < header.count
            && LENGTHS.contains(&length)
            && body > 0
            && if header.count == 1 { body == length } else { body < length }
            && (header.index > 0 || body >= *LENGTHS.start());
        if !is_sound {
            return None;
        }
        let _ = datagram.split_to(PIECE_HEADER);
        Some(header)
    }
}

/// Cuts a frame into datagrams of at most `max_datagram` bytes; nothing if that is too small for frames.
pub(crate) fn split(
    vnet: &[u8; VNET_HEADER],
    frame: &[u8],
    vni: Vni,
    number: u32,
    max_datagram: usize,
) -> Option<Pieces> {
    let length = VNET_HEADER + frame.len();
    if max_datagram < MIN_DATAGRAM || !LENGTHS.contains(&length) {
        return None;
    }
    let body = max_datagram - PIECE_HEADER;
    let count = u8::try_from(length.div_ceil(body)).ok()?;
    // One allocation for all pieces, which are then slices of it.
    let mut buffer = BytesMut::with_capacity(length + usize::from(count) * PIECE_HEADER);
    let mut rest = frame;
    for index in 0..count {
        let header = PieceHeader { index, count, vni, frame: number, length: length as u32 };
        header.encode(&mut buffer);
        let mut room = body;
        if index == 0 {
            buffer.put_slice(vnet);
            room -= VNET_HEADER;
        }
        let (piece, next) = rest.split_at(room.min(rest.len()));
        buffer.put_slice(piece);
        rest = next;
    }
    Some(Pieces { buffer: buffer.freeze(), datagram: max_datagram })
}

/// The datagrams of one frame, in order.
pub(crate) struct Pieces {
    buffer: Bytes,
    datagram: usize,
}

impl Iterator for Pieces {
    type Item = Bytes;

    fn next(&mut self) -> Option<Bytes> {
        if self.buffer.is_empty() {
            return None;
        }
        Some(self.buffer.split_to(self.datagram.min(self.buffer.len())))
    }
}
