//! The full mesh of mutually authenticated QUIC connections between the nodes of a cluster.
//!
//! | module | it is |
//! |---|---|
//! | [`config`] | [`Class`]es of traffic and [`MeshConfig`] |
//! | `transport` | quinn's settings for each class: windows, MTU, timeouts |
//! | `socket` | the UDP socket: buffers, and the cap on segmentation offload |
//! | `refusal` | peers whose kernel says that nobody listens there |
//! | `mtu` | reads the link's MTU |
//! | `tls` | mutual TLS 1.3 from a node's identity |
//! | `hello` | the first exchange on a connection: which process is this |
//! | `peer` | one peer: its link, the arbitration of duplicates, the dialler |
//! | `lane` | many calls on one stream, where calls are many and small |
//! | `serve` | what peers start: connections, calls, datagrams |
//! | `stats` | figures for metrics |
//!
//! A process starts one [`Mesh`] for each [`Class`] that it serves. [`Mesh::set_peers`] says who the peers are;
//! each has a task that dials until there is a link and waits for its end, with backoff. Both sides dial. When two
//! connections meet, that dialled by the lower [`NodeId`] stays; the other finishes its calls and is closed.
//!
//! A link that breaks is reported at once when the peer closes or resets it, within [`config::CONFIRM_REFUSAL`] of the next
//! packet when the peer's process was killed, after [`config::IDLE_TIMEOUT`] when it falls silent. A restarted process resets the connections of its predecessor: stateless reset keys are derived from
//! the node's key. Calls fail fast when there is no link; callers decide about retries.

pub mod config;
mod hello;
mod lane;
mod mtu;
mod peer;
mod refusal;
mod serve;
mod socket;
mod stats;
mod tls;
mod transport;

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use parking_lot::{Mutex, RwLock};
use tokio::sync::{broadcast, mpsc};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::NodeId;
use crate::pki::{Identity, PkiError};
use crate::rpc::frame::{self, Assembler};
use crate::rpc::{CallError, Handler, Request, Response};

pub use config::{Admission, Class, MeshConfig};
pub use peer::{DownReason, PeerState};
pub use stats::{MeshStats, PeerStats};

use peer::{Link, Peer};

/// Events kept for a subscriber that is slow.
const EVENT_QUEUE: usize = 256;
/// Received datagrams kept for a consumer that is slow; more are dropped and counted. 4096 jumbo datagrams are 36 MB.
const DATAGRAM_QUEUE: usize = 4096;
/// How long [`Mesh::close`] waits for peers to be told and for tasks to end.
const CLOSE_DEADLINE: Duration = Duration::from_secs(1);

/// Sent when a caller gives up.
const ABANDONED: quinn::VarInt = quinn::VarInt::from_u32(3);

/// A datagram and the node it came from.
pub type Datagram = (NodeId, Bytes);

/// Why a mesh cannot start.
#[derive(Debug, thiserror::Error)]
pub enum MeshError {
    /// The UDP socket cannot be made.
    #[error("cannot listen on UDP {address}")]
    Listen {
        /// Where.
        address: SocketAddr,
        /// What the system said.
        source: std::io::Error,
    },
    /// The identity is unusable.
    #[error(transparent)]
    Identity(#[from] PkiError),
    /// TLS refused the identity.
    #[error("TLS cannot use the node's identity: {0}")]
    Tls(String),
    /// The link's MTU is below what QUIC needs.
    #[error("a link MTU of {0} is too small, QUIC needs {min}", min = mtu::SMALLEST)]
    Mtu(u16),
}

/// What happens to peers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PeerEvent {
    /// A link to the peer is up.
    Up {
        /// Which peer.
        node: NodeId,
    },
    /// The link is gone; calls in flight on it have failed.
    Down {
        /// Which peer.
        node: NodeId,
        /// Why.
        reason: DownReason,
    },
}

/// Why a datagram was not sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DatagramError {
    /// There is no link to the node.
    #[error("no link to the node")]
    Unreachable,
    /// The datagram does not fit into one packet; see [`Mesh::max_datagram`].
    #[error("larger than the link's maximum")]
    TooLarge,
    /// The send buffer is full (only from [`Mesh::try_send_datagram`]).
    #[error("the send buffer is full")]
    Full,
    /// This class has no datagrams.
    #[error("this class of traffic has no datagrams")]
    Disabled,
}

