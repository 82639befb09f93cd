//! The Internet checksum (RFC 1071).

use std::net::Ipv4Addr;

/// The ones' complement sum of 16-bit words, not yet folded and inverted. Starts at any even offset of its data.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Sum(u64);

impl Sum {
    /// Adds bytes; a lone last byte counts as the high half of a word, so only the last slice may be of odd length.
    pub(crate) fn add(mut self, bytes: &[u8]) -> Self {
        // Sums of 32-bit words fold to the same 16 bits, and the compiler vectorises this loop.
        let mut words = bytes.chunks_exact(4);
        for word in &mut words {
            self.0 += u64::from(u32::from_be_bytes([word[0], word[1], word[2], word[3]]));
        }
        let mut rest = words.remainder().iter();
        while let Some(&high) = rest.next() {
            let low = rest.next().copied().unwrap_or(0);
            self.0 += u64::from(u16::from_be_bytes([high, low]));
        }
        self
    }

    /// Adds one word.
    pub(crate) fn add_word(mut self, word: u16) -> Self {
        self.0 += u64::from(word);
        self
    }

    /// Adds the pseudo header of TCP and UDP over IPv4.
    pub(crate) fn add_pseudo_header(self, src: Ipv4Addr, dst: Ipv4Addr, protocol: u8, length: u16) -> Self {
        self.add(&src.octets()).add(&dst.octets()).add_word(u16::from(protocol)).add_word(length)
    }

    /// The sum in 16 bits, as a sender leaves it in the checksum field for someone else to complete.
    pub(crate) fn fold(self) -> u16 {
        let mut sum = self.0;
        while sum > 0xffff {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        sum as u16
    }

    /// The checksum.
    pub(crate) fn finish(self) -> u16 {
        !self.fold()
    }
}

/// The checksum of some bytes.
pub(crate) fn checksum(bytes: &[u8]) -> u16 {
    Sum::default().add(bytes).finish()
}

/// UDP sends a computed zero as all ones, because zero says that there is no checksum (RFC 768).
pub(crate) fn nonzero(checksum: u16) -> u16 {
    if checksum == 0 { 0xffff } else { checksum }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn by_definition(bytes: &[u8]) -> u16 {
        let mut sum = 0u32;
        for pair in bytes.chunks(2) {
            sum += u32::from(pair[0]) << 8 | pair.get(1).map_or(0, |&low| u32::from(low));
            sum = (sum & 0xffff) + (sum >> 16);
        }
        !(sum as u16)
    }

    proptest! {
        #[test]
        fn equals_the_definition(bytes in proptest::collection::vec(any::<u8>(), 0..3000)) {
            prop_assert_eq!(checksum(&bytes), by_definition(&bytes));
        }
    }

    #[test]
    fn of_a_header_from_rfc_1071() {
        assert_eq!(checksum(&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7]), !0xddf2);
    }
}
