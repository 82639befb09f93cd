//! What runs beside the control process, through the reconciler of this node.

use std::{ops::RangeInclusive, sync::Arc};

use bytes::Bytes;
use futures_util::{FutureExt, future::BoxFuture};
use netfabric::rpc::{CallError, Caller, Handler, Request, Response, RpcError};
use tokio::sync::watch;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{
    lease::NodeLease,
    member::{ConsoleStream, LocalNode, Peers},
    replicated::Replicated,
};
use crate::{
    paths::NodePaths,
    state::{
        ContentHash, NodeId, VmId, VolumeId,
        report::{CandidateDisk, LocalReport},
    },
};

/// Methods that reconcilers serve each other on the control mesh.
pub const PEER_METHODS: RangeInclusive<u16> = 0x0400..=0x04ff;

/// What runs beside the control process: nothing yet.
pub struct Local;

struct Nobody;
impl Handler for Nobody {
    fn handle(&self, _: Caller, request: Request) -> BoxFuture<'static, Result<Response, RpcError>> {
        async move { Err(RpcError::unknown_method(request.method)) }.boxed()
    }
}

impl Local {
    /// Starts it.
    pub fn start(
        _id: NodeId,
        _paths: &NodePaths,
        _replicated: Arc<dyn Replicated>,
        _peers: Arc<dyn Peers>,
        _lease: watch::Receiver<NodeLease>,
        _tasks: &TaskTracker,
        _shutdown: &CancellationToken,
    ) -> Arc<Self> {
        Arc::new(Self)
    }
    /// Serves [`PEER_METHODS`].
    pub fn peer_handler(&self) -> Arc<dyn Handler> {
        Arc::new(Nobody)
    }
}

fn away() -> CallError {
    CallError::Unreachable("the data process".to_owned())
}

impl LocalNode for Local {
    fn report(&self) -> LocalReport {
        LocalReport::default()
    }
    fn boot_files(&self) -> Vec<ContentHash> {
        vec![]
    }
    fn candidates(&self) -> BoxFuture<'static, Vec<CandidateDisk>> {
        async { vec![] }.boxed()
    }
    fn write_volume(&self, _: VolumeId, _: u64, _: Bytes) -> BoxFuture<'static, Result<(), CallError>> {
        async { Err(away()) }.boxed()
    }
    fn flush_volume(&self, _: VolumeId) -> BoxFuture<'static, Result<(), CallError>> {
        async { Err(away()) }.boxed()
    }
    fn data_metrics(&self) -> BoxFuture<'static, Result<String, CallError>> {
        async { Err(away()) }.boxed()
    }
    fn attach_console(
        &self,
        _: NodeId,
        _: VmId,
    ) -> BoxFuture<'static, Result<Box<dyn ConsoleStream>, String>> {
        async { Err(away().to_string()) }.boxed()
    }
    fn console_log(&self, _: NodeId, _: VmId) -> BoxFuture<'static, Result<Bytes, String>> {
        async { Err(away().to_string()) }.boxed()
    }
}
