//! The leader's part: leases, reports, and the loop that has done what is due.
//!
//! | module | it is |
//! |---|---|
//! | [`ha`] | what is due: pure |
//! | [`pace`] | how long rebuilding takes |
//! | [`pool`] | what is due for the pool's redundancy: pure |
//! | [`scheduler`] | which node a VM starts on: pure |
//!
//! Every node runs this loop; on those that do not lead it only waits.

pub mod ha;
pub mod pace;
pub mod pool;
pub mod scheduler;
#[cfg(test)]
mod tests;

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use self::{ha::Ha, pace::Pace};
use super::{
    lease::{LeaderLeases, LeaseStanding},
    replicated::{Replicated, ReplicationError},
};
use crate::state::{
    ClusterState, Command, Node, NodeId, NodeService, Op, Refusal, Timestamp, VolumeId, report::NodeReport,
};

/// How often the loop looks when nothing happens.
const TICK: Duration = Duration::from_millis(500);

/// What the leader knows beyond the replicated state. Empty on other nodes.
pub struct Leader {
    node: NodeId,
    replicated: Arc<dyn Replicated>,
    leases: Mutex<Option<LeaderLeases>>,
    pace: Mutex<Pace>,
    changed: Notify,
}

impl Leader {
    /// For this node.
    pub fn new(node: NodeId, replicated: Arc<dyn Replicated>) -> Arc<Self> {
        Arc::new(Self {
            node,
            replicated,
            leases: Mutex::new(None),
            pace: Mutex::default(),
            changed: Notify::new(),
        })
    }

    fn term_led(&self) -> Option<u64> {
        let leadership = *self.replicated.leadership().borrow();
        (leadership.leader == Some(self.node)).then_some(leadership.term)
    }

    /// Starts a term's leases when leadership is new, drops them when it is gone.
    fn follow_leadership(&self) -> Option<u64> {
        let term = self.term_led();
        let mut leases = self.leases.lock();
        match term {
            None => *leases = None,
            Some(term) if leases.as_ref().is_none_or(|leases| leases.term() != term) => {
                *leases = Some(LeaderLeases::new(term, Instant::now()));
            }
            Some(_) => {}
        }
        term
    }

    /// Renews a node's lease. What it answers is the revision of the state that the lease was renewed at.
    pub async fn renew(&self, node: NodeId, report: NodeReport) -> Result<u64, ReplicationError> {
        let term = self.follow_leadership().ok_or(ReplicationError::NotLeader)?;
        // Taken before the confirmation: whatever a later leader decides is newer than this revision.
        let revision = self.replicated.state().borrow().revision;
        self.replicated.confirm_leadership().await?;
        if self.term_led() != Some(term) {
            return Err(ReplicationError::NotLeader);
        }
        if let Some(leases) = self.leases.lock().as_mut().filter(|leases| leases.term() == term) {
            leases.renewed(node, report, Instant::now());
        }
        self.changed.notify_one();
        Ok(revision)
    }

    /// The latest reports of the nodes whose lease holds; empty unless this node leads.
    pub fn reports(&self) -> BTreeMap<NodeId, NodeReport> {
        self.leases.lock().as_ref().map(|leases| leases.reports(Instant::now())).unwrap_or_default()
    }

    /// How long volumes need until nothing of them is missing, as far as can be told; empty unless this node leads.
    pub fn etas(&self) -> BTreeMap<VolumeId, Duration> {
        self.pace.lock().etas(Instant::now())
    }

    /// Nodes whose lease has ended, or that have not renewed with this leader yet: nothing new is put there.
    pub fn silent(&self, state: &ClusterState) -> Vec<NodeId> {
        let now = Instant::now();
        let leases = self.leases.lock();
        let held = |node: &NodeId| {
            leases.as_ref().is_some_and(|leases| leases.standing(*node, now) == LeaseStanding::Held)
        };
        state.nodes.keys().copied().filter(|node| !held(node)).collect()
    }

