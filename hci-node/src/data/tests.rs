//! Tests of the data process: its messages, and the role itself against a control plane made by the test.

use std::{path::Path, sync::Arc, time::Duration};

use bytes::Bytes;
use futures_util::future::BoxFuture;
use netfabric::{
    NodeId,
    overlay::OverlayConfig,
    pki::{ClusterCa, Identity, NodeKey},
    rpc::{Caller, Handler, Request, Response, RpcError, codec, serve_unix},
};
use parking_lot::Mutex;
use proptest::prelude::*;
use storage::KeySalt;
use storage::store::Compression;
use storage::store::disk::{Encryption, LogStore};
use storage::{
    config::{
        Access, CleanState, DiskConfig, Durability, LayersConfig, Limits, ReplicaConfig, ReplicaState,
        SegmentConfig, StorageConfig, Tenure, VolumeConfig,
    },
    ids::{ByteSize, DiskId, Generation, SegmentIndex, VolumeId},
    status::{DiskHealth, VolumeState},
};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::{
    EngineOptions,
    client::{DataClient, QUICK, SLOW},
    protocol::*,
    serve,
};
use crate::paths::NodePaths;

fn round_trip<T>(message: &T) -> T
where
    T: serde::Serialize + serde::de::DeserializeOwned,
{
    codec::decode(&codec::encode(message).unwrap()).unwrap()
}

prop_compose! {
    fn volume_config()(
        id: u128,
        generation: u64,
        min_in_sync in 1_u8..4,
        members in proptest::collection::vec((any::<u128>(), any::<u128>(), any::<bool>()), 1..4),
        clean: bool,
        internal: bool,
    ) -> VolumeConfig {
        let replicas = members.into_iter().map(|(disk, node, in_sync)| ReplicaConfig {
            disk: DiskId(Uuid::from_u128(disk)),
            node: NodeId::from(Uuid::from_u128(node)),
            state: if in_sync { ReplicaState::InSync } else { ReplicaState::OutOfSync },
            tenure: Tenure::Stays,
        });
        VolumeConfig {
            id: VolumeId(Uuid::from_u128(id)),
            size: ByteSize(1 << 30),
            generation: Generation(generation),
            min_in_sync,
            durability: Durability::WriteBack,
            compression: Compression::Off,
            clean: if clean { CleanState::Clean } else { CleanState::Unclean },
            segments: vec![SegmentConfig { index: SegmentIndex(0), replicas: replicas.collect() }],
            access: if internal { Access::Internal } else { Access::VhostUser { socket: "/run/v.sock".into() } },
            limits: Limits::default(),
            layers: LayersConfig::single(VolumeId(Uuid::from_u128(id))),
        }
    }
}

proptest! {
    #[test]
    fn messages_round_trip(volume in volume_config(), text: String, offset: u64, length: u32) {
        let id = volume.id;
        prop_assert_eq!(round_trip(&VolumeRead { volume: id, offset, length }), VolumeRead { volume: id, offset, length });
        let format = FormatDisk { disk: DiskId(id.0), path: text.clone().into(), wipe: Wipe::Everything, key_salt: None, secret: NodeSecret::MayBeMade };
        prop_assert_eq!(round_trip(&format), format.clone());
        let out = ReplicasOut { volume: id, generation: volume.generation, disk: DiskId(id.0), reason: text.clone() };
        prop_assert_eq!(round_trip(&out), out.clone());
        let refused: Result<VolumeConfig, CommitRefusal> = Err(CommitRefusal::Refused(text));
        prop_assert_eq!(round_trip(&refused), refused.clone());
        let config = DataConfig {
            revision: offset,
            peers: vec![PeerConfig {
                node: NodeId::from(id.0),
                storage: "10.0.0.1:7401".parse().unwrap(),
                frames: "[fe80::1]:7402".parse().unwrap(),
            }],
            storage: StorageConfig { disks: Vec::new(), volumes: vec![volume], standby: Vec::new() },
            overlay: OverlayConfig::default(),
        };
        prop_assert_eq!(round_trip(&config), config.clone());
    }

    #[test]
    fn any_bytes_are_a_message_or_an_error(bytes: Vec<u8>) {
        let mut framed = vec![codec::VERSION];
        framed.extend(bytes);
        let _ = codec::decode::<DataConfig>(&framed);
        let _ = codec::decode::<Observed>(&framed);
        let _ = codec::decode::<FormatDisk>(&framed);
        let _ = codec::decode::<Result<VolumeConfig, CommitRefusal>>(&framed);
    }
}

