//! A simulated cluster of three nodes with a disk each and one volume, and what can happen to it.

use super::dice::Dice;
use super::history::History;
use super::media::{Disk, Kind};
use super::net::{Network, NodeTransport};
use super::raft::{NodeControl, Raft};
use super::snapshots;
use crate::config::{
    Access, CleanState, Durability, LayersConfig, Limits, ReplicaConfig, ReplicaState, SegmentConfig, Tenure,
    VolumeConfig,
};
use crate::coordinator::{Coordinator, Rim, Timing, VolumeDevice};
use crate::ids::{BLOCK_SIZE, ByteSize, DiskId, Generation, SEGMENT_SIZE, SegmentIndex, VolumeId};
use crate::lease::Lease;
use crate::metrics::Metrics;
use crate::replica::protocol::{BootEpoch, PowerEpoch};
use crate::replica::server::ReplicaServer;
use crate::scrub::{ScrubPolicy, Scrubber};
use crate::status::VolumeState;
use crate::store::Compression;
use netfabric::NodeId;
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

pub(super) const NODES: usize = 3;
/// The second segment is short: the workload is around the boundary of both.
pub(super) const VOLUME_SIZE: u64 = SEGMENT_SIZE + 8 * BLOCK_SIZE;

/// The data process of a node.
struct Process {
    server: Arc<ReplicaServer>,
    lease: Arc<Lease>,
    lease_until: Instant,
    boot: BootEpoch,
    alive: CancellationToken,
    scrubber: Scrubber,
    coordinator: Option<(u64, Arc<Coordinator>)>,
}

pub(super) struct Node {
    pub(super) id: NodeId,
    pub(super) disk_id: DiskId,
    pub(super) disk: Disk,
    boots: u64,
    power: PowerEpoch,
    process: Option<Process>,
}

pub(super) struct Cluster {
    pub(super) nodes: Vec<Node>,
    pub(super) network: Arc<Network>,
    pub(super) raft: Arc<Raft>,
    pub(super) history: Arc<Mutex<History>>,
    pub(super) dice: Dice,
    pub(super) volume: VolumeId,
    metrics: Metrics,
    /// How long a lease holds once it is renewed.
    pub(super) lease: Duration,
    /// Until when the last coordinator may serve reads.
    lease_ends: Instant,
}

/// How a simulated volume is set up.
#[derive(Clone, Copy, Debug)]
pub(super) struct Setup {
    pub(super) min_in_sync: u8,
    pub(super) durability: Durability,
    pub(super) compression: Compression,
    pub(super) disks: Kind,
}

impl Cluster {
    pub(super) fn new(dice: Dice, setup: Setup) -> Self {
        let id = |n: usize| Uuid::from_u128(n as u128 + 1);
        let nodes: Vec<Node> = (0..NODES)
            .map(|n| Node {
                id: NodeId::new(id(n)),
                disk_id: DiskId(id(n + 100)),
                disk: Disk::new(setup.disks, DiskId(id(n + 100)), dice.clone()),
                boots: 0,
                power: PowerEpoch(Uuid::from_u128(1)),
                process: None,
            })
            .collect();
        let replicas = nodes
            .iter()
            .map(|n| ReplicaConfig {
                disk: n.disk_id,
                node: n.id,
                state: ReplicaState::InSync,
                tenure: Tenure::Stays,
            })
            .collect::<Vec<_>>();
        let volume = VolumeConfig {
            id: VolumeId(id(1000)),
            size: ByteSize(VOLUME_SIZE),
            generation: Generation(0),
            min_in_sync: setup.min_in_sync,
            durability: setup.durability,
            compression: setup.compression,
            clean: CleanState::Clean,
            segments: (0..2)
                .map(|i| SegmentConfig { index: SegmentIndex(i), replicas: replicas.clone() })
                .collect(),
            access: Access::Internal,
            limits: Limits::default(),
            layers: LayersConfig::single(VolumeId(id(1000))),
        };
        let network = Network::new(dice.clone());
        let history = Arc::new(Mutex::new(History::default()));
        let ids = nodes.iter().map(|n| n.id).collect();
        let raft = Raft::new(volume.clone(), ids, network.clone(), history.clone(), dice.clone());
        let mut cluster = Self {
            nodes,
            network,
            raft,
            history,
            dice,
            volume: volume.id,
            metrics: Metrics::new().expect("metrics"),
            lease: Duration::from_millis(900),
            lease_ends: Instant::now(),
        };
        for n in 0..NODES {
            cluster.start(n);
        }
        cluster
    }

    pub(super) fn is_up(&self, n: usize) -> bool {
        self.nodes[n].process.is_some()
    }

