//! Overlay networks and the allocation of addresses in them.

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr, SocketAddr},
};

use ipnet::Ipv4Net;

use super::{Applied, check_free, check_name, conflict, invalid, not_found};
use crate::state::{
    ClusterState, MacAddr, Network, NetworkId, PortId, Refusal, RefusalKind, Subject, Timestamp, Vni,
};

#[allow(clippy::too_many_arguments)] // the fields of one command
pub(super) fn create(
    state: &mut ClusterState,
    id: NetworkId,
    name: &str,
    subnet: Ipv4Net,
    gateway: Option<Ipv4Addr>,
    mtu: u16,
    dns: &[Ipv4Addr],
    domain: &str,
    at: Timestamp,
) -> Result<Applied, Refusal> {
    let done = Applied::now("network create", Subject::Network(id), name);
    if state.networks.contains_key(&id) {
        return Ok(done);
    }
    check_name("network", name)?;
    check_free("network", name, state.networks.values().map(|network| &network.name))?;
    let subnet = subnet.trunc();
    if !(8..=29).contains(&subnet.prefix_len()) {
        return Err(invalid(format!("{subnet} is too large or too small"), "use a prefix from /8 to /29"));
    }
    // A first host exists in every subnet that passed the check above.
    let gateway = gateway.or_else(|| subnet.hosts().next()).unwrap_or(subnet.addr());
    if !subnet.contains(&gateway) || gateway == subnet.network() || gateway == subnet.broadcast() {
        return Err(invalid(
            format!("{gateway} cannot be the gateway of {subnet}"),
            "use a host address of the subnet",
        ));
    }
    if !(576..=9000).contains(&mtu) {
        return Err(invalid(format!("an MTU of {mtu} is not possible"), "use 576 to 9000"));
    }
    if domain.len() > 253 || dns.len() > 8 {
        return Err(invalid("the domain is too long or there are too many name servers", "use fewer"));
    }
    let inside = |address: SocketAddr| matches!(address.ip(), IpAddr::V4(ip) if subnet.contains(&ip));
    if let Some(node) = state.nodes.values().find(|node| inside(node.addresses.control)) {
        return Err(Refusal::new(
            RefusalKind::Taken,
            format!("{subnet} contains the address {} of node {}", node.addresses.control.ip(), node.name),
            "choose a subnet that the nodes do not use",
        ));
    }
    let vni = Vni(state.next_vni);
    state.next_vni += 1;
    let network = Network {
        id,
        name: name.to_owned(),
        vni,
        subnet,
        gateway,
        mtu,
        dns: dns.to_vec(),
        domain: domain.to_owned(),
        created: at,
    };
    state.networks.insert(id, network);
    Ok(done)
}

pub(super) fn delete(state: &mut ClusterState, id: NetworkId) -> Result<Applied, Refusal> {
    let network = state.networks.get(&id).ok_or_else(|| not_found("network", id))?;
    let name = network.name.clone();
    if let Some(port) = state.ports.values().find(|port| port.network == id) {
        let vm = state.subject_name(&Subject::Vm(port.vm));
        return Err(conflict(
            format!("network {name} is in use by the VM {vm}"),
            format!("delete the VM first: hci vm delete {vm}"),
        ));
    }
    state.networks.remove(&id);
    Ok(Applied::now("network delete", Subject::Network(id), name))
}

/// The lowest free address of a network.
pub(super) fn free_address(
    state: &ClusterState,
    network: &Network,
    also_taken: &BTreeSet<(NetworkId, Ipv4Addr)>,
) -> Result<Ipv4Addr, Refusal> {
    let taken: BTreeSet<_> = state.ports_of(network.id).map(|port| port.ip).collect();
    network
        .subnet
        .hosts()
        .find(|ip| *ip != network.gateway && !taken.contains(ip) && !also_taken.contains(&(network.id, *ip)))
        .ok_or_else(|| {
            Refusal::new(
                RefusalKind::Capacity,
                format!("network {} has no free address left in {}", network.name, network.subnet),
                "delete VMs, or create a larger network",
            )
        })
}

/// A locally administered address made from the port's id; the next free one should it be taken.
pub(super) fn free_mac(state: &ClusterState, port: PortId, also_taken: &BTreeSet<MacAddr>) -> MacAddr {
    let taken: BTreeSet<_> = state.ports.values().map(|port| port.mac).collect();
    let bytes = port.0.as_bytes();
    let mut low = u32::from_be_bytes([0, bytes[13], bytes[14], bytes[15]]);
    loop {
        let [_, a, b, c] = low.to_be_bytes();
        let mac = MacAddr([0x52, 0x54, 0x00, a, b, c]);
        if !taken.contains(&mac) && !also_taken.contains(&mac) {
            return mac;
        }
        low = (low + 1) & 0x00ff_ffff;
    }
}