#[test]
fn a_lease_passes_between_processes_as_a_moment_of_their_common_clock() {
    let until = round_trip(&MonotonicTime::after(Duration::from_secs(60)));
    assert!(until.remaining() > Duration::from_secs(50) && until.remaining() <= Duration::from_secs(60));
    assert_eq!(MonotonicTime::now().remaining(), Duration::ZERO);
}

/// A control plane that agrees to everything and remembers what it was told.
#[derive(Clone, Default)]
struct FakeControl(Arc<Mutex<Told>>);

#[derive(Default)]
struct Told {
    greeted: Vec<DataInstance>,
    opened: Vec<Generation>,
    closed: Vec<Generation>,
}

impl Handler for FakeControl {
    fn handle(&self, _from: Caller, request: Request) -> BoxFuture<'static, Result<Response, RpcError>> {
        let mut told = self.0.lock();
        let answer = match request.method {
            Hello::METHOD => {
                request.decode::<Hello>().map(|call| told.greeted.push(call.instance)).map(|()| None)
            }
            Opened::METHOD => {
                request.decode::<Opened>().map(|call| told.opened.push(call.generation)).map(|()| Some(()))
            }
            ClosedClean::METHOD => request
                .decode::<ClosedClean>()
                .map(|call| told.closed.push(call.generation))
                .map(|()| Some(())),
            other => return Box::pin(async move { Err(RpcError::unknown_method(other)) }),
        };
        Box::pin(async move {
            Ok(match answer? {
                None => Response::new(&())?,
                Some(()) => Response::new(&Ok::<(), CommitRefusal>(()))?,
            })
        })
    }
}

struct Node {
    paths: NodePaths,
    control: FakeControl,
    client: DataClient,
    shutdown: CancellationToken,
}

impl Node {
    fn start(root: &Path) -> Self {
        let paths = NodePaths::new(root.join("state"), root.join("run"));
        std::fs::create_dir_all(paths.run()).unwrap();
        let (control, shutdown) = (FakeControl::default(), CancellationToken::new());
        let (socket, handler, stop) = (paths.control_socket(), control.clone(), shutdown.clone());
        tokio::spawn(async move { serve_unix(&socket, Arc::new(handler), stop).await.unwrap() });
        let client = DataClient::new(paths.data_socket());
        let node = Self { paths, control, client, shutdown };
        node.start_data();
        node
    }

    /// Runs an instance of the data process on threads of its own, as a process would, until the node's shutdown.
    fn start_data(&self) {
        let options = EngineOptions {
            paths: self.paths.clone(),
            listen_storage: "127.0.0.1:0".parse().unwrap(),
            listen_frames: "127.0.0.1:0".parse().unwrap(),
            link_mtu: Some(1500),
        };
        let stop = self.shutdown.clone();
        std::thread::spawn(move || {
            let runtime =
                tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
            let served = runtime.block_on(serve(options, stop));
            runtime.shutdown_timeout(Duration::from_secs(5));
            served.unwrap();
        });
    }

