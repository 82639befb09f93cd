//! Three nodes' storage in one process: disk stores in files, real meshes on loopback.

// A test may panic.
#![allow(clippy::unwrap_used)]

use futures_util::future::BoxFuture;
use netfabric::mesh::{Class, Mesh, MeshConfig};
use netfabric::pki::{ClusterCa, Identity, NodeKey};
use netfabric::rpc::{CallError, Request};
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use storage::config::{
    Access, CleanState, DiskConfig, Durability, LayersConfig, Limits, ReplicaConfig, ReplicaState,
    SegmentConfig, Tenure, VolumeConfig,
};
use storage::control::{CommitError, ControlPlane, FreezeStep};
use storage::device::BlockOp;
use storage::ids::{ByteSize, DiskId, FreezeId, Generation, LayerId, LayerRef, SegmentIndex, VolumeId};
use storage::status::{Handover, MemberState, VolumeState};
use storage::store::Compression;
use storage::store::disk::LogStore;
use storage::{
    BusyPoll, MeshTransport, NodeId, Storage, StorageConfig, StorageError, StorageOptions, Timing,
    disk_stores,
};

const LONG: Duration = Duration::from_secs(30);

/// A control plane that commits at once.
struct Control(Mutex<VolumeConfig>);

impl Control {
    fn commit<T: Send + 'static>(
        self: &Arc<Self>,
        generation: Generation,
        change: impl FnOnce(&mut VolumeConfig) -> T,
    ) -> BoxFuture<'static, Result<T, CommitError>> {
        let mut volume = self.0.lock();
        let result =
            if volume.generation == generation { Ok(change(&mut volume)) } else { Err(CommitError::Fenced) };
        Box::pin(async move { result })
    }
}

/// One handle for each node.
struct Handle(Arc<Control>);

impl ControlPlane for Handle {
    fn replicas_out(
        &self,
        _: VolumeId,
        generation: Generation,
        disk: DiskId,
        _: String,
    ) -> BoxFuture<'static, Result<VolumeConfig, CommitError>> {
        self.0.commit(generation, |volume| {
            let replicas = volume.segments.iter_mut().flat_map(|s| &mut s.replicas);
            replicas.filter(|r| r.disk == disk).for_each(|r| r.state = ReplicaState::OutOfSync);
            volume.clone()
        })
    }

    fn replica_in(
        &self,
        _: VolumeId,
        generation: Generation,
        _: SegmentIndex,
        disk: DiskId,
    ) -> BoxFuture<'static, Result<VolumeConfig, CommitError>> {
        self.0.commit(generation, |volume| {
            let replicas = volume.segments.iter_mut().flat_map(|s| &mut s.replicas);
            replicas.filter(|r| r.disk == disk).for_each(|r| r.state = ReplicaState::InSync);
            volume.clone()
        })
    }

    fn replica_left(
        &self,
        _: VolumeId,
        generation: Generation,
        segment: SegmentIndex,
        disk: DiskId,
    ) -> BoxFuture<'static, Result<VolumeConfig, CommitError>> {
        self.0.commit(generation, |volume| {
            let segments = volume.segments.iter_mut().filter(|s| s.index == segment);
            segments.for_each(|s| s.replicas.retain(|r| r.disk != disk));
            volume.clone()
        })
    }

    fn opened(&self, _: VolumeId, generation: Generation) -> BoxFuture<'static, Result<(), CommitError>> {
        self.0.commit(generation, |volume| volume.clean = CleanState::Unclean)
    }

    fn closed_clean(
        &self,
        _: VolumeId,
        generation: Generation,
    ) -> BoxFuture<'static, Result<(), CommitError>> {
        self.0.commit(generation, |volume| volume.clean = CleanState::Clean)
    }

    fn freeze_step(
        &self,
        _: VolumeId,
        _: Generation,
        _: FreezeId,
        _: FreezeStep,
    ) -> BoxFuture<'static, Result<VolumeConfig, CommitError>> {
        Box::pin(async { Err(CommitError::Refused("no snapshots here".into())) })
    }

    fn merged(
        &self,
        _: VolumeId,
        generation: Generation,
        layer: LayerRef,
    ) -> BoxFuture<'static, Result<VolumeConfig, CommitError>> {
        self.0.commit(generation, |volume| {
            volume.layers.chain.retain(|there| *there != layer);
            volume.layers.merge = None;
            volume.layers.revision += 1;
            volume.clone()
        })
    }
}