    /// Starts a node's data process.
    pub(super) fn start(&mut self, n: usize) {
        let node = &mut self.nodes[n];
        if node.process.is_some() {
            return;
        }
        node.boots += 1;
        let boot = BootEpoch(node.boots);
        let server = Arc::new(ReplicaServer::new(node.id, boot, node.power, self.metrics.clone()));
        let store = match node.disk.open() {
            Ok(store) => store,
            Err(error) => {
                let violation = format!("disk {} cannot be opened: {error}", node.disk_id);
                return self.history.lock().violation(violation);
            }
        };
        let served = server.add_disk(node.disk_id, store);
        let scrubber = Scrubber::start(node.disk_id, served, ScrubPolicy::default(), None);
        let alive = CancellationToken::new();
        self.network.up(node.id, server.clone(), alive.clone());
        node.process = Some(Process {
            server,
            lease: Arc::new(Lease::new()),
            lease_until: Instant::now(),
            boot,
            alive,
            scrubber,
            coordinator: None,
        });
    }

    /// Kills a node's data process; what is in the disk's cache stays.
    pub(super) fn kill(&mut self, n: usize) {
        let node = &mut self.nodes[n];
        if let Some(process) = node.process.take() {
            node.disk.detach();
            process.alive.cancel();
            if let Some((_, coordinator)) = process.coordinator {
                coordinator.kill();
                self.lease_ends = Instant::now();
            }
            self.network.down(node.id);
        }
    }

    /// Cuts the power of nodes, at the same moment.
    pub(super) fn power_cut(&mut self, nodes: &[usize]) {
        let mut disks = Vec::new();
        for n in nodes {
            self.kill(*n);
            self.nodes[*n].disk.power_cut();
            self.nodes[*n].power.0 = Uuid::from_u128(self.nodes[*n].power.0.as_u128() + 1);
            disks.push(self.nodes[*n].disk_id);
        }
        self.raft.power_cut(&disks);
    }

    /// What the control plane does all the time: renews leases, opens the volume where its coordinator is gone.
    pub(super) fn control_step(&mut self) {
        snapshots::control(self);
        let now = Instant::now();
        for node in &mut self.nodes {
            if let Some(process) = &mut node.process
                && self.raft.reaches_majority(node.id)
            {
                process.lease.renew(self.lease);
                process.lease_until = now + self.lease;
            }
        }
        let (coordinator, opening) = {
            let record = self.raft.record.lock();
            (record.coordinator, record.opening)
        };
        let current = coordinator.and_then(|c| self.nodes.iter().position(|n| n.id == c));
        if let Some(n) = current {
            let node = &mut self.nodes[n];
            if let Some(process) = &node.process
                && self.raft.reaches_majority(node.id)
            {
                match &process.coordinator {
                    Some((o, c)) if *o == opening && c.status().state != VolumeState::Fenced => {
                        let config = self.raft.record.lock().volume.clone();
                        return c.configure(&config);
                    }
                    // The process restarted: the same generation again, or a new one.
                    _ if self.dice.percent(50) => {
                        let config = self.raft.reopen_same();
                        return self.start_coordinator(n, &config);
                    }
                    _ => {}
                }
            } else if let Some(process) = &node.process {
                self.lease_ends = self.lease_ends.max(process.lease_until);
            }
        }
        // A coordinator that is cut off may read until its lease ends.
        if now < self.lease_ends {
            return;
        }
        let candidates: Vec<usize> =
            (0..NODES).filter(|n| self.is_up(*n) && self.raft.reaches_majority(self.nodes[*n].id)).collect();
        if let Some(n) = self.dice.pick(&candidates).copied()
            && let Some(config) = self.raft.open_volume(self.nodes[n].id)
        {
            self.start_coordinator(n, &config);
        }
    }

    fn start_coordinator(&mut self, n: usize, config: &VolumeConfig) {
        let opening = self.raft.record.lock().opening;
        let node = &mut self.nodes[n];
        let Some(process) = &mut node.process else { return };
        let rim = Rim {
            node: node.id,
            boot: process.boot,
            replicas: process.server.clone(),
            transport: Arc::new(NodeTransport { node: node.id, network: self.network.clone() }),
            control: Arc::new(NodeControl { node: node.id, raft: self.raft.clone() }),
            lease: process.lease.clone(),
            timing: Timing::default(),
        };
        if let Some((_, old)) = process.coordinator.take() {
            old.kill();
        }
        let coordinator = Coordinator::start(config, rim, self.metrics.volume(config.id));
        process.coordinator = Some((opening, coordinator));
    }

    /// Changes the replica set of a segment, and has the coordinator take it over.
    pub(super) fn change_set(&self, segment: SegmentIndex, change: impl FnOnce(&mut Vec<ReplicaConfig>)) {
        let config = {
            let mut record = self.raft.record.lock();
            if let Some(segment) = record.volume.segments.iter_mut().find(|s| s.index == segment) {
                change(&mut segment.replicas);
            }
            record.volume.clone()
        };
        if let Some((_, coordinator)) = self.coordinator() {
            coordinator.configure(&config);
        }
    }

