//! The simulated network: delays, some of them longer than any deadline, partitions in one or both directions, dead nodes.

use super::dice::Dice;
use super::flaws::{Flaw, Flawed};
use crate::replica::protocol::{ReplicaReply, ReplicaRequest};
use crate::replica::server::ReplicaServer;
use crate::transport::{PeerChange, Transport, TransportError};
use futures_util::future::BoxFuture;
use netfabric::NodeId;
use parking_lot::Mutex;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::broadcast;
use tokio_util::sync::CancellationToken;

#[derive(Default)]
struct State {
    processes: BTreeMap<NodeId, (Arc<ReplicaServer>, CancellationToken)>,
    /// Directions in which nothing arrives.
    cut: BTreeSet<(NodeId, NodeId)>,
    /// How many messages in a hundred are very late.
    late_percent: u64,
}

/// The network of a cluster.
pub(super) struct Network {
    state: Mutex<State>,
    events: broadcast::Sender<PeerChange>,
    dice: Dice,
    flawed: Flawed,
}

impl Network {
    pub(super) fn new(dice: Dice) -> Arc<Self> {
        let flawed = Flawed::new(dice.clone());
        Arc::new(Self { state: Mutex::default(), events: broadcast::Sender::new(64), dice, flawed })
    }

    /// From now on something is done wrong.
    pub(super) fn plant(&self, flaw: Flaw) {
        self.flawed.plant(flaw);
    }

    /// A process came up; it ends when the token is cancelled.
    pub(super) fn up(&self, node: NodeId, server: Arc<ReplicaServer>, alive: CancellationToken) {
        self.state.lock().processes.insert(node, (server, alive));
        let _ = self.events.send(PeerChange::Up(node));
    }

    pub(super) fn down(&self, node: NodeId) {
        self.state.lock().processes.remove(&node);
        let _ = self.events.send(PeerChange::Down(node));
    }

    pub(super) fn cut(&self, from: NodeId, to: NodeId) {
        self.state.lock().cut.insert((from, to));
    }

    pub(super) fn heal(&self) {
        let mut state = self.state.lock();
        state.cut.clear();
        state.late_percent = 0;
    }

    pub(super) fn set_late(&self, percent: u64) {
        self.state.lock().late_percent = percent;
    }

    /// Whether both are up and reach each other.
    pub(super) fn connected(&self, a: NodeId, b: NodeId) -> bool {
        let state = self.state.lock();
        let up = |n| state.processes.contains_key(&n);
        up(a) && up(b) && !state.cut.contains(&(a, b)) && !state.cut.contains(&(b, a))
    }

    fn is_cut(&self, from: NodeId, to: NodeId) -> bool {
        self.state.lock().cut.contains(&(from, to))
    }

    fn delay(&self) -> Duration {
        let late = self.state.lock().late_percent;
        if self.dice.percent(late) { self.dice.micros(6_000_000) } else { self.dice.micros(800) }
    }
}

/// The network as one node's process sees it.
pub(super) struct NodeTransport {
    pub(super) node: NodeId,
    pub(super) network: Arc<Network>,
}

impl Transport for NodeTransport {
    fn call(
        &self,
        to: NodeId,
        request: ReplicaRequest,
        deadline: Duration,
    ) -> BoxFuture<'static, Result<ReplicaReply, TransportError>> {
        let (network, from) = (self.network.clone(), self.node);
        Box::pin(async move {
            let there = network.state.lock().processes.get(&to).cloned();
            let Some((server, alive)) = there else {
                return Err(TransportError::Unreachable("the node is down".into()));
            };
            let (arrives, answers) = (network.delay(), network.delay());
            // A task of its own: what was sent arrives, whether or not the caller still waits.
            let served = tokio::spawn({
                let (network, alive) = (network.clone(), alive.clone());
                async move {
                    let serve = async {
                        tokio::time::sleep(arrives).await;
                        if network.is_cut(from, to) {
                            std::future::pending::<()>().await;
                        }
                        let reply = network.flawed.handle(&server, from, request).await;
                        tokio::time::sleep(answers).await;
                        if network.is_cut(to, from) {
                            std::future::pending::<()>().await;
                        }
                        reply
                    };
                    tokio::select! {
                        biased;
                        () = alive.cancelled() => Err(TransportError::Unreachable("the connection broke".into())),
                        reply = serve => Ok(reply),
                    }
                }
            });
            match tokio::time::timeout(deadline, served).await {
                Ok(Ok(result)) => result,
                Ok(Err(_)) => Err(TransportError::Unreachable("the simulation ended".into())),
                Err(_) => Err(TransportError::Timeout),
            }
        })
    }

    fn subscribe(&self) -> broadcast::Receiver<PeerChange> {
        self.network.events.subscribe()
    }
}
