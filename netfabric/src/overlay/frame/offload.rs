//! Finishes a frame for a receiver that cannot take it as it is: completes checksums, and cuts super-frames of TCP and
//! UDP over IPv4 into frames that fit on a wire. A guest that negotiated the offloads never gets here.

use std::net::Ipv4Addr;

use super::checksum::{Sum, checksum, nonzero};
use super::packet::{ETHERNET_HEADER, Ethernet, Ipv4, UDP_HEADER, ether_type, protocol};
use super::vnet::{Checksum, Gso, VnetHeader};
use crate::overlay::stats::DropReason;

const TCP_FIN: u8 = 0x01;
const TCP_PSH: u8 = 0x08;
const TCP_CWR: u8 = 0x80;
/// No stack segments smaller than 48 bytes (Linux' least MSS), which makes 1366 of the largest super-frame.
const MAX_SEGMENTS: usize = 1366;

/// Completes the checksum in place.
pub(crate) fn complete_checksum(frame: &mut [u8], header: &VnetHeader) -> Result<(), DropReason> {
    let Checksum::Partial { start, offset } = header.checksum else { return Ok(()) };
    let start = usize::from(start);
    let field = start + usize::from(offset);
    let covered = frame.get(start..).ok_or(DropReason::Malformed)?;
    // The field holds the pseudo header's sum, so it is part of what is summed.
    let sum = nonzero(Sum::default().add(covered).finish());
    frame.get_mut(field..field + 2).ok_or(DropReason::Malformed)?.copy_from_slice(&sum.to_be_bytes());
    Ok(())
}

/// Cuts a super-frame into frames with complete checksums.
pub(crate) fn segment(frame: &[u8], header: &VnetHeader) -> Result<Vec<Vec<u8>>, DropReason> {
    let ethernet = Ethernet::parse(frame).ok_or(DropReason::Malformed)?;
    if ethernet.ether_type != ether_type::IPV4 {
        return Err(DropReason::UnknownProtocol);
    }
    let ip = Ipv4::parse(ethernet.payload).ok_or(DropReason::Malformed)?;
    let size = usize::from(header.gso_size);
    if ip.is_fragment || size == 0 {
        return Err(DropReason::Malformed);
    }
    let transport = match (header.gso, ip.protocol) {
        (Gso::TcpV4, protocol::TCP) => {
            let length = usize::from(ip.payload.get(12).ok_or(DropReason::Malformed)? >> 4) * 4;
            if length < 20 { return Err(DropReason::Malformed) } else { length }
        }
        (Gso::Udp, protocol::UDP) => UDP_HEADER,
        _ => return Err(DropReason::Malformed),
    };
    let data = ip.payload.get(transport..).ok_or(DropReason::Malformed)?;
    if data.is_empty() || data.len().div_ceil(size) > MAX_SEGMENTS {
        return Err(DropReason::Malformed);
    }
    let headers = &frame[..ETHERNET_HEADER + ip.header + transport];
    let count = data.len().div_ceil(size);
    let mut frames = Vec::with_capacity(count);
    for (index, part) in data.chunks(size).enumerate() {
        let mut out = Vec::with_capacity(headers.len() + part.len());
        out.extend_from_slice(headers);
        out.extend_from_slice(part);
        let place = Place { index, offset: index * size, last: index + 1 == count };
        finish_segment(&mut out, &ip, transport, place)?;
        frames.push(out);
    }
    Ok(frames)
}

/// Which segment of a super-frame this is.
struct Place {
    index: usize,
    /// Of its data in the super-frame's.
    offset: usize,
    last: bool,
}

/// Writes the fields in which a segment differs from its super-frame.
fn finish_segment(frame: &mut [u8], ip: &Ipv4<'_>, transport: usize, place: Place) -> Result<(), DropReason> {
    let packet = &mut frame[ETHERNET_HEADER..];
    let total = u16::try_from(packet.len()).map_err(|_| DropReason::TooLarge)?;
    packet[2..4].copy_from_slice(&total.to_be_bytes());
    let id = u16::from_be_bytes([packet[4], packet[5]]).wrapping_add(place.index as u16);
    packet[4..6].copy_from_slice(&id.to_be_bytes());
    packet[10..12].fill(0);
    let sum = checksum(&packet[..ip.header]);
    packet[10..12].copy_from_slice(&sum.to_be_bytes());

    let segment = &mut packet[ip.header..];
    let length = segment.len() as u16;
    let field = match ip.protocol {
        protocol::TCP => {
            finish_tcp(segment, &place);
            16
        }
        _ => {
            segment[4..6].copy_from_slice(&length.to_be_bytes());
            6
        }
    };
    debug_assert!(transport >= field + 2);
    segment[field..field + 2].fill(0);
    let sum = transport_sum(ip.src, ip.dst, ip.protocol, segment);
    segment[field..field + 2].copy_from_slice(&sum.to_be_bytes());
    Ok(())
}

/// Sequence number and flags of one TCP segment (RFC 9293; CWR on the first only, RFC 3168).
fn finish_tcp(segment: &mut [u8], place: &Place) {
    let first = u32::from_be_bytes([segment[4], segment[5], segment[6], segment[7]]);
    let sequence = first.wrapping_add(place.offset as u32);
    segment[4..8].copy_from_slice(&sequence.to_be_bytes());
    if !place.last {
        segment[13] &= !(TCP_FIN | TCP_PSH);
    }
    if place.index > 0 {
        segment[13] &= !TCP_CWR;
    }
}

