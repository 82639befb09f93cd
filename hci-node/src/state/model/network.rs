//! Overlay networks and the ports of VMs on them.

use std::net::Ipv4Addr;

use ipnet::Ipv4Net;
use serde::{Deserialize, Serialize};

use crate::state::ids::*;

/// An overlay network.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Network {
    /// Its id.
    pub id: NetworkId,
    /// Its name, unique.
    pub name: String,
    /// Its number on the wire.
    pub vni: Vni,
    /// Its addresses.
    pub subnet: Ipv4Net,
    /// The virtual gateway, which is also the DHCP server.
    pub gateway: Ipv4Addr,
    /// MTU of its guests.
    pub mtu: u16,
    /// Name servers told to its guests.
    pub dns: Vec<Ipv4Addr>,
    /// Domain told to its guests.
    pub domain: String,
    /// When it was created.
    pub created: Timestamp,
}

/// A NIC of a VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Port {
    /// Its id.
    pub id: PortId,
    /// The network that it is on.
    pub network: NetworkId,
    /// The VM that it belongs to.
    pub vm: VmId,
    /// Its Ethernet address, unique in the cluster.
    pub mac: MacAddr,
    /// Its address, unique in its network.
    pub ip: Ipv4Addr,
}
