//! A node that is in a cluster: what its parts share.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use bytes::Bytes;
use futures_util::future::BoxFuture;
use netfabric::rpc::{CallError, Request, codec};
use tokio::io::{AsyncRead, AsyncWrite};

use super::{
    export,
    leader::Leader,
    replicated::Replicated,
    rpc::{self, ApiAnswer, ApiCall},
};
use crate::{
    agent::{self, AgentFailure},
    api::{
        problem::{Problem, ProblemKind},
        service::{ApiRequest, ApiResponse},
    },
    paths::NodePaths,
    reconcile::channels::ChannelKind,
    state::{
        ClusterState, ContentHash, NodeId, VmId, VolumeId,
        report::{CandidateDisk, LocalReport},
    },
};

/// How long a forwarded request may take: an election and a commit fit in.
const FORWARD_DEADLINE: Duration = Duration::from_secs(20);
/// How long a forwarded question may take: it is answered from memory.
const FORWARD_READ_DEADLINE: Duration = Duration::from_secs(2);

/// A channel into a guest as a stream of bytes, both ways.
pub trait ChannelStream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin + ?Sized> ChannelStream for T {}

/// What runs on this node beside the control process: the data process and the VMMs, behind the reconciler.
pub trait LocalNode: Send + Sync + 'static {
    /// What it sees.
    fn report(&self) -> LocalReport;
    /// Boot files that are here.
    fn boot_files(&self) -> Vec<ContentHash>;
    /// Disks that could be given to the pool.
    fn candidates(&self) -> BoxFuture<'static, Vec<CandidateDisk>>;
    /// Writes to a volume that is open here for internal use.
    fn write_volume(
        &self,
        volume: VolumeId,
        offset: u64,
        data: Bytes,
    ) -> BoxFuture<'static, Result<(), CallError>>;
    /// Reads from a volume that is open here for internal use.
    fn read_volume(
        &self,
        volume: VolumeId,
        offset: u64,
        length: u32,
    ) -> BoxFuture<'static, Result<Bytes, CallError>>;
    /// Makes all earlier writes durable.
    fn flush_volume(&self, volume: VolumeId) -> BoxFuture<'static, Result<(), CallError>>;
    /// Metrics of the data process as text.
    fn data_metrics(&self) -> BoxFuture<'static, Result<String, CallError>>;
    /// Opens a channel into the guest of a VM that runs on that node.
    fn open_channel(
        &self,
        node: NodeId,
        vm: VmId,
        kind: ChannelKind,
    ) -> BoxFuture<'static, Result<Box<dyn ChannelStream>, String>>;
    /// The last output of a VM that runs on that node.
    fn console_log(&self, node: NodeId, vm: VmId) -> BoxFuture<'static, Result<Bytes, String>>;
    /// Asks the agent in the guest of a VM that runs on that node.
    fn ask_agent(
        &self,
        node: NodeId,
        vm: VmId,
        request: agent::Request,
    ) -> BoxFuture<'static, Result<agent::Answer, AgentFailure>>;
}

/// Calls to other nodes over the control mesh.
pub trait Peers: Send + Sync + 'static {
    /// Calls one.
    fn call(
        &self,
        node: NodeId,
        request: Request,
        deadline: Duration,
    ) -> BoxFuture<'static, Result<netfabric::rpc::Response, CallError>>;
}

/// A node that is in a cluster.
pub struct Member {
    /// Its id.
    pub id: NodeId,
    /// Its files.
    pub paths: NodePaths,
    /// The replicated state.
    pub replicated: Arc<dyn Replicated>,
    /// What it does when it leads.
    pub leader: Arc<Leader>,
    /// The other nodes.
    pub peers: Arc<dyn Peers>,
    /// What runs beside.
    pub local: Arc<dyn LocalNode>,
    /// Where its control mesh is.
    pub control: SocketAddr,
    /// The volumes that this process reads out.
    pub exports: export::Running,
}

impl Member {
    /// This node's copy of the state.
    pub fn state(&self) -> Arc<ClusterState> {
        self.replicated.state().borrow().clone()
    }

    /// Passes a request on to the leader.
    pub async fn forward(&self, leader: NodeId, request: &ApiRequest) -> Result<ApiResponse, ForwardError> {
        let header = ApiCall { method: request.method.clone(), path: request.path.clone() };
        let call = Request::new(rpc::API, &header).map_err(CallError::from)?.with_bulk(request.body.clone());
        let deadline = if request.method == "GET" { FORWARD_READ_DEADLINE } else { FORWARD_DEADLINE };
        let response = match self.peers.call(leader, call, deadline).await {
            Err(error @ CallError::Unreachable(_)) => return Err(ForwardError::NotSent(error)),
            answered => answered?,
        };
        let answer: ApiAnswer = response.decode().map_err(CallError::from)?;
        Ok(ApiResponse { status: answer.status, body: response.bulk })
    }
}

/// Why the leader did not answer a request that was passed on.
#[derive(Debug, thiserror::Error)]
pub enum ForwardError {
    /// It was not sent: it may be sent again.
    #[error("the leader cannot be reached: {0}")]
    NotSent(#[source] CallError),
    /// Whether it was carried out is not known.
    #[error("the leader does not answer: {0}")]
    Unknown(#[from] CallError),
}

impl ForwardError {
    /// Whether sending the request again can do no harm.
    pub fn may_repeat(&self, request: &ApiRequest) -> bool {
        matches!(self, Self::NotSent(_)) || matches!(request.method.as_str(), "GET" | "HEAD")
    }
}

impl From<ForwardError> for Problem {
    fn from(error: ForwardError) -> Self {
        Self::new(
            ProblemKind::Unavailable,
            error.to_string(),
            "see what became of it: hci task list; then try again",
        )
    }
}

/// A typed bulk part.
pub fn from_bulk<T: serde::de::DeserializeOwned>(bulk: &[u8]) -> Result<T, netfabric::rpc::RpcError> {
    Ok(codec::decode(bulk)?)
}
