//! The switch, as guests and peers see it.

use std::net::Ipv4Addr;

use dhcproto::v4::{DhcpOption, Flags, Message, MessageType, OptionCode};
use dhcproto::{Decodable, Decoder, Encodable, Encoder};
use proptest::prelude::*;

use super::table::PortIndex;
use super::*;
use crate::overlay::config::{ForwardEntry, NetworkConfig, OverlayConfig, PortConfig, PortStanding};
use crate::overlay::frame::checksum::checksum;
use crate::overlay::frame::packet::{ArpOperation, ipv4};
use crate::overlay::id::PortId;

const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 1, 0, 1);
const ALICE: PortIndex = PortIndex(0);
const BOB: PortIndex = PortIndex(1);
/// In the other network, with the same address as Alice.
const EVE: PortIndex = PortIndex(2);

fn vni(number: u32) -> Vni {
    Vni::try_from(number).unwrap()
}

fn node(number: u8) -> NodeId {
    NodeId::new(uuid::Uuid::from_bytes([number; 16]))
}

fn ip(last: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 1, 0, last)
}

fn mac(network: u8, last: u8) -> MacAddr {
    MacAddr::new([2, 0, 0, 0, network, last])
}

fn config() -> OverlayConfig {
    let network = |number| NetworkConfig {
        vni: vni(number),
        subnet: "10.1.0.0/24".parse().unwrap(),
        gateway: GATEWAY,
        mtu: 1500,
        dns: vec![Ipv4Addr::new(9, 9, 9, 9)],
        domain: "vm.example".to_owned(),
    };
    let port = |network: u8, last, name: &str| PortConfig {
        id: PortId::random(),
        vni: vni(network.into()),
        mac: mac(network, last),
        ip: ip(last),
        hostname: name.to_owned(),
        socket: format!("/run/{network}-{last}").into(),
        standing: PortStanding::Active,
    };
    let remote = |network: u8, last, node| ForwardEntry {
        vni: vni(network.into()),
        mac: mac(network, last),
        ip: ip(last),
        node,
    };
    OverlayConfig {
        networks: vec![network(1), network(2)],
        ports: vec![port(1, 10, "alice"), port(1, 11, "bob"), port(2, 10, "eve")],
        forwarding: vec![remote(1, 20, node(7)), remote(2, 21, node(7))],
    }
}

fn table() -> Table {
    let config = config();
    config.validate().unwrap();
    Table::new(&config)
}

fn ip_frame(src: (MacAddr, Ipv4Addr), dst: (MacAddr, Ipv4Addr)) -> Vec<u8> {
    let payload = ipv4(src.1, dst.1, protocol::TCP, &[0; 20]).unwrap();
    Ethernet { dst: dst.0, src: src.0, ether_type: ether_type::IPV4, payload: &payload }.encode()
}

fn arp_frame(arp: &Arp) -> Vec<u8> {
    let dst = MacAddr::BROADCAST;
    Ethernet { dst, src: arp.sender_mac, ether_type: ether_type::ARP, payload: &arp.encode() }.encode()
}

fn who_has(target: Ipv4Addr) -> Arp {
    Arp {
        operation: ArpOperation::Request,
        sender_mac: mac(1, 10),
        sender_ip: ip(10),
        target_mac: MacAddr::new([0; 6]),
        target_ip: target,
    }
}

fn drops(reason: DropReason) -> Verdict {
    Verdict::Drop(reason)
}

#[test]
fn frames_go_where_the_address_is_and_nowhere_else() {
    let table = table();
    let from_alice = |dst| handle_frame(&table, Source::Port(ALICE), &ip_frame((mac(1, 10), ip(10)), dst));
    assert_eq!(from_alice((mac(1, 11), ip(11))), Verdict::Deliver(BOB));
    assert_eq!(from_alice((mac(1, 20), ip(20))), Verdict::Send(node(7), vni(1)));
    assert_eq!(from_alice((mac(1, 99), ip(99))), drops(DropReason::UnknownDestination));
    assert_eq!(from_alice((MacAddr::BROADCAST, ip(255))), drops(DropReason::Broadcast));
    assert_eq!(from_alice((MacAddr::new([1, 0, 0x5e, 0, 0, 1]), ip(1))), drops(DropReason::Multicast));
}

