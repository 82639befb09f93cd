//! The latest snapshot of the state machine.
//!
//! Its home is the metadata store. A snapshot is cut into chunks that fit into a value. A new one is written beside the
//! present one; when it is durable, one batch switches the manifest and removes the old chunks. There is a second
//! copy in a plain file ([`file`]), and the bytes are kept in memory to be sent to peers: the cluster's state is some
//! megabytes.

mod file;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::BytesMut;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use super::types::{Snapshot, SnapshotMeta};
use crate::meta_store::{Batch, MAX_VALUE, MetaError, MetaStore};

const MANIFEST_KEY: &[u8] = b"raft/snapshot/manifest";
const CHUNK_PREFIX: &[u8] = b"raft/snapshot/chunk/";
/// The second copy, in the directory of the log.
const COPY_FILE: &str = "snapshot.bin";
/// Chunks put into one batch.
const BATCH_CHUNKS: usize = 16;

#[derive(Clone, Debug, Serialize, Deserialize)]
struct Manifest {
    /// Raised with each snapshot; part of its chunks' keys.
    number: u64,
    chunks: u32,
    length: u64,
    meta: SnapshotMeta,
}

/// The store of the latest snapshot. Clones share it.
#[derive(Clone, Debug)]
pub(super) struct SnapshotStore {
    store: MetaStore,
    copy: Arc<Path>,
    current: Arc<Mutex<Option<Snapshot>>>,
    /// Number of the snapshot in the store. Held while a new one is written.
    number: Arc<Mutex<u64>>,
}

fn chunk_key(number: u64, index: u32) -> Vec<u8> {
    [CHUNK_PREFIX, &number.to_be_bytes(), &index.to_be_bytes()].concat()
}

impl SnapshotStore {
    /// Reads the latest snapshot, if there is one, from the store or its copy in the directory of the log. A damaged one
    /// is as good as none: the log knows whether one is needed, see [`super::recovery`].
    pub(super) fn open(store: MetaStore, log_dir: &Path) -> Result<Self, MetaError> {
        let copy: PathBuf = log_dir.join(COPY_FILE);
        let (number, stored) = match Self::read(&store) {
            Err(error) if error.is_damage() => {
                tracing::error!(%error, "the Raft snapshot in the metadata store is lost");
                (0, None)
            }
            read => read?,
        };
        let copied = file::read(&copy).unwrap_or_else(|error| {
            tracing::error!(%error, "the copy of the Raft snapshot is lost");
            None
        });
        let last = |snapshot: &Option<Snapshot>| snapshot.as_ref().map(|s| s.meta.last_log_id);
        let newest = if last(&copied) > last(&stored) { copied } else { stored };
        Ok(Self {
            store,
            copy: copy.into(),
            current: Arc::new(Mutex::new(newest)),
            number: Arc::new(Mutex::new(number)),
        })
    }

    fn read(store: &MetaStore) -> Result<(u64, Option<Snapshot>), MetaError> {
        let mut current = (0, None);
        if let Some(manifest) = store.get(MANIFEST_KEY)? {
            let damaged = |reason: &str| MetaError::Damaged(format!("Raft snapshot: {reason}"));
            let manifest: Manifest = postcard::from_bytes(&manifest).map_err(|e| damaged(&e.to_string()))?;
            let mut data = BytesMut::new();
            for index in 0..manifest.chunks {
                let chunk = store.get(&chunk_key(manifest.number, index))?;
                data.extend_from_slice(&chunk.ok_or_else(|| damaged("a chunk is missing"))?);
            }
            if data.len() as u64 != manifest.length {
                return Err(damaged("wrong length"));
            }
            current = (manifest.number, Some(Snapshot { meta: manifest.meta, snapshot: data.freeze() }));
        }
        Ok(current)
    }

    /// The latest snapshot.
    pub(super) fn current(&self) -> Option<Snapshot> {
        self.current.lock().clone()
    }

    /// Makes this the latest snapshot, unless a newer one is there. Durable when it returns.
    pub(super) async fn save(&self, snapshot: Snapshot) -> io::Result<()> {
        let this = self.clone();
        let saved = tokio::task::spawn_blocking(move || this.save_blocking(snapshot));
        saved.await.map_err(io::Error::other)?.map_err(io::Error::other)
    }

