//! The control plane of a [`super::cluster::DataCluster`]: one consistent record of the volume in this process, reachable
//! from each node over its `control.sock` unless the node is cut off.
//!
//! It keeps the rules of the real one: a commit needs the current generation and the present coordinator; the last replica in sync is
//! never taken out; an opening raises the generation, drops members that cannot be reached in the same step, and is for
//! one instance of the data process; a lease is 5 s, renewed every second.

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::future::BoxFuture;
use hci_node::data::client::{DataClient, QUICK};
use hci_node::data::protocol::{
    ClosedClean, CommitRefusal, ControlCall, DataConfig, DataInstance, Hello, MonotonicTime, Observed,
    Opened, PeerConfig, Readiness, RenewLease, ReplicaIn, ReplicaLeft, ReplicasOut, Status,
};
use netfabric::NodeId;
use netfabric::overlay::OverlayConfig;
use netfabric::rpc::{Caller, Handler, Request, Response, RpcError};
use parking_lot::Mutex;
use storage::config::{CleanState, DiskConfig, ReplicaConfig, ReplicaState, StorageConfig, VolumeConfig};
use storage::ids::Generation;

/// How long a node serves without a renewal.
pub const LEASE: Duration = Duration::from_secs(5);
const RENEWAL: Duration = Duration::from_secs(1);
const LOOK: Duration = Duration::from_millis(50);

/// Whether a node reaches the control plane.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reach {
    /// It does.
    Connected,
    /// It does not: no commits, no configuration, no lease.
    CutOff,
}

/// Everything that the control plane knows.
#[derive(Debug)]
pub struct Record {
    /// The volume, as last committed.
    pub volume: Option<VolumeConfig>,
    /// Who has it open: the node, and the instance of its data process that it was opened for.
    pub coordinator: Option<(usize, DataInstance)>,
    /// The nodes.
    pub nodes: Vec<NodeRecord>,
}

/// What the control plane knows of a node.
#[derive(Debug)]
pub struct NodeRecord {
    /// Its id.
    pub id: NodeId,
    /// Whether it reaches the control plane.
    pub reach: Reach,
    /// Its disks.
    pub disks: Vec<DiskConfig>,
    /// Its part of the overlay.
    pub overlay: OverlayConfig,
    /// Where the other nodes reach it.
    pub address: PeerConfig,
    /// Its data process as last seen; none when it does not answer.
    pub observed: Option<Observed>,
    /// What its data process took last.
    applied: Option<(DataInstance, DataConfig)>,
}

impl NodeRecord {
    /// A node that has nothing yet.
    pub fn new(address: PeerConfig) -> Self {
        let (disks, overlay, observed, applied) = Default::default();
        Self { id: address.node, reach: Reach::Connected, disks, overlay, address, observed, applied }
    }
}

impl Record {
    /// What a node's data process is to do now.
    fn config(&self, node: usize, instance: DataInstance) -> DataConfig {
        let others = self.nodes.iter().enumerate().filter(|(index, _)| *index != node);
        let serves = self.coordinator == Some((node, instance));
        let volumes = self.volume.iter().filter(|_| serves).cloned().collect();
        DataConfig {
            revision: 1,
            peers: others.map(|(_, other)| other.address).collect(),
            storage: StorageConfig { disks: self.nodes[node].disks.clone(), volumes, standby: vec![] },
            overlay: self.nodes[node].overlay.clone(),
        }
    }

    /// Opens the volume on a node: its data process must be there. None when no replica in sync can be reached.
    pub fn open(&mut self, node: usize) -> Option<Generation> {
        let instance = self.nodes[node].observed.as_ref()?.instance;
        let reachable = |replica: &ReplicaConfig| {
            let holder = self.nodes.iter().find(|n| n.id == replica.node);
            holder.is_some_and(|n| n.reach == Reach::Connected && n.observed.is_some())
        };
        let mut volume = self.volume.clone()?;
        for segment in &mut volume.segments {
            for replica in segment.replicas.iter_mut().filter(|replica| !reachable(replica)) {
                replica.state = ReplicaState::OutOfSync;
            }
            segment.replicas.iter().find(|replica| replica.state == ReplicaState::InSync)?;
        }
        volume.generation.0 += 1;
        let generation = volume.generation;
        self.volume = Some(volume);
        self.coordinator = Some((node, instance));
        Some(generation)
    }

    /// How many replicas are in sync in every segment.
    pub fn in_sync(&self) -> usize {
        let in_sync = |replicas: &[ReplicaConfig]| {
            replicas.iter().filter(|replica| replica.state == ReplicaState::InSync).count()
        };
        let volume = self.volume.iter().flat_map(|volume| &volume.segments);
        volume.map(|segment| in_sync(&segment.replicas)).min().unwrap_or(0)
    }

    fn replicas_out(&mut self, call: &ReplicasOut) -> Result<VolumeConfig, CommitRefusal> {
        let volume = self.volume.as_mut().ok_or(CommitRefusal::Fenced)?;
        let mut after = volume.clone();
        for segment in &mut after.segments {
            for replica in segment.replicas.iter_mut().filter(|replica| replica.disk == call.disk) {
                replica.state = ReplicaState::OutOfSync;
            }
            if !segment.replicas.iter().any(|replica| replica.state == ReplicaState::InSync) {
                return Err(CommitRefusal::Refused("it is the last replica in sync".to_owned()));
            }
        }
        *volume = after.clone();
        Ok(after)
    }

