//! What the control plane tells the overlay: all networks, ports and addresses that matter on this node, as one value.
//!
//! A configuration is declarative and whole. Applying it twice is the same as once; what is absent is gone. It is
//! checked before anything of it takes effect, so a wrong one leaves the last good one in place.

use std::collections::{HashMap, HashSet};
use std::net::Ipv4Addr;
use std::path::PathBuf;

use ipnet::Ipv4Net;
use serde::{Deserialize, Serialize};

use super::id::{MacAddr, PortId, Vni};
use crate::NodeId;

/// Everything that the overlay of one node has to know.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct OverlayConfig {
    /// The networks that have a port on this node.
    pub networks: Vec<NetworkConfig>,
    /// The ports on this node.
    pub ports: Vec<PortConfig>,
    /// Every port of every network in `networks`, on any node (those on this one may be left out).
    pub forwarding: Vec<ForwardEntry>,
}

/// One layer-2 network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkConfig {
    /// The number that keeps it apart from others on the wire.
    pub vni: Vni,
    /// Where its addresses come from.
    pub subnet: Ipv4Net,
    /// The virtual gateway: answers ARP and ping on every node, and is the DHCP server's address.
    pub gateway: Ipv4Addr,
    /// Largest IP packet of a guest; independent of the MTU below.
    pub mtu: u16,
    /// Name servers told to guests.
    pub dns: Vec<Ipv4Addr>,
    /// Domain told to guests; empty for none.
    pub domain: String,
}

/// One port: a network interface of a VM on this node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortConfig {
    /// Its name.
    pub id: PortId,
    /// The network that it is plugged into.
    pub vni: Vni,
    /// The only hardware address that it may use.
    pub mac: MacAddr,
    /// The only IPv4 address that it may use; DHCP gives it.
    pub ip: Ipv4Addr,
    /// The host name that DHCP gives.
    pub hostname: String,
    /// Where to listen for the VMM (vhost-user-net).
    pub socket: PathBuf,
    /// Whether its addresses are here.
    pub standing: PortStanding,
}

/// Whether a port is where its VM runs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum PortStanding {
    /// It is.
    #[default]
    Active,
    /// The VM runs on another node and may come here: a VMM can connect and start its rings, but nothing passes, and the
    /// addresses are where a forwarding entry says.
    Standby,
}

/// Where an address of a network is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ForwardEntry {
    /// The network.
    pub vni: Vni,
    /// The port's hardware address.
    pub mac: MacAddr,
    /// The port's IPv4 address.
    pub ip: Ipv4Addr,
    /// The node that runs its VM.
    pub node: NodeId,
}