#[test]
fn a_port_in_standby_is_elsewhere() {
    let mut config = config();
    config.ports[1].standing = PortStanding::Standby;
    config.forwarding.push(ForwardEntry { vni: vni(1), mac: mac(1, 11), ip: ip(11), node: node(7) });
    config.validate().unwrap();
    let frames = [
        ip_frame((mac(1, 11), ip(11)), (mac(1, 10), ip(10))),
        arp_frame(&Arp { sender_mac: mac(1, 11), sender_ip: ip(11), ..who_has(GATEWAY) }),
    ];
    let to_bob = ip_frame((mac(1, 10), ip(10)), (mac(1, 11), ip(11)));
    let from_bob = ip_frame((mac(1, 11), ip(11)), (mac(1, 10), ip(10)));
    let table = Table::new(&config);
    for frame in &frames {
        assert_eq!(handle_frame(&table, Source::Port(BOB), frame), drops(DropReason::Standby));
    }
    assert_eq!(handle_frame(&table, Source::Port(ALICE), &to_bob), Verdict::Send(node(7), vni(1)));
    assert_eq!(handle_frame(&table, Source::Node(node(7), vni(1)), &from_bob), Verdict::Deliver(ALICE));
    assert_eq!(
        handle_frame(
            &table,
            Source::Node(node(7), vni(1)),
            &ip_frame((mac(1, 20), ip(20)), (mac(1, 11), ip(11)))
        ),
        drops(DropReason::UnknownDestination)
    );
    // It comes here.
    config.ports[1].standing = PortStanding::Active;
    let table = Table::new(&config);
    assert_eq!(handle_frame(&table, Source::Port(ALICE), &to_bob), Verdict::Deliver(BOB));
    assert_eq!(handle_frame(&table, Source::Port(BOB), &from_bob), Verdict::Deliver(ALICE));
}

#[test]
fn networks_with_the_same_addresses_do_not_see_each_other() {
    let table = table();
    // Eve knows Bob's hardware address, and the remote port's of network 1.
    for dst in [(mac(1, 11), ip(11)), (mac(1, 20), ip(20))] {
        let frame = ip_frame((mac(2, 10), ip(10)), dst);
        assert_eq!(handle_frame(&table, Source::Port(EVE), &frame), drops(DropReason::UnknownDestination));
    }
    // A node may deliver only into the network that it names, and only from its own addresses.
    let frame = ip_frame((mac(1, 20), ip(20)), (mac(1, 11), ip(11)));
    let from = |node, vni| handle_frame(&table, Source::Node(node, vni), &frame);
    assert_eq!(from(node(7), vni(1)), Verdict::Deliver(BOB));
    assert_eq!(from(node(8), vni(1)), drops(DropReason::SpoofedMac));
    assert_eq!(from(node(7), vni(2)), drops(DropReason::SpoofedMac));
    assert_eq!(from(node(7), vni(3)), drops(DropReason::UnknownNetwork));
    // No transit.
    let frame = ip_frame((mac(1, 20), ip(20)), (mac(1, 20), ip(20)));
    assert_eq!(
        handle_frame(&table, Source::Node(node(7), vni(1)), &frame),
        drops(DropReason::UnknownDestination)
    );
}

