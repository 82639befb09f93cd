//! Several nodes in one process, over real sockets and disks.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::future::BoxFuture;
use netfabric::NodeId;
use netfabric::mesh::{Class, MeshConfig};
use netfabric::pki::{ClusterCa, Identity, NodeKey};
use netfabric::rpc::{CallError, Caller, ErrorCode, Handler, Request, Response, RpcError};
use openraft::StorageError;
use openraft::testing::log::{StoreBuilder, Suite};
use serde::{Deserialize, Serialize};
use tempfile::TempDir;

use super::log_store::LogStore;
use super::machine::Machine;
use super::snapshot::SnapshotStore;
use super::types::{RequestId, TypeConfig};
use super::*;
use crate::meta_store::MetaStore;

/// Far longer than anything here takes; reached only when a test fails.
const LONG: Duration = Duration::from_secs(60);

/// Named counters.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Counters(BTreeMap<String, u64>);

#[derive(Clone, Debug, Serialize, Deserialize)]
struct Add(String, u64);

impl StateMachine for Counters {
    type Command = Add;
    type Output = u64;

    fn apply(&mut self, Add(name, amount): Add) -> u64 {
        let counter = self.0.entry(name).or_default();
        *counter += amount;
        *counter
    }
}

struct Builder;

impl StoreBuilder<TypeConfig, LogStore, Machine<Counters>, TempDir> for Builder {
    async fn build(&self) -> Result<(TempDir, LogStore, Machine<Counters>), StorageError<TypeConfig>> {
        let dir = tempfile::tempdir().unwrap();
        let log = LogStore::open(&dir.path().join("log")).unwrap();
        let store = MetaStore::open(&dir.path().join("meta")).unwrap();
        let snapshots = SnapshotStore::open(store, &dir.path().join("log")).unwrap();
        let (machine, _) = Machine::open(Counters::default(), snapshots).unwrap();
        Ok((dir, log, machine))
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_stores_pass_the_suite_of_openraft() {
    Suite::test_all(Builder).await.unwrap();
}

/// Serves what is not Raft's.
struct Other;

impl Handler for Other {
    fn handle(&self, _: Caller, request: Request) -> BoxFuture<'static, Result<Response, RpcError>> {
        Box::pin(async move { Ok(Response { header: request.header, bulk: request.bulk }) })
    }
}

struct Node {
    identity: Identity,
    dir: TempDir,
    address: SocketAddr,
    patience: Duration,
    running: Option<Consensus<Counters>>,
}

impl Node {
    async fn new(ca: &ClusterCa) -> Self {
        let key = NodeKey::generate().unwrap();
        let cert = ca.issue_node(NodeId::random(), &key.csr("n").unwrap(), &[]).unwrap();
        let identity = Identity::new(&key, &cert, ca.cert_pem()).unwrap();
        let address = "127.0.0.1:0".parse().unwrap();
        let dir = tempfile::tempdir().unwrap();
        let mut node = Self { identity, dir, address, patience: LONG, running: None };
        node.start().await;
        node.address = node.consensus().mesh().local_addr();
        node
    }

    fn id(&self) -> NodeId {
        self.identity.node()
    }

    fn consensus(&self) -> &Consensus<Counters> {
        self.running.as_ref().unwrap()
    }

    fn meta_dir(&self) -> PathBuf {
        self.dir.path().join("meta")
    }

    /// Starts; waits for a predecessor in this process to release its socket and files.
    async fn start(&mut self) {
        let begun = Instant::now();
        loop {
            match self.try_start().await {
                Ok(consensus) => break self.running = Some(consensus),
                Err(error) if begun.elapsed() > LONG => panic!("{error}"),
                Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
            }
        }
    }

    async fn try_start(&self) -> Result<Consensus<Counters>, StartError> {
        let (store, _) = MetaStore::open_or_set_aside(&self.meta_dir())?;
        let options = Options {
            identity: self.identity.clone(),
            mesh: MeshConfig::new(Class::Control, self.address),
            log_dir: self.dir.path().join("log"),
            store,
            handler: Arc::new(Other),
            timing: Timing {
                heartbeat: Duration::from_millis(50),
                election: (Duration::from_millis(250), Duration::from_millis(500)),
                patience: self.patience,
            },
            recovery_deadline: LONG,
        };
        Consensus::start(options, Counters::default()).await
    }

    fn scribble_over_store(&self) {
        let data = self.meta_dir().join("db");
        let length = std::fs::metadata(&data).unwrap().len();
        std::fs::write(&data, vec![0xa5; usize::try_from(length).unwrap()]).unwrap();
    }

    fn kill(&mut self) {
        self.running.take().unwrap().kill();
    }

    async fn stop(&mut self) {
        self.running.take().unwrap().shutdown().await;
    }

    async fn add(&self, name: &str, amount: u64) -> u64 {
        self.consensus().propose(&Add(name.to_owned(), amount)).await.unwrap()
    }