struct Node {
    storage: Storage,
    mesh: Mesh,
    disks: Vec<DiskConfig>,
    forward: tokio::task::JoinHandle<()>,
}

async fn start(
    dir: &std::path::Path,
    ca: &ClusterCa,
    id: NodeId,
    disk: DiskId,
    control: &Arc<Control>,
) -> Node {
    let options = StorageOptions {
        node: id,
        state_dir: dir.join("state"),
        timing: Timing::default(),
        open_store: disk_stores(Arc::new(|_, _| Err(std::io::Error::other("no disk is encrypted here")))),
        start_target: Arc::new(|_, _, _| Err("no targets here".into())),
        poll: BusyPoll::new(),
    };
    let transport = MeshTransport::new();
    let storage =
        Storage::start(options, transport.clone(), Arc::new(Handle(control.clone()))).await.unwrap();
    let key = NodeKey::generate().unwrap();
    let cert = ca.issue_node(id, &key.csr("n").unwrap(), &[]).unwrap();
    let identity = Identity::new(&key, &cert, ca.cert_pem()).unwrap();
    let config = MeshConfig {
        link_mtu: Some(1500),
        ..MeshConfig::new(Class::Storage, "127.0.0.1:0".parse().unwrap())
    };
    let mesh = Mesh::start(identity, config, storage.rpc_handler()).await.unwrap();
    let forward = tokio::spawn(transport.bind(mesh.clone()));
    let path = dir.join("disk");
    if !path.exists() {
        std::fs::create_dir_all(dir).unwrap();
        std::fs::File::create(&path).unwrap().set_len(256 << 20).unwrap();
        LogStore::format(&path, disk, None).unwrap();
    }
    let disks = vec![DiskConfig { id: disk, path, key_salt: None, scrubs: 0 }];
    storage.apply(StorageConfig { disks: disks.clone(), volumes: vec![], standby: vec![] }).await.unwrap();
    storage.renew_lease(Duration::from_secs(3600));
    Node { storage, mesh, disks, forward }
}

async fn until(what: &str, condition: impl Fn() -> bool) {
    let met = async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    assert!(tokio::time::timeout(LONG, met).await.is_ok(), "waited too long for: {what}");
}

/// Three connected nodes, and a volume with a replica on each.
async fn three(dir: &std::path::Path) -> (Arc<Control>, Vec<Node>, VolumeConfig) {
    let ca = ClusterCa::create("test").unwrap();
    let ids: Vec<(NodeId, DiskId)> = (0..3).map(|_| (NodeId::random(), DiskId::random())).collect();
    let replicas = ids.iter().map(|(node, disk)| ReplicaConfig {
        disk: *disk,
        node: *node,
        state: ReplicaState::InSync,
        tenure: Tenure::Stays,
    });
    let id = VolumeId::random();
    let volume = VolumeConfig {
        id,
        size: ByteSize(64 << 20),
        generation: Generation(1),
        min_in_sync: 2,
        durability: Durability::WriteBack,
        compression: Compression::Off,
        clean: CleanState::Clean,
        segments: vec![SegmentConfig { index: SegmentIndex(0), replicas: replicas.collect() }],
        access: Access::Internal,
        limits: Limits::default(),
        layers: LayersConfig::single(id),
    };
    let control = Arc::new(Control(Mutex::new(volume.clone())));
    let mut nodes = Vec::new();
    for (i, (id, disk)) in ids.iter().enumerate() {
        nodes.push(start(&dir.join(i.to_string()), &ca, *id, *disk, &control).await);
    }
    let peers: BTreeMap<_, _> = nodes.iter().map(|n| (n.mesh.node(), n.mesh.local_addr())).collect();
    nodes.iter().for_each(|n| n.mesh.set_peers(peers.clone()));
    (control, nodes, volume)
}

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
    gone.forward.abort();
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

