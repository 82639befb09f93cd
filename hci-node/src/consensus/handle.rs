//! The handle to the replicated state machine.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use netfabric::NodeId;
use netfabric::mesh::{Mesh, MeshConfig, MeshError};
use netfabric::pki::Identity;
use netfabric::rpc::{CallError, ErrorCode, Handler, Request, Response, RpcError, codec};
use openraft::async_runtime::WatchReceiver;
use openraft::{Config, Raft, ServerState, SnapshotPolicy};
use parking_lot::Mutex;
use tokio::runtime::Runtime;
use tokio::sync::watch;

use super::StateMachine;
use super::log_store::{LogError, LogStore};
use super::machine::Machine;
use super::network::Network;
use super::protocol::{self, MembershipChange};
use super::recovery::{self, RecoveryError};
use super::server::{RaftOf, Server, Service};
use super::snapshot::SnapshotStore;
use super::types::{Opaque, Proposal, RaftId, RaftNode, Reply, RequestId};
use crate::meta_store::{MetaError, MetaStore};

/// Threads of Raft's own runtime.
const RAFT_THREADS: usize = 2;
/// How long a change of membership is tried; a new learner has to catch up.
const MEMBERSHIP_PATIENCE: Duration = Duration::from_secs(90);
/// Pause before an operation is tried again.
const RETRY: Duration = Duration::from_millis(50);
/// How long one attempt at a leader may take before the leader is asked for again.
const ATTEMPT: Duration = Duration::from_secs(3);
/// A snapshot is made after this many entries.
const SNAPSHOT_EVERY: u64 = 2048;
/// Entries kept behind a snapshot, so that a node that was away briefly needs no snapshot.
const KEEP_BEHIND_SNAPSHOT: u64 = 1024;
/// Entries in one message to a follower; their bytes are bounded by the log store.
const MAX_PAYLOAD_ENTRIES: u64 = 512;
/// How long a snapshot may take to be sent and installed.
const INSTALL_SNAPSHOT_TIMEOUT: Duration = Duration::from_secs(60);
/// How long a leader that ends waits for another to take over.
const HAND_OVER_DEADLINE: Duration = Duration::from_secs(1);
/// How long [`Consensus::shutdown`] waits for Raft's tasks.
const SHUTDOWN_DEADLINE: Duration = Duration::from_secs(5);

/// Raft's clock. Losing the leader without a word costs about `election.1` plus a time within `election`.
#[derive(Clone, Copy, Debug)]
pub struct Timing {
    /// Between two heartbeats.
    pub heartbeat: Duration,
    /// Shortest and longest time after which a silent leader is given up.
    pub election: (Duration, Duration),
    /// How long a proposal or a read is tried, elections included.
    pub patience: Duration,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            heartbeat: Duration::from_millis(150),
            election: (Duration::from_millis(500), Duration::from_millis(1000)),
            patience: Duration::from_secs(10),
        }
    }
}

/// How a node takes part.
pub struct Options {
    /// Who this node is.
    pub identity: Identity,
    /// The control mesh.
    pub mesh: MeshConfig,
    /// Where the log and the vote are kept.
    pub log_dir: PathBuf,
    /// Where snapshots are kept; the process' own store.
    pub store: MetaStore,
    /// Serves the methods of the control mesh that are not Raft's.
    pub handler: Arc<dyn Handler>,
    /// Raft's clock.
    pub timing: Timing,
    /// How long a node whose store was lost waits for a peer with a snapshot.
    pub recovery_deadline: Duration,
}

