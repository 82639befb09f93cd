//! Nodes as processes, with a disk each and one volume that is replicated on all of them.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use hci_node::data::client::{DataClient, QUICK, SLOW};
use hci_node::data::disks::keyring::Keyring;
use hci_node::data::protocol::{FormatDisk, Metrics, NodeSecret, PeerConfig, Wipe};
use hci_node::paths::NodePaths;
use netfabric::NodeId;
use netfabric::overlay::OverlayConfig;
use netfabric::pki::ClusterCa;
use netfabric::rpc::serve_unix;
use nix::sys::signal::Signal;
use nix::unistd::Pid;
use parking_lot::Mutex;
use storage::KeySalt;
use storage::config::{
    Access, CleanState, DiskConfig, Durability, LayersConfig, Limits, ReplicaConfig, ReplicaState,
    SegmentConfig, Tenure, VolumeConfig,
};
use storage::ids::{
    BLOCKS_PER_SEGMENT, ByteSize, DiskId, Generation, LayerId, SEGMENT_SIZE, SegmentIndex, SegmentKey,
    VolumeId,
};
use storage::status::{ScrubStatus, VolumeState, VolumeStatus};
use storage::store::Compression;
use storage::store::DiskStore;
use storage::store::disk::{Encryption, LogStore};
use tokio::runtime::Runtime;
use tokio_util::sync::CancellationToken;

use super::control::{NodeControl, NodeRecord, Reach, Record, run_lease, run_link};
use super::fabric::Fabric;
use super::process::{DataProcess, executable, tail};
use super::scratch::{self, Directory};
use crate::bench::storage::usage::cpu;
use crate::overlay_node::identity;

/// How long a process may take to come up, or a replica to come back, on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// Where the nodes keep their disks.
#[derive(Clone, Debug)]
pub enum Disks {
    /// In memory, each with that many bytes.
    Memory(Vec<u64>),
    /// In the folder for temporary files.
    Temporary,
}

/// What a cluster is to be.
#[derive(Clone, Debug)]
pub struct Options {
    /// The executable under test; [`executable`] when none.
    pub hci: Option<PathBuf>,
    /// Nodes.
    pub nodes: usize,
    /// MTU of the links between them.
    pub mtu: u16,
    /// Their disks.
    pub disks: Disks,
    /// How what the disks hold is encrypted.
    pub encryption: Encryption,
    /// Size of the volume.
    pub volume_bytes: u64,
    /// Whether its data are compressed.
    pub compression: Compression,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            hci: None,
            nodes: 3,
            mtu: 1500,
            disks: Disks::Memory(vec![512 << 20; 3]),
            encryption: Encryption::None,
            volume_bytes: 64 << 20,
            compression: Compression::Off,
        }
    }
}

struct Node {
    paths: NodePaths,
    log: PathBuf,
    client: DataClient,
    disk: DiskConfig,
    process: Option<DataProcess>,
}

/// See the module. Ended and removed when dropped.
pub struct DataCluster {
    // Dropped in this order: processes, then what they use.
    nodes: Vec<Node>,
    shutdown: CancellationToken,
    runtime: Runtime,
    fabric: Fabric,
    record: Arc<Mutex<Record>>,
    hci: PathBuf,
    volume: VolumeId,
    _directory: Directory,
}

impl DataCluster {
    /// Starts all nodes and adds their disks. The volume is not open yet.
    pub fn start(options: &Options) -> Result<Self> {
        scratch::prepare()?;
        let hci = options.hci.clone().map_or_else(executable, |hci| Ok(fs::canonicalize(hci)?))?;
        let directory = Directory::new()?;
        let fabric = Fabric::new(options.nodes, options.mtu)?;
        let ca = ClusterCa::create("native")?;
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
        let (shutdown, volume) = (CancellationToken::new(), VolumeId::random());
        let (mut nodes, mut records) = (Vec::new(), Vec::new());
        for index in 0..options.nodes {
            let root = directory.path().join(format!("node{index}"));
            let paths = NodePaths::new(root.join("state"), root.join("run"));
            for path in [paths.state(), paths.run()] {
                fs::create_dir_all(path)?;
            }
            let id = NodeId::random();
            identity(&ca, id)?.store(&paths.identity())?;
            let place = match &options.disks {
                Disks::Memory(bytes) => directory.mount_memory(&format!("disk{index}"), bytes[index])?,
                Disks::Temporary => directory.path().join(format!("disk{index}")),
            };
            let at = |port| SocketAddr::from((Fabric::address(index), port));
            records.push(NodeRecord::new(PeerConfig { node: id, storage: at(7401), frames: at(7402) }));
            nodes.push(Node {
                log: root.join("log"),
                client: DataClient::new(paths.data_socket()),
                paths,
                disk: DiskConfig {
                    id: DiskId::random(),
                    path: place.join("disk"),
                    key_salt: match options.encryption {
                        Encryption::None => None,
                        Encryption::Aes256Xts => Some(KeySalt([index as u8; 32])),
                    },
                    scrubs: 0,
                },
                process: None,
            });
        }
        let record = Record { volume: None, coordinator: None, nodes: records };
        let record = Arc::new(Mutex::new(record));
        let mut cluster =
            Self { nodes, shutdown, runtime, fabric, record, hci, volume, _directory: directory };
        for node in 0..options.nodes {
            cluster.start_control(node);
            cluster.start_node(node)?;
        }
        for node in 0..options.nodes {
            cluster.wait_until_up(node)?;
            cluster.add_disk(node)?;
        }
        cluster.create_volume(options.volume_bytes, options.compression);
        Ok(cluster)
    }

