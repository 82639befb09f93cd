//! What runs on a node that is in a cluster, and how it starts and ends.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use anyhow::Context;
use futures_util::{FutureExt, future::BoxFuture};
use netfabric::{
    mesh::{Class, Mesh, MeshConfig},
    pki::Identity,
    rpc::{CallError, Caller, ErrorCode, Handler, Request, Response, RpcError},
};
use parking_lot::RwLock;
use tokio::{net::TcpListener, sync::watch};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{
    app::App,
    export, import,
    leader::Leader,
    local::Local,
    member::{Member, Peers, from_bulk},
    raft::{self, RaftState},
    renew,
    rpc::{self, ApiAnswer, ApiCall, Renew, Renewed},
};
use crate::{
    api::{
        certificates, http,
        service::{self, ApiRequest, ApiResponse},
    },
    consensus::{self, Consensus, Timing},
    meta_store::MetaStore,
    reconcile::{cluster::Lease, peers},
    state::{ClusterState, NodeId, Op},
};

/// How long a node whose metadata were lost waits for a peer that has them.
const RECOVERY_DEADLINE: Duration = Duration::from_secs(120);
/// How long the parts get to end.
const STOP_DEADLINE: Duration = Duration::from_secs(3);
/// How long a node waits for its address to be free, after a restart for example.
const BIND_PATIENCE: Duration = Duration::from_secs(10);

/// A member's running parts.
pub struct Running {
    /// What they share.
    pub member: Arc<Member>,
    /// Consensus itself, for status and metrics.
    pub consensus: Consensus<ClusterState>,
    /// The lease as renewed last.
    pub lease: watch::Receiver<Lease>,
    local: Arc<Local>,
    service: Service,
    shutdown: CancellationToken,
    tasks: TaskTracker,
}

/// Serves the control mesh: what is not Raft's. The member exists only after the mesh has started.
#[derive(Clone, Default)]
struct Service {
    member: Arc<RwLock<Option<ServingMember>>>,
}

/// The member, and what serves the calls between reconcilers.
type ServingMember = (Arc<Member>, Arc<dyn Handler>);

impl Handler for Service {
    fn handle(&self, from: Caller, request: Request) -> BoxFuture<'static, Result<Response, RpcError>> {
        let member = self.member.read().clone();
        async move {
            let Some((member, reconciler)) = member else {
                return Err(RpcError::new(ErrorCode::Unavailable, "this node is starting"));
            };
            if let Caller::Node(node) = from
                && member.state().removed_nodes.contains(&node)
            {
                return Err(RpcError::new(ErrorCode::Refused, "this node has left the cluster"));
            }
            match request.method {
                rpc::RENEW => renewed(&member, from, &request).await,
                rpc::API => forwarded(&member, request).await,
                method if peers::METHODS.contains(&method) => reconciler.handle(from, request).await,
                method => Err(RpcError::unknown_method(method)),
            }
        }
        .boxed()
    }
}

async fn renewed(member: &Member, from: Caller, request: &Request) -> Result<Response, RpcError> {
    let Caller::Node(node) = from else {
        return Err(RpcError::new(ErrorCode::Refused, "only nodes have leases"));
    };
    if !member.state().nodes.contains_key(&node) {
        return Err(RpcError::new(ErrorCode::Refused, "this node is no member"));
    }
    let renew: Renew = from_bulk(&request.bulk)?;
    let renewed = member.leader.renew(node, renew.report).await;
    let as_of = renewed.map_err(|error| RpcError::new(ErrorCode::Unavailable, error.to_string()))?;
    Ok(Response::new(&Renewed { as_of })?)
}

async fn forwarded(member: &Arc<Member>, request: Request) -> Result<Response, RpcError> {
    let call: ApiCall = request.decode()?;
    let asked = ApiRequest { method: call.method, path: call.path, body: request.bulk };
    // Not passed on again: a request goes to one leader, or fails.
    let answer = service::answer_here(member, &asked).await.unwrap_or_else(ApiResponse::from);
    Ok(Response::new(&ApiAnswer { status: answer.status })?.with_bulk(answer.body))
}

struct MeshPeers(Mesh);

impl Peers for MeshPeers {
    fn call(
        &self,
        node: NodeId,
        request: Request,
        deadline: Duration,
    ) -> BoxFuture<'static, Result<Response, CallError>> {
        let mesh = self.0.clone();
        async move { mesh.call(node, request, deadline).await }.boxed()
    }
}