#[test]
fn a_port_cannot_pretend_to_be_another() {
    let table = table();
    let from_alice = |frame: &[u8]| handle_frame(&table, Source::Port(ALICE), frame);
    let bob = (mac(1, 11), ip(11));
    assert_eq!(from_alice(&ip_frame((mac(1, 11), ip(10)), bob)), drops(DropReason::SpoofedMac));
    assert_eq!(from_alice(&ip_frame((mac(1, 10), ip(11)), bob)), drops(DropReason::SpoofedIp));
    assert_eq!(from_alice(&ip_frame((mac(1, 10), Ipv4Addr::UNSPECIFIED), bob)), drops(DropReason::SpoofedIp));
    let spoofed_ip = Arp { sender_ip: ip(11), ..who_has(ip(20)) };
    assert_eq!(from_alice(&arp_frame(&spoofed_ip)), drops(DropReason::SpoofedArp));
    let mut spoofed_mac = arp_frame(&who_has(ip(20)));
    spoofed_mac[22..28].copy_from_slice(&mac(1, 11).octets());
    assert_eq!(from_alice(&spoofed_mac), drops(DropReason::SpoofedArp));
    let mut tagged = ip_frame((mac(1, 10), ip(11)), bob);
    tagged.splice(12..12, [0x81, 0, 0, 5]);
    assert_eq!(from_alice(&tagged), drops(DropReason::UnknownProtocol));
}

#[test]
fn arp_is_answered_for_every_known_address() {
    let table = table();
    let gateway_mac = config().networks[0].gateway_mac();
    for (target, expected) in [(GATEWAY, gateway_mac), (ip(11), mac(1, 11)), (ip(20), mac(1, 20))] {
        let verdict = handle_frame(&table, Source::Port(ALICE), &arp_frame(&who_has(target)));
        let Verdict::Reply(frame) = verdict else { panic!("{verdict:?}") };
        let ethernet = Ethernet::parse(&frame).unwrap();
        assert_eq!((ethernet.dst, ethernet.src), (mac(1, 10), expected));
        let reply = Arp::parse(ethernet.payload).unwrap();
        assert_eq!(reply.operation, ArpOperation::Reply);
        assert_eq!((reply.sender_mac, reply.sender_ip), (expected, target));
        assert_eq!((reply.target_mac, reply.target_ip), (mac(1, 10), ip(10)));
    }
    let ask = |arp: &Arp| handle_frame(&table, Source::Port(ALICE), &arp_frame(arp));
    // Known only in the other network, and known nowhere.
    assert_eq!(ask(&who_has(ip(21))), drops(DropReason::UnknownArpTarget));
    assert_eq!(ask(&who_has(ip(77))), drops(DropReason::UnknownArpTarget));
    // A guest that checks whether its own address is free must hear nothing.
    let probe = Arp { sender_ip: Ipv4Addr::UNSPECIFIED, ..who_has(ip(10)) };
    assert_eq!(ask(&probe), Verdict::Consumed);
}

#[test]
fn the_gateway_answers_pings_and_routes_nothing() {
    let table = table();
    let gateway_mac = config().networks[0].gateway_mac();
    let mut message = vec![8, 0, 0, 0, 0, 1, 0, 2];
    message.extend_from_slice(b"some data");
    let sum = checksum(&message);
    message[2..4].copy_from_slice(&sum.to_be_bytes());
    let send = |dst, message: &[u8]| {
        let payload = ipv4(ip(10), dst, protocol::ICMP, message).unwrap();
        let frame =
            Ethernet { dst: gateway_mac, src: mac(1, 10), ether_type: ether_type::IPV4, payload: &payload };
        handle_frame(&table, Source::Port(ALICE), &frame.encode())
    };
    let Verdict::Reply(frame) = send(GATEWAY, &message) else { panic!("no answer") };
    let packet = Ipv4::parse(Ethernet::parse(&frame).unwrap().payload).unwrap();
    assert_eq!((packet.src, packet.dst), (GATEWAY, ip(10)));
    assert_eq!(packet.payload[0], 0);
    assert_eq!(packet.payload[4..], message[4..]);
    assert_eq!(checksum(packet.payload), 0);
    assert_eq!(send(Ipv4Addr::new(9, 9, 9, 9), &message), drops(DropReason::NoRoute));
    assert_eq!(send(GATEWAY, &[0, 0, 0, 0, 0, 1, 0, 2]), drops(DropReason::NoRoute));
    assert_eq!(send(GATEWAY, &[8]), drops(DropReason::NoRoute));
}