/// Why a node cannot take part.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The log or vote cannot be read.
    #[error(transparent)]
    Log(#[from] LogError),
    /// The snapshot cannot be read.
    #[error(transparent)]
    Store(#[from] MetaError),
    /// The state in the snapshot cannot be read.
    #[error("cannot restore the state from its snapshot")]
    Restore(#[source] std::io::Error),
    /// The control mesh cannot start.
    #[error(transparent)]
    Mesh(#[from] MeshError),
    /// The snapshot is lost and no peer gave one.
    #[error(transparent)]
    Recovery(#[from] RecoveryError),
    /// openraft refused to start.
    #[error("Raft cannot start: {0}")]
    Raft(String),
    /// Raft's runtime cannot start.
    #[error("cannot start Raft's threads")]
    Runtime(#[source] std::io::Error),
}

/// Why an operation failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConsensusError {
    /// There was no leader with a majority for too long. A proposal may still be applied later.
    #[error("the cluster has no majority or no leader: {0}")]
    Unavailable(String),
    /// The leader refused for good.
    #[error("refused by the leader: {0}")]
    Refused(String),
    /// A command or output cannot be encoded or decoded.
    #[error("cannot encode or decode: {0}")]
    Codec(String),
}

impl From<codec::EncodeError> for ConsensusError {
    fn from(error: codec::EncodeError) -> Self {
        Self::Codec(error.to_string())
    }
}

impl From<codec::DecodeError> for ConsensusError {
    fn from(error: codec::DecodeError) -> Self {
        Self::Codec(error.to_string())
    }
}

/// Who leads, as far as this node knows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Leadership {
    /// Raised by every election.
    pub term: u64,
    /// None during an election, or when cut off from the majority.
    pub leader: Option<NodeId>,
}

/// The part of a member.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Counts for majorities.
    Voter,
    /// Follows only.
    Learner,
}

/// A member of the group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Member {
    /// Which node.
    pub node: NodeId,
    /// UDP address of its control mesh.
    pub control: SocketAddr,
    /// Whether it votes.
    pub role: Role,
}

/// Figures of this node's part, for status and metrics.
#[derive(Clone, Debug)]
pub struct Status {
    /// Who leads.
    pub leadership: Leadership,
    /// Raft's name of what this node does now.
    pub state: &'static str,
    /// Newest entry in the log.
    pub last_log_index: u64,
    /// Newest entry that this node knows to be committed.
    pub committed_index: u64,
    /// Newest entry that was applied.
    pub applied_index: u64,
    /// Newest entry in the latest snapshot.
    pub snapshot_index: u64,
    /// Newest entry that was purged.
    pub purged_index: u64,
    /// All members.
    pub members: Vec<Member>,
    /// Set when Raft has stopped for good: the process must be restarted.
    pub failure: Option<String>,
}

struct Inner<S: StateMachine> {
    node: NodeId,
    mesh: Mesh,
    raft: RaftOf<S>,
    server: Arc<Server<S>>,
    state: watch::Receiver<Arc<S>>,
    leadership: watch::Receiver<Leadership>,
    /// Taken by shutdown. A runtime must not be dropped inside another.
    runtime: Mutex<Option<Runtime>>,
    handle: tokio::runtime::Handle,
    patience: Duration,
}

impl<S: StateMachine> Drop for Inner<S> {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.lock().take() {
            runtime.shutdown_background();
        }
    }
}

/// This node's part in the replicated state machine. Cheap to clone; all clones are the same part.
pub struct Consensus<S: StateMachine> {
    inner: Arc<Inner<S>>,
}

impl<S: StateMachine> Clone for Consensus<S> {
    fn clone(&self) -> Self {
        Self { inner: self.inner.clone() }
    }
}

