//! Figures for metrics. All counters only grow while the mesh lives.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::{Class, Shared};
use crate::NodeId;

/// A counter that only grows.
#[derive(Debug, Default)]
pub(super) struct Counter(AtomicU64);

impl Counter {
    pub(super) fn count(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Counters of a whole mesh.
#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) refused: Counter,
    pub(super) malformed: Counter,
    pub(super) dropped_datagrams: Counter,
}

/// Figures of one peer's connections, summed over all of them.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Totals {
    sent_bytes: u64,
    received_bytes: u64,
    sent_packets: u64,
    lost_packets: u64,
}

impl Totals {
    pub(super) fn add(&mut self, stats: &quinn::ConnectionStats) {
        self.sent_bytes += stats.udp_tx.bytes;
        self.received_bytes += stats.udp_rx.bytes;
        self.sent_packets += stats.path.sent_packets;
        self.lost_packets += stats.path.lost_packets;
    }
}

/// Figures of one mesh.
#[derive(Clone, Debug)]
pub struct MeshStats {
    /// Which class of traffic.
    pub class: Class,
    /// Each peer.
    pub peers: Vec<PeerStats>,
    /// Connections that were refused: failed handshakes, foreign certificates, nodes that are not peers.
    pub refused_connections: u64,
    /// Streams that were not valid requests.
    pub malformed_requests: u64,
    /// Received datagrams dropped because the consumer was slow.
    pub dropped_datagrams: u64,
}

/// Figures of one peer.
#[derive(Clone, Debug)]
pub struct PeerStats {
    /// Which peer.
    pub node: NodeId,
    /// Smoothed round-trip time of the present link; none without a link.
    pub rtt: Option<Duration>,
    /// How often a link came up.
    pub links: u64,
    /// Bytes in UDP payloads sent.
    pub sent_bytes: u64,
    /// Bytes in UDP payloads received.
    pub received_bytes: u64,
    /// Packets sent.
    pub sent_packets: u64,
    /// Packets found lost.
    pub lost_packets: u64,
}

pub(super) fn collect(shared: &Shared) -> MeshStats {
    let mut peers: Vec<PeerStats> = shared
        .peers
        .read()
        .values()
        .map(|peer| {
            let (totals, rtt, links) = peer.totals();
            PeerStats {
                node: peer.node,
                rtt,
                links,
                sent_bytes: totals.sent_bytes,
                received_bytes: totals.received_bytes,
                sent_packets: totals.sent_packets,
                lost_packets: totals.lost_packets,
            }
        })
        .collect();
    peers.sort_by_key(|peer| peer.node);
    MeshStats {
        class: shared.config.class,
        peers,
        refused_connections: shared.counters.refused.get(),
        malformed_requests: shared.counters.malformed.get(),
        dropped_datagrams: shared.counters.dropped_datagrams.get(),
    }
}
