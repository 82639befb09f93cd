//! What the reconciler needs of the rest of the control process: the replicated state, a way to propose commands,
//! calls to other nodes, and the node's lease. A trait, so that tests can be the cluster.

use std::{sync::Arc, time::Duration};

use futures_util::future::BoxFuture;
use netfabric::rpc::{CallError, Request, Response};
use tokio::{sync::watch, time::Instant};

use crate::state::{ClusterState, NodeId, Op, Outcome, Refusal};

/// The cluster, as a node's reconciler sees it.
pub trait Cluster: Send + Sync + 'static {
    /// This node's copy of the state, each time that it changed.
    fn state(&self) -> watch::Receiver<Arc<ClusterState>>;

    /// Has a command committed by the leader, whichever node that is, and answers what it did.
    fn propose(&self, op: Op) -> BoxFuture<'static, Result<Outcome, ProposeError>>;

    /// Calls a method of [`super::peers`] on another node, over the control mesh.
    fn call_node(
        &self,
        node: NodeId,
        request: Request,
        deadline: Duration,
    ) -> BoxFuture<'static, Result<Response, CallError>>;
}

/// Why a command was not committed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProposeError {
    /// The state does not allow it.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// No answer from a majority; whether it was committed is not known.
    #[error("no majority of the nodes answers: {0}")]
    Unavailable(String),
}

/// The node's lease with the leader, as the control process' lease task knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lease {
    /// None was given since the control process started.
    None,
    /// The latest one.
    Until {
        /// When it ends or has ended.
        at: Instant,
        /// Revision of the leader's state when it renewed the lease. After a lapse nothing is started before this
        /// node's copy of the state has come so far: it may have lost its VMs meanwhile.
        as_of: u64,
    },
}