impl Running {
    /// Starts everything. HTTPS listens before this returns.
    pub async fn start(app: &Arc<App>, identity: Identity) -> anyhow::Result<Arc<Self>> {
        let options = &app.options;
        let id = identity.node();
        let listener = listen(options.listen_api).await?;
        let address = options.addresses().ok().map(|addresses| addresses.api.ip());
        let identity_dir = options.paths.identity();
        let tls = certificates::server_config(&identity, &identity_dir, &options.node_name, address)?;
        let dir = options.paths.state().join("node");
        std::fs::create_dir_all(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
        let meta = dir.join("meta");
        let opened = tokio::task::spawn_blocking(move || MetaStore::open_or_set_aside(&meta)).await?;
        let (store, _) = opened.context("the metadata store cannot be opened")?;
        let service = Service::default();
        let mesh = MeshConfig {
            link_mtu: options.link_mtu,
            ..MeshConfig::new(Class::Control, options.listen_control)
        };
        let raft = consensus::Options {
            identity,
            mesh,
            log_dir: dir.join("log"),
            store,
            handler: Arc::new(service.clone()),
            timing: Timing::default(),
            recovery_deadline: RECOVERY_DEADLINE,
        };
        let consensus =
            Consensus::start(raft, ClusterState::default()).await.context("consensus cannot start")?;
        let shutdown = CancellationToken::new();
        let tasks = TaskTracker::new();
        let replicated = Arc::new(RaftState::new(consensus.clone(), &tasks, &shutdown));
        let peers = Arc::new(MeshPeers(consensus.mesh().clone()));
        let (lease_tx, lease) = watch::channel(Lease::None);
        let local = Local::start(
            id,
            &options.paths,
            replicated.clone(),
            peers.clone(),
            lease.clone(),
            shutdown.clone(),
        );
        let member = Arc::new(Member {
            id,
            paths: options.paths.clone(),
            leader: Leader::new(id, replicated.clone()),
            replicated,
            peers,
            local: local.clone(),
            control: options.listen_control,
            exports: Default::default(),
        });
        *service.member.write() = Some((member.clone(), local.peer_handler()));

        tasks.spawn(member.leader.clone().run(shutdown.clone()));
        tasks.spawn(member.leader.clone().admit_members(shutdown.clone()));
        tasks.spawn(renew::run(member.clone(), lease_tx, shutdown.clone()));
        tasks.spawn(import::run(member.clone(), shutdown.clone()));
        tasks.spawn(export::run(member.clone(), shutdown.clone()));
        tasks.spawn(keep_addresses(app.clone(), member.clone(), shutdown.clone()));
        let https = http::serve_https(http::router(app.clone()), listener, tls, shutdown.clone());
        tasks.spawn(async move {
            if let Err(error) = https.await {
                tracing::error!(%error, "HTTPS has ended");
            }
        });
        tracing::info!(node = %id, "this node is a member");
        Ok(Arc::new(Self { member, consensus, lease, local, service, shutdown, tasks }))
    }

    /// Makes this node the first member of its cluster.
    pub async fn initialize(&self, control: SocketAddr) -> Result<(), raft::InitializeError> {
        raft::initialize(&self.consensus, control).await
    }

    /// Ends everything of the control process. Guests and the data process go on.
    pub async fn stop(&self) {
        self.shutdown.cancel();
        self.tasks.close();
        let ended = async {
            self.tasks.wait().await;
            self.local.stopped().await;
        };
        if tokio::time::timeout(STOP_DEADLINE, ended).await.is_err() {
            tracing::warn!("some tasks did not end in time");
        }
        self.consensus.shutdown().await;
        // The mesh holds the service, which holds the member, which holds the mesh.
        *self.service.member.write() = None;
    }
}

async fn listen(address: SocketAddr) -> anyhow::Result<TcpListener> {
    let begun = tokio::time::Instant::now();
    loop {
        match TcpListener::bind(address).await {
            Ok(listener) => return Ok(listener),
            Err(error) if begun.elapsed() < BIND_PATIENCE => {
                tracing::warn!(%address, %error, "cannot listen yet");
                tokio::time::sleep(Duration::from_millis(500)).await;
            }
            Err(error) => return Err(error).with_context(|| format!("cannot listen on {address}")),
        }
    }
}

/// Tells the cluster when this node is reached elsewhere than it says.
async fn keep_addresses(app: Arc<App>, member: Arc<Member>, shutdown: CancellationToken) {
    let mut states = member.replicated.state();
    loop {
        let known = states.borrow_and_update().nodes.get(&member.id).map(|node| node.addresses);
        if let (Some(known), Ok(now)) = (known, app.options.addresses())
            && known != now
        {
            let op = Op::SetNodeAddresses { node: member.id, addresses: now };
            match member.replicated.propose(crate::state::Command::now(op)).await {
                Ok(_) => tracing::info!(?now, "told the cluster this node's addresses"),
                Err(error) => tracing::debug!(%error, "cannot tell this node's addresses"),
            }
        }
        tokio::select! {
            () = shutdown.cancelled() => return,
            () = tokio::time::sleep(Duration::from_secs(10)) => {}
        }
    }
}
