//! Classes of traffic and the configuration of a mesh.

use std::fmt;
use std::net::SocketAddr;
use std::time::Duration;

/// A connection from which nothing is heard for this long is dead. Bounds the I/O pause for a silent peer.
pub const IDLE_TIMEOUT: Duration = Duration::from_secs(3);
/// A connection whose packets are refused is dead when nothing is heard on it for this long: whoever lives acknowledges within
/// the 25 ms that QUIC allows, and a round trip.
pub const CONFIRM_REFUSAL: Duration = Duration::from_millis(60);
/// How often a link is listened to after one refusal: for long enough that QUIC asks again what was not answered.
pub(super) const CONFIRMATIONS: usize = 10;
/// How long a handshake may take before the dialler tries again.
pub const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(2);
/// First and longest pause between attempts to reach a peer.
pub const BACKOFF: std::ops::RangeInclusive<Duration> = Duration::from_millis(50)..=Duration::from_secs(1);
/// How long a connection that lost against a duplicate may finish its calls.
pub const RETIRE_AFTER: Duration = Duration::from_secs(5);
/// How long a peer may take to send a request, and to take an answer.
pub const TRANSFER_DEADLINE: Duration = Duration::from_secs(30);

/// A class of traffic: each has its own UDP port, endpoint and connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Class {
    /// Raft, forwarded API calls, leases: small and urgent.
    Control,
    /// Replication of volumes: bulk and latency matter.
    Storage,
    /// Guests' Ethernet frames, as datagrams.
    Frames,
}

impl Class {
    /// TLS protocol name, so that a port mix-up ends in a clear handshake error.
    pub(super) fn alpn(self) -> &'static [u8] {
        match self {
            Self::Control => b"hci-control/1",
            Self::Storage => b"hci-storage/1",
            Self::Frames => b"hci-frames/1",
        }
    }

    /// How often an idle connection proves that it lives.
    pub(super) fn keep_alive(self) -> Duration {
        match self {
            Self::Control => Duration::from_millis(500),
            Self::Storage | Self::Frames => Duration::from_secs(1),
        }
    }

    /// Whether calls share one stream a side (a lane) instead of having one each.
    pub(super) fn has_lanes(self) -> bool {
        self == Self::Storage
    }

    /// UDP port unless configured otherwise.
    pub const fn default_port(self) -> u16 {
        match self {
            Self::Control => 7400,
            Self::Storage => 7401,
            Self::Frames => 7402,
        }
    }
}

impl fmt::Display for Class {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Control => "control",
            Self::Storage => "storage",
            Self::Frames => "frames",
        })
    }
}

/// Whose connections are let in, among the nodes with a certificate of our CA.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Admission {
    /// All of them. Needed where membership itself is learned over the mesh: a node that was away does not know
    /// the nodes that joined meanwhile, and must hear of them from one of them.
    Certified,
    /// Only those named by [`super::Mesh::set_peers`].
    Peers,
}

/// How a mesh is set up.
#[derive(Clone, Debug)]
pub struct MeshConfig {
    /// What it carries.
    pub class: Class,
    /// UDP address to listen on and to dial from.
    pub listen: SocketAddr,
    /// MTU of the link to the peers; none to read it from the interface of `listen`.
    pub link_mtu: Option<u16>,
    /// Whose connections are let in.
    pub admission: Admission,
}

impl MeshConfig {
    /// The usual configuration of a class: everyone certified on the control mesh, peers only on the others.
    pub fn new(class: Class, listen: SocketAddr) -> Self {
        let admission = match class {
            Class::Control => Admission::Certified,
            Class::Storage | Class::Frames => Admission::Peers,
        };
        Self { class, listen, link_mtu: None, admission }
    }
}
