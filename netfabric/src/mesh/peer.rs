//! One peer: its link, the arbitration between duplicate connections, and the task that dials it.

use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Mutex, RwLock};
use quinn::{ConnectionError, VarInt};
use tokio::sync::{Notify, watch};
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::config::{BACKOFF, CONFIRM_REFUSAL, CONFIRMATIONS, HANDSHAKE_TIMEOUT, RETIRE_AFTER};
use super::hello::Instance;
use super::lane::Lane;
use super::refusal::Refusals;
use super::stats::Totals;
use super::{PeerEvent, Shared, serve};
use crate::NodeId;

/// Why we close a connection; the peer sees the code. Part of the protocol: never renumber.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum CloseCode {
    /// This process ends.
    Shutdown = 1,
    /// The node is not, or no longer, a peer.
    NotAPeer = 2,
    /// Another connection to the same process stays.
    Duplicate = 3,
    /// The other end of this connection was replaced by a new process.
    Superseded = 4,
    /// The first exchange failed.
    BadHello = 5,
    /// A lane ended or had bytes on it that are no frame.
    BrokenLane = 6,
    /// Nobody listens at the other end: its kernel refused our packets.
    Refused = 7,
}

impl From<CloseCode> for VarInt {
    fn from(code: CloseCode) -> Self {
        Self::from_u32(code as u32)
    }
}

/// Why a link went down.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DownReason {
    /// The peer said goodbye: its process ended in order.
    Closed,
    /// The peer's process was restarted.
    Restarted,
    /// No process listens on the peer's port any more.
    Refused,
    /// Nothing was heard for [`super::config::IDLE_TIMEOUT`].
    Silent,
    /// We closed it: the node is no longer a peer, or this mesh closes.
    Local,
    /// Anything else, such as a protocol violation.
    Failed(String),
}

impl DownReason {
    fn of(error: &ConnectionError) -> Self {
        match error {
            ConnectionError::ApplicationClosed(close) if close.error_code == CloseCode::Superseded.into() => {
                Self::Restarted
            }
            ConnectionError::ApplicationClosed(_) | ConnectionError::ConnectionClosed(_) => Self::Closed,
            ConnectionError::Reset => Self::Restarted,
            ConnectionError::TimedOut => Self::Silent,
            ConnectionError::LocallyClosed => Self::Local,
            other => Self::Failed(other.to_string()),
        }
    }
}

impl fmt::Display for DownReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Closed => f.write_str("the peer closed it"),
            Self::Restarted => f.write_str("the peer restarted"),
            Self::Refused => f.write_str("the peer's process is gone"),
            Self::Silent => f.write_str("nothing was heard from the peer"),
            Self::Local => f.write_str("closed on this side"),
            Self::Failed(reason) => f.write_str(reason),
        }
    }
}

/// How the link to a peer stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PeerState {
    /// Not a peer.
    Unknown,
    /// No link; being dialled.
    Connecting {
        /// Attempts since the last link.
        attempts: u32,
        /// Why the last one failed.
        last_error: Option<String>,
    },
    /// There is a link.
    Up {
        /// Since when.
        since: Instant,
        /// Smoothed round-trip time.
        rtt: Duration,
    },
}

/// An authenticated connection that carries calls.
#[derive(Clone, Debug)]
pub(super) struct Link {
    pub(super) connection: quinn::Connection,
    /// Which of the two nodes dialled.
    pub(super) dialer: NodeId,
    /// Which process is at the other end.
    pub(super) instance: Instance,
    /// The stream for our calls, in classes that have one.
    pub(super) lane: Option<Arc<Lane>>,
}

#[derive(Debug, Default)]
struct Slot {
    link: Option<(Link, Instant)>,
    attempts: u32,
    last_error: Option<String>,
    /// Figures of links that ended.
    past: Totals,
    links: u64,
}

