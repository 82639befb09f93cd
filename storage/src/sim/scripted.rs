//! Single stories with exact expectations.

use super::client::{fill, request};
use super::cluster::{Cluster, Setup};
use super::dice::Dice;
use super::media::Kind;
use super::simulate;
use crate::config::{Durability, ReplicaConfig, ReplicaState, Tenure};
use crate::coordinator::VolumeDevice;
use crate::device::{BlockDevice, BlockError, BlockOp};
use crate::ids::{BLOCK_SIZE, LayerId, LayerRef, SECTOR_SIZE, SEGMENT_SIZE, SegmentIndex, SegmentKey};
use crate::status::{MemberState, ScrubState, VolumeState};
use crate::store::Compression;
use bytes::Bytes;
use std::time::Duration;
use tokio::time::Instant;

const LIMIT: Duration = Duration::from_secs(30);

/// A healthy volume and the number of the node that coordinates it.
async fn healthy(seed: u64, min_in_sync: u8) -> (Cluster, VolumeDevice, usize) {
    let (durability, compression) = (Durability::WriteBack, Compression::Off);
    let setup = Setup { min_in_sync, durability, compression, disks: Kind::Model };
    let mut cluster = Cluster::new(Dice::new(seed), setup);
    cluster.lease = Duration::from_secs(3600);
    assert!(cluster.run_until(LIMIT, Cluster::is_healthy).await);
    let (_, coordinator) = cluster.coordinator().unwrap();
    let node = cluster.raft.record.lock().coordinator.unwrap();
    let n = cluster.nodes.iter().position(|x| x.id == node).unwrap();
    (cluster, VolumeDevice(coordinator), n)
}

async fn write(device: &VolumeDevice, block: u64, value: u64) {
    let data = fill(value, BLOCK_SIZE / SECTOR_SIZE);
    request(device, BlockOp::Write { offset: block * BLOCK_SIZE, data }).await.unwrap();
}

async fn read(device: &VolumeDevice, block: u64) -> Result<u64, BlockError> {
    let data = request(device, BlockOp::Read { offset: block * BLOCK_SIZE, len: BLOCK_SIZE }).await?;
    Ok(u64::from_le_bytes(data[..8].try_into().unwrap()))
}

/// How long a write takes while the control plane goes on.
async fn timed_write(cluster: &mut Cluster, device: &VolumeDevice, block: u64, value: u64) -> Duration {
    let started = Instant::now();
    let device = device.clone();
    let task = tokio::spawn(async move {
        write(&device, block, value).await;
        started.elapsed()
    });
    assert!(cluster.run_until(LIMIT, |_| task.is_finished()).await, "the write does not end");
    task.await.unwrap()
}

#[test]
fn a_killed_replica_costs_a_moment_and_a_silent_one_less_than_three_seconds() {
    simulate(async {
        let (mut cluster, device, n) = healthy(1, 1).await;
        cluster.kill((n + 1) % 3);
        let pause = timed_write(&mut cluster, &device, 0, 1).await;
        assert!(pause < Duration::from_millis(500), "{pause:?}");

        let (mut cluster, device, n) = healthy(11, 1).await;
        cluster.network.cut(cluster.nodes[(n + 2) % 3].id, cluster.nodes[n].id);
        let pause = timed_write(&mut cluster, &device, 0, 2).await;
        assert!(pause > Duration::from_secs(2) && pause < Duration::from_secs(3), "{pause:?}");
    });
}

#[test]
fn resync_copies_only_what_changed() {
    simulate(async {
        let (mut cluster, device, n) = healthy(2, 1).await;
        for block in 0..40 {
            write(&device, block, 1).await;
        }
        let away = (n + 1) % 3;
        cluster.kill(away);
        for block in [3, 4, 30] {
            timed_write(&mut cluster, &device, block, 2).await;
        }
        let before = cluster.nodes[away].disk.model().blocks_written();
        cluster.start(away);
        let disk = cluster.nodes[away].disk_id;
        assert!(cluster.run_until(LIMIT, Cluster::is_healthy).await);
        assert_eq!(cluster.nodes[away].disk.model().blocks_written() - before, 3);
        let status = cluster.coordinator().unwrap().1.status();
        let replica = status.replicas.iter().find(|r| r.disk == disk).unwrap();
        assert_eq!(replica.state, MemberState::InSync);
        assert_eq!(replica.resync.unwrap().blocks_copied, 3);
    });
}

