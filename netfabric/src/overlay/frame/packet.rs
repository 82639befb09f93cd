//! Views of the headers that the switch looks at: Ethernet, ARP, IPv4, UDP. Each parser takes what a guest sent and
//! returns nothing for what makes no sense; none allocates.

use std::net::Ipv4Addr;

use super::checksum::{Sum, checksum, nonzero};
use crate::overlay::id::MacAddr;

/// Length of an Ethernet header (no VLAN tag: tagged frames are not carried).
pub(crate) const ETHERNET_HEADER: usize = 14;
/// Length of an IPv4 header without options.
pub(crate) const IPV4_HEADER: usize = 20;
/// Length of a UDP header.
pub(crate) const UDP_HEADER: usize = 8;
const ARP_PACKET: usize = 28;
const DONT_FRAGMENT: u16 = 0x4000;
const TTL: u8 = 64;

/// Ethernet's protocol numbers.
pub(crate) mod ether_type {
    pub(crate) const IPV4: u16 = 0x0800;
    pub(crate) const ARP: u16 = 0x0806;
    pub(crate) const IPV6: u16 = 0x86dd;
}

/// IP's protocol numbers.
pub(crate) mod protocol {
    pub(crate) const ICMP: u8 = 1;
    pub(crate) const TCP: u8 = 6;
    pub(crate) const UDP: u8 = 17;
}

pub(crate) fn be16(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

fn ip_at(bytes: &[u8], at: usize) -> Option<Ipv4Addr> {
    let octets: [u8; 4] = bytes.get(at..at + 4)?.try_into().ok()?;
    Some(Ipv4Addr::from(octets))
}

fn mac_at(bytes: &[u8], at: usize) -> Option<MacAddr> {
    let octets: [u8; 6] = bytes.get(at..at + 6)?.try_into().ok()?;
    Some(MacAddr::new(octets))
}

/// An Ethernet frame.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Ethernet<'a> {
    pub(crate) dst: MacAddr,
    pub(crate) src: MacAddr,
    pub(crate) ether_type: u16,
    pub(crate) payload: &'a [u8],
}

impl<'a> Ethernet<'a> {
    pub(crate) fn parse(frame: &'a [u8]) -> Option<Self> {
        Some(Self {
            dst: mac_at(frame, 0)?,
            src: mac_at(frame, 6)?,
            ether_type: be16(frame, 12)?,
            payload: frame.get(ETHERNET_HEADER..)?,
        })
    }

    /// Builds the frame.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut frame = Vec::with_capacity(ETHERNET_HEADER + self.payload.len());
        frame.extend_from_slice(&self.dst.octets());
        frame.extend_from_slice(&self.src.octets());
        frame.extend_from_slice(&self.ether_type.to_be_bytes());
        frame.extend_from_slice(self.payload);
        frame
    }
}

/// What an ARP packet wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ArpOperation {
    Request,
    Reply,
}

/// An ARP packet for IPv4 over Ethernet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Arp {
    pub(crate) operation: ArpOperation,
    pub(crate) sender_mac: MacAddr,
    pub(crate) sender_ip: Ipv4Addr,
    pub(crate) target_mac: MacAddr,
    pub(crate) target_ip: Ipv4Addr,
}

impl Arp {
    /// Hardware type Ethernet, protocol IPv4, lengths 6 and 4.
    const KIND: [u8; 6] = [0, 1, 8, 0, 6, 4];

    pub(crate) fn parse(packet: &[u8]) -> Option<Self> {
        let packet = packet.get(..ARP_PACKET)?;
        if packet[..6] != Self::KIND {
            return None;
        }
        Some(Self {
            operation: match be16(packet, 6)? {
                1 => ArpOperation::Request,
                2 => ArpOperation::Reply,
                _ => return None,
            },
            sender_mac: mac_at(packet, 8)?,
            sender_ip: ip_at(packet, 14)?,
            target_mac: mac_at(packet, 18)?,
            target_ip: ip_at(packet, 24)?,
        })
    }

    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut packet = Vec::with_capacity(ARP_PACKET);
        packet.extend_from_slice(&Self::KIND);
        let operation: u16 = match self.operation {
            ArpOperation::Request => 1,
            ArpOperation::Reply => 2,
        };
        packet.extend_from_slice(&operation.to_be_bytes());
        packet.extend_from_slice(&self.sender_mac.octets());
        packet.extend_from_slice(&self.sender_ip.octets());
        packet.extend_from_slice(&self.target_mac.octets());
        packet.extend_from_slice(&self.target_ip.octets());
        packet
    }
}

/// An IPv4 packet.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Ipv4<'a> {
    pub(crate) src: Ipv4Addr,
    pub(crate) dst: Ipv4Addr,
    pub(crate) protocol: u8,
    /// Part of a larger packet, so the payload may not start with the protocol's header.
    pub(crate) is_fragment: bool,
    /// Header length in bytes.
    pub(crate) header: usize,
    pub(crate) payload: &'a [u8],
}

