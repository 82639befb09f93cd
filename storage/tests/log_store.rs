//! The disk store on real files, through its public interface: in memory, and on a disk through io_uring.

// A test may panic.
#![allow(clippy::unwrap_used)]

use bytes::Bytes;
use futures_util::future::join_all;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};
use storage::ids::{ByteSize, DiskId, Generation, LayerId, SegmentIndex, SegmentKey, Version, VolumeId};
use storage::status::{DiskHealth, VolumeUsage};
use storage::store::disk::offline::{self, SegmentDump};
use storage::store::disk::{Encryption, LogStore, OpenError};
use storage::store::{
    Compression, DamagedBlocks, DiskStore, Keep, ReplicaWrite, ScrubCursor, StoreError, WriteContent,
};
use storage::{DISK_KEY_BYTES, DiskKey};

const BLOCK: usize = 4096;

fn key(volume: VolumeId) -> SegmentKey {
    SegmentKey { volume, segment: SegmentIndex(0), layer: LayerId(0) }
}

fn content(block: u32, sequence: u64) -> Vec<u8> {
    (u64::from(block) << 32 | sequence).to_le_bytes().repeat(BLOCK / 8)
}

fn write(block: u32, blocks: u32, sequence: u64) -> ReplicaWrite {
    let data: Vec<u8> = (block..block + blocks).flat_map(|block| content(block, sequence)).collect();
    let crcs = data.chunks(BLOCK).map(crc32c::crc32c).collect();
    ReplicaWrite {
        block,
        version: Version { generation: 1, sequence },
        content: WriteContent::Data { data: Bytes::from(data), crcs },
        compression: Compression::Off,
    }
}

fn compressed(block: u32, blocks: u32, sequence: u64) -> ReplicaWrite {
    ReplicaWrite { compression: Compression::Lz4, ..write(block, blocks, sequence) }
}

fn zeroes(block: u32, blocks: u32, sequence: u64) -> ReplicaWrite {
    let version = Version { generation: 1, sequence };
    let content = WriteContent::Zeroes { blocks, keep: Keep::WhereStored };
    ReplicaWrite { block, version, content, compression: Compression::Off }
}

/// A file for a store, in memory or on a disk.
fn places() -> Vec<(tempfile::TempDir, PathBuf)> {
    let in_memory = Path::new("/dev/shm");
    let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir_in(in_memory).unwrap()];
    dirs.into_iter()
        .map(|dir| {
            let path = dir.path().join("disk");
            File::create(&path).unwrap().set_len(256 << 20).unwrap();
            (dir, path)
        })
        .collect()
}