    fn replica_in(&mut self, call: ReplicaIn) -> Result<VolumeConfig, CommitRefusal> {
        let volume = self.volume.as_mut().ok_or(CommitRefusal::Fenced)?;
        for segment in volume.segments.iter_mut().filter(|segment| segment.index == call.segment) {
            for replica in segment.replicas.iter_mut().filter(|replica| replica.disk == call.disk) {
                replica.state = ReplicaState::InSync;
            }
        }
        Ok(volume.clone())
    }

    fn replica_left(&mut self, call: ReplicaLeft) -> Result<VolumeConfig, CommitRefusal> {
        let volume = self.volume.as_mut().ok_or(CommitRefusal::Fenced)?;
        for segment in volume.segments.iter_mut().filter(|segment| segment.index == call.segment) {
            segment.replicas.retain(|replica| replica.disk != call.disk);
        }
        Ok(volume.clone())
    }

    fn set_clean(&mut self, clean: CleanState) -> Result<(), CommitRefusal> {
        self.volume.as_mut().ok_or(CommitRefusal::Fenced)?.clean = clean;
        Ok(())
    }
}

/// The control plane as one node sees it: serves its `control.sock`.
pub struct NodeControl {
    /// The node.
    pub node: usize,
    /// The record.
    pub record: Arc<Mutex<Record>>,
}

impl NodeControl {
    /// Commits, if the node reaches the control plane and its generation is current.
    fn commit<T>(
        &self,
        generation: Generation,
        change: impl FnOnce(&mut Record) -> Result<T, CommitRefusal>,
    ) -> Result<T, CommitRefusal> {
        let mut record = self.record.lock();
        if record.nodes[self.node].reach == Reach::CutOff {
            return Err(CommitRefusal::Unavailable("no majority".to_owned()));
        }
        let current = record.volume.as_ref().map(|volume| volume.generation);
        let coordinator = record.coordinator.map(|(node, _)| node);
        if current != Some(generation) || coordinator != Some(self.node) {
            return Err(CommitRefusal::Fenced);
        }
        change(&mut record)
    }

    fn answer(&self, request: &Request) -> Result<Response, RpcError> {
        Ok(match request.method {
            // The link looks often enough.
            Hello::METHOD => Response::new(&())?,
            ReplicasOut::METHOD => {
                let call: ReplicasOut = request.decode()?;
                Response::new(&self.commit(call.generation, |record| record.replicas_out(&call)))?
            }
            ReplicaIn::METHOD => {
                let call: ReplicaIn = request.decode()?;
                Response::new(&self.commit(call.generation, |record| record.replica_in(call)))?
            }
            ReplicaLeft::METHOD => {
                let call: ReplicaLeft = request.decode()?;
                Response::new(&self.commit(call.generation, |record| record.replica_left(call)))?
            }
            Opened::METHOD => {
                let call: Opened = request.decode()?;
                Response::new(&self.commit(call.generation, |record| record.set_clean(CleanState::Unclean)))?
            }
            ClosedClean::METHOD => {
                let call: ClosedClean = request.decode()?;
                let closed = |record: &mut Record| {
                    record.coordinator = None;
                    record.set_clean(CleanState::Clean)
                };
                Response::new(&self.commit(call.generation, closed))?
            }
            other => return Err(RpcError::unknown_method(other)),
        })
    }
}

impl Handler for NodeControl {
    fn handle(&self, _from: Caller, request: Request) -> BoxFuture<'static, Result<Response, RpcError>> {
        let answer = self.answer(&request);
        Box::pin(async move { answer })
    }
}

/// Keeps a node's data process configured, for ever.
pub async fn run_link(node: usize, client: DataClient, record: Arc<Mutex<Record>>) {
    loop {
        let observed = client.call(&Status, QUICK).await.ok();
        let wanted = {
            let mut record = record.lock();
            record.nodes[node].observed = observed.clone().filter(|seen| seen.readiness == Readiness::Ready);
            record.nodes[node].observed.as_ref().map(|seen| seen.instance).and_then(|instance| {
                let wanted = (instance, record.config(node, instance));
                let present = &record.nodes[node];
                let due = present.reach == Reach::Connected && present.applied.as_ref() != Some(&wanted);
                due.then_some(wanted)
            })
        };
        if let Some((instance, config)) = wanted {
            match client.apply(instance, &config).await {
                Ok(_) => record.lock().nodes[node].applied = Some((instance, config)),
                Err(error) => eprintln!("node {node} does not take its configuration yet: {error}"),
            }
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// Renews a node's lease, for ever: every second, and at once for a new instance.
pub async fn run_lease(node: usize, client: DataClient, record: Arc<Mutex<Record>>) {
    let mut last = None;
    loop {
        let (reach, instance) = {
            let record = record.lock();
            let node = &record.nodes[node];
            (node.reach, node.observed.as_ref().map(|seen| seen.instance))
        };
        let told = last.is_some_and(|(to, at): (_, Instant)| Some(to) == instance && at.elapsed() < RENEWAL);
        if let (Reach::Connected, Some(instance), false) = (reach, instance, told) {
            let until = MonotonicTime::after(LEASE);
            // A data process that was killed just now gets it at its next start.
            if client.call(&RenewLease { until }, QUICK).await.is_ok() {
                last = Some((instance, Instant::now()));
            }
        }
        tokio::time::sleep(LOOK).await;
    }
}
