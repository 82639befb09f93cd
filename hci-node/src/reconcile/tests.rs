//! The reconciler with a real data process beside it, in a cluster of one node that the test plays.

mod suspension;

use std::{net::SocketAddr, path::Path, sync::Arc, time::Duration};

use bytes::Bytes;
use futures_util::future::BoxFuture;
use netfabric::{
    pki::{ClusterCa, Identity, NodeKey},
    rpc::{CallError, Request, Response},
};
use parking_lot::Mutex;
use tokio::{sync::watch, time::Instant};
use tokio_util::sync::CancellationToken;

use super::{
    Options, Reconciler,
    cluster::{Cluster, Lease, ProposeError},
};
use crate::{
    data::{
        self, EngineOptions,
        client::{DataClient, QUICK, SLOW},
        protocol::{LeaseState, Status, VolumeFlush, VolumeRead, VolumeWrite},
    },
    paths::NodePaths,
    state::{report::VolumeRunState, *},
};

/// A state that one node changes.
struct OneNode(Mutex<ClusterState>, watch::Sender<Arc<ClusterState>>);

impl Cluster for OneNode {
    fn state(&self) -> watch::Receiver<Arc<ClusterState>> {
        self.1.subscribe()
    }

    fn propose(&self, op: Op) -> BoxFuture<'static, Result<Outcome, ProposeError>> {
        let mut state = self.0.lock();
        let outcome = state.apply(&Command { at: Timestamp::now(), task: None, op });
        self.1.send_replace(Arc::new(state.clone()));
        Box::pin(async move { Ok(outcome?) })
    }

    fn call_node(
        &self,
        node: NodeId,
        _request: Request,
        _deadline: Duration,
    ) -> BoxFuture<'static, Result<Response, CallError>> {
        Box::pin(async move { Err(CallError::Unreachable(node.to_string())) })
    }
}

struct Node {
    id: NodeId,
    paths: NodePaths,
    cluster: Arc<OneNode>,
    lease: watch::Sender<Lease>,
    reconciler: Reconciler,
    shutdown: CancellationToken,
}

impl Node {
    fn start(root: &Path) -> Self {
        let paths = NodePaths::new(root.join("state"), root.join("run"));
        std::fs::create_dir_all(paths.run()).unwrap();
        let id = NodeId::random();
        let (ca, key) = (ClusterCa::create("test").unwrap(), NodeKey::generate().unwrap());
        let certificate = ca.issue_node(id, &key.csr("n1").unwrap(), &[]).unwrap();
        Identity::new(&key, &certificate, ca.cert_pem()).unwrap().store(&paths.identity()).unwrap();
        let state = cluster_of(id);
        let cluster = Arc::new(OneNode(Mutex::new(state.clone()), watch::Sender::new(Arc::new(state))));
        let shutdown = CancellationToken::new();
        let (lease, lease_of_node) = watch::channel(Lease::None);
        let options = Options {
            me: id,
            paths: paths.clone(),
            cluster: cluster.clone(),
            lease: lease_of_node,
            node_lease: Duration::from_secs(5),
        };
        let reconciler = Reconciler::start(options, shutdown.clone());
        let node = Self { id, paths, cluster, lease, reconciler, shutdown };
        node.renew();
        node
    }

    fn renew(&self) {
        self.lease.send_replace(Lease::Until { at: Instant::now() + SLOW, as_of: 0 });
    }

    /// Runs a data process on threads of its own until the token, or the node, ends.
    fn start_data(&self) -> CancellationToken {
        let options = EngineOptions {
            paths: self.paths.clone(),
            listen_storage: "127.0.0.1:0".parse().unwrap(),
            listen_frames: "127.0.0.1:0".parse().unwrap(),
            link_mtu: Some(1500),
        };
        let ended = self.shutdown.child_token();
        let stop = ended.clone();
        std::thread::spawn(move || {
            let runtime =
                tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
            let served = runtime.block_on(data::serve(options, stop));
            runtime.shutdown_timeout(Duration::from_secs(5));
            served.unwrap();
        });
        ended
    }

    async fn propose(&self, op: Op) -> Outcome {
        self.cluster.propose(op).await.unwrap()
    }

    async fn state_when(&self, what: &str, ready: impl Fn(&ClusterState) -> bool) -> Arc<ClusterState> {
        let mut states = self.cluster.state();
        let found =
            tokio::time::timeout(Duration::from_secs(20), states.wait_for(|state| ready(state))).await;
        match found {
            Ok(state) => state.unwrap().clone(),
            Err(_) => panic!("not within 20 s: {what}; {:?}", self.reconciler.report()),
        }
    }