    fn start_control(&self, node: usize) {
        let Node { paths, client, .. } = &self.nodes[node];
        let socket = paths.control_socket();
        let handler = Arc::new(NodeControl { node, record: self.record.clone() });
        let shutdown = self.shutdown.clone();
        self.runtime.spawn(async move {
            if let Err(error) = serve_unix(&socket, handler, shutdown).await {
                eprintln!("the control plane of node {node} failed: {error}");
            }
        });
        self.runtime.spawn(run_link(node, client.clone(), self.record.clone()));
        self.runtime.spawn(run_lease(node, client.clone(), self.record.clone()));
    }

    fn add_disk(&mut self, index: usize) -> Result<()> {
        let node = &mut self.nodes[index];
        let format = FormatDisk {
            disk: node.disk.id,
            path: node.disk.path.clone(),
            wipe: Wipe::Refuse,
            key_salt: node.disk.key_salt,
            secret: NodeSecret::MayBeMade,
        };
        let formatted = self.runtime.block_on(node.client.call(&format, SLOW))?;
        node.disk.path = formatted.store;
        self.record.lock().nodes[index].disks = vec![node.disk.clone()];
        Ok(())
    }

    fn create_volume(&mut self, bytes: u64, compression: Compression) {
        let mut record = self.record.lock();
        let replica = |(node, at): (&Node, &NodeRecord)| ReplicaConfig {
            disk: node.disk.id,
            node: at.id,
            state: ReplicaState::InSync,
            tenure: Tenure::Stays,
        };
        let replicas: Vec<_> = self.nodes.iter().zip(&record.nodes).map(replica).collect();
        let segments = (0..bytes.div_ceil(SEGMENT_SIZE) as u32)
            .map(|index| SegmentConfig { index: SegmentIndex(index), replicas: replicas.clone() });
        record.volume = Some(VolumeConfig {
            id: self.volume,
            size: ByteSize(bytes),
            generation: Generation(0),
            min_in_sync: 1,
            durability: Durability::WriteBack,
            compression,
            clean: CleanState::Clean,
            segments: segments.collect(),
            // Known when it is opened.
            access: Access::VhostUser { socket: PathBuf::new() },
            limits: Limits::default(),
            layers: LayersConfig::single(self.volume),
        });
    }

    /// Starts the data process of a node.
    pub fn start_node(&mut self, node: usize) -> Result<()> {
        let namespace = self.fabric.node(node).name();
        let Node { paths, log, .. } = &self.nodes[node];
        self.nodes[node].process = Some(DataProcess::start(&self.hci, namespace, paths, log)?);
        Ok(())
    }

    /// Waits until a node's data process can be configured.
    pub fn wait_until_up(&mut self, node: usize) -> Result<()> {
        let what = format!("node {node} comes up");
        self.wait(&what, PATIENCE, |cluster| cluster.record.lock().nodes[node].observed.is_some())
    }

    /// kill -9 of the data process of each of these nodes.
    pub fn kill(&mut self, nodes: &[usize]) -> Result<()> {
        let killed: Vec<_> = nodes.iter().filter_map(|node| self.nodes[*node].process.take()).collect();
        killed.into_iter().try_for_each(DataProcess::kill)?;
        let mut record = self.record.lock();
        nodes.iter().for_each(|node| record.nodes[*node].observed = None);
        Ok(())
    }

