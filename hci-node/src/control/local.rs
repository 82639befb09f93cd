//! What runs beside the control process on this node: the data process and the VMMs, through the reconciler.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use futures_util::{FutureExt, future::BoxFuture};
use netfabric::rpc::{CallError, Handler, Request, Response};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::{
    lease::NODE_LEASE,
    member::{ChannelStream, LocalNode, Peers},
    replicated::Replicated,
};
use crate::{
    agent::{self, AgentFailure},
    data::{
        client::QUICK,
        protocol::{DiskUsage, ListDisks, LocalDisk, Metrics, VolumeFlush, VolumeRead, VolumeWrite},
    },
    paths::NodePaths,
    reconcile::{
        Options, Reconciler,
        channels::ChannelKind,
        cluster::{Cluster, Lease, ProposeError},
    },
    state::{
        ClusterState, Command, ContentHash, NodeId, Op, Outcome, VmId, VolumeId,
        report::{CandidateDisk, LocalReport},
    },
};

/// The cluster, as the reconciler needs it.
struct ReconcilerCluster {
    replicated: Arc<dyn Replicated>,
    peers: Arc<dyn Peers>,
}

impl Cluster for ReconcilerCluster {
    fn state(&self) -> watch::Receiver<Arc<ClusterState>> {
        self.replicated.state()
    }

    fn propose(&self, op: Op) -> BoxFuture<'static, Result<Outcome, ProposeError>> {
        let proposed = self.replicated.propose(Command::now(op));
        async move {
            match proposed.await {
                Ok(applied) => Ok(applied?),
                Err(error) => Err(ProposeError::Unavailable(error.to_string())),
            }
        }
        .boxed()
    }

    fn call_node(
        &self,
        node: NodeId,
        request: Request,
        deadline: Duration,
    ) -> BoxFuture<'static, Result<Response, CallError>> {
        self.peers.call(node, request, deadline)
    }
}

/// The reconciler of this node.
pub struct Local(Reconciler);

impl Local {
    /// Starts it.
    pub fn start(
        me: NodeId,
        paths: &NodePaths,
        replicated: Arc<dyn Replicated>,
        peers: Arc<dyn Peers>,
        lease: watch::Receiver<Lease>,
        shutdown: CancellationToken,
    ) -> Arc<Self> {
        let cluster = Arc::new(ReconcilerCluster { replicated, peers });
        let options = Options { me, paths: paths.clone(), cluster, lease, node_lease: NODE_LEASE };
        Arc::new(Self(Reconciler::start(options, shutdown)))
    }

    /// Serves the calls between reconcilers.
    pub fn peer_handler(&self) -> Arc<dyn Handler> {
        self.0.peer_handler()
    }

    /// Returns when it has ended after the shutdown.
    pub async fn stopped(&self) {
        self.0.stopped().await;
    }
}

/// A disk that could be given to the pool.
fn candidate(disk: LocalDisk) -> Option<CandidateDisk> {
    let holds = match disk.usage {
        DiskUsage::Blank => None,
        DiskUsage::Holds(what) => Some(what),
        DiskUsage::InUse(_) | DiskUsage::Pool(_) => return None,
    };
    Some(CandidateDisk {
        path: disk.path.display().to_string(),
        size_bytes: disk.size_bytes,
        model: format!("{} {}", disk.model, disk.serial).trim().to_owned(),
        holds,
    })
}

impl LocalNode for Local {
    fn report(&self) -> LocalReport {
        self.0.report()
    }

    fn boot_files(&self) -> Vec<ContentHash> {
        self.0.boot_files()
    }

    fn candidates(&self) -> BoxFuture<'static, Vec<CandidateDisk>> {
        let data = self.0.data().clone();
        async move {
            match data.call(&ListDisks, QUICK).await {
                Ok(disks) => disks.into_iter().filter_map(candidate).collect(),
                Err(error) => {
                    tracing::debug!(%error, "the disks of this node are not known");
                    Vec::new()
                }
            }
        }
        .boxed()
    }

    fn write_volume(
        &self,
        volume: VolumeId,
        offset: u64,
        data: Bytes,
    ) -> BoxFuture<'static, Result<(), CallError>> {
        let client = self.0.data().clone();
        let volume = volume.into();
        async move { client.write(VolumeWrite { volume, offset }, data).await }.boxed()
    }

    fn read_volume(
        &self,
        volume: VolumeId,
        offset: u64,
        length: u32,
    ) -> BoxFuture<'static, Result<Bytes, CallError>> {
        let client = self.0.data().clone();
        let volume = volume.into();
        async move { client.read(VolumeRead { volume, offset, length }).await }.boxed()
    }

    fn flush_volume(&self, volume: VolumeId) -> BoxFuture<'static, Result<(), CallError>> {
        let client = self.0.data().clone();
        let volume = volume.into();
        async move { client.flush(VolumeFlush { volume }).await }.boxed()
    }

    fn data_metrics(&self) -> BoxFuture<'static, Result<String, CallError>> {
        let client = self.0.data().clone();
        async move { client.call(&Metrics, QUICK).await }.boxed()
    }

    fn open_channel(
        &self,
        node: NodeId,
        vm: VmId,
        kind: ChannelKind,
    ) -> BoxFuture<'static, Result<Box<dyn ChannelStream>, String>> {
        let reconciler = self.0.clone();
        async move {
            let opened = reconciler.open_channel(node, vm, kind).await.map_err(|error| error.to_string())?;
            Ok(Box::new(opened) as Box<dyn ChannelStream>)
        }
        .boxed()
    }

    fn console_log(&self, node: NodeId, vm: VmId) -> BoxFuture<'static, Result<Bytes, String>> {
        let reconciler = self.0.clone();
        async move { reconciler.console_log(node, vm).await.map_err(|error| error.to_string()) }.boxed()
    }

    fn ask_agent(
        &self,
        node: NodeId,
        vm: VmId,
        request: agent::Request,
    ) -> BoxFuture<'static, Result<agent::Answer, AgentFailure>> {
        let reconciler = self.0.clone();
        async move { reconciler.ask_agent(node, vm, request).await }.boxed()
    }
}
