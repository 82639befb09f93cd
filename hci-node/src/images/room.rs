//! Room for sources on the node's system disk, which Raft's log needs too: some of it is never touched.

use std::{io, path::Path};

/// What has to stay free.
const KEEP_FREE: u64 = 1 << 30;

/// There is no room for a source.
#[derive(Debug, thiserror::Error)]
pub enum RoomError {
    /// Too little.
    #[error("the source needs {needed} bytes on the node, of which {free} are free (1 GiB is kept back)")]
    Full {
        /// How much it needs.
        needed: u64,
        /// How much there is.
        free: u64,
    },
    /// Nobody knows.
    #[error("the room on the node cannot be seen: {0}")]
    Unknown(#[source] io::Error),
}

/// Whether so many bytes fit into a directory's file system.
pub fn check(dir: &Path, needed: u64) -> Result<(), RoomError> {
    let seen = nix::sys::statvfs::statvfs(dir).map_err(|errno| RoomError::Unknown(errno.into()))?;
    let free = seen.blocks_available().saturating_mul(seen.fragment_size());
    let usable = free.saturating_sub(KEEP_FREE);
    if needed <= usable { Ok(()) } else { Err(RoomError::Full { needed, free: usable }) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_fit_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        assert!(matches!(check(dir.path(), u64::MAX), Err(RoomError::Full { .. })));
    }
}
