//! openraft's way to its peers: calls over the control mesh.
//!
//! There is one logical client for each target and no connection of its own: every call is a stream of the mesh's
//! link, so a snapshot does not stand in the way of a heartbeat. The mesh checks that the node at the other end is the
//! one that was meant.

use std::future::Future;
use std::time::Duration;

use bytes::Bytes;
use netfabric::mesh::Mesh;
use netfabric::rpc::{CallError, Request, Response};
use openraft::alias::{SnapshotOf, VoteOf};
use openraft::errors::{NetworkError, RPCError, ReplicationClosed, StreamingError, Timeout, Unreachable};
use openraft::network::RPCOption;
use openraft::raft::{
    AppendEntriesRequest, AppendEntriesResponse, SnapshotResponse, TransferLeaderRequest,
    TransferLeaderResponse, VoteRequest, VoteResponse,
};
use openraft::{RPCTypes, RaftNetworkFactory, RaftNetworkV2};
use serde::de::DeserializeOwned;

use super::protocol::{self, PIECE, SnapshotPiece};
use super::types::{RaftId, RaftNode, TypeConfig};

/// How long one piece of a snapshot may take; the last one includes the installation.
const PIECE_DEADLINE: Duration = Duration::from_secs(60);

/// How long entries may take to reach a follower's disk. openraft would allow one heartbeat interval, which a disk that
/// is busy with guests' writes can exceed; heartbeats themselves wait for no disk.
const APPEND_DEADLINE: Duration = Duration::from_secs(1);

/// Makes clients.
#[derive(Clone, Debug)]
pub(super) struct Network {
    mesh: Mesh,
}

impl Network {
    pub(super) fn new(mesh: Mesh) -> Self {
        Self { mesh }
    }
}

impl RaftNetworkFactory<TypeConfig> for Network {
    type Network = Client;

    /// The address is not used: the mesh knows its peers from the same membership.
    async fn new_client(&mut self, target: RaftId, _node: &RaftNode) -> Client {
        Client { mesh: self.mesh.clone(), target }
    }
}

/// Calls one target.
#[derive(Debug)]
pub(super) struct Client {
    mesh: Mesh,
    target: RaftId,
}

impl Client {
    async fn call<T: DeserializeOwned>(
        &self,
        action: RPCTypes,
        request: Result<Request, impl std::error::Error + 'static>,
        deadline: Duration,
    ) -> Result<T, RPCError<TypeConfig>> {
        let request = request.map_err(|e| NetworkError::new(&e))?;
        let response = self.send(action, request, deadline).await?;
        Ok(response.decode().map_err(|e| NetworkError::new(&e))?)
    }

    async fn send(
        &self,
        action: RPCTypes,
        request: Request,
        deadline: Duration,
    ) -> Result<Response, RPCError<TypeConfig>> {
        self.mesh.call(self.target.0, request, deadline).await.map_err(|error| match error {
            CallError::Timeout => RPCError::Timeout(Timeout {
                action,
                id: RaftId(self.mesh.node()),
                target: self.target,
                timeout: deadline,
            }),
            // A peer that is starting answers with an error: as good as not there, and not worth hurrying.
            CallError::Unreachable(_) | CallError::Remote(_) => {
                RPCError::Unreachable(Unreachable::new(&error))
            }
            CallError::Reset(_) | CallError::Invalid(_) => RPCError::Network(NetworkError::new(&error)),
        })
    }
}

impl RaftNetworkV2<TypeConfig> for Client {
    type SnapshotData = Bytes;

    async fn append_entries(
        &mut self,
        rpc: AppendEntriesRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<AppendEntriesResponse<TypeConfig>, RPCError<TypeConfig>> {
        let deadline = match rpc.entries.is_empty() {
            true => option.hard_ttl(),
            false => option.hard_ttl().max(APPEND_DEADLINE),
        };
        let request = protocol::bulk_request(protocol::APPEND, &rpc);
        self.call(RPCTypes::AppendEntries, request, deadline).await
    }

    async fn vote(
        &mut self,
        rpc: VoteRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<VoteResponse<TypeConfig>, RPCError<TypeConfig>> {
        self.call(RPCTypes::Vote, Request::new(protocol::VOTE, &rpc), option.hard_ttl()).await
    }

    async fn pre_vote(
        &mut self,
        rpc: VoteRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<VoteResponse<TypeConfig>, RPCError<TypeConfig>> {
        self.call(RPCTypes::Vote, Request::new(protocol::PRE_VOTE, &rpc), option.hard_ttl()).await
    }

    async fn transfer_leader(
        &mut self,
        rpc: TransferLeaderRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<TransferLeaderResponse<TypeConfig>, RPCError<TypeConfig>> {
        let request = Request::new(protocol::TRANSFER_LEADER, &rpc);
        self.call(RPCTypes::TransferLeader, request, option.hard_ttl()).await
    }

    async fn full_snapshot(
        &mut self,
        vote: VoteOf<TypeConfig>,
        snapshot: SnapshotOf<TypeConfig, Bytes>,
        cancel: impl Future<Output = ReplicationClosed> + Send + 'static,
        _option: RPCOption,
    ) -> Result<SnapshotResponse<TypeConfig>, StreamingError<TypeConfig>> {
        let push = async {
            let total = snapshot.snapshot.len();
            let mut offset = 0;
            loop {
                let piece = snapshot.snapshot.slice(offset..total.min(offset + PIECE));
                let header = SnapshotPiece {
                    vote,
                    meta: snapshot.meta.clone(),
                    total: total as u64,
                    offset: offset as u64,
                };
                offset += piece.len();
                let request = Request::new(protocol::SNAPSHOT_PUSH, &header).map(|r| r.with_bulk(piece));
                let response: SnapshotResponse<TypeConfig> =
                    self.call(RPCTypes::InstallSnapshot, request, PIECE_DEADLINE).await?;
                // A higher vote means that we no longer lead.
                if offset == total || response.vote > vote {
                    return Ok(response);
                }
            }
        };
        tokio::select! {
            closed = cancel => Err(closed.into()),
            pushed = push => pushed,
        }
    }
}
