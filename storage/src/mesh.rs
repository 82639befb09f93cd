//! The real transport: replica messages over the Storage mesh.
//!
//! A mesh needs its handler when it starts and storage needs its transport when it starts. So: make a [`MeshTransport`], start
//! storage with it, start the mesh with [`crate::Storage::rpc_handler`], then [`MeshTransport::bind`] them.

use crate::poll::BusyPoll;
use crate::replica::protocol::{ReplicaReply, ReplicaRequest};
use crate::replica::server::ReplicaServer;
use crate::replica::wire;
use crate::transport::{PeerChange, Transport, TransportError};
use futures_util::future::BoxFuture;
use netfabric::NodeId;
use netfabric::mesh::{Mesh, PeerEvent};
use netfabric::rpc::{CallError, Caller, ErrorCode, Handler, Request, Response, RpcError};
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use tokio::sync::broadcast;

const EVENT_QUEUE: usize = 256;

/// A [`Transport`] over a mesh of class Storage.
#[derive(Debug)]
pub struct MeshTransport {
    mesh: OnceLock<Mesh>,
    changes: broadcast::Sender<PeerChange>,
}

impl MeshTransport {
    /// A transport that reaches nobody until it is bound.
    pub fn new() -> Arc<Self> {
        Arc::new(Self { mesh: OnceLock::new(), changes: broadcast::Sender::new(EVENT_QUEUE) })
    }

    /// Uses this mesh from now on, and forwards its events until the mesh is closed. Call once; later calls change nothing.
    pub async fn bind(self: Arc<Self>, mesh: Mesh) {
        let mut events = mesh.subscribe();
        if self.mesh.set(mesh).is_err() {
            return;
        }
        loop {
            let change = match events.recv().await {
                Ok(PeerEvent::Up { node }) => PeerChange::Up(node),
                Ok(PeerEvent::Down { node, .. }) => PeerChange::Down(node),
                Err(broadcast::error::RecvError::Lagged(_)) => continue,
                Err(broadcast::error::RecvError::Closed) => return,
            };
            // Nobody listens when no volume is open.
            let _ = self.changes.send(change);
        }
    }
}

impl Transport for MeshTransport {
    fn call(
        &self,
        to: NodeId,
        request: ReplicaRequest,
        deadline: Duration,
    ) -> BoxFuture<'static, Result<ReplicaReply, TransportError>> {
        let mesh = self.mesh.get().cloned();
        Box::pin(async move {
            let mesh = mesh.ok_or_else(|| TransportError::Unreachable("the mesh is not up yet".into()))?;
            let request =
                wire::encode_request(request).map_err(|e| TransportError::Protocol(e.to_string()))?;
            let response = mesh.call(to, request, deadline).await.map_err(|error| match error {
                CallError::Unreachable(_) | CallError::Reset(_) => {
                    TransportError::Unreachable(error.to_string())
                }
                CallError::Timeout => TransportError::Timeout,
                CallError::Remote(_) | CallError::Invalid(_) => TransportError::Protocol(error.to_string()),
            })?;
            wire::decode_reply(&response).map_err(|e| TransportError::Protocol(e.to_string()))
        })
    }

    fn subscribe(&self) -> broadcast::Receiver<PeerChange> {
        self.changes.subscribe()
    }
}

/// Serves replica requests that come over the mesh.
pub(crate) struct ReplicaHandler {
    pub(crate) server: Arc<ReplicaServer>,
    /// A coordinator that works keeps the shard awake for its next request.
    pub(crate) poll: Arc<BusyPoll>,
}

impl Handler for ReplicaHandler {
    fn handle(&self, from: Caller, request: Request) -> BoxFuture<'static, Result<Response, RpcError>> {
        let server = self.server.clone();
        self.poll.note();
        Box::pin(async move {
            let Caller::Node(node) = from else {
                return Err(RpcError::new(ErrorCode::Refused, "replicas serve nodes only"));
            };
            if request.method != wire::METHOD {
                return Err(RpcError::unknown_method(request.method));
            }
            let request = wire::decode_request(&request)?;
            Ok(wire::encode_reply(server.handle(node, request).await)?)
        })
    }
}
