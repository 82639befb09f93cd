//! The DHCPv4 server of each network (RFC 2131), at the port: no message ever leaves the node.
//!
//! The control plane has chosen a port's address, so there is nothing to allocate and nothing to remember: every
//! answer follows from the request and the configuration, on any node, before and after any restart.

use std::net::Ipv4Addr;

use dhcproto::v4::{DhcpOption, DhcpOptions, Flags, Message, MessageType, Opcode};
use dhcproto::{Encodable, Encoder};

use super::Verdict;
use super::table::{LocalPort, Network};
use crate::overlay::frame::packet::{Ethernet, Udp, ether_type, ipv4, protocol};
use crate::overlay::id::MacAddr;
use crate::overlay::stats::DropReason;

/// Where clients send to.
pub(super) const SERVER_PORT: u16 = 67;
const CLIENT_PORT: u16 = 68;
/// An address never changes while its port exists, so this only says how soon a changed option (DNS) is noticed: at
/// half of it, when clients renew.
const LEASE_SECONDS: u32 = 24 * 3600;

/// Answers one message.
pub(super) fn answer(port: &LocalPort, network: &Network, payload: &[u8]) -> Result<Verdict, DropReason> {
    let request = Request::parse(payload).ok_or(DropReason::Malformed)?;
    if request.hardware != port.mac || !request.relay.is_unspecified() {
        return Err(DropReason::DhcpIgnored);
    }
    match request.kind {
        MessageType::Discover => reply(port, network, &request, MessageType::Offer),
        MessageType::Request => match judge(port, network.config.gateway, &request) {
            Judgement::Granted => reply(port, network, &request, MessageType::Ack),
            Judgement::Wrong => reply(port, network, &request, MessageType::Nak),
            Judgement::ForAnotherServer => Ok(Verdict::Consumed),
        },
        MessageType::Inform => reply(port, network, &request, MessageType::Ack),
        MessageType::Release => Ok(Verdict::Consumed),
        MessageType::Decline => {
            tracing::warn!(mac = %port.mac, ip = %port.ip, "guest says that its address is in use");
            Ok(Verdict::Consumed)
        }
        _ => Err(DropReason::DhcpIgnored),
    }
}

/// What matters of a client's message. Parsed here because dhcproto's decoder panics on options of a wrong length.
struct Request<'a> {
    xid: u32,
    flags: Flags,
    client: Ipv4Addr,
    relay: Ipv4Addr,
    hardware: MacAddr,
    kind: MessageType,
    requested: Option<Ipv4Addr>,
    server: Option<Ipv4Addr>,
    identifier: Option<&'a [u8]>,
}

/// Operation request, hardware type Ethernet, hardware addresses of 6 bytes.
const BOOT_REQUEST: [u8; 3] = [1, 1, 6];
const COOKIE_AT: usize = 236;
const COOKIE: [u8; 4] = [99, 130, 83, 99];
/// Option codes (RFC 2132).
mod option {
    pub(super) const PAD: u8 = 0;
    pub(super) const REQUESTED_IP: u8 = 50;
    pub(super) const MESSAGE_TYPE: u8 = 53;
    pub(super) const SERVER_IDENTIFIER: u8 = 54;
    pub(super) const CLIENT_IDENTIFIER: u8 = 61;
    pub(super) const END: u8 = 255;
}

impl<'a> Request<'a> {
    fn parse(message: &'a [u8]) -> Option<Self> {
        let (fixed, cookie) = message.get(..COOKIE_AT + COOKIE.len())?.split_at(COOKIE_AT);
        if fixed[..3] != BOOT_REQUEST || cookie != COOKIE {
            return None;
        }
        let ip = |bytes: &[u8]| <[u8; 4]>::try_from(bytes).ok().map(Ipv4Addr::from);
        let mut request = Self {
            xid: u32::from_be_bytes(fixed[4..8].try_into().ok()?),
            flags: Flags::new(u16::from_be_bytes([fixed[10], fixed[11]])),
            client: ip(&fixed[12..16])?,
            relay: ip(&fixed[24..28])?,
            hardware: MacAddr::new(fixed[28..34].try_into().ok()?),
            kind: MessageType::Unknown(0),
            requested: None,
            server: None,
            identifier: None,
        };
        let mut options = &message[COOKIE_AT + COOKIE.len()..];
        while let Some((&code, rest)) = options.split_first() {
            options = rest;
            match code {
                option::PAD => continue,
                option::END => break,
                _ => {}
            }
            let (&length, rest) = options.split_first()?;
            let (value, rest) = rest.split_at_checked(usize::from(length))?;
            options = rest;
            match code {
                option::MESSAGE_TYPE => request.kind = MessageType::from(*value.first()?),
                option::REQUESTED_IP => request.requested = Some(ip(value)?),
                option::SERVER_IDENTIFIER => request.server = Some(ip(value)?),
                option::CLIENT_IDENTIFIER => request.identifier = Some(value),
                _ => {}
            }
        }
        Some(request)
    }
}

