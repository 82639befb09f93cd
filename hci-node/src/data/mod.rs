//! The data role: `hci data run`.
//!
//! One process for each node that serves guests' disks and networks: the storage crate with its replica server, the
//! overlay switch, and the QUIC meshes for both. It holds no opinion of its own: the control process tells it over
//! `data.sock` what to do, declaratively and whole, and renews the lease under which it serves. It may be killed at
//! any time: VMMs reconnect to its sockets, and the control process configures the next instance at once.
//!
//! | start reading at | it is |
//! |---|---|
//! | [`protocol`] | what control and data process say to each other |
//! | `engine` | the running data plane: meshes, storage, overlay, lease |
//! | `shard` | the thread on which storage and its mesh run |
//! | `frames` | the overlay and its mesh, on a thread of their own |
//! | `backends` | how volumes are offered to VMs: vhost-user-blk targets |
//! | `server` | serves `data.sock` |
//! | `uplink` | calls `control.sock`: storage's commits |
//! | [`client`] | the other side of `data.sock`, for the control process and for tests |
//! | [`disks`] | physical disks: inventory, preparing, finding them again |
//!
//! Threads: one each, with a runtime of its own, for storage (a shard) and for frames, on which guests' I/O runs to completion; a
//! small multi-threaded runtime for calls and whatever else is not on that way; and what stores, targets and ports start for
//! themselves.

mod backends;
pub mod client;
pub mod disks;
mod engine;
mod frames;
pub mod metrics;
pub mod protocol;
mod server;
mod shard;
mod uplink;

#[cfg(test)]
mod tests;

use std::{os::unix::fs::PermissionsExt, path::Path, sync::Arc, time::Duration};

use anyhow::Context;
use netfabric::{pki::Identity, rpc::serve_unix};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

pub use engine::EngineOptions;

use self::{engine::Engine, protocol::DataInstance, server::Server, uplink::Uplink};
/// `hci data run`: a node's settings are one set, for all of its roles.
pub use crate::control::options::Args;
use crate::paths::NodePaths;

/// Threads for calls, next to those that move guests' data.
const WORKERS: usize = 2;
/// How often a node that is in no cluster looks whether it is now.
const IDENTITY_POLL: Duration = Duration::from_millis(200);
/// Group whose members may connect to the guests' sockets: the user that VMMs run as is in it.
pub const VMM_GROUP: &str = "hci-vmm";

/// Runs the data process until SIGTERM.
pub fn run(args: Args) -> anyhow::Result<()> {
    let node = args.complete()?;
    let options = EngineOptions {
        paths: node.paths,
        listen_storage: node.listen_storage,
        listen_frames: node.listen_frames,
        link_mtu: node.link_mtu,
    };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(WORKERS)
        .enable_all()
        .thread_name("data")
        .build()
        .context("cannot start the runtime")?;
    let served = runtime.block_on(async {
        let shutdown = CancellationToken::new();
        let mut term = signal(SignalKind::terminate()).context("cannot watch for SIGTERM")?;
        let mut interrupt = signal(SignalKind::interrupt()).context("cannot watch for SIGINT")?;
        let stop = shutdown.clone();
        let watch_signals = tokio::spawn(async move {
            tokio::select! { _ = term.recv() => {}, _ = interrupt.recv() => {} }
            stop.cancel();
        });
        let served = serve(options, shutdown).await;
        watch_signals.abort();
        served
    });
    // A read that hangs in a broken disk must not keep the process from ending.
    runtime.shutdown_timeout(Duration::from_secs(1));
    served
}

/// Serves `data.sock` until `shutdown`; the data plane starts as soon as the node has an identity.
pub async fn serve(options: EngineOptions, shutdown: CancellationToken) -> anyhow::Result<()> {
    let paths = &options.paths;
    make_directories(paths)?;
    let instance = DataInstance::random();
    let server = Server::new(instance, paths.clone());
    let socket = paths.data_socket();
    let uplink = Uplink::new(paths.control_socket());

    let engine = async {
        let identity = wait_for_identity(paths).await?;
        let node = identity.node();
        let engine = Engine::start(instance, identity, &options, uplink.clone()).await?;
        tracing::info!(%node, ?instance, "the data plane is up");
        server.ready(engine.clone());
        uplink.hello(instance).await;
        engine.watch().await;
        anyhow::Ok(())
    };
    let sockets = async { Ok(serve_unix(&socket, Arc::new(server.clone()), shutdown.clone()).await?) };
    let ended: anyhow::Result<()> = tokio::select! {
        ended = engine => ended,
        ended = sockets => ended,
        () = shutdown.cancelled() => Ok(()),
    };
    shutdown.cancel();
    if let Ok(engine) = server.engine() {
        engine.close().await;
    }
    ended
}

async fn wait_for_identity(paths: &NodePaths) -> anyhow::Result<Identity> {
    let mut told = false;
    loop {
        match Identity::load(&paths.identity()) {
            Ok(Some(identity)) => return Ok(identity),
            Ok(None) if told => {}
            Ok(None) => {
                told = true;
                tracing::info!("this node is in no cluster yet: waiting");
            }
            Err(error) => return Err(error).context("the node's identity cannot be used"),
        }
        tokio::time::sleep(IDENTITY_POLL).await;
    }
}

fn make_directories(paths: &NodePaths) -> anyhow::Result<()> {
    for dir in
        [paths.state().to_owned(), paths.run().to_owned(), paths.data(), paths.disks(), paths.inflight()]
    {
        std::fs::create_dir_all(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
    }
    // Sockets get the permissions that the umask leaves: connecting needs the right to write.
    nix::sys::stat::umask(nix::sys::stat::Mode::S_IRWXO);
    Ok(())
}

/// Makes the directory of a guest's socket, unless it is there. It passes its group on, so that the unprivileged VMM may connect.
pub fn make_socket_directory(socket: &Path) -> std::io::Result<()> {
    let Some(dir) = socket.parent() else { return Ok(()) };
    if dir.is_dir() {
        return Ok(());
    }
    std::fs::create_dir_all(dir)?;
    give_to_vmms(dir)
}

fn give_to_vmms(dir: &Path) -> std::io::Result<()> {
    let Some(group) = vmm_group() else { return Ok(()) };
    nix::unistd::chown(dir, None, Some(group))?;
    std::fs::set_permissions(dir, std::fs::Permissions::from_mode(0o2750))
}

/// The group of the VMMs' user, when this process may give sockets to it.
fn vmm_group() -> Option<nix::unistd::Gid> {
    if !nix::unistd::geteuid().is_root() {
        return None;
    }
    nix::unistd::Group::from_name(VMM_GROUP).ok().flatten().map(|group| group.gid)
}
