//! What happened to frames: counts for each port, and for each reason why one was dropped.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use super::id::PortId;

/// Why a frame was dropped. Every frame that is not delivered, forwarded or answered has exactly one of these.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DropReason {
    /// The node's lease has lapsed: nothing passes.
    Fenced,
    /// The frame, a header in it, or the guest's descriptors make no sense.
    Malformed,
    /// Larger than the network's MTU and not meant to be segmented.
    TooLarge,
    /// The source hardware address is not the port's (or not one that the sending node has).
    SpoofedMac,
    /// The source IPv4 address is not the port's.
    SpoofedIp,
    /// An ARP packet names a sender other than the port.
    SpoofedArp,
    /// ARP asks for an address that nobody has.
    UnknownArpTarget,
    /// Nobody in this network has the destination hardware address.
    UnknownDestination,
    /// The network's number is not known here.
    UnknownNetwork,
    /// Sent to the gateway, but not for it.
    NoRoute,
    /// Broadcast that is neither ARP nor DHCP: networks do not flood.
    Broadcast,
    /// Multicast: not carried.
    Multicast,
    /// IPv6: not carried yet.
    Ipv6,
    /// Neither IPv4 nor ARP.
    UnknownProtocol,
    /// A DHCP message that gets no answer.
    DhcpIgnored,
    /// The receiving guest offered no buffers in time.
    RingFull,
    /// The receiving VM is not connected.
    PortDown,
    /// There is no connection to the other node.
    NodeUnreachable,
    /// The connection to the other node takes no more.
    NodeCongested,
    /// The port is in standby: its VM runs on another node.
    Standby,
}

impl DropReason {
    /// All reasons, in the order of their declaration.
    pub const ALL: [Self; 20] = [
        Self::Fenced,
        Self::Malformed,
        Self::TooLarge,
        Self::SpoofedMac,
        Self::SpoofedIp,
        Self::SpoofedArp,
        Self::UnknownArpTarget,
        Self::UnknownDestination,
        Self::UnknownNetwork,
        Self::NoRoute,
        Self::Broadcast,
        Self::Multicast,
        Self::Ipv6,
        Self::UnknownProtocol,
        Self::DhcpIgnored,
        Self::RingFull,
        Self::PortDown,
        Self::NodeUnreachable,
        Self::NodeCongested,
        Self::Standby,
    ];

    /// The name used in metrics.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Fenced => "fenced",
            Self::Malformed => "malformed",
            Self::TooLarge => "too_large",
            Self::SpoofedMac => "spoofed_mac",
            Self::SpoofedIp => "spoofed_ip",
            Self::SpoofedArp => "spoofed_arp",
            Self::UnknownArpTarget => "unknown_arp_target",
            Self::UnknownDestination => "unknown_destination",
            Self::UnknownNetwork => "unknown_network",
            Self::NoRoute => "no_route",
            Self::Broadcast => "broadcast",
            Self::Multicast => "multicast",
            Self::Ipv6 => "ipv6",
            Self::UnknownProtocol => "unknown_protocol",
            Self::DhcpIgnored => "dhcp_ignored",
            Self::RingFull => "ring_full",
            Self::PortDown => "port_down",
            Self::NodeUnreachable => "node_unreachable",
            Self::NodeCongested => "node_congested",
            Self::Standby => "standby",
        }
    }
}

impl fmt::Display for DropReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Counts of the whole overlay since the process started.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct OverlayStats {
    /// The ports on this node.
    pub ports: BTreeMap<PortId, PortStats>,
    /// Frames from other nodes.
    pub mesh: MeshFrameStats,
}

/// Counts of one port. `rx` and `tx` are as the guest sees them.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortStats {
    /// Whether a VMM is connected.
    pub connected: bool,
    /// Frames given to the guest.
    pub rx_frames: u64,
    /// Bytes given to the guest, without the virtio header.
    pub rx_bytes: u64,
    /// Frames taken from the guest.
    pub tx_frames: u64,
    /// Bytes taken from the guest, without the virtio header.
    pub tx_bytes: u64,
    /// Frames from or to the guest that were dropped; reasons that never happened are left out.
    pub drops: BTreeMap<DropReason, u64>,
}

/// Counts of what came from other nodes.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MeshFrameStats {
    /// Datagrams received.
    pub datagrams: u64,
    /// Datagrams that are no part of a frame.
    pub garbage: u64,
    /// Pieces that were there already.
    pub duplicates: u64,
    /// Frames complete.
    pub frames: u64,
    /// Frames given up because a piece did not come in time.
    pub incomplete: u64,
    /// Frames given up to make room for newer ones.
    pub evicted: u64,
    /// Complete frames that no port took.
    pub drops: BTreeMap<DropReason, u64>,
}
