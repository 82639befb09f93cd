//! The keys of encrypted disks.
//!
//! A disk's key is made of two halves that are never in the same place but here: a salt in the cluster's state, which is the disk's own, and a secret of the node, which never leaves it and
//! is in no backup of the state. So a disk that is taken out of its node cannot be read. One that left the pool cannot either, once its salt is gone from Raft's logs and snapshots, too.
//! When a node's secret is lost its encrypted disks are, too; what they held is on other nodes.

use std::{
    fs,
    io::{self, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::PathBuf,
};

use aws_lc_rs::{
    hkdf::{HKDF_SHA512, KeyType, Salt},
    rand,
};
use storage::{DISK_KEY_BYTES, DiskKey, KeySalt, ids::DiskId};
use zeroize::Zeroizing;

use crate::data::protocol::NodeSecret;

/// The node's secret.
const SECRET_FILE: &str = "disks.secret";
const SECRET_BYTES: usize = 64;
/// What the keys are for, so that no other use of the secret makes the same ones.
const PURPOSE: &[u8] = b"hci disk key, AES-256-XTS";

struct Length;

impl KeyType for Length {
    fn len(&self) -> usize {
        DISK_KEY_BYTES
    }
}

/// Makes keys of disks with the node's secret.
#[derive(Clone, Debug)]
pub struct Keyring {
    secret: PathBuf,
}

impl Keyring {
    /// That of a node whose identity is in this directory.
    pub fn new(identity: PathBuf) -> Self {
        Self { secret: identity.join(SECRET_FILE) }
    }

    /// The key of a disk that was encrypted on this node.
    pub fn key(&self, disk: DiskId, salt: KeySalt) -> io::Result<DiskKey> {
        let gone = |error: io::Error| {
            let why = format!(
                "the secret of this node's encrypted disks cannot be read ({}): {error}; without it they are lost: \
                 evict them, so that what they held is copied from other nodes",
                self.secret.display()
            );
            io::Error::new(error.kind(), why)
        };
        let secret = Zeroizing::new(fs::read(&self.secret).map_err(gone)?);
        if secret.len() != SECRET_BYTES {
            return Err(gone(io::Error::new(io::ErrorKind::InvalidData, "it is damaged")));
        }
        derive(&secret, disk, salt)
    }

    /// The same for a disk that is about to be encrypted: the node's first one makes its secret. One that is lost is not replaced while disks are in the
    /// pool that need it: nobody would notice, and nobody could tell any more which disks can be read.
    pub fn key_for_new(&self, disk: DiskId, salt: KeySalt, secret: NodeSecret) -> io::Result<DiskKey> {
        if secret == NodeSecret::MayBeMade
            && let Err(error) = fs::metadata(&self.secret)
            && error.kind() == io::ErrorKind::NotFound
        {
            self.make_secret()?;
        }
        self.key(disk, salt)
    }

    /// Durable before anything is encrypted with it, and never half written.
    fn make_secret(&self) -> io::Result<()> {
        let mut secret = Zeroizing::new([0; SECRET_BYTES]);
        rand::fill(&mut secret[..]).map_err(io::Error::other)?;
        let dir = self.secret.parent().ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
        fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
        let fresh = self.secret.with_extension("new");
        let mut file =
            fs::File::options().write(true).create(true).truncate(true).mode(0o600).open(&fresh)?;
        file.write_all(&secret[..])?;
        file.sync_all()?;
        fs::rename(&fresh, &self.secret)?;
        fs::File::open(dir)?.sync_all()
    }
}

fn derive(secret: &[u8], disk: DiskId, KeySalt(salt): KeySalt) -> io::Result<DiskKey> {
    let failed = |_| io::Error::other("the key of the disk cannot be made");
    let info = [PURPOSE, disk.0.as_bytes()];
    let made = Salt::new(HKDF_SHA512, &salt).extract(secret);
    let mut bytes = Zeroizing::new([0; DISK_KEY_BYTES]);
    made.expand(&info, Length).and_then(|okm| okm.fill(&mut bytes[..])).map_err(failed)?;
    DiskKey::from_bytes(&bytes[..]).ok_or_else(|| io::Error::other("the key of the disk cannot be made"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use uuid::Uuid;

    #[test]
    fn a_key_needs_the_same_node_disk_and_salt() {
        let (here, there) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let ring = Keyring::new(here.path().join("identity"));
        let (one, other) = (DiskId(Uuid::from_u128(1)), DiskId(Uuid::from_u128(2)));
        let (salt, another) = (KeySalt([1; 32]), KeySalt([2; 32]));
        let error = ring.key_for_new(one, salt, NodeSecret::IsInUse).unwrap_err();
        assert!(error.to_string().contains("evict"), "{error}");
        let error = ring.key(one, salt).unwrap_err();
        assert!(error.to_string().contains("evict"), "{error}");
        let key = ring.key_for_new(one, salt, NodeSecret::MayBeMade).unwrap();
        assert_eq!(ring.key(one, salt).unwrap(), key);
        assert_eq!(ring.key_for_new(one, salt, NodeSecret::MayBeMade).unwrap(), key);
        assert_ne!(ring.key(other, salt).unwrap(), key);
        assert_ne!(ring.key(one, another).unwrap(), key);
        let elsewhere = Keyring::new(there.path().to_owned());
        assert_ne!(elsewhere.key_for_new(one, salt, NodeSecret::MayBeMade).unwrap(), key);
    }

    #[test]
    fn the_secret_is_the_owners_alone() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let ring = Keyring::new(dir.path().to_owned());
        ring.key_for_new(DiskId(Uuid::from_u128(1)), KeySalt([1; 32]), NodeSecret::MayBeMade).unwrap();
        let mode = fs::metadata(dir.path().join(SECRET_FILE)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert!(!dir.path().join("disks.new").exists());
    }
}
