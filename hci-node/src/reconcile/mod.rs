//! The reconciler: every node makes what runs on it match its copy of the cluster state.
//!
//! It looks (cluster state, data process, VMs' directories), plans ([`plan`], pure), does what was planned
//! (`actions`), and looks again when something has changed. No step depends on a message that is sent once, so a crash
//! of any process at any point is repaired by the next look.
//!
//! | start reading at | it is |
//! |---|---|
//! | [`plan`] | what has to be done: pure |
//! | [`observed`] | what the planner looks at besides the state |
//! | `executor` | the loop, and the lease's standing |
//! | `actions` | how each thing is done |
//! | [`link`] | the link to the data process: configuration and lease |
//! | [`commits`] | serves `control.sock`: storage's commits |
//! | [`vm_process`] | VMM processes: started, found again, ended |
//! | `saved` | runs of VMs that are written to volumes, and made from them |
//! | `moving`, `arrivals` | runs that move to another node while their guests run |
//! | `variables` | what the firmware of VMs keeps |
//! | [`boot_files`] | kernels and initramfs on this node |
//! | [`channels`] | consoles, screens and sockets of guests on any node |
//! | [`peers`] | what reconcilers of different nodes ask each other |
//! | [`cluster`] | what is needed of the rest of the control process |
//!
//! **Self-fencing.** Guests run only under the node's lease. When it runs out, the data process lets I/O wait and
//! silences the ports, and VMMs are killed; that takes milliseconds, and the leader waits two seconds longer before it
//! starts them elsewhere. When the lease is back, nothing is started before the local copy of the state is as recent
//! as the lease.

mod actions;
mod arrivals;
pub mod boot_files;
pub mod channels;
pub mod cluster;
pub mod commits;
mod executor;
pub mod link;
mod machine;
mod moving;
pub mod observed;
pub mod peers;
pub mod plan;
mod renewing;
mod report;
mod saved;
#[cfg(test)]
mod tests;
mod variables;
pub mod vm_process;

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use netfabric::rpc::{Handler, ServeError, serve_unix};
use parking_lot::Mutex;
use tokio::sync::{Notify, mpsc, watch};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use self::{
    actions::Tools,
    arrivals::Arrivals,
    channels::{Channel, ChannelError, ChannelKind},
    cluster::{Cluster, Lease},
    commits::{CommitHandler, CommitServer},
    executor::{Executor, Shown},
    peers::{AskAgent, PeerHandler},
};
use crate::{
    agent::{AgentFailure, Agents, Answer, Request},
    data::client::DataClient,
    paths::NodePaths,
    state::{ContentHash, NodeId, VmId, report::LocalReport},
};

/// Greetings of data processes that wait to be noticed.
const GREETINGS: usize = 8;

/// What a reconciler needs.
pub struct Options {
    /// This node.
    pub me: NodeId,
    /// Its paths.
    pub paths: NodePaths,
    /// The cluster.
    pub cluster: Arc<dyn Cluster>,
    /// This node's lease, each time that it was renewed.
    pub lease: watch::Receiver<Lease>,
    /// How long a lease holds at most: one that a predecessor of this process had is over by then.
    pub node_lease: Duration,
}

/// The running reconciler of a node. Cheap to clone.
#[derive(Clone)]
pub struct Reconciler {
    me: NodeId,
    paths: NodePaths,
    cluster: Arc<dyn Cluster>,
    data: DataClient,
    shown: Arc<Mutex<Shown>>,
    peers: PeerHandler,
    agents: Agents,
    tasks: TaskTracker,
}

impl Reconciler {
    /// Starts it on the current runtime, and serves `control.sock`, until `shutdown`.
    pub fn start(options: Options, shutdown: CancellationToken) -> Self {
        let Options { me, paths, cluster, lease, node_lease } = options;
        let data = DataClient::new(paths.data_socket());
        let tasks = TaskTracker::new();
        let (started_in, started) = mpsc::channel(GREETINGS);
        let commits = Arc::new(CommitServer::new(cluster.clone(), paths.clone(), started_in));
        let link = link::start(data.clone(), lease.clone(), started, shutdown.clone(), &tasks);
        let agents = Agents::new(paths.clone());
        let tools = Tools {
            agents: agents.clone(),
            me,
            paths: paths.clone(),
            cluster: cluster.clone(),
            data: data.clone(),
            vm_ended: Arc::new(Notify::new()),
            aside: Default::default(),
        };
        let shown = Arc::new(Mutex::new(Shown::default()));
        let executor = Executor::new(tools, lease, node_lease, link, shown.clone());
        let (stop, attended) = (shutdown.clone(), agents.clone());
        tasks.spawn(async move {
            executor.run(stop).await;
            attended.dismiss();
        });
        tasks.spawn(variables::keep(cluster.clone(), paths.clone(), me, shutdown.clone()));
        let socket = paths.control_socket();
        tasks.spawn(async move {
            let served: Result<(), ServeError> =
                serve_unix(&socket, Arc::new(CommitHandler(commits)), shutdown).await;
            if let Err(error) = served {
                tracing::error!(%error, "the data process cannot be served");
            }
        });
        tasks.close();
        let arrivals = Arrivals::new(me, paths.clone(), cluster.clone());
        let peers = PeerHandler::new(paths.clone(), agents.clone(), arrivals);
        Self { me, paths, cluster, data, shown, peers, agents, tasks }
    }

    /// What this node sees, for the renewal of its lease.
    pub fn report(&self) -> LocalReport {
        self.shown.lock().report.clone()
    }

    /// The boot files that this node holds, for the same.
    pub fn boot_files(&self) -> Vec<ContentHash> {
        self.shown.lock().boot_files.clone()
    }

    /// Calls to the data process of this node.
    pub fn data(&self) -> &DataClient {
        &self.data
    }

    /// Serves [`peers::METHODS`] on the control mesh.
    pub fn peer_handler(&self) -> Arc<dyn Handler> {
        Arc::new(self.peers.clone())
    }

    /// Opens a channel into the guest of a VM that runs on `node`.
    pub async fn open_channel(
        &self,
        node: NodeId,
        vm: VmId,
        kind: ChannelKind,
    ) -> Result<Box<dyn Channel>, ChannelError> {
        channels::open(self.cluster.clone(), &self.paths, self.me, node, vm, kind).await
    }

    /// The last output of a VM that runs on `node`.
    pub async fn console_log(&self, node: NodeId, vm: VmId) -> Result<Bytes, ChannelError> {
        channels::log(self.cluster.clone(), &self.paths, self.me, node, vm).await
    }

    /// Asks the agent in the guest of a VM that runs on `node`.
    pub async fn ask_agent(&self, node: NodeId, vm: VmId, request: Request) -> Result<Answer, AgentFailure> {
        if node == self.me {
            return self.agents.ask(vm, request).await;
        }
        match peers::call(self.cluster.as_ref(), node, &AskAgent { vm, request }, Bytes::new()).await {
            Ok((answer, _)) => answer,
            Err(error) => {
                tracing::debug!(%vm, %error, "the agent of another node's guest cannot be asked");
                Err(AgentFailure::Silent)
            }
        }
    }

    /// Returns when everything has ended after the shutdown. VMMs go on.
    pub async fn stopped(&self) {
        self.tasks.wait().await;
    }
}
