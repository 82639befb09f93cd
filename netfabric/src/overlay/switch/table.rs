//! The forwarding table: a configuration, compiled for look-up by exact address. Never changed once made; a new
//! configuration is a new table.

use std::collections::HashMap;
use std::net::Ipv4Addr;

use crate::NodeId;
use crate::overlay::config::{NetworkConfig, OverlayConfig, PortStanding};
use crate::overlay::id::{MacAddr, Vni};

/// A port on this node: its place in [`OverlayConfig::ports`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct PortIndex(pub(crate) usize);

/// Where an address is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Destination {
    Port(PortIndex),
    Node(NodeId),
}

/// A port on this node.
#[derive(Debug)]
pub(crate) struct LocalPort {
    pub(crate) mac: MacAddr,
    pub(crate) ip: Ipv4Addr,
    pub(crate) hostname: String,
    pub(crate) standing: PortStanding,
    vni: Vni,
}

/// A network with all its addresses.
#[derive(Debug)]
pub(crate) struct Network {
    pub(crate) config: NetworkConfig,
    pub(crate) gateway_mac: MacAddr,
    places: HashMap<MacAddr, Destination>,
    addresses: HashMap<Ipv4Addr, MacAddr>,
}

impl Network {
    /// Where a hardware address is.
    pub(crate) fn locate(&self, mac: MacAddr) -> Option<Destination> {
        self.places.get(&mac).copied()
    }

    /// Which hardware address has an IPv4 address, the gateway's included.
    pub(crate) fn resolve(&self, ip: Ipv4Addr) -> Option<MacAddr> {
        if ip == self.config.gateway { Some(self.gateway_mac) } else { self.addresses.get(&ip).copied() }
    }
}

/// All networks and ports of this node.
#[derive(Debug, Default)]
pub(crate) struct Table {
    networks: HashMap<Vni, Network>,
    ports: Vec<LocalPort>,
}

impl Table {
    /// Compiles a configuration that has been validated.
    pub(crate) fn new(config: &OverlayConfig) -> Self {
        let mut networks: HashMap<_, _> = config
            .networks
            .iter()
            .map(|network| {
                let compiled = Network {
                    config: network.clone(),
                    gateway_mac: network.gateway_mac(),
                    places: HashMap::new(),
                    addresses: HashMap::new(),
                };
                (network.vni, compiled)
            })
            .collect();
        for entry in &config.forwarding {
            if let Some(network) = networks.get_mut(&entry.vni) {
                network.places.insert(entry.mac, Destination::Node(entry.node));
                network.addresses.insert(entry.ip, entry.mac);
            }
        }
        // After the entries, so that a port that is here is found here, unless its VM is not.
        for (index, port) in config.ports.iter().enumerate() {
            if port.standing == PortStanding::Active
                && let Some(network) = networks.get_mut(&port.vni)
            {
                network.places.insert(port.mac, Destination::Port(PortIndex(index)));
                network.addresses.insert(port.ip, port.mac);
            }
        }
        let ports = config
            .ports
            .iter()
            .map(|port| LocalPort {
                mac: port.mac,
                ip: port.ip,
                hostname: port.hostname.clone(),
                standing: port.standing,
                vni: port.vni,
            })
            .collect();
        Self { networks, ports }
    }

    /// A network.
    pub(crate) fn network(&self, vni: Vni) -> Option<&Network> {
        self.networks.get(&vni)
    }

    /// A port and the network that it is in.
    pub(crate) fn port(&self, index: PortIndex) -> Option<(&LocalPort, &Network)> {
        let port = self.ports.get(index.0)?;
        Some((port, self.networks.get(&port.vni)?))
    }
}
