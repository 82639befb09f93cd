//! The overlay switch and the mesh of class Frames, together on one thread of their own: a guest's frame costs one
//! wake-up on each node, and a busy disk delays none.

use std::{collections::BTreeMap, net::SocketAddr, sync::Arc, thread::JoinHandle};

use futures_util::future::BoxFuture;
use netfabric::{
    NodeId,
    mesh::{Class, Mesh, MeshConfig},
    overlay::{Fencing, Overlay, OverlayOptions},
    pki::Identity,
    rpc::{Caller, Handler, Request, Response, RpcError},
};
use tokio::{runtime::Handle, sync::oneshot};
use tokio_util::sync::CancellationToken;

use super::{engine::StartError, vmm_group};

/// The running overlay.
pub(crate) struct Frames {
    overlay: Overlay,
    mesh: Mesh,
    runtime: Handle,
    shutdown: CancellationToken,
    thread: parking_lot::Mutex<Option<JoinHandle<()>>>,
}

impl Frames {
    /// Starts thread, mesh and overlay. No frame passes before the fence is opened.
    pub(crate) async fn start(identity: Identity, config: MeshConfig) -> Result<Self, StartError> {
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(StartError::Thread)?;
        let handle = runtime.handle().clone();
        let shutdown = CancellationToken::new();
        let (started_in, started) = oneshot::channel();
        let ended = shutdown.clone();
        let run = move || {
            runtime.block_on(async move {
                // The caller is gone when it does not take the answer: nothing is left to run for.
                if started_in.send(start(identity, config).await).is_ok() {
                    ended.cancelled().await;
                }
            });
        };
        let thread =
            std::thread::Builder::new().name("frames".to_owned()).spawn(run).map_err(StartError::Thread)?;
        let vanished = |_| StartError::Thread(std::io::Error::other("the thread ended at once"));
        let (mesh, overlay) = started.await.map_err(vanished)??;
        Ok(Self { overlay, mesh, runtime: handle, shutdown, thread: parking_lot::Mutex::new(Some(thread)) })
    }

    pub(crate) fn overlay(&self) -> &Overlay {
        &self.overlay
    }

    pub(crate) fn mesh(&self) -> &Mesh {
        &self.mesh
    }

    /// Says who the peers are. What the mesh starts for them runs on the frames' thread.
    pub(crate) fn set_peers(&self, peers: BTreeMap<NodeId, SocketAddr>) {
        let _on_its_thread = self.runtime.enter();
        self.mesh.set_peers(peers);
    }

    /// Ends mesh and thread.
    pub(crate) async fn stop(&self) {
        self.mesh.close().await;
        self.shutdown.cancel();
        let thread = self.thread.lock().take();
        if let Some(thread) = thread {
            let joined = tokio::task::spawn_blocking(move || thread.join()).await;
            if !matches!(joined, Ok(Ok(()))) {
                tracing::error!("the frames' thread did not end in order");
            }
        }
    }
}

async fn start(identity: Identity, config: MeshConfig) -> Result<(Mesh, Overlay), StartError> {
    let mesh = Mesh::start(identity, config, Arc::new(NoCalls))
        .await
        .map_err(|source| StartError::Mesh { class: Class::Frames, source })?;
    let options = OverlayOptions { socket_group: vmm_group().map(nix::unistd::Gid::as_raw) };
    let overlay = Overlay::start(mesh.clone(), options)?;
    overlay.set_fenced(Fencing::Fenced);
    Ok((mesh, overlay))
}

/// Frames travel as datagrams: nobody calls over this mesh.
struct NoCalls;

impl Handler for NoCalls {
    fn handle(&self, _from: Caller, request: Request) -> BoxFuture<'static, Result<Response, RpcError>> {
        Box::pin(async move { Err(RpcError::unknown_method(request.method)) })
    }
}