fn transport_sum(src: Ipv4Addr, dst: Ipv4Addr, protocol: u8, segment: &[u8]) -> u16 {
    let sum =
        Sum::default().add_pseudo_header(src, dst, protocol, segment.len() as u16).add(segment).finish();
    if protocol == protocol::UDP { nonzero(sum) } else { sum }
}

#[cfg(test)]
mod tests {
    use etherparse::{NetHeaders, PacketBuilder, PacketHeaders, TransportHeader};
    use proptest::prelude::*;

    use super::*;

    const SRC: [u8; 4] = [10, 0, 0, 1];
    const DST: [u8; 4] = [10, 0, 0, 2];

    fn tcp(data: &[u8]) -> Vec<u8> {
        let mut frame = Vec::new();
        PacketBuilder::ethernet2([2; 6], [4; 6])
            .ipv4(SRC, DST, 64)
            .tcp(1000, 2000, 0xffff_f000, 5000)
            .psh()
            .fin()
            .write(&mut frame, data)
            .unwrap();
        frame
    }

    fn udp(data: &[u8]) -> Vec<u8> {
        let mut frame = Vec::new();
        PacketBuilder::ethernet2([2; 6], [4; 6])
            .ipv4(SRC, DST, 64)
            .udp(1000, 2000)
            .write(&mut frame, data)
            .unwrap();
        frame
    }

    /// As a driver hands it over: the field holds the pseudo header's sum.
    fn make_partial(frame: &mut [u8], protocol: u8, offset: u16) -> VnetHeader {
        let length = (frame.len() - 34) as u16;
        let sum = Sum::default().add_pseudo_header(SRC.into(), DST.into(), protocol, length).fold();
        let field = 34 + usize::from(offset);
        frame[field..field + 2].copy_from_slice(&sum.to_be_bytes());
        VnetHeader { checksum: Checksum::Partial { start: 34, offset }, ..VnetHeader::PLAIN }
    }

    /// Checks all checksums with another implementation; returns sequence number, flags and data.
    fn verify(frame: &[u8]) -> (u32, bool, Vec<u8>) {
        let read = PacketHeaders::from_ethernet_slice(frame).unwrap();
        let Some(NetHeaders::Ipv4(ip, _)) = read.net else { panic!("not IPv4") };
        assert_eq!(ip.calc_header_checksum(), ip.header_checksum);
        let data = read.payload.slice().to_vec();
        match read.transport {
            Some(TransportHeader::Tcp(tcp)) => {
                // Zero and all ones are the same number.
                assert_eq!(nonzero(tcp.calc_checksum_ipv4(&ip, &data).unwrap()), nonzero(tcp.checksum));
                (tcp.sequence_number, tcp.fin, data)
            }
            Some(TransportHeader::Udp(udp)) => {
                assert_eq!(udp.calc_checksum_ipv4(&ip, &data).unwrap(), udp.checksum);
                assert_eq!(usize::from(udp.length), data.len() + 8);
                (0, false, data)
            }
            _ => panic!("neither TCP nor UDP"),
        }
    }

    proptest! {
        #[test]
        fn completed_checksums_are_right(data in proptest::collection::vec(any::<u8>(), 0..2000), is_tcp: bool) {
            let (mut frame, protocol, offset) =
                if is_tcp { (tcp(&data), protocol::TCP, 16) } else { (udp(&data), protocol::UDP, 6) };
            let header = make_partial(&mut frame, protocol, offset);
            complete_checksum(&mut frame, &header).unwrap();
            prop_assert_eq!(verify(&frame).2, data);
        }

        #[test]
        fn segments_carry_the_data_in_order(
            data in proptest::collection::vec(any::<u8>(), 1..20_000), size in 48..3000u16, is_tcp: bool,
        ) {
            let gso = if is_tcp { Gso::TcpV4 } else { Gso::Udp };
            let (mut frame, protocol, offset) =
                if is_tcp { (tcp(&data), protocol::TCP, 16) } else { (udp(&data), protocol::UDP, 6) };
            let header = VnetHeader { gso, gso_size: size, ..make_partial(&mut frame, protocol, offset) };
            let frames = segment(&frame, &header).unwrap();
            let mut joined = Vec::new();
            for (index, frame) in frames.iter().enumerate() {
                let (sequence, fin, part) = verify(frame);
                prop_assert!(part.len() <= usize::from(size));
                if is_tcp {
                    prop_assert_eq!(sequence, 0xffff_f000u32.wrapping_add(joined.len() as u32));
                    prop_assert_eq!(fin, index + 1 == frames.len());
                }
                joined.extend(part);
            }
            prop_assert_eq!(joined, data);
        }

        #[test]
        fn garbage_is_refused_quietly(
            bytes in proptest::collection::vec(any::<u8>(), 0..120), raw: [u8; 12], flat: bool,
        ) {
            let mut frame = if flat { bytes } else { let mut frame = tcp(&bytes); frame[14] = raw[0]; frame[46] = raw[1]; frame };
            if let Ok(header) = VnetHeader::parse(&raw, frame.len()) {
                let _ = segment(&frame, &header);
                let _ = complete_checksum(&mut frame, &header);
            }
        }
    }
}