#[tokio::test(flavor = "multi_thread")]
async fn a_volume_is_handed_over_under_load() {
    const ROUNDS: u64 = 5;
    const WRITERS: u64 = 8;
    const BLOCK: u64 = 4096;
    let dir = tempfile::tempdir().unwrap();
    let (control, nodes, mut volume) = three(dir.path()).await;
    let config = |node: usize, volumes: &[&VolumeConfig]| StorageConfig {
        disks: nodes[node].disks.clone(),
        volumes: volumes.iter().map(|volume| (*volume).clone()).collect(),
        standby: vec![],
    };
    let mut expected = vec![0u64; WRITERS as usize];
    let (mut closing, mut opening) = (Vec::new(), Vec::new());
    for round in 0..ROUNDS {
        // Each time at another node.
        let at = (round % 3) as usize;
        let here = nodes[at].storage.clone();
        volume.generation = Generation(round + 1);
        volume.clean = control.0.lock().clean;
        *control.0.lock() = volume.clone();
        let started = std::time::Instant::now();
        here.apply(config(at, &[&volume])).await.unwrap();
        for (writer, expected) in expected.iter().enumerate() {
            let read = here.read(volume.id, writer as u64 * BLOCK, 8).await;
            // Whole sectors only.
            assert!(matches!(read, Err(StorageError::Block(_))), "{read:?}");
            let read = here.read(volume.id, writer as u64 * BLOCK, 512).await.unwrap();
            assert_eq!(u64::from_le_bytes(read[..8].try_into().unwrap()), *expected, "round {round}");
            if writer == 0 {
                opening.push(started.elapsed());
            }
        }
        // Each writer counts up in a block of its own until it is refused.
        let writers: Vec<_> = (0..WRITERS)
            .zip(&expected)
            .map(|(writer, from)| {
                let (here, id, mut done) = (here.clone(), volume.id, *from);
                tokio::spawn(async move {
                    loop {
                        let mut data = vec![0; BLOCK as usize];
                        data[..8].copy_from_slice(&(done + 1).to_le_bytes());
                        match here.write(id, writer * BLOCK, data.into()).await {
                            Ok(()) => done += 1,
                            Err(_) => return done,
                        }
                    }
                })
            })
            .collect();
        tokio::time::sleep(Duration::from_millis(200)).await;
        let started = std::time::Instant::now();
        let other = here.hand_over(volume.id, Generation(round)).await;
        assert!(matches!(other, Err(StorageError::OtherGeneration { .. })), "{other:?}");
        let both = tokio::join!(
            here.hand_over(volume.id, volume.generation),
            here.hand_over(volume.id, volume.generation),
        );
        closing.push(started.elapsed());
        assert_eq!((both.0.unwrap(), both.1.unwrap()), (Handover::Clean, Handover::Clean));
        assert_eq!(control.0.lock().clean, CleanState::Clean);
        for (writer, expected) in writers.into_iter().zip(&mut expected) {
            let done = writer.await.unwrap();
            assert!(done > *expected, "no load in round {round}");
            *expected = done;
        }
        // It stays closed, whatever is applied of the same generation.
        here.apply(config(at, &[&volume])).await.unwrap();
        let status = here.status().volumes.remove(0);
        assert_eq!((status.state, status.generation), (VolumeState::Closed, volume.generation));
        assert!(here.read(volume.id, 0, 512).await.is_err());
        here.apply(config(at, &[])).await.unwrap();
        assert!(matches!(here.hand_over(volume.id, volume.generation).await, Err(StorageError::NotOpen(_))));
    }
    println!("handed over in {closing:?}; opened and read in {opening:?}");
    // Neither waits for a retry or a deadline. The first opening is that of a cluster whose connections are new.
    let longest = closing.iter().chain(&opening[1..]).max().unwrap();
    assert!(*longest < Timing::default().retry, "{longest:?}");
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