fn dhcp(kind: MessageType, change: impl FnOnce(&mut Message)) -> Message {
    let none = Ipv4Addr::UNSPECIFIED;
    let mut message = Message::new_with_id(0x1234, none, none, none, none, &mac(1, 10).octets());
    message.opts_mut().insert(DhcpOption::MessageType(kind));
    change(&mut message);
    message
}

fn dhcp_frame(message: &Message) -> Vec<u8> {
    let mut payload = Vec::new();
    message.encode(&mut Encoder::new(&mut payload)).unwrap();
    let (src, dst) = (message.ciaddr(), Ipv4Addr::BROADCAST);
    let udp = Udp { src_port: 68, dst_port: 67, payload: &payload }.encode(src, dst).unwrap();
    let packet = ipv4(src, dst, protocol::UDP, &udp).unwrap();
    let (src, dst) = (mac(1, 10), MacAddr::BROADCAST);
    Ethernet { dst, src, ether_type: ether_type::IPV4, payload: &packet }.encode()
}

/// The answer, with the addresses that it was sent to.
fn ask(message: &Message) -> (Message, MacAddr, Ipv4Addr) {
    let verdict = handle_frame(&table(), Source::Port(ALICE), &dhcp_frame(message));
    let Verdict::Reply(frame) = verdict else { panic!("{verdict:?}") };
    let ethernet = Ethernet::parse(&frame).unwrap();
    let packet = Ipv4::parse(ethernet.payload).unwrap();
    let udp = Udp::parse(packet.payload).unwrap();
    assert_eq!((packet.src, udp.src_port, udp.dst_port), (GATEWAY, 67, 68));
    let answer = Message::decode(&mut Decoder::new(udp.payload)).unwrap();
    assert_eq!(answer.xid(), message.xid());
    assert_eq!(answer.chaddr(), mac(1, 10).octets());
    assert_eq!(answer.opts().get(OptionCode::ServerIdentifier), Some(&DhcpOption::ServerIdentifier(GATEWAY)));
    (answer, ethernet.dst, packet.dst)
}

#[test]
fn a_client_gets_its_address_and_all_about_its_network() {
    let (offer, ..) = ask(&dhcp(MessageType::Discover, |_| {}));
    assert_eq!(offer.opts().msg_type(), Some(MessageType::Offer));
    assert_eq!(offer.yiaddr(), ip(10));

    let (ack, dst_mac, dst_ip) = ask(&dhcp(MessageType::Request, |message| {
        message.opts_mut().insert(DhcpOption::RequestedIpAddress(offer.yiaddr()));
        message.opts_mut().insert(DhcpOption::ServerIdentifier(GATEWAY));
        message.opts_mut().insert(DhcpOption::ClientIdentifier(vec![1, 2, 3]));
    }));
    assert_eq!((dst_mac, dst_ip), (mac(1, 10), ip(10)));
    assert_eq!(ack.opts().msg_type(), Some(MessageType::Ack));
    assert_eq!(ack.yiaddr(), ip(10));
    for option in [
        DhcpOption::SubnetMask(Ipv4Addr::new(255, 255, 255, 0)),
        DhcpOption::Router(vec![GATEWAY]),
        DhcpOption::DomainNameServer(vec![Ipv4Addr::new(9, 9, 9, 9)]),
        DhcpOption::InterfaceMtu(1500),
        DhcpOption::Hostname("alice".to_owned()),
        DhcpOption::DomainName("vm.example".to_owned()),
        DhcpOption::ClientIdentifier(vec![1, 2, 3]),
    ] {
        assert_eq!(ack.opts().get(OptionCode::from(&option)), Some(&option));
    }
    assert!(ack.opts().contains(OptionCode::AddressLeaseTime));
}