    /// The counter as everyone must see it now.
    async fn read(&self, name: &str) -> u64 {
        self.consensus().read_barrier().await.unwrap();
        self.consensus().state().0.get(name).copied().unwrap_or(0)
    }
}

/// A cluster of this many nodes, made as the product does it: one founds it, the others are added.
async fn cluster(size: usize) -> Vec<Node> {
    let ca = ClusterCa::create("test").unwrap();
    let mut nodes = vec![Node::new(&ca).await];
    nodes[0].consensus().initialize(nodes[0].address).await.unwrap();
    for _ in 1..size {
        join(&ca, &mut nodes).await;
    }
    nodes
}

async fn join(ca: &ClusterCa, nodes: &mut Vec<Node>) -> Role {
    let node = Node::new(ca).await;
    // Asked of a node that need not lead.
    let asked = nodes[nodes.len() - 1].consensus();
    asked.add_learner(node.id(), node.address).await.unwrap();
    let role = asked.promote_to_voter(node.id()).await.unwrap();
    nodes.push(node);
    role
}

/// Position of the leader, once all running nodes agree on one that runs.
async fn leader(nodes: &[Node]) -> usize {
    let begun = Instant::now();
    loop {
        assert!(begun.elapsed() < LONG, "no leader");
        let running = || nodes.iter().filter_map(|node| node.running.as_ref());
        let leaders: Vec<_> = running().map(|consensus| consensus.leadership().leader).collect();
        let found =
            nodes.iter().position(|n| n.running.is_some() && leaders.iter().all(|l| *l == Some(n.id())));
        match found {
            Some(position) => return position,
            None => tokio::time::sleep(Duration::from_millis(5)).await,
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_node_writes_and_reads_and_the_loss_of_the_leader_is_survived() {
    let mut nodes = cluster(3).await;
    assert!(nodes[0].consensus().members().iter().all(|member| member.role == Role::Voter));
    for node in &nodes {
        node.add("n", 1).await;
    }
    for node in &nodes {
        assert_eq!(node.read("n").await, 3);
    }

    let lost = leader(&nodes).await;
    let begun = Instant::now();
    nodes[lost].kill();
    let survivor = (lost + 1) % 3;
    assert_eq!(nodes[survivor].add("n", 1).await, 4);
    let pause = begun.elapsed();
    assert!(pause < Duration::from_secs(2), "no write for {pause:?}");
    assert_ne!(leader(&nodes).await, lost);

    nodes[lost].start().await;
    assert_eq!(nodes[lost].read("n").await, 4);
    assert_eq!(nodes[lost].add("n", 1).await, 5);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_acknowledged_survives_the_loss_of_all_nodes_at_once() {
    let mut nodes = cluster(3).await;
    let writers = (0..3).map(|writer| {
        let node = &nodes[writer];
        async move {
            for _ in 0..50 {
                node.add(&format!("writer {writer}"), 1).await;
            }
        }
    });
    futures_util::future::join_all(writers).await;
    nodes.iter_mut().for_each(Node::kill);
    for node in &mut nodes {
        node.start().await;
    }
    for (position, node) in nodes.iter().enumerate() {
        assert_eq!(node.read(&format!("writer {}", (position + 1) % 3)).await, 50);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_single_node_restarts_from_its_snapshot_and_log() {
    let mut nodes = cluster(1).await;
    nodes[0].add("n", 1).await;
    nodes[0].consensus().compact().await;
    nodes[0].add("n", 1).await;
    for _ in 0..2 {
        nodes[0].stop().await;
        nodes[0].start().await;
        assert_eq!(nodes[0].read("n").await, 2);
    }
    // With nobody to ask: the second copy of the snapshot stands in.
    nodes[0].stop().await;
    nodes[0].scribble_over_store();
    nodes[0].start().await;
    assert_eq!(nodes[0].read("n").await, 2);
    let status = nodes[0].consensus().status();
    assert!(status.purged_index > 0 && status.failure.is_none(), "{status:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_damaged_store_is_set_aside_and_reinstalled_from_a_peer() {
    let mut nodes = cluster(3).await;
    for node in &nodes {
        node.add("n", 7).await;
    }
    for node in &nodes {
        node.read("n").await;
        node.consensus().compact().await;
    }
    let victim = (leader(&nodes).await + 1) % 3;
    nodes[victim].stop().await;
    nodes[victim].scribble_over_store();
    std::fs::remove_file(nodes[victim].dir.path().join("log/snapshot.bin")).unwrap();
    nodes[victim].start().await;
    assert_eq!(nodes[victim].read("n").await, 21);
    assert_eq!(nodes[victim].add("n", 1).await, 22);
    // And it is on disk again: the next start needs no peer.
    nodes.iter_mut().for_each(Node::kill);
    nodes[victim].start().await;
    assert!(nodes[victim].consensus().state().0.contains_key("n"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_joins_late_gets_a_snapshot_and_five_vote_at_most() {
    let ca = ClusterCa::create("test").unwrap();
    let mut nodes = vec![Node::new(&ca).await];
    nodes[0].consensus().initialize(nodes[0].address).await.unwrap();
    // More than fits into one piece.
    let big = "x".repeat(900_000);
    for i in 0..6 {
        nodes[0].add(&format!("{i}{big}"), 1).await;
    }
    nodes[0].consensus().compact().await;
    let expected = [Role::Voter, Role::Voter, Role::Learner, Role::Voter];
    for role in expected {
        assert_eq!(join(&ca, &mut nodes).await, role);
    }
    assert_eq!(nodes[4].read(&format!("5{big}")).await, 1);
    let voters = |node: &Node| {
        node.consensus().members().into_iter().filter(|member| member.role == Role::Voter).count()
    };
    assert_eq!(voters(&nodes[0]), 5);

    // The leader itself is removed: it hands over, and of the four left three vote.
    let leaving = leader(&nodes).await;
    let (asked, gone) = ((leaving + 1) % 5, nodes[leaving].id());
    nodes[asked].consensus().remove_member(gone).await.unwrap();
    nodes[asked].read("n").await;
    assert_eq!((nodes[asked].consensus().members().len(), voters(&nodes[asked])), (4, 3));
    nodes[asked].add("n", 1).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_retried_proposal_is_applied_once_even_by_a_new_leader() {
    let mut nodes = cluster(3).await;
    let (id, command) = (RequestId::random(), Add("n".to_owned(), 1));
    let first = leader(&nodes).await;
    for _ in 0..2 {
        assert_eq!(nodes[first].consensus().propose_as(id, &command).await, 1);
    }
    nodes[first].kill();
    let second = leader(&nodes).await;
    nodes[second].read("n").await;
    assert_eq!(nodes[second].consensus().propose_as(id, &command).await, 1);
    assert_eq!(nodes[second].read("n").await, 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn garbage_and_strangers_are_refused_and_other_methods_are_passed_on() {
    let ca = ClusterCa::create("test").unwrap();
    let mut nodes = vec![Node::new(&ca).await];
    nodes[0].consensus().initialize(nodes[0].address).await.unwrap();
    join(&ca, &mut nodes).await;
    let to = nodes[0].id();
    for method in protocol::METHODS.take(16) {
        let garbage = Request { method, header: vec![0xff; 40].into(), bulk: vec![0xff; 40].into() };
        match nodes[1].consensus().mesh().call(to, garbage, LONG).await {
            Err(CallError::Remote(error)) => {
                assert!(matches!(error.code, ErrorCode::Malformed | ErrorCode::UnknownMethod), "{error}");
            }
            // Has no parameters.
            Ok(_) if method == protocol::READ_INDEX => {}
            other => panic!("{method:#x}: {other:?}"),
        }
    }
    let too_large = nodes[1].consensus().propose(&Add("x".repeat(protocol::MAX_COMMAND), 1)).await;
    assert!(matches!(too_large, Err(ConsensusError::Refused(_))), "{too_large:?}");
    let other = Request { method: 0x0200, bulk: vec![1].into(), ..Request::default() };
    assert_eq!(nodes[1].consensus().mesh().call(to, other, LONG).await.unwrap().bulk, vec![1]);

    // Certified, but not a member.
    let stranger = Node::new(&ca).await;
    let begun = Instant::now();
    let refused = loop {
        // Said again each time: its consensus, which knows no members, may not have set its own peers yet.
        stranger.consensus().mesh().set_peers(BTreeMap::from([(to, nodes[0].address)]));
        let change =
            Request::new(protocol::CHANGE_MEMBERSHIP, &protocol::MembershipChange::Remove { node: to });
        match stranger.consensus().mesh().call(to, change.unwrap(), LONG).await {
            Err(CallError::Unreachable(_)) if begun.elapsed() < LONG => {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            outcome => break outcome,
        }
    };
    assert!(
        matches!(refused, Err(CallError::Remote(RpcError { code: ErrorCode::Refused, .. }))),
        "{refused:?}"
    );
    nodes[0].add("n", 1).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_that_ends_in_order_hands_over() {
    let mut nodes = cluster(3).await;
    nodes[0].add("n", 1).await;
    let (leaving, term) = (leader(&nodes).await, nodes[0].consensus().leadership().term);
    nodes[leaving].stop().await;
    let next = leader(&nodes).await;
    assert_ne!(next, leaving);
    // One election, at once: nobody had to give the old leader up.
    assert_eq!(nodes[next].consensus().leadership().term, term + 1);
    assert_eq!(nodes[next].add("n", 1).await, 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_majority_nothing_is_acknowledged() {
    let mut nodes = cluster(3).await;
    nodes.iter_mut().for_each(Node::kill);
    nodes[0].patience = Duration::from_millis(1500);
    nodes[0].start().await;
    let outcome = nodes[0].consensus().propose(&Add("n".to_owned(), 1)).await;
    assert!(matches!(outcome, Err(ConsensusError::Unavailable(_))), "{outcome:?}");
    assert!(nodes[0].consensus().read_barrier().await.is_err());
    nodes[1].start().await;
    nodes[1].add("m", 1).await;
}