    /// A replica of a segment leaves its set, as far as enough others are in sync, or one that has left comes again, out of sync.
    pub(super) fn reshape(&self, n: usize) {
        let (disk, node) = (self.nodes[n].disk_id, self.nodes[n].id);
        // A set changes where its coordinator is told of it; one that is cut off is not.
        let told = self.raft.record.lock().coordinator.is_some_and(|c| self.raft.reaches_majority(c));
        if !told {
            return;
        }
        let segment = SegmentIndex(self.dice.below(2) as u32);
        let minimum = usize::from(self.raft.record.lock().volume.min_in_sync);
        self.change_set(segment, |replicas| match replicas.iter().position(|r| r.disk == disk) {
            Some(at) => {
                let others = replicas.iter().filter(|r| r.disk != disk && r.state == ReplicaState::InSync);
                if others.count() >= minimum {
                    match replicas[at].state {
                        ReplicaState::InSync => replicas[at].tenure = Tenure::Leaves,
                        ReplicaState::OutOfSync => drop(replicas.remove(at)),
                    }
                }
            }
            None => replicas.push(ReplicaConfig {
                disk,
                node,
                state: ReplicaState::OutOfSync,
                tenure: Tenure::Stays,
            }),
        });
    }

    /// All replicas are in their sets again.
    pub(super) fn complete_sets(&self) {
        for segment in (0..2).map(SegmentIndex) {
            self.change_set(segment, |replicas| {
                replicas.iter_mut().for_each(|r| r.tenure = Tenure::Stays);
                for n in &self.nodes {
                    if replicas.iter().all(|r| r.disk != n.disk_id) {
                        let state = ReplicaState::OutOfSync;
                        replicas.push(ReplicaConfig {
                            disk: n.disk_id,
                            node: n.id,
                            state,
                            tenure: Tenure::Stays,
                        });
                    }
                }
            });
        }
    }

    /// Makes the volume larger: new segments have replicas on all disks.
    pub(super) fn grow(&self, size: u64) {
        let config = {
            let mut record = self.raft.record.lock();
            let replicas: Vec<_> = self
                .nodes
                .iter()
                .map(|n| ReplicaConfig {
                    disk: n.disk_id,
                    node: n.id,
                    state: ReplicaState::InSync,
                    tenure: Tenure::Stays,
                })
                .collect();
            let known = record.volume.segments.len() as u32;
            let count = size.div_ceil(SEGMENT_SIZE) as u32;
            let new =
                (known..count).map(|i| SegmentConfig { index: SegmentIndex(i), replicas: replicas.clone() });
            record.volume.segments.extend(new);
            record.volume.size = ByteSize(size);
            record.volume.clone()
        };
        if let Some((_, coordinator)) = self.coordinator() {
            coordinator.configure(&config);
        }
    }

    /// The scrubber of a node's disk.
    pub(super) fn scrubber(&self, n: usize) -> &Scrubber {
        &self.nodes[n].process.as_ref().expect("the node is up").scrubber
    }

    /// The replica server of a node.
    pub(super) fn server(&self, n: usize) -> Option<Arc<ReplicaServer>> {
        self.nodes[n].process.as_ref().map(|process| process.server.clone())
    }

    /// The coordinators that there are, old ones on nodes cut off included, by opening.
    pub(super) fn devices(&self) -> BTreeMap<u64, VolumeDevice> {
        let coordinators = self.nodes.iter().filter_map(|n| n.process.as_ref()?.coordinator.as_ref());
        coordinators.map(|(opening, c)| (*opening, VolumeDevice(c.clone()))).collect()
    }

    /// The coordinator in charge.
    pub(super) fn coordinator(&self) -> Option<(u64, Arc<Coordinator>)> {
        let opening = self.raft.record.lock().opening;
        let coordinators = self.nodes.iter().filter_map(|n| n.process.as_ref()?.coordinator.as_ref());
        coordinators.filter(|(o, _)| *o == opening).map(|(o, c)| (*o, c.clone())).next()
    }

    /// Runs the control plane until the condition holds; false when it does not within the time.
    pub(super) async fn run_until(&mut self, limit: Duration, done: impl Fn(&Self) -> bool) -> bool {
        let end = Instant::now() + limit;
        while Instant::now() < end {
            self.control_step();
            if done(self) {
                return true;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        false
    }

    /// Open, all replicas in sync, no snapshot on its way in or out.
    pub(super) fn is_healthy(&self) -> bool {
        self.coordinator().is_some_and(|(_, c)| c.status().state == VolumeState::Open)
            && self.raft.in_sync().len() == NODES
            && {
                let record = self.raft.record.lock();
                record.volume.layers.freeze.is_none() && record.volume.layers.merge.is_none()
            }
    }
}
