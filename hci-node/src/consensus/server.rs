//! What other nodes ask of this one: Raft's own messages, proposals, reads and membership changes.

use std::collections::{BTreeSet, HashMap};
use std::fmt::Display;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures_util::future::BoxFuture;
use netfabric::NodeId;
use netfabric::rpc::{Caller, ErrorCode, Handler, Request, Response, RpcError};
use openraft::async_runtime::WatchReceiver;
use openraft::raft::SnapshotResponse;
use openraft::{ChangeMembers, Raft, ReadPolicy};
use parking_lot::Mutex;
use serde::Serialize;

use super::StateMachine;
use super::machine::Machine;
use super::membership::choose_voters;
use super::protocol::{
    self, MAX_COMMAND, MAX_SNAPSHOT, MembershipChange, PIECE, SnapshotPart, SnapshotPiece, SnapshotPull,
};
use super::snapshot::SnapshotStore;
use super::types::{Proposal, RaftId, RaftNode, Reply, Snapshot, TypeConfig};

/// How long a new learner may take to catch up.
const CATCH_UP_DEADLINE: Duration = Duration::from_secs(60);

pub(super) type RaftOf<S> = Raft<TypeConfig, Machine<S>>;

/// A snapshot on its way from the leader.
#[derive(Debug)]
struct Incoming {
    last_log_id: Option<super::types::LogId>,
    data: BytesMut,
}

/// Serves the control mesh.
pub(super) struct Server<S: StateMachine> {
    raft: OnceLock<RaftOf<S>>,
    snapshots: SnapshotStore,
    incoming: Mutex<HashMap<NodeId, Incoming>>,
    /// Takes all other methods, on the runtime of whoever started us: it must not delay a heartbeat.
    other: Arc<dyn Handler>,
    other_runtime: tokio::runtime::Handle,
}

fn unavailable(reason: impl Display) -> RpcError {
    RpcError::new(ErrorCode::Unavailable, reason.to_string())
}

fn internal(reason: impl Display) -> RpcError {
    RpcError::new(ErrorCode::Internal, reason.to_string())
}

fn answer<T: Serialize>(message: &T) -> Result<Response, RpcError> {
    Ok(Response::new(message)?)
}

impl<S: StateMachine> Server<S> {
    pub(super) fn new(
        snapshots: SnapshotStore,
        other: Arc<dyn Handler>,
        other_runtime: tokio::runtime::Handle,
    ) -> Self {
        Self { raft: OnceLock::new(), snapshots, incoming: Mutex::default(), other, other_runtime }
    }

    /// From now on Raft's methods are served.
    pub(super) fn serve(&self, raft: RaftOf<S>) {
        // Called once.
        let _ = self.raft.set(raft);
    }

    fn raft(&self) -> Result<&RaftOf<S>, RpcError> {
        self.raft.get().ok_or_else(|| unavailable("this node is starting"))
    }

    async fn dispatch(&self, from: NodeId, request: Request) -> Result<Response, RpcError> {
        match request.method {
            protocol::APPEND => {
                let rpc = protocol::from_bulk(&request.bulk)?;
                answer(&self.raft()?.append_entries(rpc).await.map_err(internal)?)
            }
            protocol::VOTE => answer(&self.raft()?.vote(request.decode()?).await.map_err(internal)?),
            protocol::PRE_VOTE => answer(&self.raft()?.pre_vote(request.decode()?).await.map_err(internal)?),
            protocol::TRANSFER_LEADER => {
                answer(&self.raft()?.handle_transfer_leader(request.decode()?).await.map_err(internal)?)
            }
            protocol::SNAPSHOT_PUSH => self.take_piece(from, request.decode()?, &request.bulk).await,
            protocol::SNAPSHOT_PULL => self.give_piece(from, request.decode()?).await,
            protocol::PROPOSE => {
                self.check_member(from)?;
                let Reply(reply) = self.propose(protocol::from_bulk(&request.bulk)?).await?;
                Ok(Response { header: Bytes::new(), bulk: reply.0 })
            }
            protocol::READ_INDEX => {
                self.check_member(from)?;
                answer(&self.read_index().await?)
            }
            protocol::CHANGE_MEMBERSHIP => {
                self.check_member(from)?;
                answer(&self.change_membership(request.decode()?).await?)
            }
            other => Err(RpcError::unknown_method(other)),
        }
    }

    /// A node that was removed keeps its certificate, but has no say any more.
    fn check_member(&self, node: NodeId) -> Result<(), RpcError> {
        let members = self.raft()?.metrics().borrow_watched().membership_config.clone();
        match members.get_node(&RaftId(node)) {
            Some(_) => Ok(()),
            None => Err(RpcError::new(ErrorCode::Refused, format!("{node} is not a member of this cluster"))),
        }
    }

    /// Puts a proposal into the log, if this node leads.
    pub(super) async fn propose(&self, proposal: Proposal) -> Result<Reply, RpcError> {
        let size = proposal.command.0.len();
        if size > MAX_COMMAND {
            let reason = format!("a command of {size} bytes, the limit is {MAX_COMMAND}");
            return Err(RpcError::new(ErrorCode::Refused, reason));
        }
        let written = self.raft()?.client_write(proposal).await.map_err(unavailable)?;
        Ok(written.data)
    }

    /// The index up to which a reader must have applied, if this node leads.
    pub(super) async fn read_index(&self) -> Result<u64, RpcError> {
        let read = self.raft()?.ensure_linearizable(ReadPolicy::ReadIndex).await.map_err(unavailable)?;
        Ok(read.index())
    }