impl<'a> Ipv4<'a> {
    pub(crate) fn parse(packet: &'a [u8]) -> Option<Self> {
        let first = *packet.first()?;
        let header = usize::from(first & 0x0f) * 4;
        let total = usize::from(be16(packet, 2)?);
        if first >> 4 != 4 || header < IPV4_HEADER || total < header || total > packet.len() {
            return None;
        }
        Some(Self {
            src: ip_at(packet, 12)?,
            dst: ip_at(packet, 16)?,
            protocol: packet[9],
            // All but "don't fragment": the "more" bit and the offset.
            is_fragment: be16(packet, 6)? & 0x3fff != 0,
            header,
            payload: &packet[header..total],
        })
    }
}

/// Builds an IPv4 packet around a payload; none if that is too long.
pub(crate) fn ipv4(src: Ipv4Addr, dst: Ipv4Addr, protocol: u8, payload: &[u8]) -> Option<Vec<u8>> {
    let total = u16::try_from(IPV4_HEADER + payload.len()).ok()?;
    let mut packet = vec![0; IPV4_HEADER];
    packet[0] = 0x45;
    packet[2..4].copy_from_slice(&total.to_be_bytes());
    packet[6..8].copy_from_slice(&DONT_FRAGMENT.to_be_bytes());
    packet[8] = TTL;
    packet[9] = protocol;
    packet[12..16].copy_from_slice(&src.octets());
    packet[16..20].copy_from_slice(&dst.octets());
    let sum = checksum(&packet);
    packet[10..12].copy_from_slice(&sum.to_be_bytes());
    packet.extend_from_slice(payload);
    Some(packet)
}

/// A UDP datagram.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Udp<'a> {
    pub(crate) src_port: u16,
    pub(crate) dst_port: u16,
    pub(crate) payload: &'a [u8],
}

impl<'a> Udp<'a> {
    pub(crate) fn parse(datagram: &'a [u8]) -> Option<Self> {
        let length = usize::from(be16(datagram, 4)?);
        Some(Self {
            src_port: be16(datagram, 0)?,
            dst_port: be16(datagram, 2)?,
            payload: datagram.get(UDP_HEADER..length)?,
        })
    }

    /// Builds the datagram with its checksum; none if the payload is too long.
    pub(crate) fn encode(&self, src: Ipv4Addr, dst: Ipv4Addr) -> Option<Vec<u8>> {
        let length = u16::try_from(UDP_HEADER + self.payload.len()).ok()?;
        let mut datagram = Vec::with_capacity(usize::from(length));
        datagram.extend_from_slice(&self.src_port.to_be_bytes());
        datagram.extend_from_slice(&self.dst_port.to_be_bytes());
        datagram.extend_from_slice(&length.to_be_bytes());
        datagram.extend_from_slice(&[0, 0]);
        datagram.extend_from_slice(self.payload);
        let sum = Sum::default().add_pseudo_header(src, dst, protocol::UDP, length).add(&datagram).finish();
        datagram[6..8].copy_from_slice(&nonzero(sum).to_be_bytes());
        Some(datagram)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const A: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 1);
    const B: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 2);

    #[test]
    fn what_is_built_is_what_another_parser_reads() {
        let udp = Udp { src_port: 67, dst_port: 68, payload: b"abc" }.encode(A, B).unwrap();
        let packet = ipv4(A, B, protocol::UDP, &udp).unwrap();
        let (src, dst) = (MacAddr::new([2; 6]), MacAddr::new([4; 6]));
        let frame = Ethernet { dst, src, ether_type: ether_type::IPV4, payload: &packet }.encode();

        let read = etherparse::PacketHeaders::from_ethernet_slice(&frame).unwrap();
        let Some(etherparse::NetHeaders::Ipv4(ip, _)) = read.net else { panic!("not IPv4") };
        assert_eq!((ip.source, ip.destination), (A.octets(), B.octets()));
        assert_eq!(ip.calc_header_checksum(), ip.header_checksum);
        let Some(etherparse::TransportHeader::Udp(udp)) = read.transport else { panic!("not UDP") };
        assert_eq!(udp.calc_checksum_ipv4(&ip, b"abc").unwrap(), udp.checksum);

        let back = Ethernet::parse(&frame).unwrap();
        assert_eq!((back.src, back.dst), (src, dst));
        let back = Ipv4::parse(back.payload).unwrap();
        assert_eq!((back.src, back.dst, back.protocol, back.is_fragment), (A, B, protocol::UDP, false));
        assert_eq!(Udp::parse(back.payload).unwrap().payload, b"abc");
    }

    proptest! {
        #[test]
        fn parsers_take_anything(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = (Ethernet::parse(&bytes), Arp::parse(&bytes), Ipv4::parse(&bytes), Udp::parse(&bytes));
        }

        #[test]
        fn arp_round_trips(reply: bool, macs: [[u8; 6]; 2], ips: [[u8; 4]; 2]) {
            let arp = Arp {
                operation: if reply { ArpOperation::Reply } else { ArpOperation::Request },
                sender_mac: MacAddr::new(macs[0]),
                sender_ip: ips[0].into(),
                target_mac: MacAddr::new(macs[1]),
                target_ip: ips[1].into(),
            };
            prop_assert_eq!(Arp::parse(&arp.encode()), Some(arp));
        }
    }
}