/// What the tasks of a mesh share.
struct Shared {
    node: NodeId,
    config: MeshConfig,
    endpoint: quinn::Endpoint,
    client: quinn::ClientConfig,
    hello: hello::Hello,
    handler: Arc<dyn Handler>,
    /// Peers that were set, and nodes that were let in by [`Admission::Certified`].
    peers: RwLock<HashMap<NodeId, Arc<Peer>>>,
    events: broadcast::Sender<PeerEvent>,
    datagrams: mpsc::Sender<Datagram>,
    counters: stats::Counters,
    tasks: TaskTracker,
    shutdown: CancellationToken,
}

/// One class of traffic between this node and its peers. Cheap to clone; all clones are the same mesh.
#[derive(Clone)]
pub struct Mesh {
    shared: Arc<Shared>,
    received: Arc<Mutex<Option<mpsc::Receiver<Datagram>>>>,
}

impl Mesh {
    /// Starts serving and dialling on the current tokio runtime.
    pub async fn start(
        identity: Identity,
        config: MeshConfig,
        handler: Arc<dyn Handler>,
    ) -> Result<Self, MeshError> {
        let link_mtu = config.link_mtu.unwrap_or_else(|| mtu::of_address(config.listen.ip()));
        let payload = mtu::udp_payload(link_mtu, config.listen).ok_or(MeshError::Mtu(link_mtu))?;
        let transport = Arc::new(transport::transport(config.class, payload));
        let (server, client) = tls::configs(&identity, config.class, &transport)?;
        let endpoint_config = transport::endpoint(&identity, config.class, payload);
        let listen_error = |source| MeshError::Listen { address: config.listen, source };
        let (socket, refusals) = socket::bind(config.listen, payload).map_err(listen_error)?;
        let endpoint = quinn::Endpoint::new_with_abstract_socket(
            endpoint_config,
            Some(server),
            socket,
            Arc::new(quinn::TokioRuntime),
        )
        .map_err(listen_error)?;
        tracing::info!(class = %config.class, address = %config.listen, link_mtu, "mesh listens");

        let (datagrams, received) = mpsc::channel(DATAGRAM_QUEUE);
        let shared = Arc::new(Shared {
            node: identity.node(),
            hello: hello::Hello::new(config.class),
            config,
            endpoint,
            client,
            handler,
            peers: RwLock::default(),
            events: broadcast::Sender::new(EVENT_QUEUE),
            datagrams,
            counters: stats::Counters::default(),
            tasks: TaskTracker::new(),
            shutdown: CancellationToken::new(),
        });
        shared.tasks.spawn(serve::accept_connections(shared.clone()));
        shared.tasks.spawn(peer::take_refusals(shared.clone(), refusals));
        Ok(Self { shared, received: Arc::new(Mutex::new(Some(received))) })
    }

    /// This node.
    pub fn node(&self) -> NodeId {
        self.shared.node
    }

    /// The UDP address on which the mesh listens.
    pub fn local_addr(&self) -> SocketAddr {
        self.shared.endpoint.local_addr().unwrap_or(self.shared.config.listen)
    }

    /// Says who the peers are. Links to them are kept up; those to nodes not named are closed. A peer whose address
    /// changed is dialled there when its present link ends. This node itself is ignored.
    pub fn set_peers(&self, peers: BTreeMap<NodeId, SocketAddr>) {
        peer::set_peers(&self.shared, peers);
    }