/// Why a configuration was not applied.
#[derive(Debug, thiserror::Error)]
pub enum OverlayError {
    /// Two networks with one number.
    #[error("network {0} is configured twice")]
    DuplicateNetwork(Vni),
    /// Something refers to a network that is not there.
    #[error("{what} refers to network {vni}, which is not configured")]
    UnknownNetwork {
        /// The port or forwarding entry.
        what: String,
        /// The network that is missing.
        vni: Vni,
    },
    /// Two ports share an id or a socket.
    #[error("port {0} is configured twice, or shares its socket with another")]
    DuplicatePort(PortId),
    /// One address in two places of a network.
    #[error("address {address} is used twice in network {vni}")]
    DuplicateAddress {
        /// The network.
        vni: Vni,
        /// The hardware or IPv4 address.
        address: String,
    },
    /// An address that cannot be a port's or a gateway's.
    #[error("{what}: {address} cannot be used in network {vni}")]
    BadAddress {
        /// The port, gateway or forwarding entry.
        what: String,
        /// The network.
        vni: Vni,
        /// The hardware or IPv4 address.
        address: String,
    },
    /// The MTU is one that no guest can work with.
    #[error("network {vni}: an MTU of {mtu} is not between {min} and {max}", min = MIN_MTU, max = MAX_MTU)]
    BadMtu {
        /// The network.
        vni: Vni,
        /// The value given.
        mtu: u16,
    },
    /// Somebody else takes the transport's datagrams.
    #[error("the transport's datagrams are taken already")]
    TransportTaken,
    /// The counters cannot be made.
    #[error("cannot make metrics: {0}")]
    Metrics(String),
    /// A port's socket cannot be made.
    #[error("cannot listen on {path}")]
    Listen {
        /// The socket's path.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
}

/// Every IPv4 host must take packets of 576 bytes (RFC 791); IPv6 asks for more, which a network may choose.
const MIN_MTU: u16 = 576;
/// The largest frame without segmentation offload that a guest's buffers are sized for.
const MAX_MTU: u16 = 9216;

impl OverlayConfig {
    /// Checks that the configuration means something: references resolve, addresses are usable and unique.
    pub fn validate(&self) -> Result<(), OverlayError> {
        let mut networks = HashMap::new();
        for network in &self.networks {
            network.validate()?;
            if networks.insert(network.vni, network).is_some() {
                return Err(OverlayError::DuplicateNetwork(network.vni));
            }
        }
        let mut ids = HashSet::new();
        let mut sockets = HashSet::new();
        let mut addresses = HashSet::new();
        for port in &self.ports {
            let what = format!("port {}", port.id);
            let network = resolve(&networks, &what, port.vni)?;
            network.check(&what, port.mac, port.ip)?;
            if !ids.insert(port.id) || !sockets.insert(&port.socket) {
                return Err(OverlayError::DuplicatePort(port.id));
            }
            unique(&mut addresses, port.vni, port.mac, port.ip)?;
        }
        // An entry may repeat a port of this node; beyond that, each address is in one place.
        let here: HashMap<_, _> =
            self.ports.iter().map(|port| ((port.vni, port.mac, port.ip), port.standing)).collect();
        let mut elsewhere = HashSet::new();
        for entry in &self.forwarding {
            let what = format!("the forwarding entry of {}", entry.mac);
            let network = resolve(&networks, &what, entry.vni)?;
            network.check(&what, entry.mac, entry.ip)?;
            match here.get(&(entry.vni, entry.mac, entry.ip)) {
                None => unique(&mut addresses, entry.vni, entry.mac, entry.ip)?,
                Some(PortStanding::Standby) => unique(&mut elsewhere, entry.vni, entry.mac, entry.ip)?,
                Some(PortStanding::Active) => {}
            }
        }
        Ok(())
    }
}

fn resolve<'a>(
    networks: &HashMap<Vni, &'a NetworkConfig>,
    what: &str,
    vni: Vni,
) -> Result<&'a NetworkConfig, OverlayError> {
    networks.get(&vni).copied().ok_or_else(|| OverlayError::UnknownNetwork { what: what.to_owned(), vni })
}

#[derive(PartialEq, Eq, Hash)]
enum Address {
    Mac(MacAddr),
    Ip(Ipv4Addr),
}

fn unique(
    addresses: &mut HashSet<(Vni, Address)>,
    vni: Vni,
    mac: MacAddr,
    ip: Ipv4Addr,
) -> Result<(), OverlayError> {
    if !addresses.insert((vni, Address::Mac(mac))) {
        return Err(OverlayError::DuplicateAddress { vni, address: mac.to_string() });
    }
    if !addresses.insert((vni, Address::Ip(ip))) {
        return Err(OverlayError::DuplicateAddress { vni, address: ip.to_string() });
    }
    Ok(())
}

impl NetworkConfig {
    /// The gateway's hardware address: the same on every node, so that a VM that moves keeps its ARP cache.
    pub fn gateway_mac(&self) -> MacAddr {
        let [_, a, b, c] = self.vni.get().to_be_bytes();
        MacAddr::new([0x0e, 0x68, 0x63, a, b, c])
    }

    fn validate(&self) -> Result<(), OverlayError> {
        if !(MIN_MTU..=MAX_MTU).contains(&self.mtu) {
            return Err(OverlayError::BadMtu { vni: self.vni, mtu: self.mtu });
        }
        if !self.is_host(self.gateway) {
            return Err(OverlayError::BadAddress {
                what: "gateway".to_owned(),
                vni: self.vni,
                address: self.gateway.to_string(),
            });
        }
        Ok(())
    }

    fn check(&self, what: &str, mac: MacAddr, ip: Ipv4Addr) -> Result<(), OverlayError> {
        let bad =
            |address: String| OverlayError::BadAddress { what: what.to_owned(), vni: self.vni, address };
        if mac.is_multicast() || mac == MacAddr::new([0; 6]) || mac == self.gateway_mac() {
            return Err(bad(mac.to_string()));
        }
        if !self.is_host(ip) || ip == self.gateway {
            return Err(bad(ip.to_string()));
        }
        Ok(())
    }