    async fn status_when(&self, ready: impl Fn(&Observed) -> bool) -> Observed {
        let mut last = None;
        for _ in 0..1000 {
            if let Ok(observed) = self.client.call(&Status, QUICK).await {
                if ready(&observed) {
                    return observed;
                }
                last = Some(observed);
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("this did not happen within 10 s; now it is {last:?}");
    }
}

fn join(paths: &NodePaths) -> NodeId {
    let node = NodeId::random();
    let (ca, key) = (ClusterCa::create("test").unwrap(), NodeKey::generate().unwrap());
    let csr = key.csr("n1").unwrap();
    let certificate = ca.issue_node(node, &csr, &[]).unwrap();
    Identity::new(&key, &certificate, ca.cert_pem()).unwrap().store(&paths.identity()).unwrap();
    node
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unjoined_node_waits_for_its_identity() {
    let temp = tempfile::tempdir().unwrap();
    let node = Node::start(temp.path());
    let unjoined = node.status_when(|_| true).await;
    assert_eq!((unjoined.readiness, unjoined.lease), (Readiness::Unjoined, LeaseState::Lapsed));
    assert!(node.client.call(&Metrics, QUICK).await.is_err());
    join(&node.paths);
    let joined = node.status_when(|observed| observed.readiness == Readiness::Ready).await;
    assert_eq!(joined.instance, unjoined.instance);
    for _ in 0..1000 {
        if node.control.0.lock().greeted == [joined.instance] {
            return node.shutdown.cancel();
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("the control process was not greeted");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_volume_is_opened_written_closed_and_reopened_by_a_new_instance() {
    let temp = tempfile::tempdir().unwrap();
    let node = Node::start(temp.path());
    let id = join(&node.paths);
    let first = node.status_when(|observed| observed.readiness == Readiness::Ready).await.instance;

    // Encrypted: the next instance must find the key again.
    let (disk, key_salt) = (DiskId::random(), Some(KeySalt([9; 32])));
    let format = FormatDisk {
        disk,
        path: temp.path().join("disk"),
        wipe: Wipe::Refuse,
        key_salt,
        secret: NodeSecret::MayBeMade,
    };
    let prepared = node.client.call(&format, SLOW).await.unwrap();
    let encryption = LogStore::identify(&prepared.store).unwrap().encryption;
    assert_eq!(encryption, Encryption::Aes256Xts);
    let config = |generation, clean, volumes: bool| DataConfig {
        revision: generation,
        storage: StorageConfig {
            disks: vec![DiskConfig { id: disk, path: prepared.store.clone(), key_salt, scrubs: 0 }],
            volumes: if volumes { vec![volume(id, disk, Generation(generation), clean)] } else { Vec::new() },
            standby: Vec::new(),
        },
        ..DataConfig::default()
    };
    let open =
        |observed: &Observed| observed.storage.volumes.iter().any(|volume| volume.state == VolumeState::Open);
    node.client.apply(first, &config(1, CleanState::Clean, true)).await.unwrap();
    node.client.call(&RenewLease { until: MonotonicTime::after(SLOW) }, QUICK).await.unwrap();
    let observed = node.status_when(open).await;
    assert_eq!((observed.revision, observed.lease), (Some(1), LeaseState::Held));
    assert_eq!(observed.storage.disks[0].health, DiskHealth::Ok);
    // Told once more when the first lease came only after the opening.
    let mut opened = node.control.0.lock().opened.clone();
    opened.dedup();
    assert_eq!(opened, [Generation(1)]);

    let volume = observed.storage.volumes[0].id;
    let data = Bytes::from(vec![7; 8192]);
    node.client.write(VolumeWrite { volume, offset: 4096 }, data.clone()).await.unwrap();
    node.client.flush(VolumeFlush { volume }).await.unwrap();
    let text = node.client.call(&Metrics, QUICK).await.unwrap();
    assert!(text.contains("hci_volume_op_seconds_bucket"), "{text}");

    node.client.apply(first, &config(2, CleanState::Clean, false)).await.unwrap();
    assert_eq!(node.control.0.lock().closed, [Generation(1)]);
    node.client.apply(first, &config(2, CleanState::Clean, true)).await.unwrap();
    node.status_when(open).await;

    // What was meant for one instance is refused by the next.
    node.shutdown.cancel();
    let temp_paths = node.paths.clone();
    let again = Node { shutdown: CancellationToken::new(), ..node };
    let (socket, handler, stop) =
        (temp_paths.control_socket(), again.control.clone(), again.shutdown.clone());
    tokio::spawn(async move { serve_unix(&socket, Arc::new(handler), stop).await.unwrap() });
    again.start_data();
    let up = |observed: &Observed| observed.readiness == Readiness::Ready && observed.instance != first;
    let second = again.status_when(up).await.instance;
    assert!(again.client.apply(first, &config(3, CleanState::Unclean, true)).await.is_err());
    // Refused until the first instance has let go of its disk.
    let configured = async {
        while again.client.apply(second, &config(3, CleanState::Unclean, true)).await.is_err() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), configured).await.unwrap();
    again.client.call(&RenewLease { until: MonotonicTime::after(SLOW) }, QUICK).await.unwrap();
    again.status_when(open).await;
    let read = again.client.read(VolumeRead { volume, offset: 4096, length: 8192 }).await.unwrap();
    assert_eq!(read, data);
    again.shutdown.cancel();
}

fn volume(node: NodeId, disk: DiskId, generation: Generation, clean: CleanState) -> VolumeConfig {
    let replica = ReplicaConfig { disk, node, state: ReplicaState::InSync, tenure: Tenure::Stays };
    VolumeConfig {
        id: VolumeId(Uuid::from_u128(1)),
        size: ByteSize(64 << 20),
        generation,
        min_in_sync: 1,
        durability: Durability::WriteBack,
        compression: Compression::Off,
        clean,
        segments: vec![SegmentConfig { index: SegmentIndex(0), replicas: vec![replica] }],
        access: Access::Internal,
        limits: Limits::default(),
        layers: LayersConfig::single(VolumeId(Uuid::from_u128(1))),
    }
}
