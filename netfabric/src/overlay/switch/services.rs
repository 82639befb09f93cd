//! What the switch itself answers at the port: ARP for every known address, and pings to the virtual gateway.

use super::Verdict;
use super::table::{LocalPort, Network};
use crate::overlay::frame::checksum::checksum;
use crate::overlay::frame::packet::{Arp, ArpOperation, Ethernet, Ipv4, ether_type, ipv4, protocol};
use crate::overlay::stats::DropReason;

const ECHO_REQUEST: u8 = 8;
const ECHO_REPLY: u8 = 0;
/// Type, code, checksum, identifier, sequence number.
const ICMP_HEADER: usize = 8;

/// Answers a request for any address of the network, so that none has to be flooded. Unicast requests, with which
/// guests refresh their cache, are answered as well.
pub(super) fn answer_arp(port: &LocalPort, network: &Network, arp: &Arp) -> Result<Verdict, DropReason> {
    // Replies and announcements tell the others what the control plane has told them already; a probe for the
    // port's own address must stay unanswered.
    if arp.operation == ArpOperation::Reply || arp.target_ip == port.ip {
        return Ok(Verdict::Consumed);
    }
    let mac = network.resolve(arp.target_ip).ok_or(DropReason::UnknownArpTarget)?;
    let reply = Arp {
        operation: ArpOperation::Reply,
        sender_mac: mac,
        sender_ip: arp.target_ip,
        target_mac: port.mac,
        target_ip: arp.sender_ip,
    };
    let payload = reply.encode();
    let frame = Ethernet { dst: port.mac, src: mac, ether_type: ether_type::ARP, payload: &payload };
    Ok(Verdict::Reply(frame.encode()))
}

/// What is sent to the gateway: it answers pings and routes nowhere.
pub(super) fn answer_gateway(
    port: &LocalPort,
    network: &Network,
    packet: &Ipv4<'_>,
) -> Result<Verdict, DropReason> {
    if packet.dst != network.config.gateway
        || packet.protocol != protocol::ICMP
        || packet.is_fragment
        || packet.payload.len() < ICMP_HEADER
        || packet.payload[0] != ECHO_REQUEST
    {
        return Err(DropReason::NoRoute);
    }
    let mut message = packet.payload.to_vec();
    message[0] = ECHO_REPLY;
    message[2..4].fill(0);
    let sum = checksum(&message);
    message[2..4].copy_from_slice(&sum.to_be_bytes());
    let payload =
        ipv4(network.config.gateway, port.ip, protocol::ICMP, &message).ok_or(DropReason::TooLarge)?;
    let frame =
        Ethernet { dst: port.mac, src: network.gateway_mac, ether_type: ether_type::IPV4, payload: &payload };
    Ok(Verdict::Reply(frame.encode()))
}