/// What to say to a DHCPREQUEST.
enum Judgement {
    Granted,
    Wrong,
    ForAnotherServer,
}

/// Selecting names a server; a rebooted client asks for its old address; a renewing one already uses it
/// (RFC 2131, section 4.3.2). All three come down to: is it the port's address?
fn judge(port: &LocalPort, server: Ipv4Addr, request: &Request<'_>) -> Judgement {
    if request.server.is_some_and(|chosen| chosen != server) {
        return Judgement::ForAnotherServer;
    }
    let asked = request.requested.unwrap_or(request.client);
    if asked == port.ip { Judgement::Granted } else { Judgement::Wrong }
}

fn reply(
    port: &LocalPort,
    network: &Network,
    request: &Request<'_>,
    kind: MessageType,
) -> Result<Verdict, DropReason> {
    let server = network.config.gateway;
    let is_inform = request.kind == MessageType::Inform;
    let none = Ipv4Addr::UNSPECIFIED;
    let yours = if kind == MessageType::Nak || is_inform { none } else { port.ip };
    let client = if kind == MessageType::Nak { none } else { request.client };
    let mut message = Message::new_with_id(request.xid, client, yours, none, none, &port.mac.octets());
    message.set_opcode(Opcode::BootReply).set_flags(request.flags);
    let options = message.opts_mut();
    options.insert(DhcpOption::MessageType(kind));
    options.insert(DhcpOption::ServerIdentifier(server));
    // RFC 6842: an identifier comes back as it was.
    if let Some(identifier) = request.identifier {
        options.insert(DhcpOption::ClientIdentifier(identifier.to_vec()));
    }
    if kind != MessageType::Nak {
        if !is_inform {
            options.insert(DhcpOption::AddressLeaseTime(LEASE_SECONDS));
            options.insert(DhcpOption::Renewal(LEASE_SECONDS / 2));
            options.insert(DhcpOption::Rebinding(LEASE_SECONDS / 8 * 7));
        }
        describe(options, port, network);
    }
    let payload = encode(&message)?;

    let is_broadcast = kind == MessageType::Nak || request.flags.broadcast();
    let (ip, mac) = if !client.is_unspecified() {
        (client, port.mac)
    } else if is_broadcast {
        (Ipv4Addr::BROADCAST, MacAddr::BROADCAST)
    } else {
        (port.ip, port.mac)
    };
    let udp = Udp { src_port: SERVER_PORT, dst_port: CLIENT_PORT, payload: &payload }.encode(server, ip);
    let packet = udp.and_then(|udp| ipv4(server, ip, protocol::UDP, &udp)).ok_or(DropReason::TooLarge)?;
    let frame =
        Ethernet { dst: mac, src: network.gateway_mac, ether_type: ether_type::IPV4, payload: &packet };
    Ok(Verdict::Reply(frame.encode()))
}

/// What a guest should know about its network.
fn describe(options: &mut DhcpOptions, port: &LocalPort, network: &Network) {
    let config = &network.config;
    options.insert(DhcpOption::SubnetMask(config.subnet.netmask()));
    options.insert(DhcpOption::BroadcastAddr(config.subnet.broadcast()));
    options.insert(DhcpOption::Router(vec![config.gateway]));
    options.insert(DhcpOption::InterfaceMtu(config.mtu));
    if !config.dns.is_empty() {
        options.insert(DhcpOption::DomainNameServer(config.dns.clone()));
    }
    if !port.hostname.is_empty() {
        options.insert(DhcpOption::Hostname(port.hostname.clone()));
    }
    if !config.domain.is_empty() {
        options.insert(DhcpOption::DomainName(config.domain.clone()));
    }
}

fn encode(message: &Message) -> Result<Vec<u8>, DropReason> {
    /// Some clients drop messages shorter than BOOTP's (RFC 1542, section 2.1).
    const BOOTP: usize = 300;
    let mut payload = Vec::with_capacity(BOOTP);
    message.encode(&mut Encoder::new(&mut payload)).map_err(|error| {
        tracing::warn!(%error, "DHCP answer cannot be encoded");
        DropReason::DhcpIgnored
    })?;
    if payload.len() < BOOTP {
        payload.resize(BOOTP, 0);
    }
    Ok(payload)
}