    /// Sends a signal to a node's data process.
    pub fn signal(&self, node: usize, signal: Signal) -> Result<()> {
        let process = self.nodes[node].process.as_ref().context("the process does not run")?;
        Ok(nix::sys::signal::kill(Pid::from_raw(process.pid().try_into()?), signal)?)
    }

    /// How much processor time each data process has used so far.
    pub fn processor_times(&self) -> Result<Vec<Duration>> {
        self.pids().into_iter().map(|pid| cpu(&[pid])).collect()
    }

    /// kill -9, and a new process.
    pub fn restart(&mut self, node: usize) -> Result<()> {
        self.kill(&[node])?;
        self.start_node(node)?;
        self.wait_until_up(node)
    }

    /// Opens the volume on a node and waits until it serves.
    pub fn open(&mut self, node: usize) -> Result<Generation> {
        let socket = self.socket(node);
        let generation = {
            let mut record = self.record.lock();
            if let Some(volume) = &mut record.volume {
                volume.access = Access::VhostUser { socket };
            }
            record.open(node).context("no replica in sync can be reached")?
        };
        self.wait(&format!("the volume opens on node {node}"), PATIENCE, |cluster| {
            let open =
                |volume: VolumeStatus| volume.generation == generation && volume.state == VolumeState::Open;
            cluster.volume(node).is_some_and(open)
        })?;
        Ok(generation)
    }

    /// Has a node's disk verified.
    pub fn scrub(&mut self, node: usize) {
        for disk in &mut self.record.lock().nodes[node].disks {
            disk.scrubs += 1;
        }
    }

    /// How the verification of a node's disk stands.
    pub fn scrub_status(&self, node: usize) -> Option<ScrubStatus> {
        let record = self.record.lock();
        Some(record.nodes[node].observed.as_ref()?.storage.disks.first()?.scrub.clone())
    }

    /// The device or file of a node's disk.
    pub fn disk_path(&self, node: usize) -> &Path {
        &self.nodes[node].disk.path
    }

    /// Makes the volume larger.
    pub fn grow(&mut self, bytes: u64) {
        let mut record = self.record.lock();
        let Some(volume) = &mut record.volume else { return };
        volume.size = ByteSize(bytes);
        let replicas: Vec<_> = volume.segments.iter().take(1).flat_map(|s| s.replicas.clone()).collect();
        let known = volume.segments.len() as u32;
        let segments = (known..bytes.div_ceil(SEGMENT_SIZE) as u32)
            .map(|index| SegmentConfig { index: SegmentIndex(index), replicas: replicas.clone() });
        volume.segments.extend(segments);
    }

    /// Closes the volume on its node and waits until that is recorded as clean.
    pub fn close(&mut self) -> Result<()> {
        let node = {
            let mut record = self.record.lock();
            let (node, _) = record.coordinator.context("the volume is not open")?;
            // For no instance: the present one is told to close it, and may still commit.
            record.coordinator = record.coordinator.map(|(node, _)| (node, no_instance()));
            node
        };
        self.wait(&format!("the volume closes on node {node}"), PATIENCE, |cluster| {
            cluster.record.lock().coordinator.is_none()
        })
    }

    /// Cuts a node off: from the other nodes as said, and from the control plane.
    pub fn isolate(&mut self, node: usize, way: Cut) -> Result<()> {
        match way {
            Cut::BothWays => self.fabric.cut(node)?,
            Cut::Outgoing => {
                let others = (0..self.nodes.len()).filter(|other| *other != node);
                others.into_iter().try_for_each(|other| self.fabric.cut_one_way(node, other))?;
            }
        }
        self.record.lock().nodes[node].reach = Reach::CutOff;
        Ok(())
    }

    /// Mends all links, to the control plane too.
    pub fn heal(&mut self) -> Result<()> {
        self.fabric.heal()?;
        self.record.lock().nodes.iter_mut().for_each(|node| node.reach = Reach::Connected);
        Ok(())
    }

    /// Waits until all replicas are in sync, for the control plane and for the coordinator.
    pub fn wait_in_sync(&mut self) -> Result<()> {
        let replicas = self.nodes.len();
        self.wait("all replicas are in sync", PATIENCE, |cluster| cluster.record.lock().in_sync() == replicas)
    }

