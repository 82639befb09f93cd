//! The data process' metrics: storage's own, and the figures of meshes and overlay at this moment.

use netfabric::{
    mesh::{Mesh, MeshStats, PeerStats},
    overlay::Overlay,
};
use prometheus::{Registry, TextEncoder};
use storage::Storage;

use crate::exposition::{Exposition, Kind};

/// All of it as text.
pub(crate) fn text(storage: &Storage, overlay: &Overlay, meshes: &[&Mesh]) -> String {
    let mut out = Exposition::default();
    for registry in [storage.metrics().registry(), overlay.metrics()] {
        out.append(&encode(registry));
    }
    mesh(&mut out, &meshes.iter().map(|mesh| mesh.stats()).collect::<Vec<_>>());
    out.finish()
}

fn encode(registry: &Registry) -> String {
    TextEncoder::new().encode_to_string(&registry.gather()).unwrap_or_else(|error| {
        tracing::warn!(%error, "metrics cannot be encoded");
        String::new()
    })
}

/// The figures of meshes; the control process has one too.
pub fn mesh(out: &mut Exposition, meshes: &[MeshStats]) {
    let peers = |of: fn(&PeerStats) -> Option<f64>| {
        let all = meshes.iter().flat_map(|mesh| mesh.peers.iter().map(|peer| (mesh.class, peer)));
        let samples = all.filter_map(|(class, peer)| {
            Some((vec![("class", class.to_string()), ("peer", peer.node.to_string())], of(peer)?))
        });
        samples.collect::<Vec<_>>()
    };
    let totals = |of: fn(&MeshStats) -> u64| {
        let samples = meshes.iter().map(|mesh| (vec![("class", mesh.class.to_string())], of(mesh) as f64));
        samples.collect::<Vec<_>>()
    };
    let rtt = peers(|peer| peer.rtt.map(|rtt| rtt.as_secs_f64()));
    out.family("hci_mesh_rtt_seconds", Kind::Gauge, "Smoothed round-trip time to a peer.", rtt);
    let up = peers(|peer| Some(f64::from(u8::from(peer.rtt.is_some()))));
    out.family("hci_mesh_up", Kind::Gauge, "Whether there is a link to a peer.", up);
    let links = peers(|peer| Some(peer.links as f64));
    out.family("hci_mesh_links_total", Kind::Counter, "How often a link to a peer came up.", links);
    let sent = peers(|peer| Some(peer.sent_bytes as f64));
    out.family("hci_mesh_sent_bytes_total", Kind::Counter, "Bytes of UDP payload sent.", sent);
    let received = peers(|peer| Some(peer.received_bytes as f64));
    out.family("hci_mesh_received_bytes_total", Kind::Counter, "Bytes of UDP payload received.", received);
    let packets = peers(|peer| Some(peer.sent_packets as f64));
    out.family("hci_mesh_sent_packets_total", Kind::Counter, "Packets sent.", packets);
    let lost = peers(|peer| Some(peer.lost_packets as f64));
    out.family("hci_mesh_lost_packets_total", Kind::Counter, "Packets found lost.", lost);
    let refused = totals(|mesh| mesh.refused_connections);
    out.family(
        "hci_mesh_refused_connections_total",
        Kind::Counter,
        "Connections that were refused.",
        refused,
    );
    let malformed = totals(|mesh| mesh.malformed_requests);
    out.family(
        "hci_mesh_malformed_requests_total",
        Kind::Counter,
        "Streams that were no requests.",
        malformed,
    );
    let dropped = totals(|mesh| mesh.dropped_datagrams);
    out.family("hci_mesh_dropped_datagrams_total", Kind::Counter, "Datagrams nobody took in time.", dropped);
}
