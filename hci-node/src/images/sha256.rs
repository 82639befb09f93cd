//! SHA-256: of the worker's stream, and of what users say a source has.

use std::fmt;

use aws_lc_rs::digest;

/// A SHA-256 in the making.
pub struct Sha256(digest::Context);

impl Sha256 {
    /// Bytes of a finished one.
    pub const LENGTH: usize = digest::SHA256_OUTPUT_LEN;

    /// Of nothing yet.
    pub fn new() -> Self {
        Self(digest::Context::new(&digest::SHA256))
    }

    /// More bytes.
    pub fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    /// Of everything so far.
    pub fn finish(self) -> [u8; Self::LENGTH] {
        let mut bytes = [0; Self::LENGTH];
        bytes.copy_from_slice(self.0.finish().as_ref());
        bytes
    }
}

impl Default for Sha256 {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for Sha256 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Sha256")
    }
}