impl<S: StateMachine> Consensus<S> {
    /// Starts with what is on disk. A new node waits until it is added to a cluster, or until [`Self::initialize`].
    pub async fn start(options: Options, initial: S) -> Result<Self, StartError> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(RAFT_THREADS)
            .thread_name("hci-raft")
            .enable_all()
            .build()
            .map_err(StartError::Runtime)?;
        let handle = runtime.handle().clone();
        let callers = tokio::runtime::Handle::current();
        let patience = options.timing.patience;
        let started = handle.spawn(start(options, initial, callers));
        let outcome = started.await.unwrap_or_else(|error| Err(StartError::Raft(error.to_string())));
        match outcome {
            Ok(parts) => {
                let Parts { mesh, raft, server, state, leadership } = parts;
                let runtime = Mutex::new(Some(runtime));
                let node = mesh.node();
                let inner = Inner { node, mesh, raft, server, state, leadership, runtime, handle, patience };
                Ok(Self { inner: Arc::new(inner) })
            }
            Err(error) => {
                runtime.shutdown_background();
                Err(error)
            }
        }
    }

    /// Makes this node the first and only member of a new cluster. Does nothing if it is a member already.
    pub async fn initialize(&self, control: SocketAddr) -> Result<(), ConsensusError> {
        let unavailable = |error: &dyn std::fmt::Display| ConsensusError::Unavailable(error.to_string());
        if self.inner.raft.is_initialized().await.map_err(|e| unavailable(&e))? {
            return Ok(());
        }
        let members = BTreeMap::from([(RaftId(self.inner.node), RaftNode { control })]);
        self.inner.raft.initialize(members).await.map_err(|e| unavailable(&e))
    }

    /// True once this node belongs to a cluster.
    pub async fn is_initialized(&self) -> bool {
        self.inner.raft.is_initialized().await.unwrap_or(false)
    }

    /// Proposes a command and waits until it is applied at the leader. Goes to the leader wherever it is, and tries
    /// again while the cluster elects one; the command is applied once.
    pub async fn propose(&self, command: &S::Command) -> Result<S::Output, ConsensusError> {
        let proposal = Proposal { id: RequestId::random(), command: Opaque(codec::encode(command)?) };
        let request = protocol::bulk_request(protocol::PROPOSE, &proposal)?;
        let reply = self
            .at_leader(self.inner.patience, ATTEMPT, request, |server| {
                let proposal = proposal.clone();
                async move {
                    let Reply(reply) = server.propose(proposal).await?;
                    Ok(Response { bulk: reply.0, ..Response::default() })
                }
            })
            .await?;
        Ok(codec::decode(&reply.bulk)?)
    }

    /// Waits until [`Self::state`] shows everything that was answered, anywhere, before this call.
    pub async fn read_barrier(&self) -> Result<(), ConsensusError> {
        let request = Request { method: protocol::READ_INDEX, ..Request::default() };
        let answer = self
            .at_leader(self.inner.patience, ATTEMPT, request, |server| async move {
                Ok(Response::new(&server.read_index().await?)?)
            })
            .await?;
        let index: u64 = answer.decode()?;
        let wait = self.inner.raft.wait(Some(self.inner.patience));
        wait.applied_index_at_least(Some(index), "read barrier")
            .await
            .map(|_| ())
            .map_err(|e| ConsensusError::Unavailable(e.to_string()))
    }

    /// The state as applied on this node: possibly behind the leader, see [`Self::read_barrier`].
    pub fn state(&self) -> Arc<S> {
        self.inner.state.borrow().clone()
    }

    /// Follows the state as applied on this node. Values may be skipped; the latest is always seen.
    pub fn watch(&self) -> watch::Receiver<Arc<S>> {
        self.inner.state.clone()
    }

    /// Who leads, as far as this node knows.
    pub fn leadership(&self) -> Leadership {
        *self.inner.leadership.borrow()
    }

    /// Follows who leads.
    pub fn watch_leadership(&self) -> watch::Receiver<Leadership> {
        self.inner.leadership.clone()
    }

    /// True if this node leads, as far as it knows.
    pub fn is_leader(&self) -> bool {
        self.leadership().leader == Some(self.inner.node)
    }

    /// Adds a node as a learner and waits until it has caught up. It must be running, with its mesh at `control`.
    pub async fn add_learner(&self, node: NodeId, control: SocketAddr) -> Result<(), ConsensusError> {
        self.change_membership(MembershipChange::AddLearner { node, control }).await
    }

    /// Lets a learner vote, if another voter is useful: three or five nodes vote, the rest follow. Chooses the voters
    /// anew, so that with a fifth node both learners become voters. Tells what the node is now.
    pub async fn promote_to_voter(&self, node: NodeId) -> Result<Role, ConsensusError> {
        self.change_membership(MembershipChange::SettleVoters).await?;
        self.read_barrier().await?;
        let found = self.members().into_iter().find(|member| member.node == node);
        found.map(|m| m.role).ok_or_else(|| ConsensusError::Refused(format!("{node} is not a member")))
    }

    /// Takes a node out of the group, a learner takes its place as a voter. The leader hands over first.
    pub async fn remove_member(&self, node: NodeId) -> Result<(), ConsensusError> {
        self.change_membership(MembershipChange::Remove { node }).await
    }

    async fn change_membership(&self, change: MembershipChange) -> Result<(), ConsensusError> {
        let request = Request::new(protocol::CHANGE_MEMBERSHIP, &change)?;
        self.at_leader(MEMBERSHIP_PATIENCE, MEMBERSHIP_PATIENCE, request, |server| async move {
            server.change_membership(change).await?;
            Ok(Response::default())
        })
        .await?;
        Ok(())
    }

    /// The members, as this node knows them.
    pub fn members(&self) -> Vec<Member> {
        members_of(&self.inner.raft.metrics().borrow_watched().membership_config)
    }

    /// Figures of this node's part.
    pub fn status(&self) -> Status {
        let metrics = self.inner.raft.metrics().borrow_watched().clone();
        let index = |id: Option<super::types::LogId>| id.map_or(0, |id| id.index);
        Status {
            leadership: leadership_of(&metrics),
            state: match metrics.state {
                ServerState::Learner => "learner",
                ServerState::Follower => "follower",
                ServerState::Candidate => "candidate",
                ServerState::Leader => "leader",
                ServerState::Shutdown => "stopped",
            },
            last_log_index: metrics.last_log_index.unwrap_or(0),
            committed_index: index(metrics.local_committed),
            applied_index: index(metrics.last_applied),
            snapshot_index: index(metrics.snapshot),
            purged_index: index(metrics.purged),
            members: members_of(&metrics.membership_config),
            failure: metrics.running_state.err().map(|error| error.to_string()),
        }
    }

    /// The control mesh, for the control plane's own calls.
    pub fn mesh(&self) -> &Mesh {
        &self.inner.mesh
    }

    /// Waits until Raft stops for good on this node, because of a failed disk or of a command that it does not know; tells
    /// why. The process must then end: a restart replays what is on disk.
    pub async fn failure(&self) -> String {
        let mut metrics = self.inner.raft.metrics();
        loop {
            if let Err(error) = &metrics.borrow_watched().running_state {
                return error.to_string();
            }
            if metrics.changed().await.is_err() {
                return "Raft has ended".to_owned();
            }
        }
    }

    /// If this node leads, lets the voter that is furthest ahead take over, so that nobody has to wait for an election.
    async fn hand_over(&self) {
        let metrics = self.inner.raft.metrics().borrow_watched().clone();
        let voters: Vec<RaftId> = metrics.membership_config.voter_ids().collect();
        // Known at the leader only.
        let followers = metrics.replication.unwrap_or_default();
        let candidates =
            followers.iter().filter(|(id, _)| **id != RaftId(self.inner.node) && voters.contains(id));
        let Some((successor, _)) = candidates.max_by_key(|(_, matched)| **matched) else { return };
        if self.inner.raft.trigger().transfer_leader(*successor).await.is_err() {
            return;
        }
        let mut leadership = self.inner.leadership.clone();
        let handed_over = leadership.wait_for(|l| l.leader.is_some_and(|leader| leader != self.inner.node));
        if tokio::time::timeout(HAND_OVER_DEADLINE, handed_over).await.is_err() {
            tracing::warn!(successor = %successor, "nobody took over leadership in time");
        }
    }

    /// Ends this node's part; a leader hands over first. Everything acknowledged is on disk already.
    pub async fn shutdown(&self) {
        self.hand_over().await;
        let inner = self.inner.clone();
        let stop = self.inner.handle.spawn(async move {
            // Fails only if it ended before.
            let _ = inner.raft.shutdown().await;
            inner.mesh.close().await;
        });
        if tokio::time::timeout(SHUTDOWN_DEADLINE, stop).await.is_err() {
            tracing::warn!("Raft did not end in time");
        }
        if let Some(runtime) = self.inner.runtime.lock().take() {
            runtime.shutdown_background();
        }
    }

    /// Ends without a word, as kill -9 would.
    #[cfg(test)]
    pub(super) fn kill(&self) {
        if let Some(runtime) = self.inner.runtime.lock().take() {
            runtime.shutdown_background();
        }
    }

    /// Makes a snapshot and purges the whole log behind it.
    #[cfg(test)]
    pub(super) async fn compact(&self) {
        let raft = &self.inner.raft;
        let applied = self.status().applied_index;
        raft.trigger().snapshot().await.unwrap();
        let covered = |m: &openraft::RaftMetrics<_>| m.snapshot.is_some_and(|id| id.index >= applied);
        raft.wait(Some(self.inner.patience)).metrics(covered, "snapshot").await.unwrap();
        raft.trigger().purge_log(applied).await.unwrap();
        let purged = |m: &openraft::RaftMetrics<_>| m.purged.is_some_and(|id| id.index >= applied);
        raft.wait(Some(self.inner.patience)).metrics(purged, "purge").await.unwrap();
    }

    /// Proposes under an id of the caller's, to play a retry.
    #[cfg(test)]
    pub(super) async fn propose_as(&self, id: RequestId, command: &S::Command) -> S::Output {
        let proposal = Proposal { id, command: Opaque(codec::encode(command).unwrap()) };
        let Reply(reply) = self.inner.server.propose(proposal).await.unwrap();
        codec::decode(&reply.0).unwrap()
    }

    /// Carries an operation out at the leader, here or there, until it works, is refused, or patience ends.
    async fn at_leader<F, Fut>(
        &self,
        patience: Duration,
        attempt: Duration,
        request: Request,
        here: F,
    ) -> Result<Response, ConsensusError>
    where
        F: Fn(Arc<Server<S>>) -> Fut,
        Fut: Future<Output = Result<Response, RpcError>> + Send,
    {
        let begun = Instant::now();
        let mut leadership = self.inner.leadership.clone();
        loop {
            let left = patience.saturating_sub(begun.elapsed());
            let attempt = attempt.min(left);
            let now = *leadership.borrow_and_update();
            let tried = async {
                match now.leader {
                    None => Err(CallError::Unreachable("no leader is known".to_owned())),
                    Some(leader) if leader == self.inner.node => {
                        let answered = tokio::time::timeout(attempt, here(self.inner.server.clone())).await;
                        answered.map_err(|_| CallError::Timeout)?.map_err(CallError::Remote)
                    }
                    Some(leader) => self.inner.mesh.call(leader, request.clone(), attempt).await,
                }
            };
            let outcome = tokio::select! {
                outcome = tried => outcome,
                // A leader that died silently would otherwise be waited for until the attempt times out.
                _ = leadership.wait_for(|l| *l != now) => Err(CallError::Reset("the leader changed".to_owned())),
            };
            let error = match outcome {
                Ok(response) => return Ok(response),
                Err(CallError::Remote(RpcError { code: ErrorCode::Refused, message })) => {
                    return Err(ConsensusError::Refused(message));
                }
                Err(CallError::Invalid(message)) => return Err(ConsensusError::Codec(message)),
                Err(error) => error,
            };
            if begun.elapsed() + RETRY >= patience {
                return Err(ConsensusError::Unavailable(error.to_string()));
            }
            tracing::debug!(%error, "trying again at the leader");
            tokio::time::sleep(RETRY).await;
        }
    }
}