#[test]
fn a_replica_that_is_in_sync_again_has_flushed_writes_durably() {
    simulate(async {
        let (mut cluster, device, n) = healthy(9, 1).await;
        let away = (n + 1) % 3;
        cluster.kill(away);
        for block in 0..20 {
            timed_write(&mut cluster, &device, block, 1).await;
        }
        request(&device, BlockOp::Flush).await.unwrap();
        cluster.start(away);
        assert!(cluster.run_until(LIMIT, Cluster::is_healthy).await);
        cluster.power_cut(&[away]);
        assert_eq!(cluster.nodes[away].disk.model().contents().len(), 20);
    });
}

#[test]
fn a_damaged_block_is_read_elsewhere_and_repaired() {
    simulate(async {
        let (cluster, device, n) = healthy(3, 1).await;
        write(&device, 5, 42).await;
        let at = SegmentKey { volume: cluster.volume, segment: SegmentIndex(0), layer: LayerId(0) };
        cluster.nodes[n].disk.model().corrupt(at, 5);
        assert_eq!(read(&device, 5).await, Ok(42));
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert!(cluster.nodes[n].disk.model().is_intact(at, 5), "not repaired");
        for node in &cluster.nodes {
            node.disk.model().corrupt(at, 5);
        }
        assert!(matches!(read(&device, 5).await, Err(BlockError::Io(_))), "no copy is left");
        assert_eq!(read(&device, 6).await, Ok(0), "the volume goes on");
    });
}

#[test]
fn a_scrub_finds_what_is_damaged_at_rest_and_it_is_repaired_unread() {
    simulate(async {
        let (mut cluster, device, n) = healthy(12, 1).await;
        for block in 0..600 {
            write(&device, block, block + 1).await;
        }
        let at = SegmentKey { volume: cluster.volume, segment: SegmentIndex(0), layer: LayerId(0) };
        let damaged = [0, 7, 8, 300, 599];
        let away = (n + 1) % 3;
        for block in damaged {
            cluster.nodes[away].disk.model().corrupt(at, block);
        }
        cluster.scrubber(away).ask(1);
        let repaired = |cluster: &Cluster| cluster.scrubber(away).status().repaired == damaged.len() as u64;
        assert!(cluster.run_until(LIMIT * 2, repaired).await, "{:?}", cluster.scrubber(away).status());
        assert!(damaged.iter().all(|block| cluster.nodes[away].disk.model().is_intact(at, *block)));
        let status = cluster.scrubber(away).status();
        assert_eq!((status.state, status.found, status.damaged), (ScrubState::Idle, damaged.len() as u64, 0));
        assert_eq!(status.checked.0, 600 * BLOCK_SIZE);
        assert!(cluster.is_healthy(), "nobody was taken out for it");
        for block in damaged {
            assert_eq!(read(&device, u64::from(block)).await, Ok(u64::from(block) + 1));
        }
    });
}

