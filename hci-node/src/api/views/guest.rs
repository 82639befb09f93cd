//! What is told of the inside of a VM.

use std::net::IpAddr;

use super::api;
use crate::state::{
    CloudInit,
    report::{AgentReport, GuestInterface},
};

/// What of cloud-init's data a VM of this name has.
pub(super) fn cloud_init(given: &CloudInit, vm: &str) -> api::CloudInitGiven {
    let size = |text: &Option<String>| text.as_ref().map(|text| text.len() as u64);
    api::CloudInitGiven {
        user_data_bytes: size(&given.user_data),
        network_config_bytes: size(&given.network_config),
        ssh_keys: given.ssh_keys.len() as u64,
        hostname: given.hostname.clone().unwrap_or_else(|| vm.to_owned()),
    }
}

/// What the agent in a VM's guest says.
pub(super) fn agent(report: &AgentReport) -> api::GuestAgent {
    let interface = |interface: &GuestInterface| api::GuestInterface {
        name: interface.name.clone(),
        mac: interface.mac.clone(),
        addresses: interface.addresses.iter().map(ToString::to_string).collect(),
    };
    api::GuestAgent {
        version: report.version.clone(),
        interfaces: report.interfaces.iter().map(interface).collect(),
    }
}

/// By which addresses a guest is reached: those that it has by its agent's word, or else those that its NICs were given.
pub(super) fn addresses(report: Option<&AgentReport>, nics: &[api::VmNic]) -> Vec<String> {
    let told = report.iter().flat_map(|report| &report.interfaces).flat_map(|interface| &interface.addresses);
    let mut addresses: Vec<String> =
        told.filter(|address| is_reachable(**address)).map(ToString::to_string).collect();
    if addresses.is_empty() {
        addresses = nics.iter().map(|nic| nic.ip.clone()).collect();
    }
    addresses
}

/// Whether an address means something outside its own link.
fn is_reachable(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => !address.is_link_local(),
        IpAddr::V6(address) => !address.is_unicast_link_local(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guests_own_addresses_come_first_and_those_of_its_link_never() {
        let nic = api::VmNic {
            network: "lan".into(),
            mac: "02:00:00:00:00:01".into(),
            ip: "10.0.0.5".into(),
            state: api::DeviceState::Attached,
        };
        let report = |addresses: &[&str]| AgentReport {
            version: "8".into(),
            interfaces: vec![GuestInterface {
                name: "eth0".into(),
                mac: None,
                addresses: addresses.iter().map(|address| address.parse().unwrap()).collect(),
            }],
        };
        let nics = [nic];
        assert_eq!(addresses(None, &nics), ["10.0.0.5"]);
        assert_eq!(addresses(Some(&report(&["fe80::1", "169.254.0.9"])), &nics), ["10.0.0.5"]);
        assert_eq!(
            addresses(Some(&report(&["10.0.0.5", "fe80::1", "2001:db8::5"])), &nics),
            ["10.0.0.5", "2001:db8::5"]
        );
    }
}