/// A node that was set as a peer or let in.
#[derive(Debug)]
pub(super) struct Peer {
    pub(super) node: NodeId,
    address: RwLock<Option<SocketAddr>>,
    slot: Mutex<Slot>,
    up: watch::Sender<bool>,
    /// Told when a packet of the present link was refused.
    refused: Notify,
    stop: CancellationToken,
}

impl Peer {
    fn new(node: NodeId, address: Option<SocketAddr>) -> Arc<Self> {
        Arc::new(Self {
            node,
            address: RwLock::new(address),
            slot: Mutex::default(),
            up: watch::Sender::new(false),
            refused: Notify::new(),
            stop: CancellationToken::new(),
        })
    }

    pub(super) fn link(&self) -> Option<Link> {
        self.slot.lock().link.as_ref().map(|(link, _)| link.clone())
    }

    pub(super) fn state(&self) -> PeerState {
        let slot = self.slot.lock();
        match &slot.link {
            Some((link, since)) => PeerState::Up { since: *since, rtt: link.connection.rtt() },
            None => PeerState::Connecting { attempts: slot.attempts, last_error: slot.last_error.clone() },
        }
    }

    /// Takes note that a packet to this address was refused.
    pub(super) fn note_refusal(&self, address: SocketAddr) {
        let here = |link: &Link| {
            let remote = link.connection.remote_address();
            (remote.ip().to_canonical(), remote.port()) == (address.ip(), address.port())
        };
        if self.link().as_ref().is_some_and(here) {
            // Kept for nobody: it says nothing about a link to come.
            self.refused.notify_waiters();
        }
    }

    /// Figures of all links so far, the present link's round-trip time, and how often a link came up.
    pub(super) fn totals(&self) -> (Totals, Option<Duration>, u64) {
        let slot = self.slot.lock();
        let mut totals = slot.past;
        let rtt = slot.link.as_ref().map(|(link, _)| {
            totals.add(&link.connection.stats());
            link.connection.rtt()
        });
        (totals, rtt, slot.links)
    }
}

/// Makes the peers what `wanted` says.
pub(super) fn set_peers(shared: &Arc<Shared>, mut wanted: BTreeMap<NodeId, SocketAddr>) {
    wanted.remove(&shared.node);
    let mut peers = shared.peers.write();
    peers.retain(|node, peer| {
        // A node that was let in without having been set stays: the next `set_peers` may learn of it from this link.
        let keep = wanted.contains_key(node) || peer.address.read().is_none();
        if !keep {
            peer.stop.cancel();
            if let Some(link) = peer.link() {
                link.connection.close(CloseCode::NotAPeer.into(), b"no longer a peer");
            }
        }
        keep
    });
    for (node, address) in wanted {
        let peer = peers.entry(node).or_insert_with(|| Peer::new(node, None));
        let dialled_before = peer.address.write().replace(address).is_some();
        if !dialled_before {
            shared.tasks.spawn(keep_connected(shared.clone(), peer.clone()));
        }
    }
}

/// The peer's entry, made on the spot for a node that was let in without having been set.
fn entry(shared: &Shared, node: NodeId) -> Arc<Peer> {
    shared.peers.write().entry(node).or_insert_with(|| Peer::new(node, None)).clone()
}

/// Dials until there is a link, waits for its end, and again.
async fn keep_connected(shared: Arc<Shared>, peer: Arc<Peer>) {
    let mut up = peer.up.subscribe();
    let mut backoff = *BACKOFF.start();
    let dial = async {
        if shared.node > peer.node {
            // The other side's connection would win anyway: give it a moment, to save a duplicate.
            let _ = timeout(*BACKOFF.start(), up.wait_for(|up| *up)).await;
        }
        loop {
            if up.wait_for(|up| !*up).await.is_err() {
                return;
            }
            match dial_once(&shared, &peer).await {
                Ok(()) => backoff = *BACKOFF.start(),
                Err(reason) => {
                    tracing::debug!(class = %shared.config.class, peer = %peer.node, reason, "no link yet");
                    let mut slot = peer.slot.lock();
                    slot.attempts = slot.attempts.saturating_add(1);
                    slot.last_error = Some(reason);
                }
            }
            // Also after a success, so that a link that ends at once does not make a busy loop. Jitter keeps nodes
            // that lost the same peer from dialling in step.
            sleep(backoff.mul_f64(rand::random_range(0.5..1.0))).await;
            backoff = (backoff * 2).min(*BACKOFF.end());
        }
    };
    tokio::select! {
        () = dial => {}
        () = peer.stop.cancelled() => {}
        () = shared.shutdown.cancelled() => {}
    }
}

