//! The switch: what becomes of a frame. A pure function of the configuration: no clock, no I/O, no state of its own.
//!
//! Networks do not flood and do not learn. The control plane says where each address is ([`table`]); ARP, DHCP and the
//! gateway's ping are answered on the spot. So a frame has exactly one outcome, a [`Verdict`].
//!
//! Invariants:
//! - A port sends only from its own hardware and IPv4 address.
//! - A frame never leaves its network: it goes only to an address of the network that the sending port is in, and a
//!   frame from another node only to a local port of the network that it names, from an address which that node has.
//! - A frame from another node is never sent on to a third.
//! - A port in standby sends nothing, gets nothing and is answered nothing.

mod dhcp;
mod services;
pub(crate) mod table;

use std::net::Ipv4Addr;

use self::table::{Destination, LocalPort, Network, PortIndex, Table};
use super::config::PortStanding;
use super::frame::packet::{Arp, Ethernet, Ipv4, Udp, ether_type, protocol};
use super::id::{MacAddr, Vni};
use super::stats::DropReason;
use crate::NodeId;

/// Where a frame came from.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Source {
    /// A guest on this node.
    Port(PortIndex),
    /// Another node, which says that it belongs to this network.
    Node(NodeId, Vni),
}

/// What becomes of a frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Give it to a port on this node.
    Deliver(PortIndex),
    /// Send it to another node.
    Send(NodeId, Vni),
    /// Give this frame to the sender.
    Reply(Vec<u8>),
    /// It was for the switch and needs no answer.
    Consumed,
    /// Nobody gets it.
    Drop(DropReason),
}

/// Decides about one frame, of which at least all headers up to IPv4's must be in `frame`.
pub(crate) fn handle_frame(table: &Table, source: Source, frame: &[u8]) -> Verdict {
    let verdict = match source {
        Source::Port(index) => from_port(table, index, frame),
        Source::Node(node, vni) => from_node(table, node, vni, frame),
    };
    verdict.unwrap_or_else(Verdict::Drop)
}

fn from_node(table: &Table, node: NodeId, vni: Vni, frame: &[u8]) -> Result<Verdict, DropReason> {
    let ethernet = Ethernet::parse(frame).ok_or(DropReason::Malformed)?;
    let network = table.network(vni).ok_or(DropReason::UnknownNetwork)?;
    if network.locate(ethernet.src) != Some(Destination::Node(node)) {
        return Err(DropReason::SpoofedMac);
    }
    match network.locate(ethernet.dst) {
        Some(Destination::Port(index)) => Ok(Verdict::Deliver(index)),
        _ => Err(DropReason::UnknownDestination),
    }
}

fn from_port(table: &Table, index: PortIndex, frame: &[u8]) -> Result<Verdict, DropReason> {
    let (port, network) = table.port(index).ok_or(DropReason::PortDown)?;
    if port.standing == PortStanding::Standby {
        return Err(DropReason::Standby);
    }
    let ethernet = Ethernet::parse(frame).ok_or(DropReason::Malformed)?;
    if ethernet.src != port.mac {
        return Err(DropReason::SpoofedMac);
    }
    match ethernet.ether_type {
        ether_type::IPV4 => ipv4_from_port(port, network, &ethernet),
        ether_type::ARP => arp_from_port(port, network, &ethernet),
        ether_type::IPV6 => Err(DropReason::Ipv6),
        _ => Err(DropReason::UnknownProtocol),
    }
}

fn arp_from_port(
    port: &LocalPort,
    network: &Network,
    ethernet: &Ethernet<'_>,
) -> Result<Verdict, DropReason> {
    let arp = Arp::parse(ethernet.payload).ok_or(DropReason::Malformed)?;
    // A probe for a duplicate address comes from 0.0.0.0 (RFC 5227).
    let is_sender = arp.sender_ip == port.ip || arp.sender_ip.is_unspecified();
    if arp.sender_mac != port.mac || !is_sender {
        return Err(DropReason::SpoofedArp);
    }
    services::answer_arp(port, network, &arp)
}

fn ipv4_from_port(
    port: &LocalPort,
    network: &Network,
    ethernet: &Ethernet<'_>,
) -> Result<Verdict, DropReason> {
    let packet = Ipv4::parse(ethernet.payload).ok_or(DropReason::Malformed)?;
    if let Some(udp) = to_dhcp_server(network, &packet) {
        if packet.src != port.ip && !packet.src.is_unspecified() {
            return Err(DropReason::SpoofedIp);
        }
        return dhcp::answer(port, network, udp.payload);
    }
    if packet.src != port.ip {
        return Err(DropReason::SpoofedIp);
    }
    if ethernet.dst == MacAddr::BROADCAST {
        return Err(DropReason::Broadcast);
    }
    if ethernet.dst.is_multicast() {
        return Err(DropReason::Multicast);
    }
    if ethernet.dst == network.gateway_mac {
        return services::answer_gateway(port, network, &packet);
    }
    match network.locate(ethernet.dst) {
        Some(Destination::Port(index)) => Ok(Verdict::Deliver(index)),
        Some(Destination::Node(node)) => Ok(Verdict::Send(node, network.config.vni)),
        None => Err(DropReason::UnknownDestination),
    }
}

/// A datagram for the DHCP server, whoever it claims to be from.
fn to_dhcp_server<'a>(network: &Network, packet: &Ipv4<'a>) -> Option<Udp<'a>> {
    let is_for_server = packet.dst == Ipv4Addr::BROADCAST || packet.dst == network.config.gateway;
    if packet.protocol != protocol::UDP || packet.is_fragment || !is_for_server {
        return None;
    }
    Udp::parse(packet.payload).filter(|udp| udp.dst_port == dhcp::SERVER_PORT)
}

#[cfg(test)]
mod tests;