#[test]
fn damage_without_an_intact_copy_stays_known_and_hides_no_other() {
    simulate(async {
        let (mut cluster, device, n) = healthy(13, 1).await;
        for block in 0..700 {
            write(&device, block, 1).await;
        }
        let at = SegmentKey { volume: cluster.volume, segment: SegmentIndex(0), layer: LayerId(0) };
        let away = (n + 2) % 3;
        for node in &cluster.nodes {
            (0..600).for_each(|block| node.disk.model().corrupt(at, block));
        }
        cluster.nodes[away].disk.model().corrupt(at, 699);
        cluster.scrubber(away).ask(1);
        let repaired = |cluster: &Cluster| cluster.scrubber(away).status().repaired == 1;
        assert!(cluster.run_until(LIMIT * 4, repaired).await, "{:?}", cluster.scrubber(away).status());
        assert!(cluster.nodes[away].disk.model().is_intact(at, 699));
        assert_eq!(cluster.scrubber(away).status().damaged, 600);
        // The guest writes them anew: they are well again, which the next question finds out.
        for block in 0..600 {
            write(&device, block, 2).await;
        }
        let well = |cluster: &Cluster| cluster.scrubber(away).status().damaged == 0;
        assert!(cluster.run_until(LIMIT * 4, well).await, "{:?}", cluster.scrubber(away).status());
    });
}

#[test]
fn below_the_minimum_writes_wait_and_go_on_when_a_replica_is_back() {
    simulate(async {
        let (mut cluster, device, n) = healthy(4, 2).await;
        write(&device, 1, 1).await;
        cluster.kill((n + 1) % 3);
        cluster.kill((n + 2) % 3);
        // The control plane has no majority then: keep the lease, so that only the minimum is what is missing.
        let waiting = tokio::spawn({
            let device = device.clone();
            async move { write(&device, 1, 2).await }
        });
        tokio::time::sleep(Duration::from_secs(5)).await;
        assert!(!waiting.is_finished());
        cluster.start((n + 1) % 3);
        assert!(cluster.run_until(LIMIT, |_| waiting.is_finished()).await, "the write waits for ever");
        let (opening, _) = cluster.coordinator().unwrap();
        assert_eq!(opening, 1, "it was this coordinator that completed it");
        assert_eq!(read(&device, 1).await, Ok(2));
    });
}

#[test]
fn without_a_lease_reads_and_writes_wait() {
    simulate(async {
        let (mut cluster, device, _) = healthy(5, 1).await;
        write(&device, 1, 1).await;
        cluster.lease = Duration::from_millis(900);
        cluster.control_step();
        tokio::time::sleep(Duration::from_secs(2)).await;
        let waiting = tokio::spawn({
            let device = device.clone();
            async move { read(&device, 1).await }
        });
        tokio::time::sleep(Duration::from_secs(2)).await;
        assert!(!waiting.is_finished(), "read without a lease");
        let state = cluster.coordinator().unwrap().1.status().state;
        assert!(matches!(state, VolumeState::Waiting(_)), "{state:?}");
        cluster.control_step();
        assert_eq!(waiting.await.unwrap(), Ok(1));
    });
}

#[test]
fn when_all_disks_are_full_writes_wait_for_room() {
    simulate(async {
        let (mut cluster, device, _) = healthy(6, 2).await;
        write(&device, 1, 1).await;
        cluster.nodes.iter().for_each(|n| n.disk.model().set_full(true));
        let waiting = tokio::spawn({
            let device = device.clone();
            async move { write(&device, 2, 2).await }
        });
        assert!(!cluster.run_until(Duration::from_secs(5), |_| waiting.is_finished()).await);
        assert_eq!(read(&device, 1).await, Ok(1), "reads go on");
        assert_eq!(cluster.raft.in_sync().len(), 3, "a full disk is no reason to distrust equal replicas");
        cluster.nodes.iter().for_each(|n| n.disk.model().set_full(false));
        assert!(cluster.run_until(LIMIT, |_| waiting.is_finished()).await);
        assert_eq!(read(&device, 2).await, Ok(2));
    });
}

#[test]
fn a_clean_close_leaves_nothing_to_lose() {
    simulate(async {
        let (mut cluster, device, _) = healthy(7, 1).await;
        write(&device, 9, 9).await;
        cluster.coordinator().unwrap().1.close().await;
        assert_eq!(cluster.raft.record.lock().volume.clean, crate::config::CleanState::Clean);
        assert_eq!(request(&device, BlockOp::Flush).await, Err(BlockError::Closed));
        cluster.power_cut(&[0, 1, 2]);
        (0..3).for_each(|n| cluster.start(n));
        assert!(cluster.run_until(LIMIT, Cluster::is_healthy).await);
        let (_, coordinator) = cluster.coordinator().unwrap();
        assert_eq!(read(&VolumeDevice(coordinator), 9).await, Ok(9));
    });
}