/// One attempt. When it succeeds the peer has a link, this one or a better one.
async fn dial_once(shared: &Arc<Shared>, peer: &Arc<Peer>) -> Result<(), String> {
    let Some(address) = *peer.address.read() else { return Err("no address".to_owned()) };
    let attempt = async {
        let connecting = shared
            .endpoint
            .connect_with(shared.client.clone(), address, &peer.node.dns_name())
            .map_err(|e| e.to_string())?;
        let connection = connecting.await.map_err(|e| e.to_string())?;
        let hello = shared.hello.greet(&connection).await.map_err(|e| {
            connection.close(CloseCode::BadHello.into(), b"no hello");
            e.to_string()
        })?;
        Ok::<_, String>(Link { connection, dialer: shared.node, instance: hello.instance, lane: None })
    };
    let link = timeout(HANDSHAKE_TIMEOUT, attempt)
        .await
        .map_err(|_| format!("no answer from {address} within {HANDSHAKE_TIMEOUT:?}"))??;
    if peer.stop.is_cancelled() {
        link.connection.close(CloseCode::NotAPeer.into(), b"no longer a peer");
        return Err("no longer a peer".to_owned());
    }
    adopt(shared, peer, link);
    Ok(())
}

/// Takes a connection that a node dialled to us.
pub(super) fn adopt_incoming(shared: &Arc<Shared>, node: NodeId, link: Link) {
    adopt(shared, &entry(shared, node), link);
}

/// What happens when a connection meets the present one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    /// The new one stays; the present one finishes its calls.
    Replace,
    /// The new one stays; the present one belongs to a dead process.
    Supersede,
    /// The present one stays; the new one finishes what the peer may have begun on it.
    Keep,
}

/// Decides by values that both ends know, so that both decide alike.
fn arbitrate(present: (NodeId, Instance), new: (NodeId, Instance), lower: NodeId) -> Verdict {
    if present.1 != new.1 {
        Verdict::Supersede
    } else if new.0 == lower || present.0 == new.0 {
        // A second connection dialled from the same side means that this side has lost the first.
        Verdict::Replace
    } else {
        Verdict::Keep
    }
}

fn adopt(shared: &Arc<Shared>, peer: &Arc<Peer>, mut new: Link) {
    let mut slot = peer.slot.lock();
    let present = slot.link.as_ref().map(|(link, _)| link).filter(|l| l.connection.close_reason().is_none());
    let verdict = present.map(|present| {
        let lower = shared.node.min(peer.node);
        arbitrate((present.dialer, present.instance), (new.dialer, new.instance), lower)
    });
    serve::start(shared, peer.node, &new.connection);
    if verdict == Some(Verdict::Keep) {
        retire(shared, new.connection);
        return;
    }
    if shared.config.class.has_lanes() {
        new.lane = Some(Lane::open(shared, &new.connection));
    }
    shared.tasks.spawn(watch_link(shared.clone(), peer.clone(), new.connection.clone()));
    tracing::debug!(class = %shared.config.class, peer = %peer.node, ?verdict, "link up");
    let old = slot.link.replace((new, Instant::now()));
    slot.attempts = 0;
    slot.last_error = None;
    slot.links += 1;
    if let Some((old, _)) = old {
        slot.past.add(&old.connection.stats());
        match verdict {
            Some(Verdict::Replace) => retire(shared, old.connection),
            _ => {
                old.connection.close(CloseCode::Superseded.into(), b"superseded by a new process");
                shared.emit(PeerEvent::Down { node: peer.node, reason: DownReason::Restarted });
            }
        }
    }
    if verdict != Some(Verdict::Replace) {
        shared.emit(PeerEvent::Up { node: peer.node });
    }
    peer.up.send_replace(true);
}

