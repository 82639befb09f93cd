//! Three nodes' storage in one process: disk stores in files, real meshes on loopback, targets on sockets.

use futures_util::future::BoxFuture;
use netfabric::mesh::{Class, Mesh, MeshConfig};
use netfabric::pki::{ClusterCa, Identity, NodeKey};
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use storage::config::{
    Access, CleanState, DiskConfig, Durability, LayersConfig, Limits, ReplicaConfig, ReplicaState,
    SegmentConfig, Tenure, VolumeConfig,
};
use storage::control::{CommitError, ControlPlane, FreezeStep};
use storage::ids::{ByteSize, DiskId, FreezeId, Generation, LayerRef, SegmentIndex, VolumeId};
use storage::store::Compression;
use storage::store::disk::LogStore;
use storage::target::{Target, TargetOptions};
use storage::{
    BusyPoll, MeshTransport, NodeId, Storage, StorageConfig, StorageOptions, TargetStarter, Timing,
    disk_stores,
};
use tokio_util::task::AbortOnDropHandle;

pub(crate) const LONG: Duration = Duration::from_secs(30);

/// A control plane that commits at once.
pub(crate) struct Control(pub(crate) Mutex<VolumeConfig>);

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

pub(crate) struct Node {
    pub(crate) storage: Storage,
    pub(crate) mesh: Mesh,
    pub(crate) disks: Vec<DiskConfig>,
    _forward: AbortOnDropHandle<()>,
}

fn target_starter(dir: &std::path::Path) -> TargetStarter {
    let dir = dir.to_owned();
    Arc::new(move |volume, socket, device| {
        let options = TargetOptions {
            socket,
            socket_group: None,
            inflight: dir.join(format!("inflight-{volume}")),
            queues: 1,
            serial: "volume".to_owned(),
            access: storage::target::Access::ReadWrite,
            runtime: tokio::runtime::Handle::current(),
            poll: BusyPoll::new(),
        };
        let target = Target::start(options, device).map_err(|error| error.to_string())?;
        Ok(Box::new(target) as _)
    })
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
        start_target: target_starter(dir),
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
    let forward = AbortOnDropHandle::new(tokio::spawn(transport.bind(mesh.clone())));
    let path = dir.join("disk");
    if !path.exists() {
        std::fs::create_dir_all(dir).unwrap();
        std::fs::File::create(&path).unwrap().set_len(256 << 20).unwrap();
        LogStore::format(&path, disk, None).unwrap();
    }
    let disks = vec![DiskConfig { id: disk, path, key_salt: None, scrubs: 0 }];
    storage.apply(StorageConfig { disks: disks.clone(), volumes: vec![], standby: vec![] }).await.unwrap();
    storage.renew_lease(Duration::from_secs(3600));
    Node { storage, mesh, disks, _forward: forward }
}

pub(crate) async fn until(what: &str, condition: impl Fn() -> bool) {
    let met = async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    assert!(tokio::time::timeout(LONG, met).await.is_ok(), "waited too long for: {what}");
}

/// Three connected nodes, and a volume with a replica on each.
pub(crate) async fn three(dir: &std::path::Path) -> (Arc<Control>, Vec<Node>, VolumeConfig) {
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
