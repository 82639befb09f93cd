//! Numbers in byte slices, without panics: what is not there reads as nothing.

/// Reads numbers from the front of a slice.
#[derive(Clone, Copy)]
pub(in crate::store::disk) struct Reader<'a>(pub(in crate::store::disk) &'a [u8]);

impl<'a> Reader<'a> {
    pub(in crate::store::disk) fn bytes(&mut self, count: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(count)?;
        self.0 = rest;
        Some(taken)
    }

    pub(in crate::store::disk) fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        self.bytes(N)?.try_into().ok()
    }

    pub(in crate::store::disk) fn u8(&mut self) -> Option<u8> {
        self.array().map(u8::from_le_bytes)
    }

    pub(in crate::store::disk) fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_le_bytes)
    }

    pub(in crate::store::disk) fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_le_bytes)
    }

    pub(in crate::store::disk) fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_le_bytes)
    }
}

/// Writes numbers one after the other.
pub(in crate::store::disk) struct Writer<'a> {
    to: &'a mut [u8],
    at: usize,
}

impl<'a> Writer<'a> {
    pub(in crate::store::disk) fn new(to: &'a mut [u8]) -> Self {
        Self { to, at: 0 }
    }

    /// Writes bytes; the caller has made room for them.
    pub(in crate::store::disk) fn bytes(&mut self, bytes: &[u8]) -> &mut Self {
        self.to[self.at..self.at + bytes.len()].copy_from_slice(bytes);
        self.at += bytes.len();
        self
    }

    pub(in crate::store::disk) fn skip(&mut self, count: usize) -> &mut Self {
        self.at += count;
        self
    }

    pub(in crate::store::disk) fn u8(&mut self, value: u8) -> &mut Self {
        self.bytes(&[value])
    }

    pub(in crate::store::disk) fn u16(&mut self, value: u16) -> &mut Self {
        self.bytes(&value.to_le_bytes())
    }

    pub(in crate::store::disk) fn u32(&mut self, value: u32) -> &mut Self {
        self.bytes(&value.to_le_bytes())
    }

    pub(in crate::store::disk) fn u64(&mut self, value: u64) -> &mut Self {
        self.bytes(&value.to_le_bytes())
    }
}