    /// Changes the membership, if this node leads.
    pub(super) async fn change_membership(&self, change: MembershipChange) -> Result<(), RpcError> {
        let raft = self.raft()?;
        match change {
            MembershipChange::AddLearner { node, control } => {
                let added = raft.add_learner(RaftId(node), RaftNode { control }, true);
                tokio::time::timeout(CATCH_UP_DEADLINE, added)
                    .await
                    .map_err(|_| {
                        unavailable(format!("{node} has not caught up within {CATCH_UP_DEADLINE:?}"))
                    })?
                    .map_err(unavailable)?;
            }
            MembershipChange::SettleVoters => {
                let (members, voters) = self.members()?;
                self.set_voters(choose_voters(&members, &voters), &voters).await?;
            }
            MembershipChange::Remove { node } => {
                let (mut members, voters) = self.members()?;
                let leaving = RaftId(node);
                if !members.remove(&leaving) {
                    return Ok(());
                }
                let staying = choose_voters(&members, &voters);
                let Some(successor) = staying.first().filter(|_| *raft.node_id() == leaving) else {
                    self.set_voters(staying, &voters).await?;
                    let removal = ChangeMembers::RemoveNodes(BTreeSet::from([leaving]));
                    raft.change_membership(removal, false).await.map_err(unavailable)?;
                    return Ok(());
                };
                // A leader that removed itself would leave the others to wait for an election.
                let successor = voters.intersection(&staying).next().unwrap_or(successor);
                raft.trigger().transfer_leader(*successor).await.map_err(internal)?;
                return Err(unavailable("leadership is being handed over before this node is removed"));
            }
        }
        Ok(())
    }

    fn members(&self) -> Result<(BTreeSet<RaftId>, BTreeSet<RaftId>), RpcError> {
        let membership = self.raft()?.metrics().borrow_watched().membership_config.clone();
        Ok((membership.nodes().map(|(id, _)| *id).collect(), membership.voter_ids().collect()))
    }

    async fn set_voters(&self, wanted: BTreeSet<RaftId>, present: &BTreeSet<RaftId>) -> Result<(), RpcError> {
        if wanted != *present {
            self.raft()?
                .change_membership(ChangeMembers::ReplaceAllVoters(wanted), true)
                .await
                .map_err(unavailable)?;
        }
        Ok(())
    }

    /// Takes the next piece of a snapshot from the leader; installs it with the last one.
    async fn take_piece(
        &self,
        from: NodeId,
        piece: SnapshotPiece,
        data: &[u8],
    ) -> Result<Response, RpcError> {
        let raft = self.raft()?;
        let malformed =
            |reason: &str| RpcError::new(ErrorCode::Malformed, format!("snapshot piece: {reason}"));
        if piece.total > MAX_SNAPSHOT || piece.offset + data.len() as u64 > piece.total {
            return Err(malformed("too long"));
        }
        let complete = {
            let mut all = self.incoming.lock();
            if piece.offset == 0 {
                all.insert(from, Incoming { last_log_id: piece.meta.last_log_id, data: BytesMut::new() });
            }
            let incoming = all.get_mut(&from).ok_or_else(|| malformed("its beginning is missing"))?;
            if incoming.last_log_id != piece.meta.last_log_id || incoming.data.len() as u64 != piece.offset {
                return Err(malformed("out of order"));
            }
            incoming.data.extend_from_slice(data);
            if incoming.data.len() as u64 == piece.total { all.remove(&from) } else { None }
        };
        let response = match complete {
            Some(incoming) => {
                tracing::info!(%from, bytes = incoming.data.len(), "installing a snapshot from the leader");
                let snapshot = Snapshot { meta: piece.meta, snapshot: incoming.data.freeze() };
                raft.install_full_snapshot(piece.vote, snapshot).await.map_err(internal)?
            }
            None => SnapshotResponse::new(piece.vote),
        };
        answer(&response)
    }

    /// Gives a piece of the latest snapshot to a node that has lost its own.
    async fn give_piece(&self, from: NodeId, pull: SnapshotPull) -> Result<Response, RpcError> {
        self.check_member(from)?;
        let covering = self
            .snapshots
            .current()
            .filter(|s| s.meta.last_log_id.is_some_and(|last| last.index >= pull.covers));
        let Some(snapshot) = covering else {
            self.raft()?.trigger().snapshot().await.map_err(internal)?;
            return Err(unavailable("a snapshot that covers the entry is being made"));
        };
        let total = snapshot.snapshot.len();
        let from = usize::try_from(pull.offset).unwrap_or(total).min(total);
        let piece = snapshot.snapshot.slice(from..total.min(from + PIECE));
        let part = SnapshotPart { meta: snapshot.meta, total: total as u64 };
        Ok(Response::new(&part)?.with_bulk(piece))
    }
}

/// Lets an `Arc<Server>` be the mesh's handler.
pub(super) struct Service<S: StateMachine>(pub(super) Arc<Server<S>>);

impl<S: StateMachine> Handler for Service<S> {
    fn handle(&self, from: Caller, request: Request) -> BoxFuture<'static, Result<Response, RpcError>> {
        let server = self.0.clone();
        match from {
            Caller::Node(node) if protocol::METHODS.contains(&request.method) => {
                Box::pin(async move { server.dispatch(node, request).await })
            }
            _ => {
                let served = server.other_runtime.spawn(server.other.handle(from, request));
                Box::pin(async move { served.await.unwrap_or_else(|error| Err(internal(error))) })
            }
        }
    }
}
