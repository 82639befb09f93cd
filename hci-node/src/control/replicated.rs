//! What the control plane needs of consensus. A trait, so that tests can run on one node in memory.

use std::{net::SocketAddr, sync::Arc};

use futures_util::future::BoxFuture;
use tokio::sync::watch;

use crate::state::{ClusterState, Command, CommandResult, NodeId};

/// Who leads, as far as this node knows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Leadership {
    /// The leader.
    pub leader: Option<NodeId>,
    /// Its term; a new leader has a higher one.
    pub term: u64,
}

/// Part of a node in consensus.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MemberRole {
    /// It has a vote.
    Voter,
    /// It only follows.
    Learner,
}

/// A member of the consensus group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Member {
    /// The node.
    pub node: NodeId,
    /// Its part.
    pub role: MemberRole,
}

/// Why consensus did not answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReplicationError {
    /// No majority answers; whether the command was committed is not known.
    #[error("no majority of the nodes answers: {0}")]
    Unavailable(String),
    /// This node does not lead.
    #[error("another node leads")]
    NotLeader,
}

/// The replicated state.
pub trait Replicated: Send + Sync + 'static {
    /// This node's copy of the state, each time that it changed.
    fn state(&self) -> watch::Receiver<Arc<ClusterState>>;

    /// Who leads, each time that it changed.
    fn leadership(&self) -> watch::Receiver<Leadership>;

    /// Has a command committed, by whichever node leads, and answers what applying it gave.
    fn propose(&self, command: Command) -> BoxFuture<'static, Result<CommandResult, ReplicationError>>;

    /// Asks a majority whether this node still leads. What was granted before the answer is older than any new leader.
    fn confirm_leadership(&self) -> BoxFuture<'static, Result<(), ReplicationError>>;

    /// The consensus group.
    fn members(&self) -> Vec<Member>;

    /// Makes a node a learner, and a voter once it has caught up. Only on the leader; harmless when repeated.
    fn admit(&self, node: NodeId, control: SocketAddr) -> BoxFuture<'static, Result<(), ReplicationError>>;

    /// Takes a node out of the consensus group. Only on the leader, which hands over first when it is the one.
    fn expel(&self, node: NodeId) -> BoxFuture<'static, Result<(), ReplicationError>>;
}