    async fn open(&self, volume: VolumeId) {
        for _ in 0..2000 {
            let generation = self.cluster.0.lock().volumes[&volume].generation;
            let open = self.reconciler.report().volumes.iter().any(|seen| {
                seen.volume == volume && seen.generation == generation && seen.state == VolumeRunState::Open
            });
            if open {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("volume {volume} is not open within 20 s: {:?}", self.reconciler.report());
    }

    fn data(&self) -> &DataClient {
        self.reconciler.data()
    }
}

fn cluster_of(id: NodeId) -> ClusterState {
    let address: SocketAddr = "127.0.0.1:9".parse().unwrap();
    let node = crate::state::Node {
        id,
        name: "n1".to_owned(),
        addresses: NodeAddresses { control: address, storage: address, frames: address, api: address },
        public_key_pem: String::new(),
        certificate_pem: String::new(),
        joined: Timestamp(0),
        availability: Availability::Available,
        rack: None,
        service: NodeService::InService,
    };
    let cluster = crate::state::Cluster {
        id: ClusterId::random(),
        name: "test".to_owned(),
        ca_cert_pem: String::new(),
        ca_key_pem: CaKey(String::new()),
        ca_fingerprint: String::new(),
        created: Timestamp(0),
    };
    ClusterState {
        cluster: Some(cluster),
        nodes: [(id, node)].into_iter().collect(),
        ..ClusterState::default()
    }
}

const SIZE: u64 = 8 << 20;

fn new_volume(name: &str) -> command::NewVolume {
    command::NewVolume {
        id: VolumeId::random(),
        name: name.to_owned(),
        size_bytes: SIZE,
        replicas: 1,
        min_in_sync: None,
        durability: Durability::WriteBack,
        compression: Compression::Off,
    }
}

/// Adds a directory as a disk, and imports an image's disk with this content at its start.
async fn image(node: &Node, root: &Path, content: &Bytes) -> (ImageId, VolumeId) {
    let disk = DiskId::random();
    let path = root.join("disk").display().to_string();
    node.propose(Op::AddDisk { disk, node: node.id, path, wipe: WipePolicy::Refuse, key_salt: None }).await;
    node.state_when("the disk is ready", |state| state.disks[&disk].state == DiskState::Ready).await;

    let (image, volume) = (ImageId::random(), new_volume("golden"));
    let parts = vec![ImagePart::Disk];
    node.propose(Op::CreateImage { image, name: "debian".to_owned(), cmdline: String::new(), parts }).await;
    let id = volume.id;
    node.propose(Op::BeginImagePart {
        image,
        part: ImagePart::Disk,
        node: node.id,
        volume: Some(volume),
        file: None,
        unreachable: Vec::new(),
    })
    .await;
    node.open(id).await;
    node.data().write(VolumeWrite { volume: id.into(), offset: 0 }, content.clone()).await.unwrap();
    node.data().flush(VolumeFlush { volume: id.into() }).await.unwrap();
    (image, id)
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_is_imported_closed_and_copied_into_a_new_volume() {
    let temp = tempfile::tempdir().unwrap();
    let node = Node::start(temp.path());
    node.start_data();
    let content = Bytes::from((0..1 << 20).map(|at: u32| (at / 4096) as u8).collect::<Vec<_>>());
    let (image, golden) = image(&node, temp.path(), &content).await;
    // On a loaded machine it may have been opened once more.
    let generation = node.cluster.0.lock().volumes[&golden].generation;
    node.propose(Op::VolumeFilled { volume: golden, generation }).await;
    node.propose(Op::CompleteImagePart { image, part: ImagePart::Disk, node: node.id }).await;
    let closed = |state: &ClusterState| state.volumes[&golden].coordinator.is_none();
    let state = node.state_when("the image's volume is closed", closed).await;
    assert_eq!(state.volumes[&golden].cleanliness, Cleanliness::Clean);

    // As the leader does for a VM's first disk: the new volume and its source are opened side by side.
    let copy = new_volume("web-disk0");
    let id = copy.id;
    {
        let mut state = node.cluster.0.lock();
        let mut volume = state.volumes[&golden].clone();
        (volume.id, volume.name, volume.generation) = (id, copy.name, Generation(0));
        (volume.fill, volume.owner) = (VolumeFill::CopyOf(golden), VolumeOwner::None);
        volume.layers = Layers::new(id, &[]);
        state.volumes.insert(id, volume);
    }
    for volume in [id, golden] {
        let expected = node.cluster.0.lock().volumes[&volume].generation;
        node.propose(Op::OpenVolume { volume, node: node.id, expected, unreachable: Vec::new() }).await;
    }
    let done = |state: &ClusterState| {
        let both = [&state.volumes[&id], &state.volumes[&golden]];
        state.volumes[&id].fill == VolumeFill::Done && both.iter().all(|volume| volume.coordinator.is_none())
    };
    node.state_when("the copy is made and both are closed", done).await;

    // Looked at through an opening of its own, as if it were filled by an import.
    node.cluster.0.lock().volumes.get_mut(&id).unwrap().fill = VolumeFill::Import;
    let expected = node.cluster.0.lock().volumes[&id].generation;
    node.propose(Op::OpenVolume { volume: id, node: node.id, expected, unreachable: Vec::new() }).await;
    node.open(id).await;
    let length = u32::try_from(content.len()).unwrap();
    let copied = node.data().read(VolumeRead { volume: id.into(), offset: 0, length }).await.unwrap();
    assert!(copied == content, "the copy differs");
    node.shutdown.cancel();
    node.reconciler.stopped().await;
}

impl Node {
    /// Opens a filled volume to look into it, as if it were being imported.
    async fn open_to_look(&self, volume: VolumeId) {
        self.cluster.0.lock().volumes.get_mut(&volume).unwrap().fill = VolumeFill::Import;
        let expected = self.cluster.0.lock().volumes[&volume].generation;
        self.propose(Op::OpenVolume { volume, node: self.id, expected, unreachable: Vec::new() }).await;
        self.open(volume).await;
    }

    async fn close(&self, volume: VolumeId) {
        let generation = self.cluster.0.lock().volumes[&volume].generation;
        self.propose(Op::VolumeFilled { volume, generation }).await;
        let is_closed = |state: &ClusterState| state.volumes[&volume].coordinator.is_none();
        self.state_when("the volume is closed", is_closed).await;
    }

    async fn read(&self, volume: VolumeId, length: usize) -> Bytes {
        let length = u32::try_from(length).unwrap();
        self.data().read(VolumeRead { volume: volume.into(), offset: 0, length }).await.unwrap()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_of_an_open_volume_is_cloned_and_merged_away() {
    let temp = tempfile::tempdir().unwrap();
    let node = Node::start(temp.path());
    node.start_data();
    let old = Bytes::from((0..1 << 20).map(|at: u32| (at / 4096) as u8).collect::<Vec<_>>());
    let (image, golden) = image(&node, temp.path(), &old).await;
    let snapshot = SnapshotId::random();
    {
        // While it is being filled there are no snapshots of it; for a moment it is not.
        let mut state = node.cluster.0.lock();
        state.volumes.get_mut(&golden).unwrap().fill = VolumeFill::Done;
        let volumes = [(golden, snapshot)].into_iter().collect();
        let op = Op::TakeSnapshot { freeze: FreezeId::random(), name: "s1".to_owned(), volumes };
        state.apply(&Command { at: Timestamp::now(), task: None, op }).unwrap();
        state.volumes.get_mut(&golden).unwrap().fill = VolumeFill::Import;
        node.cluster.1.send_replace(Arc::new(state.clone()));
    }
    let is_taken = |state: &ClusterState| state.volumes[&golden].layers.snapshots.len() == 1;
    node.state_when("the snapshot is taken", is_taken).await;
    let new = Bytes::from(vec![7; 300 << 10]);
    node.data().write(VolumeWrite { volume: golden.into(), offset: 0 }, new.clone()).await.unwrap();
    node.close(golden).await;
    node.propose(Op::CompleteImagePart { image, part: ImagePart::Disk, node: node.id }).await;

    let copy = VolumeId::random();
    let name = "copy".to_owned();
    node.propose(Op::CloneVolume { volume: copy, name, source: golden, snapshot }).await;
    node.open_to_look(copy).await;
    assert!(node.read(copy, old.len()).await == old, "a clone is what the snapshot was");
    node.data().write(VolumeWrite { volume: copy.into(), offset: 4096 }, new.slice(..4096)).await.unwrap();
    node.close(copy).await;
    node.propose(Op::DeleteVolume(copy)).await;

    // As the leader does, which opens the volume for it.
    node.propose(Op::DeleteSnapshot { volume: golden, snapshot }).await;
    let expected = node.cluster.0.lock().volumes[&golden].generation;
    node.propose(Op::OpenVolume { volume: golden, node: node.id, expected, unreachable: Vec::new() }).await;
    let is_merged = |state: &ClusterState| {
        let golden = &state.volumes[&golden];
        golden.layers.chain.len() == 1 && golden.coordinator.is_none() && state.dead_layers.len() == 1
    };
    node.state_when("the layer is merged and the volume closed again", is_merged).await;
    node.open_to_look(golden).await;
    let content = node.read(golden, old.len()).await;
    assert!(content[..new.len()] == new && content[new.len()..] == old[new.len()..]);
    node.shutdown.cancel();
    node.reconciler.stopped().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_data_process_goes_on_in_a_new_generation_with_what_was_flushed() {
    let temp = tempfile::tempdir().unwrap();
    let node = Node::start(temp.path());
    let first = node.start_data();
    let content = Bytes::from(vec![3; 64 << 10]);
    let (_, volume) = image(&node, temp.path(), &content).await;
    first.cancel();
    // The first instance lets go of its disk a moment later; the second is told again until it has it.
    tokio::time::sleep(Duration::from_millis(100)).await;
    node.start_data();
    let raised = |state: &ClusterState| state.volumes[&volume].generation > Generation(1);
    node.state_when("the volume is opened anew", raised).await;
    node.open(volume).await;
    let read = VolumeRead { volume: volume.into(), offset: 0, length: 64 << 10 };
    assert!(node.data().read(read).await.unwrap() == content, "flushed data is gone");
    node.shutdown.cancel();
    node.reconciler.stopped().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lease_that_runs_out_holds_io_back_until_it_is_renewed() {
    let temp = tempfile::tempdir().unwrap();
    let node = Node::start(temp.path());
    node.start_data();
    let content = Bytes::from(vec![5; 4096]);
    let (_, volume) = image(&node, temp.path(), &content).await;
    // Handed on as the last one: the data process has to notice its end by itself.
    let soon = Duration::from_millis(300);
    node.lease.send_replace(Lease::Until { at: Instant::now() + soon, as_of: 0 });
    let status = async |wanted: LeaseState| {
        for _ in 0..1000 {
            let seen = node.data().call(&Status, QUICK).await.unwrap().lease;
            if seen == wanted {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("the lease is not {wanted:?} within 10 s");
    };
    status(LeaseState::Lapsed).await;
    let read = VolumeRead { volume: volume.into(), offset: 0, length: 4096 };
    let waits = tokio::time::timeout(Duration::from_millis(300), node.data().read(read)).await;
    assert!(waits.is_err(), "it was read without a lease: {waits:?}");
    node.renew();
    status(LeaseState::Held).await;
    assert!(node.data().read(read).await.unwrap() == content);
    node.shutdown.cancel();
    node.reconciler.stopped().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_open_volume_moves_to_another_disk_and_grows() {
    let temp = tempfile::tempdir().unwrap();
    let node = Node::start(temp.path());
    node.start_data();
    let content = Bytes::from((0..1 << 20).map(|at: u32| (at / 4096) as u8).collect::<Vec<_>>());
    let (_, volume) = image(&node, temp.path(), &content).await;
    // On a loaded machine it may have been opened once more before it was open.
    let opened = node.cluster.0.lock().volumes[&volume].generation;
    let old = node.cluster.0.lock().volumes[&volume].segments[0].replicas[0].disk;
    let new = DiskId::random();
    let path = temp.path().join("second").display().to_string();
    node.propose(Op::AddDisk { disk: new, node: node.id, path, wipe: WipePolicy::Refuse, key_salt: None })
        .await;
    node.state_when("the disk is ready", |state| state.disks[&new].state == DiskState::Ready).await;

    let segment = SegmentIndex(0);
    node.propose(Op::AddReplica { volume, segment, disk: new, replaces: Some(old) }).await;
    let moved = |state: &ClusterState| {
        let copies = &state.volumes[&volume].segments[0].replicas;
        copies.len() == 1 && copies[0].disk == new && copies[0].state == ReplicaState::InSync
    };
    let state = node.state_when("the new copy has taken over", moved).await;
    assert_eq!(state.volumes[&volume].generation, opened, "it stayed open");
    let released = |state: &ClusterState| state.may_purge(volume, &state.retired[&volume][&old]);
    node.state_when("the coordinator has let the old copy go", released).await;
    let length = u32::try_from(content.len()).unwrap();
    let read = VolumeRead { volume: volume.into(), offset: 0, length };
    assert!(node.data().read(read).await.unwrap() == content, "the copy differs");

    let size = (1 << 30) + SIZE;
    let end = VolumeWrite { volume: volume.into(), offset: size - 4096 };
    let block = Bytes::from(vec![7; 4096]);
    assert!(node.data().write(end, block.clone()).await.is_err(), "not so large yet");
    // By hand: a volume that is being imported is not grown by anybody.
    {
        let mut state = node.cluster.0.lock();
        let volume = state.volumes.get_mut(&volume).unwrap();
        volume.size_bytes = size;
        volume.segments.push(volume.segments[0].clone());
    }
    let (severity, subject) = (Severity::Info, Subject::Cluster);
    node.propose(Op::Note { severity, kind: "test".into(), subject, message: String::new() }).await;
    let mut grown = false;
    for _ in 0..1000 {
        grown = node.data().write(end, block.clone()).await.is_ok();
        if grown {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert!(grown, "it is not larger within 10 s");
    let read = VolumeRead { volume: volume.into(), offset: size - 4096, length: 4096 };
    assert!(node.data().read(read).await.unwrap() == block);
    assert_eq!(
        node.cluster.0.lock().volumes[&volume].departures,
        1,
        "one has left, and no copy was distrusted"
    );
    node.shutdown.cancel();
    node.reconciler.stopped().await;
}