    /// Has done what is due, for as long as this node leads, until `shutdown`.
    pub async fn run(self: Arc<Self>, shutdown: CancellationToken) {
        let mut leadership = self.replicated.leadership();
        let mut state = self.replicated.state();
        let mut ha = Ha::default();
        let mut term = None;
        let mut last_refusal: Option<Refusal> = None;
        loop {
            tokio::select! {
                () = shutdown.cancelled() => return,
                _ = leadership.changed() => {}
                _ = state.changed() => {}
                () = self.changed.notified() => {}
                () = tokio::time::sleep(TICK) => {}
            }
            let now_led = self.follow_leadership();
            if now_led != term {
                term = now_led;
                ha = Ha::default();
                *self.pace.lock() = Pace::default();
                tracing::info!(?term, "leadership changed");
            }
            if term.is_none() {
                // Nothing to do until leadership changes; state changes come and go.
                tokio::time::sleep(Duration::from_millis(20)).await;
                continue;
            }
            let commands = {
                let present = state.borrow_and_update().clone();
                self.pace.lock().look(&present, Instant::now());
                let leases = self.leases.lock();
                let Some(leases) = leases.as_ref() else { continue };
                ha.decide(&present, leases, Instant::now(), Timestamp::now())
            };
            for command in commands {
                let shown = format!("{:?}", command.op);
                match self.replicated.propose(command).await {
                    Ok(Ok(_)) => tracing::debug!(op = shown, "done"),
                    Ok(Err(refusal)) => {
                        if last_refusal.as_ref() != Some(&refusal) {
                            tracing::info!(op = shown, %refusal, "refused");
                            last_refusal = Some(refusal);
                        }
                    }
                    Err(error) => {
                        tracing::warn!(op = shown, %error, "cannot propose");
                        break;
                    }
                }
            }
        }
    }

    /// Lets nodes that joined into the consensus group, while this node leads, until `shutdown`.
    pub async fn admit_members(self: Arc<Self>, shutdown: CancellationToken) {
        loop {
            tokio::select! {
                () = shutdown.cancelled() => return,
                () = tokio::time::sleep(ADMIT_EVERY) => {}
            }
            if self.term_led().is_some() {
                tokio::select! {
                    () = shutdown.cancelled() => return,
                    () = self.admit_once() => {}
                }
            }
        }
    }

    async fn admit_once(&self) {
        let members = self.replicated.members();
        let state = self.replicated.state().borrow().clone();
        for node in state.nodes.values() {
            if node.service == NodeService::Leaving {
                if pool::leaving::is_ready_to_go(&state, node.id) {
                    self.let_go(node, members.iter().any(|member| member.node == node.id)).await;
                }
                continue;
            }
            let role = members.iter().find(|member| member.node == node.id).map(|member| member.role);
            if role == Some(super::replicated::MemberRole::Voter)
                || !self.wants_voter(&state, node.id, role.is_some())
            {
                continue;
            }
            match self.replicated.admit(node.id, node.addresses.control).await {
                Ok(()) => tracing::info!(node = node.name, "is in the consensus group"),
                Err(error) => tracing::info!(node = node.name, %error, "is not in the consensus group yet"),
            }
        }
    }

    /// Takes a node that carries nothing any more out of the consensus group, then out of the cluster.
    async fn let_go(&self, node: &Node, is_member: bool) {
        let gone = match is_member {
            true => self.replicated.expel(node.id).await.map(|()| Ok(())),
            false => self
                .replicated
                .propose(Command::now(Op::RemoveNode(node.id)))
                .await
                .map(|removed| removed.map(drop)),
        };
        match gone {
            Ok(Ok(())) => tracing::info!(node = node.name, is_member, "leaves the cluster"),
            Ok(Err(refusal)) => tracing::info!(node = node.name, %refusal, "cannot leave yet"),
            Err(error) => tracing::info!(node = node.name, %error, "cannot leave yet"),
        }
    }

    /// New nodes are learners at once. Only those that are heard of get a vote: a silent voter costs availability.
    fn wants_voter(&self, state: &ClusterState, node: NodeId, is_learner: bool) -> bool {
        !is_learner || !self.silent(state).contains(&node)
    }
}

/// How often the leader looks for nodes that are not in the consensus group yet.
const ADMIT_EVERY: Duration = Duration::from_millis(500);
