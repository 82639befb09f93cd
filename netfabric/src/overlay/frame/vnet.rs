//! The virtio-net header that precedes each frame in a guest's ring, and between nodes: it says which work the sender
//! left to whoever comes next (a checksum to complete, a super-frame to segment).

use super::packet::ETHERNET_HEADER;
use crate::overlay::stats::DropReason;

/// Length of the header with `num_buffers`, which is always there in virtio 1.
pub(crate) const VNET_HEADER: usize = 12;
/// Where `num_buffers` is in it.
pub(crate) const NUM_BUFFERS_AT: usize = 10;
/// The largest frame: an IP packet of 64 KiB with its Ethernet header.
pub(crate) const MAX_FRAME: usize = ETHERNET_HEADER + 65535;

const NEEDS_CSUM: u8 = 1;
/// On the way to a guest only: "the checksum was verified".
const DATA_VALID: u8 = 2;

/// How a super-frame is to be segmented.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Gso {
    /// Not at all: a frame as it goes on a wire.
    None,
    /// As TCP over IPv4.
    TcpV4,
    /// As TCP over IPv6.
    TcpV6,
    /// As UDP datagrams of equal size.
    Udp,
}

impl Gso {
    fn from_wire(kind: u8) -> Option<Self> {
        Some(match kind {
            0 => Self::None,
            1 => Self::TcpV4,
            4 => Self::TcpV6,
            5 => Self::Udp,
            _ => return None,
        })
    }

    fn to_wire(self) -> u8 {
        match self {
            Self::None => 0,
            Self::TcpV4 => 1,
            Self::TcpV6 => 4,
            Self::Udp => 5,
        }
    }
}

/// Whether the checksum of a frame is complete.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Checksum {
    /// It is, or there is none.
    Complete,
    /// The field at `start + offset` holds the pseudo header's sum; everything from `start` is still to be added.
    Partial { start: u16, offset: u16 },
}

/// The header, checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct VnetHeader {
    pub(crate) checksum: Checksum,
    pub(crate) gso: Gso,
    /// Payload of each segment.
    pub(crate) gso_size: u16,
    /// A hint: how much of the frame is headers.
    pub(crate) header_length: u16,
}

impl VnetHeader {
    /// For a frame in which everything is done.
    pub(crate) const PLAIN: Self =
        Self { checksum: Checksum::Complete, gso: Gso::None, gso_size: 0, header_length: 0 };

    /// Reads the header of a frame that is `length` bytes long. What it promises must be inside the frame, so that
    /// whoever trusts it (another guest's driver) is not led astray.
    pub(crate) fn parse(bytes: &[u8; VNET_HEADER], length: usize) -> Result<Self, DropReason> {
        let le16 = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let (flags, header_length, gso_size) = (bytes[0], le16(2), le16(4));
        if !(ETHERNET_HEADER..=MAX_FRAME).contains(&length) || flags & !(NEEDS_CSUM | DATA_VALID) != 0 {
            return Err(DropReason::Malformed);
        }
        let checksum = if flags & NEEDS_CSUM == 0 {
            Checksum::Complete
        } else {
            let (start, offset) = (le16(6), le16(8));
            let end = usize::from(start) + usize::from(offset) + 2;
            if usize::from(start) < ETHERNET_HEADER || end > length {
                return Err(DropReason::Malformed);
            }
            Checksum::Partial { start, offset }
        };
        let gso = Gso::from_wire(bytes[1]).ok_or(DropReason::Malformed)?;
        if gso == Gso::None {
            return Ok(Self { checksum, gso, gso_size: 0, header_length: 0 });
        }
        if gso_size == 0 || checksum == Checksum::Complete || usize::from(header_length) > length {
            return Err(DropReason::Malformed);
        }
        Ok(Self { checksum, gso, gso_size, header_length })
    }

    /// The header as bytes; `num_buffers` is for the ring to fill in.
    pub(crate) fn encode(&self) -> [u8; VNET_HEADER] {
        let mut bytes = [0; VNET_HEADER];
        if let Checksum::Partial { start, offset } = self.checksum {
            bytes[0] = NEEDS_CSUM;
            bytes[6..8].copy_from_slice(&start.to_le_bytes());
            bytes[8..10].copy_from_slice(&offset.to_le_bytes());
        }
        bytes[1] = self.gso.to_wire();
        bytes[2..4].copy_from_slice(&self.header_length.to_le_bytes());
        bytes[4..6].copy_from_slice(&self.gso_size.to_le_bytes());
        bytes
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn whatever_is_accepted_is_inside_the_frame(bytes: [u8; VNET_HEADER], length in 0..70_000usize) {
            if let Ok(header) = VnetHeader::parse(&bytes, length) {
                if let Checksum::Partial { start, offset } = header.checksum {
                    prop_assert!(usize::from(start) + usize::from(offset) + 2 <= length);
                }
                prop_assert!(header.gso == Gso::None || header.gso_size > 0);
                prop_assert_eq!(VnetHeader::parse(&header.encode(), length), Ok(header));
            }
        }
    }

    #[test]
    fn refuses_what_leads_outside() {
        let mut bytes = VnetHeader {
            checksum: Checksum::Partial { start: 34, offset: 16 },
            gso: Gso::TcpV4,
            gso_size: 1448,
            header_length: 66,
        }
        .encode();
        assert!(VnetHeader::parse(&bytes, 3000).is_ok());
        assert_eq!(VnetHeader::parse(&bytes, 51), Err(DropReason::Malformed));
        assert_eq!(VnetHeader::parse(&bytes, MAX_FRAME + 1), Err(DropReason::Malformed));
        bytes[1] = 3;
        assert_eq!(VnetHeader::parse(&bytes, 3000), Err(DropReason::Malformed));
    }
}