#[test]
fn renewals_informs_and_broadcasts_are_answered_where_the_client_listens() {
    let (ack, dst_mac, dst_ip) = ask(&dhcp(MessageType::Request, |message| {
        message.set_ciaddr(ip(10));
    }));
    assert_eq!(ack.opts().msg_type(), Some(MessageType::Ack));
    assert_eq!((dst_mac, dst_ip), (mac(1, 10), ip(10)));

    let (ack, ..) = ask(&dhcp(MessageType::Inform, |message| {
        message.set_ciaddr(ip(10));
    }));
    assert_eq!(ack.yiaddr(), Ipv4Addr::UNSPECIFIED);
    assert!(!ack.opts().contains(OptionCode::AddressLeaseTime));
    assert!(ack.opts().contains(OptionCode::Router));

    let (_, dst_mac, dst_ip) = ask(&dhcp(MessageType::Discover, |message| {
        message.set_flags(Flags::default().set_broadcast());
    }));
    assert_eq!((dst_mac, dst_ip), (MacAddr::BROADCAST, Ipv4Addr::BROADCAST));
}

#[test]
fn a_wrong_address_is_refused() {
    let (nak, dst_mac, dst_ip) = ask(&dhcp(MessageType::Request, |message| {
        message.opts_mut().insert(DhcpOption::RequestedIpAddress(ip(99)));
    }));
    assert_eq!(nak.opts().msg_type(), Some(MessageType::Nak));
    assert_eq!(nak.yiaddr(), Ipv4Addr::UNSPECIFIED);
    assert_eq!((dst_mac, dst_ip), (MacAddr::BROADCAST, Ipv4Addr::BROADCAST));
}

#[test]
fn what_is_not_for_this_server_gets_no_answer() {
    let table = table();
    let send = |message: &Message| handle_frame(&table, Source::Port(ALICE), &dhcp_frame(message));
    let other = dhcp(MessageType::Request, |message| {
        message.opts_mut().insert(DhcpOption::ServerIdentifier(ip(200)));
        message.opts_mut().insert(DhcpOption::RequestedIpAddress(ip(99)));
    });
    assert_eq!(send(&other), Verdict::Consumed);
    assert_eq!(send(&dhcp(MessageType::Release, |_| {})), Verdict::Consumed);
    assert_eq!(send(&dhcp(MessageType::Decline, |_| {})), Verdict::Consumed);
    assert_eq!(send(&dhcp(MessageType::Offer, |_| {})), drops(DropReason::DhcpIgnored));
    let for_bob = dhcp(MessageType::Discover, |message| {
        message.set_chaddr(&mac(1, 11).octets());
    });
    assert_eq!(send(&for_bob), drops(DropReason::DhcpIgnored));
}

proptest! {
    #[test]
    fn no_frame_upsets_the_switch(bytes in proptest::collection::vec(any::<u8>(), 0..400), index in 0..4usize) {
        let table = table();
        handle_frame(&table, Source::Port(PortIndex(index)), &bytes);
        handle_frame(&table, Source::Node(node(7), vni(1)), &bytes);
    }

    #[test]
    fn no_dhcp_message_upsets_the_switch(at in 0..240usize, value: u8, tail in proptest::collection::vec(any::<u8>(), 0..80)) {
        let mut frame = dhcp_frame(&dhcp(MessageType::Discover, |_| {}));
        frame.truncate(14 + 28 + 240);
        frame[42 + at] = value;
        frame.extend(tail);
        let total = (frame.len() - 14) as u16;
        frame[16..18].copy_from_slice(&total.to_be_bytes());
        frame[38..40].copy_from_slice(&(total - 20).to_be_bytes());
        handle_frame(&table(), Source::Port(ALICE), &frame);
    }

    #[test]
    fn only_own_addresses_leave_a_port(src_mac: [u8; 6], src_ip: [u8; 4], dst in 0..3usize) {
        let dst = [(mac(1, 11), ip(11)), (mac(1, 20), ip(20)), (MacAddr::BROADCAST, ip(255))][dst];
        let src = (MacAddr::new(src_mac), Ipv4Addr::from(src_ip));
        let verdict = handle_frame(&table(), Source::Port(ALICE), &ip_frame(src, dst));
        let is_own = src == (mac(1, 10), ip(10));
        prop_assert_eq!(matches!(verdict, Verdict::Deliver(_) | Verdict::Send(..)), is_own && dst.1 != ip(255));
    }
}
