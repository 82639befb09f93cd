//! How coordinators reach replica servers on other nodes.

use crate::replica::protocol::{ReplicaReply, ReplicaRequest};
use futures_util::future::BoxFuture;
use netfabric::NodeId;
use std::time::Duration;
use thiserror::Error;
use tokio::sync::broadcast;

/// Why there is no answer. Whether the request was carried out is unknown in every case.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
pub enum TransportError {
    /// There is no connection, or it was closed: known at once.
    #[error("unreachable: {0}")]
    Unreachable(String),
    /// Nothing came before the deadline.
    #[error("no answer within the deadline")]
    Timeout,
    /// The answer (or the request) could not be understood.
    #[error("protocol error: {0}")]
    Protocol(String),
}

/// A change of a peer's reachability.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PeerChange {
    /// Connected.
    Up(NodeId),
    /// Connection lost.
    Down(NodeId),
}

/// Carries requests to other nodes' replica servers: the Storage mesh, or a simulated network.
pub trait Transport: Send + Sync + 'static {
    /// Sends one request and waits for its reply, at most for `deadline`.
    fn call(
        &self,
        to: NodeId,
        request: ReplicaRequest,
        deadline: Duration,
    ) -> BoxFuture<'static, Result<ReplicaReply, TransportError>>;

    /// Changes of reachability from now on. A hint only: nothing depends on it but promptness.
    fn subscribe(&self) -> broadcast::Receiver<PeerChange>;
}
