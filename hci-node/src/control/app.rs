//! The control process as the API sees it: in a cluster or not, and the way from the one to the other.
//!
//! A node is in a cluster as soon as its identity is stored. Creating a cluster is made repeatable by a record of the
//! first command, which is kept until that command is committed: a crash in between is finished at the next start.

use std::{
    fs,
    io::Write,
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use netfabric::{
    pki::{ClusterCa, Identity, NodeKey},
    rpc::codec,
};
use parking_lot::RwLock;
use tokio::sync::Mutex;
use tokio_util::task::TaskTracker;

use super::{
    join::{
        admit::public_key,
        client::{self, Invitation},
        token::{Purpose, Secret, TokenString},
    },
    member::Member,
    metrics,
    options::NodeOptions,
    running::Running,
};
use crate::{
    api::{
        display::Tickets,
        problem::{Problem, ProblemKind},
        types as api,
    },
    state::{
        CaKey, Cluster, ClusterId, Command, NodeId, Op, Timestamp, Token, TokenId, TokenKind,
        command::NewNode,
    },
};

/// The first command of a cluster that is being created.
const FOUNDING_FILE: &str = "founding";
/// How long a node that has joined waits for the cluster's state.
const FOLLOW_PATIENCE: Duration = Duration::from_secs(20);
/// Uses and life of a join secret that was agreed in advance.
const AGREED_USES: u32 = 64;
const AGREED_SECONDS: i64 = 7 * 24 * 3600;

/// The control process.
pub struct App {
    /// Its settings.
    pub options: NodeOptions,
    running: RwLock<Option<Arc<Running>>>,
    /// One way into a cluster at a time.
    formation: Mutex<()>,
    tasks: TaskTracker,
    /// Tickets for VMs' screens that were given out here.
    pub(crate) display_tickets: Tickets,
}

fn failed(what: &str, error: impl std::fmt::Display) -> Problem {
    Problem::new(ProblemKind::Internal, format!("{what}: {error}"), "see the log: journalctl -u hci-node")
}

impl App {
    /// In no cluster yet.
    pub fn new(options: NodeOptions) -> Arc<Self> {
        Arc::new(Self {
            options,
            running: RwLock::new(None),
            formation: Mutex::new(()),
            tasks: TaskTracker::new(),
            display_tickets: Tickets::default(),
        })
    }

    /// This node as a member of its cluster.
    pub fn member(&self) -> Option<Arc<Member>> {
        self.running.read().as_ref().map(|running| running.member.clone())
    }

    /// Tasks that end with the process.
    pub fn tasks(&self) -> &TaskTracker {
        &self.tasks
    }

    /// Everything that runs for the membership.
    pub fn running(&self) -> Option<Arc<Running>> {
        self.running.read().clone()
    }

    /// Metrics of this node as text.
    pub async fn metrics(&self) -> String {
        match self.running() {
            Some(running) => metrics::text(&running).await,
            None => metrics::process_text(),
        }
    }

    fn refuse_second_cluster(&self) -> Result<(), Problem> {
        let Some(member) = self.member() else { return Ok(()) };
        let state = member.state();
        let name = state.cluster.as_ref().map_or("a cluster", |cluster| &cluster.name);
        Err(Problem::new(
            ProblemKind::Conflict,
            format!("this node is in {name} already"),
            "see it: hci cluster get",
        ))
    }

    /// Starts what a member runs, if this node is one.
    pub async fn resume(self: &Arc<Self>) -> anyhow::Result<bool> {
        let _one = self.formation.lock().await;
        let Some(identity) = Identity::load(&self.options.paths.identity())? else { return Ok(false) };
        self.start(identity).await?;
        self.finish_founding().await.map_err(|problem| anyhow::anyhow!(problem.detail))?;
        Ok(true)
    }

    async fn start(self: &Arc<Self>, identity: Identity) -> anyhow::Result<()> {
        let running = Running::start(self, identity).await?;
        *self.running.write() = Some(running);
        Ok(())
    }

    fn founding_file(&self) -> PathBuf {
        self.options.paths.identity().join(FOUNDING_FILE)
    }

    /// Creates a cluster with this node as its first member.
    pub async fn create_cluster(
        self: &Arc<Self>,
        request: api::CreateCluster,
        join_secret: Option<Secret>,
    ) -> Result<api::ClusterCreated, Problem> {
        let _one = self.formation.lock().await;
        self.refuse_second_cluster()?;
        let broken = |error: &dyn std::fmt::Display| failed("the cluster cannot be created", error);
        let addresses = self.options.addresses().map_err(|error| {
            Problem::new(
                ProblemKind::Invalid,
                format!("this node does not know its address: {error}"),
                "set advertise = \"ADDRESS\" in /etc/hci/node.toml",
            )
        })?;
        let name = request.node_name.unwrap_or_else(|| self.options.node_name.clone());
        let ca = ClusterCa::create(&request.name).map_err(|error| broken(&error))?;
        let (node, key) = (NodeId::random(), NodeKey::generate().map_err(|error| broken(&error))?);
        let csr = key.csr(&name).map_err(|error| broken(&error))?;
        let mut sans = vec![addresses.api.ip().to_string()];
        let control = addresses.control.ip().to_string();
        if !sans.contains(&control) {
            sans.push(control);
        }
        let certificate_pem = ca.issue_node(node, &csr, &sans).map_err(|error| broken(&error))?;
        let identity =
            Identity::new(&key, &certificate_pem, ca.cert_pem()).map_err(|error| broken(&error))?;
        let now = Timestamp::now();
        let secret = Secret::generate().map_err(|error| broken(&error))?;
        let token = |id, kind, secret: &Secret, expires| Token {
            id,
            kind,
            secret: secret.hash(),
            created: now,
            expires,
            used_by: Default::default(),
        };
        let admin = token(TokenId::random(), TokenKind::Admin, &secret, None);
        let join = join_secret.map(|secret| {
            let kind = TokenKind::Join { uses_left: AGREED_USES };
            token(secret.agreed_id(), kind, &secret, Some(now.plus_seconds(AGREED_SECONDS)))
        });
        let admin_token = TokenString {
            purpose: Purpose::Admin,
            id: admin.id,
            secret,
            ca: ca.fingerprint(),
            addresses: vec![addresses.api],
        };
        let cluster = Cluster {
            id: ClusterId::random(),
            name: request.name,
            ca_cert_pem: ca.cert_pem().to_owned(),
            ca_key_pem: CaKey(ca.key_pem()),
            ca_fingerprint: ca.fingerprint().to_string(),
            created: now,
        };
        let public_key_pem = public_key(&csr)?;
        let node = NewNode { id: node, name, addresses, public_key_pem, certificate_pem };
        let command = Command {
            at: now,
            task: None,
            op: Op::CreateCluster { cluster: Box::new(cluster), node, admin, join },
        };
        // A refusal is found before anything is stored.
        crate::state::ClusterState::default().apply(&command)?;
        self.record_founding(&command)?;
        identity.store(&self.options.paths.identity()).map_err(|error| broken(&error))?;
        self.start(identity).await.map_err(|error| broken(&format!("{error:#}")))?;
        self.finish_founding().await?;
        let cluster = self.cluster_info()?;
        Ok(api::ClusterCreated { cluster, admin_token: admin_token.encode() })
    }

    fn cluster_info(&self) -> Result<api::ClusterInfo, Problem> {
        let member = self.member().ok_or_else(|| failed("the cluster was created", "it is not seen"))?;
        let (state, members) = (member.state(), member.replicated.members());
        let leader = member.replicated.leadership().borrow().leader;
        let views = crate::api::views::Views {
            state: &state,
            reports: &Default::default(),
            etas: &Default::default(),
            members: &members,
            leader,
        };
        views.cluster().ok_or_else(|| failed("the cluster was created", "its state is not seen"))
    }

    fn record_founding(&self, command: &Command) -> Result<(), Problem> {
        let record = || -> std::io::Result<()> {
            let dir = self.options.paths.identity();
            fs::DirBuilder::new().recursive(true).mode(0o700).create(&dir)?;
            let path = self.founding_file();
            // Of an earlier attempt that never got an identity.
            let _ = fs::remove_file(&path);
            let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path)?;
            file.write_all(&codec::encode(command).map_err(std::io::Error::other)?)?;
            file.sync_all()
        };
        record().map_err(|error| failed("the cluster cannot be created", error))
    }

    /// Commits the first command, if that has not been done yet.
    async fn finish_founding(&self) -> Result<(), Problem> {
        let path = self.founding_file();
        let Ok(bytes) = fs::read(&path) else { return Ok(()) };
        let Some(running) = self.running() else { return Ok(()) };
        let broken = |error: &dyn std::fmt::Display| failed("the cluster cannot be created", error);
        let command: Command = codec::decode(&bytes).map_err(|error| broken(&error))?;
        let Op::CreateCluster { node, .. } = &command.op else {
            return Err(broken(&"its record is something else"));
        };
        running.initialize(node.addresses.control).await.map_err(|error| broken(&error))?;
        running.member.replicated.propose(command).await??;
        // A record that stays is applied again, which changes nothing.
        let _ = fs::remove_file(path);
        Ok(())
    }

    /// Waits until this node follows the cluster, so that what is asked next is answered. Membership is certain already.
    async fn wait_for_cluster(&self) {
        let Some(member) = self.member() else { return };
        let mut state = member.replicated.state();
        let follows = state.wait_for(|state| state.nodes.contains_key(&member.id));
        if tokio::time::timeout(FOLLOW_PATIENCE, follows).await.is_err() {
            tracing::warn!("this node is a member, but the cluster's leader has not let it in yet");
        }
    }

    /// Joins the cluster that a token is from.
    pub async fn join_with_token(
        self: &Arc<Self>,
        request: api::JoinCluster,
    ) -> Result<api::ClusterJoined, Problem> {
        let token = TokenString::decode(&request.token).map_err(|error| {
            Problem::new(
                ProblemKind::Invalid,
                error.to_string(),
                "make one on a member: hci cluster token create",
            )
        })?;
        if token.purpose != Purpose::Join {
            return Err(Problem::new(
                ProblemKind::Invalid,
                "this is a token for the API, not for joining",
                "make one on a member: hci cluster token create",
            ));
        }
        let name = request.node_name.unwrap_or_else(|| self.options.node_name.clone());
        self.join(&token.into(), &name).await
    }

    /// Joins a cluster.
    pub async fn join(
        self: &Arc<Self>,
        invitation: &Invitation,
        name: &str,
    ) -> Result<api::ClusterJoined, Problem> {
        let _one = self.formation.lock().await;
        self.refuse_second_cluster()?;
        let addresses = self.options.addresses().map_err(|error| {
            Problem::new(
                ProblemKind::Invalid,
                format!("this node does not know its address: {error}"),
                "set advertise = \"ADDRESS\" in /etc/hci/node.toml",
            )
        })?;
        // Of a cluster that was to be created here and never was.
        let _ = fs::remove_file(self.founding_file());
        let (identity, answer) =
            client::join(invitation, &self.options.paths.identity(), name, addresses).await?;
        let node = identity.node();
        self.start(identity)
            .await
            .map_err(|error| failed("the node has joined, but does not start", error))?;
        self.wait_for_cluster().await;
        Ok(api::ClusterJoined { cluster: answer.cluster, node: name.to_owned(), node_id: node.to_string() })
    }
}
