//! The control plane's view of [`crate::consensus`].

use std::{net::SocketAddr, sync::Arc, time::Duration};

use futures_util::{FutureExt, future::BoxFuture};
use tokio::sync::watch;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::replicated::{Leadership, Member, MemberRole, Replicated, ReplicationError};
use crate::{
    consensus::{self, Consensus, ConsensusError, StateMachine},
    state::{ClusterState, Command, CommandResult, NodeId},
};

/// How long a majority may take to confirm a leader: renewals wait for it.
const CONFIRM_DEADLINE: Duration = Duration::from_millis(1500);

impl StateMachine for ClusterState {
    type Command = Command;
    type Output = CommandResult;

    fn apply(&mut self, command: Command) -> CommandResult {
        Self::apply(self, &command)
    }
}

impl From<ConsensusError> for ReplicationError {
    fn from(error: ConsensusError) -> Self {
        Self::Unavailable(error.to_string())
    }
}

/// Why the first member cannot begin.
#[derive(Debug, thiserror::Error)]
#[error("consensus cannot begin: {0}")]
pub struct InitializeError(#[from] ConsensusError);

/// Makes this node the first member.
pub async fn initialize(
    consensus: &Consensus<ClusterState>,
    control: SocketAddr,
) -> Result<(), InitializeError> {
    Ok(consensus.initialize(control).await?)
}

/// [`Replicated`] by Raft.
pub struct RaftState {
    consensus: Consensus<ClusterState>,
    leadership: watch::Receiver<Leadership>,
}

impl RaftState {
    /// Of this node.
    pub fn new(
        consensus: Consensus<ClusterState>,
        tasks: &TaskTracker,
        shutdown: &CancellationToken,
    ) -> Self {
        let mut raft = consensus.watch_leadership();
        let seen = |leadership: consensus::Leadership| Leadership {
            leader: leadership.leader,
            term: leadership.term,
        };
        let (publish, leadership) = watch::channel(seen(*raft.borrow_and_update()));
        let shutdown = shutdown.clone();
        tasks.spawn(async move {
            loop {
                tokio::select! {
                    () = shutdown.cancelled() => return,
                    changed = raft.changed() => if changed.is_err() { return },
                }
                publish.send_replace(seen(*raft.borrow_and_update()));
            }
        });
        Self { consensus, leadership }
    }
}

impl Replicated for RaftState {
    fn state(&self) -> watch::Receiver<Arc<ClusterState>> {
        self.consensus.watch()
    }

    fn leadership(&self) -> watch::Receiver<Leadership> {
        self.leadership.clone()
    }

    fn propose(&self, command: Command) -> BoxFuture<'static, Result<CommandResult, ReplicationError>> {
        let consensus = self.consensus.clone();
        async move { Ok(consensus.propose(&command).await?) }.boxed()
    }

    fn confirm_leadership(&self) -> BoxFuture<'static, Result<(), ReplicationError>> {
        let consensus = self.consensus.clone();
        async move {
            match tokio::time::timeout(CONFIRM_DEADLINE, consensus.read_barrier()).await {
                Ok(confirmed) => Ok(confirmed?),
                Err(_) => Err(ReplicationError::Unavailable("no majority in time".to_owned())),
            }
        }
        .boxed()
    }

    fn members(&self) -> Vec<Member> {
        let role = |role| match role {
            consensus::Role::Voter => MemberRole::Voter,
            consensus::Role::Learner => MemberRole::Learner,
        };
        self.consensus
            .members()
            .iter()
            .map(|member| Member { node: member.node, role: role(member.role) })
            .collect()
    }

    fn admit(&self, node: NodeId, control: SocketAddr) -> BoxFuture<'static, Result<(), ReplicationError>> {
        let consensus = self.consensus.clone();
        async move {
            if !consensus.members().iter().any(|member| member.node == node) {
                consensus.add_learner(node, control).await?;
            }
            consensus.promote_to_voter(node).await?;
            Ok(())
        }
        .boxed()
    }

    fn expel(&self, node: NodeId) -> BoxFuture<'static, Result<(), ReplicationError>> {
        let consensus = self.consensus.clone();
        async move { Ok(consensus.remove_member(node).await?) }.boxed()
    }
}