#[test]
fn sub_block_writes_and_bad_ranges() {
    simulate(async {
        let (_cluster, device, _) = healthy(8, 1).await;
        write(&device, 0, 1).await;
        let data = fill(2, 1);
        request(&device, BlockOp::Write { offset: 512, data: data.clone() }).await.unwrap();
        let block = request(&device, BlockOp::Read { offset: 0, len: 4096 }).await.unwrap();
        assert_eq!(
            (&block[..512], &block[512..1024], &block[1024..1536]),
            (&fill(1, 1)[..], &data[..], &fill(1, 1)[..])
        );
        request(&device, BlockOp::Discard { offset: 512, len: 8192 }).await.unwrap();
        let after = request(&device, BlockOp::Read { offset: 0, len: 1024 }).await.unwrap();
        assert_eq!((&after[..512], &after[512..]), (&fill(1, 1)[..], &fill(0, 1)[..]));
        for op in [
            BlockOp::Read { offset: u64::MAX - 511, len: 1024 },
            BlockOp::Write { offset: 0, data: vec![0; 100].into() },
            BlockOp::Discard { offset: 0, len: u64::MAX / 512 * 512 },
        ] {
            assert!(matches!(request(&device, op).await, Err(BlockError::Invalid(_))));
        }
    });
}

#[test]
fn a_replica_leaves_its_data_are_removed_and_a_new_one_is_filled() {
    const LAST: SegmentIndex = SegmentIndex(1);
    const LAST_BLOCKS: u64 = SEGMENT_SIZE / BLOCK_SIZE;
    simulate(async {
        let (mut cluster, device, n) = healthy(9, 2).await;
        for block in [0, 1, LAST_BLOCKS, LAST_BLOCKS + 3] {
            write(&device, block, block + 1).await;
        }
        let leaving = (n + 1) % 3;
        let (disk, node) = (cluster.nodes[leaving].disk_id, cluster.nodes[leaving].id);
        let volume = cluster.volume;
        let held = |cluster: &Cluster, segment| {
            let contents = cluster.nodes[leaving].disk.model().contents();
            contents.keys().filter(|(key, _)| key.segment == segment).count()
        };
        cluster.change_set(LAST, |replicas| {
            replicas.iter_mut().filter(|r| r.disk == disk).for_each(|r| r.tenure = Tenure::Leaves);
        });
        let has_left = |cluster: &Cluster| {
            let record = cluster.raft.record.lock();
            record.volume.segments[1].replicas.iter().all(|replica| replica.disk != disk)
        };
        assert!(cluster.run_until(LIMIT, has_left).await);
        assert!(timed_write(&mut cluster, &device, LAST_BLOCKS, 50).await < Duration::from_millis(500));
        let server = cluster.server(leaving).unwrap();
        let part = LayerRef { volume, layer: LayerId(0) }.key(LAST);
        server.delete_parts(disk, &[part]).await.unwrap();
        assert_eq!((held(&cluster, LAST), held(&cluster, SegmentIndex(0))), (0, 2), "and nothing else");
        assert_eq!(read(&device, LAST_BLOCKS).await, Ok(50));
        assert_eq!(cluster.raft.record.lock().volume.segments[0].replicas.len(), 3);

        let state = ReplicaState::OutOfSync;
        cluster.change_set(LAST, |replicas| {
            replicas.push(ReplicaConfig { disk, node, state, tenure: Tenure::Stays });
        });
        assert!(cluster.run_until(LIMIT, Cluster::is_healthy).await, "the new replica is filled");
        assert_eq!(held(&cluster, LAST), 2);
        write(&device, LAST_BLOCKS + 3, 60).await;
        assert_eq!(held(&cluster, LAST), 2);
    });
}

