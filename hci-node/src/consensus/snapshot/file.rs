//! A copy of the latest snapshot in a plain file beside the log.
//!
//! It is written whole, checksummed and renamed into place, so there is always one complete copy. It saves a cluster
//! whose metadata stores are all damaged at once, by a power cut of the whole room, and a cluster of one node, which
//! has no peer to ask.
//!
//! ```text
//! "hciSNP1\n", CRC32C of the rest (4 bytes, little-endian), postcard of (meta, data)
//! ```

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;

use super::super::types::{Opaque, Snapshot, SnapshotMeta};

const MAGIC: &[u8] = b"hciSNP1\n";

pub(super) fn write(path: &Path, snapshot: &Snapshot) -> io::Result<()> {
    let body = postcard::to_stdvec(&(&snapshot.meta, Opaque(snapshot.snapshot.clone())))
        .map_err(io::Error::other)?;
    let temporary = path.with_extension("new");
    let mut file = File::create(&temporary)?;
    file.write_all(MAGIC)?;
    file.write_all(&crc32c::crc32c(&body).to_le_bytes())?;
    file.write_all(&body)?;
    file.sync_all()?;
    fs::rename(&temporary, path)?;
    File::open(path.parent().unwrap_or(Path::new("/")))?.sync_all()
}

/// The snapshot in the file; none if there is no file.
pub(super) fn read(path: &Path) -> io::Result<Option<Snapshot>> {
    let bytes = match fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let damaged = || io::Error::new(io::ErrorKind::InvalidData, "the copy of the Raft snapshot is damaged");
    let (crc, body) = bytes.strip_prefix(MAGIC).and_then(<[u8]>::split_first_chunk).ok_or_else(damaged)?;
    if crc32c::crc32c(body) != u32::from_le_bytes(*crc) {
        return Err(damaged());
    }
    let (meta, Opaque(snapshot)): (SnapshotMeta, Opaque) =
        postcard::from_bytes(body).map_err(|_| damaged())?;
    Ok(Some(Snapshot { meta, snapshot }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]

        #[test]
        fn what_is_read_is_what_was_written_or_an_error(data: Vec<u8>, at: prop::sample::Index, bit in 0..8) {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("snapshot.bin");
            prop_assert!(read(&path).unwrap().is_none());
            write(&path, &Snapshot { meta: SnapshotMeta::default(), snapshot: Bytes::from(data.clone()) }).unwrap();
            prop_assert_eq!(&read(&path).unwrap().unwrap().snapshot, &data);
            let mut bytes = fs::read(&path).unwrap();
            let at = at.index(bytes.len());
            bytes[at] ^= 1_u8 << bit;
            fs::write(&path, &bytes).unwrap();
            prop_assert!(read(&path).is_err());
            fs::write(&path, &bytes[..at]).unwrap();
            prop_assert!(read(&path).is_err());
        }
    }
}
