//! The overlay of one node, as the data process runs it (one thread for the mesh of class Frames and all forwarding),
//! without the rest of the node.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use netfabric::NodeId;
use netfabric::mesh::{Class, Mesh, MeshConfig, PeerState};
use netfabric::overlay::{Overlay, OverlayOptions};
use netfabric::pki::{ClusterCa, Identity, NodeKey};
use netfabric::rpc::{Caller, ErrorCode, Handler, Request, Response, RpcError};
use tokio::runtime::Handle;
use tokio::sync::oneshot;

/// A running overlay with its mesh.
pub struct OverlayNode {
    /// The overlay.
    pub overlay: Arc<Overlay>,
    /// Its mesh.
    pub mesh: Mesh,
    runtime: Handle,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

/// The frames mesh carries no calls.
struct NoCalls;

impl Handler for NoCalls {
    fn handle(
        &self,
        _from: Caller,
        _request: Request,
    ) -> futures_util::future::BoxFuture<'static, Result<Response, RpcError>> {
        Box::pin(async {
            Err(RpcError { code: ErrorCode::UnknownMethod, message: "no calls here".to_owned() })
        })
    }
}

/// An identity for a node of a cluster.
pub fn identity(ca: &ClusterCa, node: NodeId) -> Result<Identity> {
    let key = NodeKey::generate()?;
    let certificate = ca.issue_node(node, &key.csr(&node.dns_name())?, &[])?;
    Ok(Identity::new(&key, &certificate, ca.cert_pem())?)
}

impl OverlayNode {
    /// Starts mesh and overlay on a thread of their own.
    pub fn start(identity: Identity, listen: SocketAddr) -> Result<Self> {
        let (started, result) = mpsc::channel();
        let (stop, stopped) = oneshot::channel();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let handle = runtime.handle().clone();
        let thread = std::thread::Builder::new().name("forwarding".to_owned()).spawn(move || {
            runtime.block_on(async move {
                let config = MeshConfig::new(Class::Frames, listen);
                let made = async {
                    let mesh = Mesh::start(identity, config, Arc::new(NoCalls)).await?;
                    let overlay = Overlay::start(mesh.clone(), OverlayOptions::default())?;
                    Ok::<_, anyhow::Error>((mesh, Arc::new(overlay)))
                };
                let made = made.await;
                let mesh = made.as_ref().ok().map(|(mesh, _)| mesh.clone());
                let _ = started.send(made);
                let _ = stopped.await;
                if let Some(mesh) = mesh {
                    mesh.close().await;
                }
            });
        })?;
        let (mesh, overlay) =
            result.recv_timeout(Duration::from_secs(10)).context("the overlay did not start")??;
        Ok(Self { overlay, mesh, runtime: handle, stop: Some(stop), thread: Some(thread) })
    }

    /// Names the peers.
    pub fn set_peers(&self, peers: BTreeMap<NodeId, SocketAddr>) {
        let _context = self.runtime.enter();
        self.mesh.set_peers(peers);
    }

    /// Names the peers and waits until all are linked.
    pub fn link(&self, peers: BTreeMap<NodeId, SocketAddr>) -> Result<()> {
        let nodes: Vec<_> = peers.keys().copied().collect();
        self.set_peers(peers);
        let deadline = Instant::now() + Duration::from_secs(10);
        for node in nodes {
            while !matches!(self.mesh.peer_state(node), PeerState::Up { .. }) {
                ensure!(Instant::now() < deadline, "no link to {node}: {:?}", self.mesh.peer_state(node));
                std::thread::sleep(Duration::from_millis(10));
            }
        }
        Ok(())
    }

    /// The address of its mesh.
    pub fn address(&self) -> Result<SocketAddr> {
        let address = self.mesh.local_addr();
        (address.port() != 0).then_some(address).ok_or_else(|| anyhow!("the mesh has no port"))
    }
}

impl Drop for OverlayNode {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // A panic has been printed by the thread itself.
            let _ = thread.join();
        }
    }
}