    /// True for addresses of the subnet that a host may have.
    fn is_host(&self, ip: Ipv4Addr) -> bool {
        let ends =
            self.subnet.prefix_len() < 31 && (ip == self.subnet.network() || ip == self.subnet.broadcast());
        self.subnet.contains(&ip) && !ends && !ip.is_unspecified() && !ip.is_multicast()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vni(number: u32) -> Vni {
        Vni::try_from(number).unwrap()
    }

    fn network(number: u32) -> NetworkConfig {
        NetworkConfig {
            vni: vni(number),
            subnet: "10.1.0.0/24".parse().unwrap(),
            gateway: Ipv4Addr::new(10, 1, 0, 1),
            mtu: 1500,
            dns: Vec::new(),
            domain: String::new(),
        }
    }

    fn port(number: u32, last: u8) -> PortConfig {
        PortConfig {
            id: PortId::random(),
            vni: vni(number),
            mac: MacAddr::new([2, 0, 0, 0, 0, last]),
            ip: Ipv4Addr::new(10, 1, 0, last),
            hostname: "a".to_owned(),
            socket: format!("/run/{number}-{last}.sock").into(),
            standing: PortStanding::Active,
        }
    }

    fn entry(port: &PortConfig) -> ForwardEntry {
        ForwardEntry { vni: port.vni, mac: port.mac, ip: port.ip, node: NodeId::random() }
    }

    #[test]
    fn two_networks_may_use_the_same_addresses() {
        let (a, b) = (port(1, 10), port(2, 10));
        let config = OverlayConfig {
            networks: vec![network(1), network(2)],
            forwarding: vec![entry(&a), entry(&port(1, 11)), entry(&b)],
            ports: vec![a, b],
        };
        config.validate().unwrap();
    }

    #[test]
    fn a_port_in_standby_is_at_one_other_node() {
        let standby = PortConfig { standing: PortStanding::Standby, ..port(1, 10) };
        let mut config = OverlayConfig {
            networks: vec![network(1)],
            forwarding: vec![entry(&standby)],
            ports: vec![standby.clone(), port(1, 11)],
        };
        config.validate().unwrap();
        config.forwarding.push(entry(&standby));
        assert!(matches!(config.validate(), Err(OverlayError::DuplicateAddress { .. })));
        config.forwarding.pop();
        config.ports[1].ip = standby.ip;
        assert!(matches!(config.validate(), Err(OverlayError::DuplicateAddress { .. })));
    }

    #[test]
    fn contradictions_are_refused() {
        let good = OverlayConfig {
            networks: vec![network(1)],
            ports: vec![port(1, 10)],
            forwarding: vec![entry(&port(1, 11))],
        };
        good.validate().unwrap();
        let refused = |change: &dyn Fn(&mut OverlayConfig)| {
            let mut config = good.clone();
            change(&mut config);
            config.validate().unwrap_err()
        };
        use OverlayError::*;
        assert!(matches!(refused(&|c| c.networks.push(network(1))), DuplicateNetwork(_)));
        assert!(matches!(refused(&|c| c.networks.clear()), UnknownNetwork { .. }));
        assert!(matches!(refused(&|c| c.ports.push(c.ports[0].clone())), DuplicatePort(_)));
        assert!(matches!(
            refused(&|c| c.ports.push(PortConfig { socket: "/b".into(), ..port(1, 10) })),
            DuplicateAddress { .. }
        ));
        assert!(matches!(refused(&|c| c.forwarding.push(c.forwarding[0])), DuplicateAddress { .. }));
        assert!(matches!(refused(&|c| c.forwarding[0].mac = c.ports[0].mac), DuplicateAddress { .. }));
        assert!(matches!(refused(&|c| c.ports[0].mac = MacAddr::BROADCAST), BadAddress { .. }));
        assert!(matches!(refused(&|c| c.ports[0].mac = c.networks[0].gateway_mac()), BadAddress { .. }));
        assert!(matches!(refused(&|c| c.ports[0].ip = c.networks[0].gateway), BadAddress { .. }));
        assert!(matches!(refused(&|c| c.ports[0].ip = Ipv4Addr::new(10, 2, 0, 9)), BadAddress { .. }));
        assert!(matches!(
            refused(&|c| c.networks[0].gateway = Ipv4Addr::new(10, 1, 0, 255)),
            BadAddress { .. }
        ));
        assert!(matches!(refused(&|c| c.networks[0].mtu = 100), BadMtu { .. }));
    }

    #[test]
    fn survives_json_and_postcard() {
        let config = OverlayConfig {
            networks: vec![network(1)],
            ports: vec![port(1, 10)],
            forwarding: vec![entry(&port(1, 11))],
        };
        let json = serde_json::to_string(&config).unwrap();
        assert_eq!(serde_json::from_str::<OverlayConfig>(&json).unwrap(), config);
        let binary = postcard::to_stdvec(&config).unwrap();
        assert_eq!(postcard::from_bytes::<OverlayConfig>(&binary).unwrap(), config);
    }
}