/// A store that was dropped lets go of its disk when what it does in the background has come to its end.
async fn open(path: &Path, disk: DiskId) -> Arc<LogStore> {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let path = path.to_owned();
        let opened = tokio::task::spawn_blocking(move || LogStore::open(&path, disk, None)).await.unwrap();
        match opened {
            Ok(store) => return Arc::new(store),
            Err(OpenError::Io { source, .. })
                if source.kind() == std::io::ErrorKind::ResourceBusy && Instant::now() < deadline =>
            {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            Err(error) => panic!("{error}: {error:?}"),
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_written_is_there_after_reopening() {
    for (_dir, path) in places() {
        let disk = DiskId::random();
        assert!(matches!(LogStore::open(&path, disk, None), Err(OpenError::NotADisk)));
        LogStore::format(&path, disk, None).unwrap();
        assert_eq!(LogStore::identify(&path).unwrap().disk, disk);
        assert!(matches!(LogStore::open(&path, DiskId::random(), None), Err(OpenError::OtherDisk { .. })));
        let volume = VolumeId::random();
        let store = open(&path, disk).await;
        assert!(matches!(LogStore::open(&path, disk, None), Err(OpenError::Io { .. })), "locked");
        store.set_generation(volume, Generation(7)).await.unwrap();
        // Many tasks at once, each with a flush of its own: they share batches and syncs.
        let tasks = (0..16u32).map(|task| {
            let store = Arc::clone(&store);
            tokio::spawn(async move {
                for n in 0..250 {
                    let block = task * 250 + n;
                    store.write(key(volume), write(block, 1, u64::from(block) + 1)).await.unwrap();
                    if n % 50 == 0 {
                        store.flush().await.unwrap();
                    }
                    let read = store.read(key(volume), block, 1).await.unwrap();
                    assert_eq!(read.data, content(block, u64::from(block) + 1));
                }
            })
        });
        join_all(tasks).await.into_iter().for_each(Result::unwrap);
        // Larger than a record of the log.
        store.write(key(volume), write(8000, 1024, 9000)).await.unwrap();
        store.write(key(volume), zeroes(0, 100, 9999)).await.unwrap();
        store.flush().await.unwrap();
        let used = store.usage().used;
        drop(store);
        let store = open(&path, disk).await;
        assert_eq!(store.health(), DiskHealth::Ok);
        assert_eq!(store.generation(volume).await.unwrap(), Generation(7));
        let versions = store.versions(key(volume), 0..5000).await.unwrap();
        assert_eq!(versions.len(), 4000);
        assert_eq!(versions[0].version.sequence, 9999);
        assert!(store.read(key(volume), 0, 100).await.unwrap().data.iter().all(|b| *b == 0));
        let large = store.read(key(volume), 8000, 1024).await.unwrap();
        assert_eq!(large.data, (8000..9024).flat_map(|block| content(block, 9000)).collect::<Vec<_>>());
        for block in (100..4000).step_by(37) {
            let read = store.read(key(volume), block, 1).await.unwrap();
            assert_eq!(read.data, content(block, u64::from(block) + 1));
        }
        store.delete_volume(volume).await.unwrap();
        store.delete_volume(volume).await.unwrap();
        assert!(store.versions(key(volume), 0..5000).await.unwrap().is_empty());
        drop(store);
        let store = open(&path, disk).await;
        assert!(store.usage().used.0 < used.0 / 10, "the room is given back");
        assert_eq!(store.generation(volume).await.unwrap(), Generation(0));
    }
}

#[tokio::test]
async fn damage_at_rest_is_told_and_never_read() {
    for (_dir, path) in places() {
        let disk = DiskId::random();
        LogStore::format(&path, disk, None).unwrap();
        let volume = VolumeId::random();
        let store = open(&path, disk).await;
        store.write(key(volume), write(0, 64, 1)).await.unwrap();
        drop(store);
        // Opening applies the log; so the data are in their slots afterwards.
        drop(open(&path, disk).await);
        let file = File::options().read(true).write(true).open(&path).unwrap();
        let (wanted, mut block, mut places) = (content(17, 1), vec![0; BLOCK], Vec::new());
        for at in (0..256 << 20).step_by(BLOCK) {
            file.read_exact_at(&mut block, at).unwrap();
            if block == wanted {
                places.push(at);
            }
        }
        assert!(!places.is_empty());
        for at in places {
            file.write_all_at(&[0xff; 9], at + 100).unwrap();
        }
        let verified = offline::verify(&path, None, |_, _| {}).unwrap();
        assert_eq!(verified.checked_bytes, 64 * BLOCK as u64);
        assert_eq!(verified.damaged, [DamagedBlocks { at: key(volume), blocks: 17..18 }]);
        assert!(verified.lost_pages.is_empty());
        let dump = offline::dump(&path, None).unwrap();
        assert_eq!((dump.disk, dump.boot, dump.unapplied_bytes.0), (disk, 2, 0));
        let whole = SegmentDump {
            key: key(volume),
            positions: 4,
            compressed_positions: 0,
            bytes: ByteSize(64 * BLOCK as u64),
        };
        assert_eq!(dump.segments, [whole]);
        let store = open(&path, disk).await;
        assert!(matches!(offline::dump(&path, None), Err(OpenError::Io { .. })), "it is in use");
        let (mut cursor, mut found, mut checked) = (Some(ScrubCursor::default()), Vec::new(), 0);
        while let Some(from) = cursor {
            let step = store.scrub(from, 64 << 10).await.unwrap();
            cursor = step.next;
            checked += step.checked;
            found.extend(step.damaged);
        }
        assert_eq!(found, [DamagedBlocks { at: key(volume), blocks: 17..18 }]);
        assert_eq!(checked, 64 * BLOCK as u64);
        let damaged = store.read(key(volume), 0, 64).await;
        assert_eq!(damaged, Err(StoreError::Checksum { block: 17 }));
        assert_eq!(store.read(key(volume), 18, 46).await.unwrap().data.len(), 46 * BLOCK);
        // What is written anew is sound again.
        store.write(key(volume), write(17, 1, 2)).await.unwrap();
        assert_eq!(store.read(key(volume), 17, 1).await.unwrap().data, content(17, 2));
    }
}

#[tokio::test]
async fn compressed_data_take_less_room_are_read_and_verified_and_damage_to_them_is_told() {
    for (_dir, path) in places() {
        let (disk, volume) = (DiskId::random(), VolumeId::random());
        LogStore::format(&path, disk, None).unwrap();
        let store = open(&path, disk).await;
        // More than a record of the log.
        store.write(key(volume), compressed(0, 1024, 1)).await.unwrap();
        assert_eq!(store.read(key(volume), 1000, 1).await.unwrap().data, content(1000, 1));
        drop(store);
        // Opening applies the log.
        let store = open(&path, disk).await;
        for block in [0, 17, 1023] {
            assert_eq!(store.read(key(volume), block, 1).await.unwrap().data, content(block, 1));
        }
        let all = store.read(key(volume), 0, 1024).await.unwrap().data;
        assert_eq!(all, (0..1024).flat_map(|block| content(block, 1)).collect::<Vec<_>>());
        // 64 positions of one cell of 16 KiB each, and a slot of info.
        assert_eq!(store.usage().used.0, 64 * (16 << 10) + (64 << 10));
        let [held] = store.held().try_into().unwrap();
        assert_eq!(held, VolumeUsage { volume, data: ByteSize(4 << 20), stored: ByteSize(1 << 20) });
        drop(store);
        let verified = offline::verify(&path, None, |_, _| {}).unwrap();
        assert_eq!((verified.checked_bytes, verified.damaged.len()), (1024 * BLOCK as u64, 0));
        let dump = offline::dump(&path, None).unwrap();
        let segment = SegmentDump {
            key: key(volume),
            positions: 64,
            compressed_positions: 64,
            bytes: ByteSize(1 << 20),
        };
        assert_eq!(dump.segments, [segment]);
        // The name of a compressed extent, as it is on the disk.
        let file = File::options().read(true).write(true).open(&path).unwrap();
        let mut start = [0; 4];
        let extent = (0..256 << 20).step_by(16 << 10).find(|at| {
            file.read_exact_at(&mut start, *at).unwrap();
            start == *b"HLZ4"
        });
        file.write_all_at(&[0xff; 9], extent.unwrap() + 100).unwrap();
        let verified = offline::verify(&path, None, |_, _| {}).unwrap();
        let [damaged] = verified.damaged.try_into().unwrap();
        assert_eq!((damaged.blocks.len(), damaged.blocks.start % 16), (16, 0));
    }
}

#[tokio::test]
async fn of_an_encrypted_disk_nothing_can_be_read_without_its_key() {
    for (_dir, path) in places() {
        let (disk, volume) = (DiskId::random(), VolumeId::random());
        let key_of =
            |seed: u8| DiskKey::from_bytes(&std::array::from_fn::<u8, DISK_KEY_BYTES, _>(|i| i as u8 ^ seed));
        let (right, wrong) = (key_of(1).unwrap(), key_of(2).unwrap());
        LogStore::format(&path, disk, Some(&right)).unwrap();
        assert_eq!(LogStore::identify(&path).unwrap().encryption, Encryption::Aes256Xts);
        assert!(matches!(LogStore::open(&path, disk, None), Err(OpenError::Locked)));
        assert!(matches!(LogStore::open(&path, disk, Some(&wrong)), Err(OpenError::WrongKey)));
        assert!(matches!(offline::dump(&path, None), Err(OpenError::Locked)));
        let store = LogStore::open(&path, disk, Some(&right)).unwrap();
        // Small ones through the log, a large one straight to its slots.
        for block in 0..20 {
            store.write(key(volume), write(block, 1, 1)).await.unwrap();
        }
        store.write(key(volume), write(64, 64, 2)).await.unwrap();
        store.flush().await.unwrap();
        drop(store);
        let store = LogStore::open(&path, disk, Some(&right)).unwrap();
        assert_eq!(store.read(key(volume), 17, 1).await.unwrap().data, content(17, 1));
        assert_eq!(store.read(key(volume), 100, 1).await.unwrap().data, content(100, 2));
        drop(store);
        let file = File::open(&path).unwrap();
        let mut bytes = vec![0; 1 << 20];
        let known = [content(17, 1), content(100, 2), volume.0.as_bytes().to_vec()];
        for at in (0..256 << 20).step_by(bytes.len()) {
            file.read_exact_at(&mut bytes, at).unwrap();
            for known in &known {
                let start = &known[..16];
                assert!(!bytes.windows(16).any(|window| window == start), "plaintext at {at:#x}");
            }
        }
        let verified = offline::verify(&path, Some(&right), |_, _| {}).unwrap();
        assert_eq!((verified.checked_bytes, verified.damaged.len()), (84 * BLOCK as u64, 0));
    }
    let (_dir, path) = places().remove(0);
    let (disk, key) = (DiskId::random(), DiskKey::from_bytes(&(0..64).collect::<Vec<u8>>()).unwrap());
    LogStore::format(&path, disk, None).unwrap();
    assert!(matches!(LogStore::open(&path, disk, Some(&key)), Err(OpenError::NotEncrypted)));
}
