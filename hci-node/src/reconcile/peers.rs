//! What reconcilers of different nodes ask each other over the control mesh: boot files, channels into guests, their agents, VMs on their way.
//!
//! A call is one request and one answer, so a channel that is opened from another node is a session: its reads wait
//! for output, up to [`CHANNEL_WAIT`], and a session that nobody reads from ends by itself.

use std::{ops::RangeInclusive, sync::Arc, time::Duration};

use bytes::Bytes;
use futures_util::future::BoxFuture;
use netfabric::rpc::{CallError, Caller, ErrorCode, Handler, Request, Response, RpcError};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use uuid::Uuid;

use super::{
    arrivals::{Arrival, ArrivalStatus, Arrivals, BringPiece, TakeOver},
    boot_files,
    channels::{ChannelKind, Sessions},
    cluster::Cluster,
};
use crate::{
    agent::{self, AgentFailure, Agents},
    paths::NodePaths,
    state::{ContentHash, NodeId, VmId},
};

/// The methods that [`PeerHandler`] serves. The control process sends these calls to it.
pub const METHODS: RangeInclusive<u16> = 0x0400..=0x04ff;
/// How long a read of a channel waits for output.
pub const CHANNEL_WAIT: Duration = Duration::from_secs(5);
/// Deadline of a call: longer than any wait in it.
const DEADLINE: Duration = Duration::from_secs(15);

/// A call between reconcilers.
pub trait PeerCall: Serialize + DeserializeOwned + Send + Sync {
    /// Its number.
    const METHOD: u16;
    /// What it answers besides bulk data.
    type Reply: Serialize + DeserializeOwned + Send;
}

/// Asks for a piece of a boot file, which comes as bulk data.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReadBootFile {
    /// Which file.
    pub file: ContentHash,
    /// Where the piece starts.
    pub offset: u64,
    /// How much at most.
    pub length: u32,
}

/// Asks whether a node holds a boot file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HasBootFile {
    /// Which file.
    pub file: ContentHash,
}

/// Opens a channel into the guest of a VM that runs on the called node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OpenChannel {
    /// The VM.
    pub vm: VmId,
    /// Which.
    pub kind: ChannelKind,
}

/// Name of an open channel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ChannelId(pub Uuid);

/// Waits for output, which comes as bulk data; none came in time when that is empty.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReadChannel {
    /// Which.
    pub channel: ChannelId,
}

/// Types the bulk data.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WriteChannel {
    /// Which.
    pub channel: ChannelId,
}

/// Detaches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CloseChannel {
    /// Which.
    pub channel: ChannelId,
}

/// Asks the agent in the guest of a VM that runs on the called node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AskAgent {
    /// The VM.
    pub vm: VmId,
    /// For what.
    pub request: agent::Request,
}

/// Whether a channel goes on after a read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ChannelFlow {
    /// It does.
    Open,
    /// The VM is gone.
    Ended,
}

/// Whether a node holds a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Holding {
    /// It does, all of it.
    Complete,
    /// It does not (yet).
    Missing,
}

macro_rules! peer_calls {
    ($($method:literal $call:ty => $reply:ty;)*) => {
        $(impl PeerCall for $call {
            const METHOD: u16 = $method;
            type Reply = $reply;
        })*
    };
}

peer_calls! {
    0x0401 ReadBootFile => ();
    0x0402 HasBootFile => Holding;
    0x0411 OpenChannel => ChannelId;
    0x0412 ReadChannel => ChannelFlow;
    0x0413 WriteChannel => ();
    0x0414 CloseChannel => ();
    0x0421 AskAgent => Result<agent::Answer, AgentFailure>;
    0x0431 ArrivalStatus => Arrival;
    0x0432 BringPiece => ();
    0x0433 TakeOver => ();
}

/// Calls the reconciler of another node.
pub async fn call<C: PeerCall>(
    cluster: &dyn Cluster,
    node: NodeId,
    call: &C,
    bulk: Bytes,
) -> Result<(C::Reply, Bytes), CallError> {
    let request = Request::new(C::METHOD, call)?.with_bulk(bulk);
    let response = cluster.call_node(node, request, DEADLINE).await?;
    Ok((response.decode()?, response.bulk))
}

/// Serves [`METHODS`] to other nodes.
#[derive(Clone)]
pub struct PeerHandler {
    paths: NodePaths,
    channels: Arc<Sessions>,
    agents: Agents,
    arrivals: Arrivals,
}

impl PeerHandler {
    /// A handler for this node.
    pub(super) fn new(paths: NodePaths, agents: Agents, arrivals: Arrivals) -> Self {
        Self { channels: Arc::new(Sessions::new(paths.clone())), paths, agents, arrivals }
    }

    async fn dispatch(self, from: Caller, request: Request) -> Result<Response, RpcError> {
        match request.method {
            ReadBootFile::METHOD => {
                let ReadBootFile { file, offset, length } = request.decode()?;
                let read = move || boot_files::read(&self.paths, file, offset, length);
                let piece = tokio::task::spawn_blocking(read).await.map_err(internal)?.map_err(internal)?;
                let missing = || RpcError::new(ErrorCode::NotFound, format!("there is no file {file} here"));
                Ok(Response::new(&())?.with_bulk(piece.ok_or_else(missing)?))
            }
            HasBootFile::METHOD => {
                let HasBootFile { file } = request.decode()?;
                let there = self.paths.boot_file(file).exists();
                Ok(Response::new(&if there { Holding::Complete } else { Holding::Missing })?)
            }
            OpenChannel::METHOD => {
                let OpenChannel { vm, kind } = request.decode()?;
                Ok(Response::new(&self.channels.open(vm, kind).await?)?)
            }
            ReadChannel::METHOD => {
                let ReadChannel { channel } = request.decode()?;
                let (flow, output) = self.channels.read(channel).await?;
                Ok(Response::new(&flow)?.with_bulk(output))
            }
            WriteChannel::METHOD => {
                let WriteChannel { channel } = request.decode()?;
                self.channels.write(channel, &request.bulk).await?;
                Ok(Response::new(&())?)
            }
            CloseChannel::METHOD => {
                let CloseChannel { channel } = request.decode()?;
                self.channels.close(channel);
                Ok(Response::new(&())?)
            }
            AskAgent::METHOD => {
                let AskAgent { vm, request } = request.decode()?;
                Ok(Response::new(&self.agents.ask(vm, request).await)?)
            }
            ArrivalStatus::METHOD => Ok(Response::new(&self.arrivals.status(from, request.decode()?).await)?),
            BringPiece::METHOD => {
                self.arrivals.bring(from, request.decode()?, request.bulk).await?;
                Ok(Response::new(&())?)
            }
            TakeOver::METHOD => {
                self.arrivals.take_over(from, request.decode()?).await?;
                Ok(Response::new(&())?)
            }
            other => Err(RpcError::unknown_method(other)),
        }
    }
}

fn internal(error: impl std::fmt::Display) -> RpcError {
    RpcError::new(ErrorCode::Internal, error.to_string())
}

impl Handler for PeerHandler {
    fn handle(&self, from: Caller, request: Request) -> BoxFuture<'static, Result<Response, RpcError>> {
        Box::pin(self.clone().dispatch(from, request))
    }
}
