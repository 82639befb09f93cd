//! A packet's header, as it is on the rings (virtio 1.3, 5.10.6).

/// Bytes of a header; data follows.
pub(super) const HEADER_BYTES: usize = 44;
/// The address of whoever is outside of the guest.
pub(super) const HOST_CID: u64 = 2;
/// The one type of socket there is here: a stream of bytes.
pub(super) const STREAM: u16 = 1;
/// Flags of [`Op::Shutdown`]: the sender receives, or sends, no more.
pub(super) const NO_RECEIVE: u32 = 1;
pub(super) const NO_SEND: u32 = 2;

/// What a packet says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub(super) enum Op {
    Request = 1,
    Response = 2,
    Reset = 3,
    Shutdown = 4,
    Data = 5,
    CreditUpdate = 6,
    CreditRequest = 7,
}

impl Op {
    fn of(code: u16) -> Option<Self> {
        use Op::{CreditRequest, CreditUpdate, Data, Request, Reset, Response, Shutdown};
        let all = [Request, Response, Reset, Shutdown, Data, CreditUpdate, CreditRequest];
        all.into_iter().find(|op| *op as u16 == code)
    }
}

/// A header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) src_cid: u64,
    pub(super) dst_cid: u64,
    pub(super) src_port: u32,
    pub(super) dst_port: u32,
    /// Bytes of data behind it.
    pub(super) len: u32,
    /// The type of the socket.
    pub(super) kind: u16,
    /// None: something unknown.
    pub(super) op: Option<Op>,
    pub(super) flags: u32,
    /// Bytes of room that the sender has for what it receives.
    pub(super) buf_alloc: u32,
    /// Bytes that it has taken out of there, since the connection was made.
    pub(super) fwd_cnt: u32,
}

impl Header {
    /// From the wire.
    pub(super) fn parse(bytes: &[u8; HEADER_BYTES]) -> Self {
        let half = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let word = |at: usize| u32::from(half(at)) | u32::from(half(at + 2)) << 16;
        let double = |at: usize| u64::from(word(at)) | u64::from(word(at + 4)) << 32;
        Self {
            src_cid: double(0),
            dst_cid: double(8),
            src_port: word(16),
            dst_port: word(20),
            len: word(24),
            kind: half(28),
            op: Op::of(half(30)),
            flags: word(32),
            buf_alloc: word(36),
            fwd_cnt: word(40),
        }
    }

    /// For the wire.
    pub(super) fn bytes(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        let mut put = |at: usize, field: &[u8]| bytes[at..at + field.len()].copy_from_slice(field);
        put(0, &self.src_cid.to_le_bytes());
        put(8, &self.dst_cid.to_le_bytes());
        put(16, &self.src_port.to_le_bytes());
        put(20, &self.dst_port.to_le_bytes());
        put(24, &self.len.to_le_bytes());
        put(28, &self.kind.to_le_bytes());
        put(30, &self.op.map_or(0, |op| op as u16).to_le_bytes());
        put(32, &self.flags.to_le_bytes());
        put(36, &self.buf_alloc.to_le_bytes());
        put(40, &self.fwd_cnt.to_le_bytes());
        bytes
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_header_is_on_the_wire_what_it_is(bytes in prop::array::uniform32(any::<u8>()), more in prop::array::uniform12(any::<u8>()), op in 0u16..9) {
            let mut wire = [0; HEADER_BYTES];
            wire[..32].copy_from_slice(&bytes);
            wire[32..].copy_from_slice(&more);
            wire[30..32].copy_from_slice(&op.to_le_bytes());
            let header = Header::parse(&wire);
            prop_assert_eq!(header.op.is_some(), (1..8).contains(&op));
            if header.op.is_some() {
                prop_assert_eq!(header.bytes(), wire);
            }
        }
    }

    #[test]
    fn fields_are_where_the_standard_has_them() {
        let wire: [u8; HEADER_BYTES] = std::array::from_fn(|at| at as u8);
        let header = Header::parse(&wire);
        assert_eq!((header.src_cid, header.dst_cid), (0x0706_0504_0302_0100, 0x0f0e_0d0c_0b0a_0908));
        assert_eq!((header.src_port, header.dst_port, header.len), (0x1312_1110, 0x1716_1514, 0x1b1a_1918));
        assert_eq!((header.kind, header.flags), (0x1d1c, 0x2322_2120));
        assert_eq!((header.buf_alloc, header.fwd_cnt), (0x2726_2524, 0x2b2a_2928));
    }
}