/// What the start on Raft's runtime yields.
struct Parts<S: StateMachine> {
    mesh: Mesh,
    raft: RaftOf<S>,
    server: Arc<Server<S>>,
    state: watch::Receiver<Arc<S>>,
    leadership: watch::Receiver<Leadership>,
}

async fn start<S: StateMachine>(
    options: Options,
    initial: S,
    callers: tokio::runtime::Handle,
) -> Result<Parts<S>, StartError> {
    let log = LogStore::open(&options.log_dir)?;
    let snapshots = SnapshotStore::open(options.store, &options.log_dir)?;
    let server = Arc::new(Server::new(snapshots.clone(), options.handler, callers));
    let node = options.identity.node();
    let mesh = Mesh::start(options.identity, options.mesh, Arc::new(Service(server.clone()))).await?;
    let started = async {
        if let Some(purged) = log.purged() {
            recovery::ensure_snapshot(&mesh, &snapshots, purged, options.recovery_deadline).await?;
        }
        let (machine, state) = Machine::open(initial, snapshots).map_err(StartError::Restore)?;
        let config = Arc::new(config(options.timing).map_err(|e| StartError::Raft(e.to_string()))?);
        let network = Network::new(mesh.clone());
        let raft = Raft::new(RaftId(node), config, network, log, machine)
            .await
            .map_err(|e| StartError::Raft(e.to_string()))?;
        Ok((raft, state))
    };
    let (raft, state) = match started.await {
        Ok(started) => started,
        Err(error) => {
            mesh.close().await;
            return Err(error);
        }
    };
    let (publish, leadership) = watch::channel(Leadership::default());
    tokio::spawn(follow(raft.clone(), mesh.clone(), publish));
    server.serve(raft.clone());
    Ok(Parts { mesh, raft, server, state, leadership })
}

