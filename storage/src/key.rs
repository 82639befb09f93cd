//! The keys of encrypted disks. How a key is kept is for others to say: a disk is configured with a salt, and a [`Keyring`] makes its key of that.

use crate::ids::DiskId;
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use std::{fmt, io};
use zeroize::{Zeroize, ZeroizeOnDrop};

/// Bytes of a key.
pub const DISK_KEY_BYTES: usize = 64;

/// The key of a disk for AES-256-XTS (IEEE 1619): two halves, one for the data and one for the tweak. Erased from memory when dropped, and never shown.
#[derive(Clone, PartialEq, Eq, Zeroize, ZeroizeOnDrop)]
pub struct DiskKey {
    data: [u8; DISK_KEY_BYTES / 2],
    tweak: [u8; DISK_KEY_BYTES / 2],
}

impl DiskKey {
    /// A key of these bytes; nothing when they are not [`DISK_KEY_BYTES`].
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let (data, tweak) = bytes.split_at_checked(DISK_KEY_BYTES / 2)?;
        Some(Self { data: data.try_into().ok()?, tweak: tweak.try_into().ok()? })
    }

    /// Its bytes.
    pub fn bytes(&self) -> zeroize::Zeroizing<[u8; DISK_KEY_BYTES]> {
        let mut bytes = zeroize::Zeroizing::new([0; DISK_KEY_BYTES]);
        bytes[..DISK_KEY_BYTES / 2].copy_from_slice(&self.data);
        bytes[DISK_KEY_BYTES / 2..].copy_from_slice(&self.tweak);
        bytes
    }
}

impl fmt::Debug for DiskKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("DiskKey(…)")
    }
}

/// What a disk's key is made with. No secret: with a secret that is elsewhere it makes the key.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct KeySalt(pub [u8; 32]);

/// Makes the key of a disk.
pub type Keyring = Arc<dyn Fn(DiskId, KeySalt) -> io::Result<DiskKey> + Send + Sync>;
