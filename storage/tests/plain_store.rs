//! The plain-file store on a real directory, through its public interface, with its threads.

use bytes::Bytes;
use futures_util::future::join_all;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};
use storage::ids::{DiskId, Generation, LayerId, SegmentIndex, SegmentKey, Version, VolumeId};
use storage::status::DiskHealth;
use storage::store::plain::{OpenError, PlainStore};
use storage::store::{DiskStore, Keep, ReplicaWrite, WriteContent};

fn key(volume: VolumeId) -> SegmentKey {
    SegmentKey { volume, segment: SegmentIndex(0), layer: LayerId(0) }
}

fn write(block: u32, sequence: u64) -> ReplicaWrite {
    let data = Bytes::from(content(block, sequence));
    let crcs = vec![crc32c::crc32c(&data)];
    ReplicaWrite {
        block,
        version: Version { generation: 1, sequence },
        content: WriteContent::Data { data, crcs },
    }
}

fn content(block: u32, sequence: u64) -> Vec<u8> {
    (u64::from(block) << 32 | sequence).to_le_bytes().repeat(512)
}

fn open(dir: &Path, disk: DiskId) -> Arc<PlainStore> {
    Arc::new(PlainStore::open(dir, disk).unwrap_or_else(|e| panic!("{e}: {e:?}")))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_written_is_there_after_reopening() {
    let dir = tempfile::tempdir().unwrap();
    let disk = DiskId::random();
    PlainStore::format(dir.path(), disk).unwrap();
    let volume = VolumeId::random();
    let store = open(dir.path(), disk);
    assert!(matches!(PlainStore::open(dir.path(), disk), Err(OpenError::Io { .. })), "locked");
    store.set_generation(volume, Generation(7)).await.unwrap();
    // Many tasks at once, each with a flush of its own: they share syncs.
    let started = Instant::now();
    let tasks = (0..16u32).map(|task| {
        let store = Arc::clone(&store);
        tokio::spawn(async move {
            for n in 0..250 {
                let block = task * 250 + n;
                store.write(key(volume), write(block, u64::from(block) + 1)).await.unwrap();
                if n % 50 == 0 {
                    store.flush().await.unwrap();
                }
                let read = store.read(key(volume), block, 1).await.unwrap();
                assert_eq!(read.data, content(block, u64::from(block) + 1));
            }
        })
    });
    join_all(tasks).await.into_iter().for_each(Result::unwrap);
    println!("4000 writes, 4000 reads, 80 flushes in {:?}", started.elapsed());
    store
        .write(
            key(volume),
            ReplicaWrite {
                block: 0,
                version: Version { generation: 1, sequence: 9999 },
                content: WriteContent::Zeroes { blocks: 100, keep: Keep::WhereStored },
            },
        )
        .await
        .unwrap();
    // The applier comes by itself; what it moves stays readable at all times.
    tokio::time::sleep(Duration::from_millis(700)).await;
    drop(store);
    let store = open(dir.path(), disk);
    assert_eq!(store.health(), DiskHealth::Ok);
    assert_eq!(store.generation(volume).await.unwrap(), Generation(7));
    let versions = store.versions(key(volume), 0..5000).await.unwrap();
    assert_eq!(versions.len(), 4000);
    assert_eq!(versions[0].version.sequence, 9999);
    assert!(store.read(key(volume), 0, 100).await.unwrap().data.iter().all(|b| *b == 0));
    for block in (100..4000).step_by(37) {
        assert_eq!(
            store.read(key(volume), block, 1).await.unwrap().data,
            content(block, u64::from(block) + 1)
        );
    }
    store.delete_volume(volume).await.unwrap();
    store.delete_volume(volume).await.unwrap();
    assert!(store.versions(key(volume), 0..5000).await.unwrap().is_empty());
    assert!(std::fs::read_dir(dir.path().join("volumes")).unwrap().next().is_none());
    assert!(store.usage().total.0 > 0);
}