/// Lets a connection finish its calls, then closes it.
fn retire(shared: &Arc<Shared>, connection: quinn::Connection) {
    let shutdown = shared.shutdown.clone();
    shared.tasks.spawn(async move {
        tokio::select! {
            () = sleep(RETIRE_AFTER) => {}
            _ = connection.closed() => {}
            () = shutdown.cancelled() => {}
        }
        connection.close(CloseCode::Duplicate.into(), b"another connection stays");
    });
}

/// Waits for the end of a link and reports it, unless another has taken its place.
async fn watch_link(shared: Arc<Shared>, peer: Arc<Peer>, connection: quinn::Connection) {
    let reason = tokio::select! {
        error = connection.closed() => DownReason::of(&error),
        () = refused(&peer, &connection) => {
            connection.close(CloseCode::Refused.into(), b"nobody listens");
            DownReason::Refused
        }
    };
    let mut slot = peer.slot.lock();
    let current =
        slot.link.as_ref().is_some_and(|(link, _)| link.connection.stable_id() == connection.stable_id());
    if current {
        tracing::info!(class = %shared.config.class, peer = %peer.node, %reason, "link down");
        slot.link = None;
        slot.past.add(&connection.stats());
        shared.emit(PeerEvent::Down { node: peer.node, reason });
        peer.up.send_replace(false);
    }
}

/// Waits until the peer refuses packets and nothing is heard from it. What a process that was killed had sent may still arrive after the first
/// refusals, and kernels limit how often they refuse (Linux: six times, then once a second): so the link is listened to several times. The
/// packet that was refused is one that a living peer would answer; later silence counts only while another was sent.
async fn refused(peer: &Peer, connection: &quinn::Connection) {
    loop {
        peer.refused.notified().await;
        for listened in 0..CONFIRMATIONS {
            let before = connection.stats();
            sleep(CONFIRM_REFUSAL).await;
            let after = connection.stats();
            let asked = listened == 0 || after.udp_tx.datagrams > before.udp_tx.datagrams;
            if asked && after.udp_rx.datagrams == before.udp_rx.datagrams {
                return;
            }
        }
        tracing::warn!(peer = %peer.node, "packets are refused although the peer is heard");
    }
}

/// Tells peers of refusals until the mesh closes.
pub(super) async fn take_refusals(shared: Arc<Shared>, refusals: Refusals) {
    loop {
        let next = tokio::select! {
            next = refusals.next() => next,
            () = shared.shutdown.cancelled() => return,
        };
        match next {
            Ok(address) => shared.peers.read().values().for_each(|peer| peer.note_refusal(address)),
            Err(error) => {
                tracing::warn!(%error, "peers whose process is killed will be noticed by a timeout only");
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mesh::{Class, hello::Hello};

    #[test]
    fn both_ends_keep_the_same_one_of_two_connections() {
        let (a, b) = (NodeId::random(), NodeId::random());
        let lower = a.min(b);
        let process = Hello::new(Class::Control).instance;
        // Whatever the order of arrival, the connection of the lower node stays.
        for (first, second) in [(a, b), (b, a)] {
            let verdict = arbitrate((first, process), (second, process), lower);
            assert_eq!(verdict, if second == lower { Verdict::Replace } else { Verdict::Keep });
        }
        assert_eq!(arbitrate((a, process), (a, process), lower), Verdict::Replace);
        let restarted = Hello::new(Class::Control).instance;
        assert_eq!(arbitrate((lower, process), (a.max(b), restarted), lower), Verdict::Supersede);
    }
}