fn config(timing: Timing) -> Result<Config, openraft::ConfigError> {
    let millis = |duration: Duration| u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
    Config {
        cluster_name: "hci".to_owned(),
        heartbeat_interval: millis(timing.heartbeat),
        election_timeout_min: millis(timing.election.0),
        election_timeout_max: millis(timing.election.1),
        // A node that was cut off must not depose the leader when it comes back.
        enable_pre_vote: Some(true),
        install_snapshot_timeout: millis(INSTALL_SNAPSHOT_TIMEOUT),
        snapshot_policy: SnapshotPolicy::LogsSinceLast(SNAPSHOT_EVERY),
        max_in_snapshot_log_to_keep: KEEP_BEHIND_SNAPSHOT,
        max_payload_entries: MAX_PAYLOAD_ENTRIES,
        ..Config::default()
    }
    .validate()
}

/// Follows Raft's metrics: tells the mesh who the members are, and publishes who leads. Ends with Raft.
async fn follow<S: StateMachine>(raft: RaftOf<S>, mesh: Mesh, publish: watch::Sender<Leadership>) {
    let mut metrics = raft.metrics();
    let mut members = None;
    loop {
        let now = metrics.borrow_watched().clone();
        if members.as_ref() != Some(&now.membership_config) {
            let peers = members_of(&now.membership_config).into_iter().map(|m| (m.node, m.control)).collect();
            mesh.set_peers(peers);
            members = Some(now.membership_config.clone());
        }
        let leadership = leadership_of(&now);
        publish.send_if_modified(|published| {
            let modified = *published != leadership;
            *published = leadership;
            modified
        });
        if metrics.changed().await.is_err() {
            break;
        }
    }
    publish.send_replace(Leadership::default());
}

fn leadership_of(metrics: &openraft::RaftMetrics<super::types::TypeConfig>) -> Leadership {
    let stopped = metrics.running_state.is_err();
    let leader = metrics.current_leader.filter(|_| !stopped).map(|RaftId(node)| node);
    Leadership { term: metrics.current_term, leader }
}

fn members_of(membership: &super::types::StoredMembership) -> Vec<Member> {
    let voters: Vec<RaftId> = membership.voter_ids().collect();
    membership
        .nodes()
        .map(|(id, node)| Member {
            node: id.0,
            control: node.control,
            role: if voters.contains(id) { Role::Voter } else { Role::Learner },
        })
        .collect()
}