#[test]
fn a_volume_grows_while_it_is_written_to_and_nobody_waits() {
    simulate(async {
        let (mut cluster, device, n) = healthy(10, 2).await;
        write(&device, 0, 1).await;
        let size = device.size();
        let end = size / BLOCK_SIZE;
        assert!(matches!(read(&device, end).await, Err(BlockError::Invalid(_))));
        cluster.grow(3 * SEGMENT_SIZE);
        assert_eq!(device.size(), 3 * SEGMENT_SIZE);
        let last = 3 * SEGMENT_SIZE / BLOCK_SIZE - 1;
        for block in [end, last] {
            assert_eq!(read(&device, block).await, Ok(0));
            assert!(timed_write(&mut cluster, &device, block, block).await < Duration::from_millis(500));
            assert_eq!(read(&device, block).await, Ok(block));
        }
        assert_eq!(cluster.raft.in_sync().len(), 3);

        let away = (n + 1) % 3;
        cluster.kill(away);
        timed_write(&mut cluster, &device, last, 7).await;
        cluster.grow(4 * SEGMENT_SIZE);
        assert!(cluster.run_until(LIMIT, |_| device.size() == 4 * SEGMENT_SIZE).await);
        let new = 4 * SEGMENT_SIZE / BLOCK_SIZE - 1;
        timed_write(&mut cluster, &device, new, 8).await;
        cluster.start(away);
        assert!(cluster.run_until(LIMIT, Cluster::is_healthy).await);
        assert_eq!((read(&device, last).await, read(&device, new).await), (Ok(7), Ok(8)));
    });
}

/// Takes a snapshot; the other volumes of its group hold after this time. How many there are then.
async fn snapshot(cluster: &mut Cluster, others: Duration) -> usize {
    let dice = cluster.dice.clone();
    assert!(cluster.raft.record.lock().begin_snapshot(&dice, others));
    let over = |cluster: &Cluster| cluster.raft.record.lock().volume.layers.freeze.is_none();
    assert!(cluster.run_until(LIMIT, over).await, "the freeze does not end");
    cluster.raft.record.lock().snapshots.taken.len()
}

async fn discard(device: &VolumeDevice, block: u64) {
    request(device, BlockOp::Discard { offset: block * BLOCK_SIZE, len: BLOCK_SIZE }).await.unwrap();
}

#[test]
fn a_volume_goes_back_to_a_snapshot_and_a_replica_that_was_away_has_all_layers() {
    simulate(async {
        let (mut cluster, device, n) = healthy(20, 2).await;
        let block = super::client::HOT.start / (BLOCK_SIZE / SECTOR_SIZE);
        for at in block..block + 3 {
            write(&device, at, 1).await;
        }
        let away = (n + 1) % 3;
        cluster.kill(away);
        timed_write(&mut cluster, &device, block, 2).await;
        assert_eq!(snapshot(&mut cluster, Duration::ZERO).await, 1);
        write(&device, block + 1, 3).await;
        discard(&device, block + 2).await;
        assert_eq!((read(&device, block).await, read(&device, block + 1).await), (Ok(2), Ok(3)));
        assert_eq!(read(&device, block + 2).await, Ok(0), "what lies below does not shine through");
        cluster.start(away);
        assert!(cluster.run_until(LIMIT, Cluster::is_healthy).await);

        // Only the replica that was away is left.
        cluster.coordinator().unwrap().1.close().await;
        cluster.raft.record.lock().restore(0);
        (0..3)
            .filter(|other| *other != away)
            .for_each(|other| cluster.nodes[other].disk.model().corrupt_all());
        assert!(cluster.run_until(LIMIT, Cluster::is_healthy).await);
        let device = VolumeDevice(cluster.coordinator().unwrap().1);
        for (at, value) in [(block, 2), (block + 1, 1), (block + 2, 1)] {
            assert_eq!(read(&device, at).await, Ok(value));
        }
    });
}