    /// Waits for something, with a limit; fails at once when a data process ends by itself.
    pub fn wait(&mut self, what: &str, limit: Duration, is_so: impl Fn(&Self) -> bool) -> Result<()> {
        let deadline = Instant::now() + limit;
        while !is_so(self) {
            self.check_processes()?;
            if Instant::now() > deadline {
                bail!("not within {limit:?}: {what}; the volume is {:?}", self.coordinator_status());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// Fails when a data process ended that nobody killed.
    pub fn check_processes(&mut self) -> Result<()> {
        for (index, node) in self.nodes.iter_mut().enumerate() {
            if let Some(process) = &mut node.process {
                process.check().with_context(|| format!("node {index}"))?;
            }
        }
        Ok(())
    }

    fn coordinator_status(&self) -> Option<VolumeStatus> {
        let coordinator = self.record.lock().coordinator;
        coordinator.and_then(|(node, _)| self.volume(node))
    }

    /// The volume as a node's data process reported it last.
    pub fn volume(&self, node: usize) -> Option<VolumeStatus> {
        let record = self.record.lock();
        record.nodes[node].observed.as_ref()?.storage.volumes.first().cloned()
    }

    /// The record of the control plane.
    pub fn record(&self) -> &Mutex<Record> {
        &self.record
    }

    /// The network between the nodes.
    pub fn fabric(&self) -> &Fabric {
        &self.fabric
    }

    /// The paths of a node.
    pub fn paths(&self, node: usize) -> &NodePaths {
        &self.nodes[node].paths
    }

    /// The disk of a node.
    pub fn disk(&self, node: usize) -> DiskId {
        self.nodes[node].disk.id
    }

    /// The vhost-user-blk socket of the volume when it is open on that node.
    pub fn socket(&self, node: usize) -> PathBuf {
        self.nodes[node].paths.run().join(format!("{}.sock", self.volume.0))
    }

    /// Gives a node its part of the overlay.
    pub fn set_overlay(&mut self, node: usize, config: OverlayConfig) {
        self.record.lock().nodes[node].overlay = config;
    }

    /// The process ids of the data processes that run, in the nodes' order.
    pub fn pids(&self) -> Vec<u32> {
        self.nodes.iter().filter_map(|node| node.process.as_ref()).map(DataProcess::pid).collect()
    }

    /// The metrics of a node.
    pub fn metrics(&self, node: usize) -> Result<String> {
        Ok(self.runtime.block_on(self.nodes[node].client.call(&Metrics, QUICK))?)
    }

    /// The end of each node's log, for people.
    pub fn logs(&self) -> String {
        let log = |(index, node): (usize, &Node)| format!("== log of node {index}\n{}\n", tail(&node.log));
        self.nodes.iter().enumerate().map(log).collect()
    }

    /// Kills all data processes and compares what is on their disks, block by block.
    pub fn compare_replicas(&mut self) -> Result<()> {
        let all: Vec<usize> = (0..self.nodes.len()).collect();
        self.kill(&all)?;
        let segments = self.record.lock().volume.as_ref().map_or(0, |volume| volume.segments.len());
        let mut first: Option<Vec<_>> = None;
        // Stores wait for their disks on the runtime that they are opened on.
        let _on_the_runtime = self.runtime.enter();
        for (index, node) in self.nodes.iter().enumerate() {
            let mut blocks = Vec::new();
            let keyring = Keyring::new(node.paths.identity());
            let key = node.disk.key_salt.map(|salt| keyring.key(node.disk.id, salt)).transpose()?;
            let store = LogStore::open(&node.disk.path, node.disk.id, key.as_ref())
                .with_context(|| format!("the disk of node {index} does not open"))?;
            for segment in (0..segments as u32).map(SegmentIndex) {
                let at = SegmentKey { volume: self.volume, segment, layer: LayerId::default() };
                blocks.extend(self.runtime.block_on(store.versions(at, 0..BLOCKS_PER_SEGMENT))?);
            }
            match &first {
                None => first = Some(blocks),
                Some(first) => {
                    ensure!(
                        first.len() == blocks.len(),
                        "node {index} has {} blocks, node 0 {}",
                        blocks.len(),
                        first.len()
                    );
                    let differing = first.iter().zip(&blocks).find(|(a, b)| a != b);
                    ensure!(differing.is_none(), "node 0 and node {index} differ: {differing:?}");
                }
            }
        }
        Ok(())
    }
}

/// An instance that never was.
fn no_instance() -> hci_node::data::protocol::DataInstance {
    hci_node::data::protocol::DataInstance::random()
}

/// How a node is cut off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cut {
    /// Nothing passes.
    BothWays,
    /// What it sends is lost; what is sent to it arrives.
    Outgoing,
}

impl Drop for DataCluster {
    fn drop(&mut self) {
        self.shutdown.cancel();
        self.nodes.iter_mut().for_each(|node| node.process = None);
    }
}