    fn save_blocking(&self, snapshot: Snapshot) -> Result<(), MetaError> {
        let mut stored = self.number.lock();
        let newest = self.current.lock().as_ref().and_then(|s| s.meta.last_log_id);
        if newest > snapshot.meta.last_log_id {
            return Ok(());
        }
        let copied = file::write(&self.copy, &snapshot);
        copied.map_err(|source| MetaError::Io { path: self.copy.to_path_buf(), source })?;
        let number = *stored + 1;
        // What a crash left of an unfinished one.
        self.remove_chunks_except(*stored)?;
        let mut chunks = 0;
        for group in snapshot.snapshot.chunks(BATCH_CHUNKS * MAX_VALUE) {
            let mut batch = Batch::default();
            for chunk in group.chunks(MAX_VALUE) {
                batch.put(&chunk_key(number, chunks), chunk);
                chunks += 1;
            }
            self.store.apply(batch)?;
        }
        self.store.commit_durable()?;
        let manifest =
            Manifest { number, chunks, length: snapshot.snapshot.len() as u64, meta: snapshot.meta.clone() };
        let manifest =
            postcard::to_stdvec(&manifest).map_err(|e| MetaError::Damaged(format!("Raft snapshot: {e}")))?;
        let mut batch = Batch::default();
        batch.put(MANIFEST_KEY, &manifest);
        self.store.apply(batch)?;
        self.store.commit_durable()?;
        self.remove_chunks_except(number)?;
        *stored = number;
        *self.current.lock() = Some(snapshot);
        Ok(())
    }

    fn remove_chunks_except(&self, number: u64) -> Result<(), MetaError> {
        let kept = [CHUNK_PREFIX, &number.to_be_bytes()].concat();
        let mut batch = Batch::default();
        for (key, _) in self.store.scan(CHUNK_PREFIX)?.iter().filter(|(key, _)| !key.starts_with(&kept)) {
            batch.remove(key);
        }
        self.store.apply(batch)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;

    fn snapshot(data: Bytes) -> Snapshot {
        Snapshot { meta: SnapshotMeta::default(), snapshot: data }
    }

    #[test]
    fn the_latest_snapshot_survives_and_the_old_one_is_gone() {
        let dir = tempfile::tempdir().unwrap();
        let store = MetaStore::open(&dir.path().join("meta")).unwrap();
        let open = || SnapshotStore::open(store.clone(), dir.path()).unwrap();
        let copy = dir.path().join(COPY_FILE);
        let snapshots = open();
        assert!(snapshots.current().is_none());
        for length in [0, 1, MAX_VALUE, 3 * BATCH_CHUNKS * MAX_VALUE + 17] {
            let data: Bytes = (0..length).map(|i| (i / 3) as u8).collect::<Vec<u8>>().into();
            snapshots.save_blocking(snapshot(data.clone())).unwrap();
            std::fs::remove_file(&copy).unwrap();
            assert_eq!(open().current().unwrap().snapshot, data);
            assert_eq!(store.scan(CHUNK_PREFIX).unwrap().len(), length.div_ceil(MAX_VALUE));
        }
    }

    #[test]
    fn one_of_the_two_copies_is_enough() {
        let dir = tempfile::tempdir().unwrap();
        let store = MetaStore::open(&dir.path().join("meta")).unwrap();
        let open = || SnapshotStore::open(store.clone(), dir.path()).unwrap();
        let copy = dir.path().join(COPY_FILE);
        open().save_blocking(snapshot(Bytes::from_static(b"data"))).unwrap();
        std::fs::write(&copy, "garbage").unwrap();
        assert_eq!(open().current().unwrap().snapshot, b"data"[..]);

        open().save_blocking(snapshot(Bytes::from_static(b"more"))).unwrap();
        let mut batch = Batch::default();
        store.scan(CHUNK_PREFIX).unwrap().iter().for_each(|(key, _)| batch.remove(key));
        store.apply(batch).unwrap();
        assert_eq!(open().current().unwrap().snapshot, b"more"[..]);

        std::fs::remove_file(&copy).unwrap();
        assert!(open().current().is_none());
        // The next one takes its place.
        open().save_blocking(snapshot(Bytes::from_static(b"next"))).unwrap();
        assert_eq!(open().current().unwrap().snapshot, b"next"[..]);
    }
}