#[test]
fn a_snapshot_is_a_short_pause_and_one_that_would_be_a_long_one_is_given_up() {
    simulate(async {
        let (mut cluster, device, _) = healthy(21, 2).await;
        write(&device, 0, 1).await;
        for (others, longest, count) in [(20, 300, 1), (5000, 2600, 1), (20, 300, 2)] {
            let task = {
                let device = device.clone();
                tokio::spawn(async move {
                    let mut longest = Duration::ZERO;
                    for value in 0..60 {
                        let started = Instant::now();
                        write(&device, 0, value).await;
                        longest = longest.max(started.elapsed());
                        tokio::time::sleep(Duration::from_millis(10)).await;
                    }
                    longest
                })
            };
            assert_eq!(snapshot(&mut cluster, Duration::from_millis(others)).await, count);
            assert!(cluster.run_until(LIMIT, |_| task.is_finished()).await);
            let pause = task.await.unwrap();
            assert!(pause < Duration::from_millis(longest), "{pause:?}");
        }
        super::snapshots::check(&cluster);
    });
}

#[test]
fn layers_without_a_snapshot_are_merged_and_nothing_changes() {
    simulate(async {
        let (mut cluster, device, _) = healthy(22, 2).await;
        for value in 1..6 {
            for block in 0..value {
                write(&device, 10 + block, value).await;
            }
            discard(&device, 40 + value).await;
            assert_eq!(snapshot(&mut cluster, Duration::ZERO).await, value as usize);
        }
        for _ in 0..5 {
            cluster.raft.record.lock().delete_snapshot(0);
            assert!(cluster.run_until(LIMIT, Cluster::is_healthy).await, "the merge does not end");
        }
        assert_eq!(cluster.raft.record.lock().volume.layers.chain.len(), 1);
        for block in 0..5 {
            assert_eq!(read(&device, 10 + block).await, Ok(5));
        }
        cluster.run_until(Duration::from_secs(4), |_| false).await;
        let held = cluster.nodes[0].disk.model().contents();
        assert_eq!(held.len(), 5, "one copy of each block is left: {:?}", held.keys());
    });
}

#[test]
fn a_flush_says_once_that_writes_were_lost_under_a_running_guest() {
    simulate(async {
        let (mut cluster, device, n) = healthy(4, 1).await;
        let last = (n + 1) % 3;
        let disk = cluster.nodes[last].disk_id;
        for segment in (0..2).map(SegmentIndex) {
            cluster.change_set(segment, |replicas| {
                replicas.iter_mut().filter(|r| r.disk != disk).for_each(|r| r.tenure = Tenure::Leaves);
            });
        }
        let is_alone = |cluster: &Cluster| {
            cluster.raft.in_sync() == [disk] && {
                let record = cluster.raft.record.lock();
                record.volume.segments.iter().all(|segment| segment.replicas.len() == 1)
            }
        };
        assert!(cluster.run_until(LIMIT, is_alone).await);
        write(&device, 0, 1).await;
        request(&device, BlockOp::Flush).await.unwrap();
        cluster.kill(last);
        cluster.start(last);
        timed_write(&mut cluster, &device, 1, 1).await;
        assert_eq!(
            request(&device, BlockOp::Flush).await,
            Ok(Bytes::new()),
            "a process that was killed loses nothing"
        );
        write(&device, 1, 2).await;
        cluster.power_cut(&[last]);
        cluster.start(last);
        timed_write(&mut cluster, &device, 2, 1).await;
        assert!(matches!(request(&device, BlockOp::Flush).await, Err(BlockError::Io(_))));
        assert_eq!(request(&device, BlockOp::Flush).await, Ok(Bytes::new()), "said once");
        assert_eq!(read(&device, 0).await, Ok(1), "it was flushed");
        cluster.power_cut(&[last]);
        cluster.start(last);
        timed_write(&mut cluster, &device, 2, 2).await;
        assert_eq!(request(&device, BlockOp::Flush).await, Ok(Bytes::new()), "nothing was lost");
    });
}
