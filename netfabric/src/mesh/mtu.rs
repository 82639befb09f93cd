//! The link's MTU, from which packet sizes and offload batches follow.
//!
//! quinn starts at 1200 bytes and falls back there when it suspects a black hole; on a LAN whose MTU is known both
//! only cost throughput. So the MTU is read once and set as minimum and start.

use std::net::{IpAddr, SocketAddr};
use std::path::Path;

/// Smallest link MTU that leaves QUIC its 1200 bytes, with IPv6 headers.
pub(super) const SMALLEST: u16 = 1200 + IPV6_UDP_HEADERS;
/// Where reading fails, and the least common denominator of Ethernet.
const FALLBACK: u16 = 1500;
/// Largest jumbo frame of usual hardware; caps loopback's 65536, with which offload could not batch.
const LARGEST: u16 = 9216;
const IPV4_UDP_HEADERS: u16 = 20 + 8;
const IPV6_UDP_HEADERS: u16 = 40 + 8;

/// Bytes of UDP payload in a packet of this MTU; none if that is too little for QUIC.
pub(super) fn udp_payload(link_mtu: u16, local: SocketAddr) -> Option<u16> {
    let headers = if local.is_ipv4() { IPV4_UDP_HEADERS } else { IPV6_UDP_HEADERS };
    (link_mtu >= SMALLEST).then(|| link_mtu.min(LARGEST) - headers)
}

/// MTU of the interface that has this address. For the unspecified address: the smallest of all interfaces that could
/// lead to a peer.
pub(super) fn of_address(address: IpAddr) -> u16 {
    let Ok(interfaces) = nix::ifaddrs::getifaddrs() else { return FALLBACK };
    interfaces
        .filter(|interface| {
            let theirs = interface.address.as_ref().and_then(|a| {
                let v4 = a.as_sockaddr_in().map(|a| IpAddr::from(a.ip()));
                v4.or_else(|| a.as_sockaddr_in6().map(|a| IpAddr::from(a.ip())))
            });
            match theirs {
                Some(theirs) if address.is_unspecified() => {
                    !theirs.is_loopback() && theirs.is_ipv4() == address.is_ipv4()
                }
                theirs => theirs == Some(address),
            }
        })
        .filter_map(|interface| of_interface(&interface.interface_name))
        .min()
        .unwrap_or(FALLBACK)
}

fn of_interface(name: &str) -> Option<u16> {
    let text = std::fs::read_to_string(Path::new("/sys/class/net").join(name).join("mtu")).ok()?;
    let mtu: u32 = text.trim().parse().ok()?;
    Some(u16::try_from(mtu).unwrap_or(u16::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn payload_leaves_room_for_headers() {
        let (v4, v6) = ("127.0.0.1:0".parse().unwrap(), "[::1]:0".parse().unwrap());
        assert_eq!(udp_payload(1500, v4), Some(1472));
        assert_eq!(udp_payload(1500, v6), Some(1452));
        assert_eq!(udp_payload(9000, v4), Some(8972));
        assert_eq!(udp_payload(u16::MAX, v4), Some(LARGEST - IPV4_UDP_HEADERS));
        assert_eq!(udp_payload(1000, v4), None);
    }

    #[test]
    fn loopback_is_read_and_unknown_addresses_fall_back() {
        assert!(of_address("127.0.0.1".parse().unwrap()) > FALLBACK);
        assert_eq!(of_address("192.0.2.77".parse().unwrap()), FALLBACK);
    }
}
