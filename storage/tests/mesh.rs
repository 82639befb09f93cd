//! A volume on three nodes: written, lost in part, moved, layered.

// A test may panic.
#![allow(clippy::unwrap_used)]

mod support;

use netfabric::rpc::{CallError, Request};
use std::time::Duration;
use storage::config::{CleanState, LayersConfig, ReplicaState, VolumeConfig};
use storage::device::BlockOp;
use storage::ids::{Generation, LayerId, LayerRef, SegmentIndex, VolumeId};
use storage::status::{MemberState, VolumeState};
use storage::{Storage, StorageConfig, StorageError};
use support::{LONG, three, until};

#[tokio::test(flavor = "multi_thread")]
async fn a_volume_lives_on_three_nodes() {
    let dir = tempfile::tempdir().unwrap();
    let (control, mut nodes, volume) = three(dir.path()).await;

    // Open, write, read back.
    let first = nodes[0].storage.clone();
    let disks = nodes[0].disks.clone();
    first
        .apply(StorageConfig { disks: disks.clone(), volumes: vec![volume.clone()], standby: vec![] })
        .await
        .unwrap();
    let data: bytes::Bytes = (0..9 << 20).map(|i: u32| (i % 251) as u8).collect::<Vec<u8>>().into();
    let write = tokio::time::timeout(LONG, first.write(volume.id, 512, data.clone()));
    write.await.expect("written in time").unwrap();
    first.flush(volume.id).await.unwrap();
    assert_eq!(first.read(volume.id, 512, data.len() as u64).await.unwrap(), data);
    assert!(first.status().volumes[0].replicas.iter().all(|r| r.state == MemberState::InSync));

    // Garbage over the mesh is an error for that request.
    let garbage = Request { method: 0x0201, header: vec![1, 255, 255].into(), bulk: bytes::Bytes::new() };
    let answer = nodes[1].mesh.call(nodes[0].mesh.node(), garbage, LONG).await;
    assert!(matches!(answer, Err(CallError::Remote(_))), "{answer:?}");

    // A node goes: writes go on without it.
    let gone = nodes.remove(2);
    gone.mesh.close().await;
    drop(gone);
    let write = tokio::time::timeout(LONG, first.write(volume.id, 0, data.slice(..4096)));
    write.await.expect("written in time").unwrap();
    assert_eq!(control.0.lock().segments[0].replicas[2].state, ReplicaState::OutOfSync);

    // The volume is opened elsewhere: the old coordinator completes nothing more, the new one has everything.
    let mut moved = control.0.lock().clone();
    moved.generation = Generation(2);
    *control.0.lock() = moved.clone();
    let second = nodes[1].storage.clone();
    let config =
        StorageConfig { disks: nodes[1].disks.clone(), volumes: vec![moved.clone()], standby: vec![] };
    second.apply(config).await.unwrap();
    let head = tokio::time::timeout(LONG, second.read(volume.id, 0, 4096)).await.expect("read in time");
    assert_eq!(head.unwrap(), data.slice(..4096));
    let late = tokio::time::timeout(Duration::from_secs(1), first.write(volume.id, 0, data.slice(..4096)));
    assert!(late.await.is_err(), "a fenced coordinator answers nothing");
    until("fenced", || first.status().volumes[0].state == VolumeState::Fenced).await;
    first.apply(StorageConfig { disks, volumes: vec![], standby: vec![] }).await.unwrap();

    // Clean close, and removal.
    second.shutdown().await;
    assert_eq!(control.0.lock().clean, CleanState::Clean);
    assert!(matches!(second.read(volume.id, 0, 512).await, Err(StorageError::NotOpen(_))));
    second.delete_volume(volume.id).await.unwrap();
    second.delete_volume(volume.id).await.unwrap();
    let mut text = String::new();
    for family in first.metrics().registry().gather() {
        text.push_str(family.name());
    }
    assert!(text.contains("hci_volume_op_seconds"));
}

fn pattern(seed: u32, len: u32) -> bytes::Bytes {
    (0..len).map(|i| (i.wrapping_mul(seed) >> 7) as u8).collect::<Vec<u8>>().into()
}

async fn discard(storage: &Storage, volume: VolumeId, offset: u64, len: u64) {
    let (sender, receiver) = tokio::sync::oneshot::channel();
    let done = Box::new(move |result| sender.send(result).unwrap());
    storage.device(volume).unwrap().submit(BlockOp::Discard { offset, len }, done);
    receiver.await.unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_frozen_layer_stays_as_it_was_for_a_clone_and_is_merged_later() {
    const MIB: u64 = 1 << 20;
    let dir = tempfile::tempdir().unwrap();
    let (control, nodes, mut volume) = three(dir.path()).await;
    let storage = nodes[0].storage.clone();
    let apply = async |volumes: &[&VolumeConfig]| {
        let volumes = volumes.iter().map(|volume| (*volume).clone()).collect();
        storage
            .apply(StorageConfig { disks: nodes[0].disks.clone(), volumes, standby: vec![] })
            .await
            .unwrap();
    };
    apply(&[&volume]).await;
    let old = pattern(77, 4 << 20);
    storage.write(volume.id, 0, old.clone()).await.unwrap();

    // A new top: what is written now hides what lies below, zeroes included.
    let base = volume.layers.chain[0];
    volume.layers.chain.insert(0, LayerRef { layer: LayerId(1), ..base });
    volume.layers.revision = 1;
    control.0.lock().layers = volume.layers.clone();
    apply(&[&volume]).await;
    let new = pattern(99, 1 << 20);
    storage.write(volume.id, MIB / 2, new.clone()).await.unwrap();
    discard(&storage, volume.id, 3 * MIB, MIB).await;
    let mut expected = old.to_vec();
    expected[MIB as usize / 2..3 * MIB as usize / 2].copy_from_slice(&new);
    expected[3 * MIB as usize..].fill(0);
    assert!(storage.read(volume.id, 0, 4 * MIB).await.unwrap() == expected);

    // A clone of the base goes its own way.
    let id = VolumeId::random();
    let mut clone = VolumeConfig { id, layers: LayersConfig::single(id), ..volume.clone() };
    clone.layers.chain.push(base);
    apply(&[&volume, &clone]).await;
    assert!(storage.read(id, 0, 4 * MIB).await.unwrap() == old);
    storage.write(id, 0, new.slice(..8192)).await.unwrap();
    assert!(storage.read(id, 4096, 8192).await.unwrap()[4096..] == old[8192..12288]);
    assert!(storage.read(volume.id, 0, 4 * MIB).await.unwrap() == expected);

    // Without it the base is merged into the top of the volume, and removed.
    volume.layers.revision = 2;
    volume.layers.merge = Some(base);
    control.0.lock().layers = volume.layers.clone();
    apply(&[&volume]).await;
    until("the layer is merged", || control.0.lock().layers.chain.len() == 1).await;
    let merged = control.0.lock().clone();
    apply(&[&merged]).await;
    for node in &nodes {
        let parts = [base.key(SegmentIndex(0))];
        node.storage.delete_parts(node.disks[0].id, &parts).await.unwrap();
    }
    assert!(storage.read(volume.id, 0, 4 * MIB).await.unwrap() == expected);
    storage.shutdown().await;
}