    /// Calls a peer. Fails at once when there is no link to it.
    pub async fn call(
        &self,
        to: NodeId,
        request: Request,
        deadline: Duration,
    ) -> Result<Response, CallError> {
        let link = self.link(to).ok_or_else(|| CallError::Unreachable(format!("node {to}")))?;
        if let Some(lane) = &link.lane {
            return lane.call(&request, deadline).await;
        }
        let encoded = frame::encode_request(&request).map_err(|e| CallError::Invalid(e.to_string()))?;
        let exchange = async {
            let reset = |error: &dyn std::fmt::Display| CallError::Reset(error.to_string());
            let (send, mut receive) = link.connection.open_bi().await.map_err(|e| reset(&e))?;
            let mut send = Abandon(send);
            send.0.write_all_chunks(&mut [encoded.head, encoded.bulk]).await.map_err(|e| reset(&e))?;
            send.0.finish().map_err(|e| reset(&e))?;
            let assembler =
                hello::read_frame(&mut receive, Assembler::response()).await.map_err(|e| reset(&e))?;
            assembler.into_response().map_err(|e| reset(&e))?.map_err(CallError::Remote)
        };
        tokio::time::timeout(deadline, exchange).await.map_err(|_| CallError::Timeout)?
    }

    /// Events from now on. A subscriber that lags 256 events behind is told so by the channel.
    pub fn subscribe(&self) -> broadcast::Receiver<PeerEvent> {
        self.shared.events.subscribe()
    }

    /// How the link to a node stands.
    pub fn peer_state(&self, node: NodeId) -> PeerState {
        self.shared.peers.read().get(&node).map_or(PeerState::Unknown, |peer| peer.state())
    }

    /// Sends a datagram when there is room in the send buffer.
    pub async fn send_datagram(&self, to: NodeId, data: Bytes) -> Result<(), DatagramError> {
        let link = self.link(to).ok_or(DatagramError::Unreachable)?;
        link.connection.send_datagram_wait(data).await.map_err(|e| datagram_error(&e))
    }

    /// Sends a datagram if there is room in the send buffer now.
    pub fn try_send_datagram(&self, to: NodeId, data: Bytes) -> Result<(), DatagramError> {
        let link = self.link(to).ok_or(DatagramError::Unreachable)?;
        if link.connection.datagram_send_buffer_space() < data.len() {
            return Err(DatagramError::Full);
        }
        link.connection.send_datagram(data).map_err(|e| datagram_error(&e))
    }

    /// Largest datagram that the link to a node carries now; none without a link, or if the class has no datagrams.
    pub fn max_datagram(&self, to: NodeId) -> Option<usize> {
        self.link(to)?.connection.max_datagram_size()
    }

    /// The received datagrams. There is one receiver: the second call returns none.
    pub fn datagrams(&self) -> Option<mpsc::Receiver<Datagram>> {
        self.received.lock().take()
    }

    /// Figures for metrics.
    pub fn stats(&self) -> MeshStats {
        stats::collect(&self.shared)
    }

    /// Closes all connections and ends all tasks.
    pub async fn close(&self) {
        self.shared.shutdown.cancel();
        self.shared.endpoint.close(peer::CloseCode::Shutdown.into(), b"node is shutting down");
        self.shared.tasks.close();
        let drained = async {
            self.shared.endpoint.wait_idle().await;
            self.shared.tasks.wait().await;
        };
        if tokio::time::timeout(CLOSE_DEADLINE, drained).await.is_err() {
            tracing::debug!("peers did not confirm the close in time");
        }
    }

    fn link(&self, node: NodeId) -> Option<Link> {
        self.shared.peers.read().get(&node)?.link()
    }
}

impl std::fmt::Debug for Mesh {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Mesh")
            .field("node", &self.shared.node)
            .field("class", &self.shared.config.class)
            .finish()
    }
}

impl Shared {
    /// Broadcasts; having no subscriber is fine.
    fn emit(&self, event: PeerEvent) {
        let _ = self.events.send(event);
    }
}

/// Resets the request's stream when the call ends early. Without it quinn would end the stream in order, and the peer
/// would take half a request for a malformed one. Does nothing once the peer has all of it.
struct Abandon(quinn::SendStream);

impl Drop for Abandon {
    fn drop(&mut self) {
        let _ = self.0.reset(ABANDONED);
    }
}

fn datagram_error(error: &quinn::SendDatagramError) -> DatagramError {
    match error {
        quinn::SendDatagramError::UnsupportedByPeer | quinn::SendDatagramError::Disabled => {
            DatagramError::Disabled
        }
        quinn::SendDatagramError::TooLarge => DatagramError::TooLarge,
        quinn::SendDatagramError::ConnectionLost(_) => DatagramError::Unreachable,
    }
}
