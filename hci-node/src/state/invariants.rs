//! What holds after every command. The property tests check it after each step of random histories.

use std::collections::BTreeSet;

use super::{ClusterState, Subject, VolumeOwner};

/// Every violation found, as sentences; empty when all is well.
pub fn violations(state: &ClusterState) -> Vec<String> {
    let mut found = Vec::new();
    let mut unique = |what: &str, names: Vec<&String>| {
        let distinct: BTreeSet<_> = names.iter().collect();
        if distinct.len() != names.len() {
            found.push(format!("two {what} share a name"));
        }
    };
    unique("nodes", state.nodes.values().map(|node| &node.name).collect());
    unique("volumes", state.volumes.values().map(|volume| &volume.name).collect());
    unique("images", state.images.values().map(|image| &image.name).collect());
    unique("networks", state.networks.values().map(|network| &network.name).collect());
    unique("VMs", state.vms.values().map(|vm| &vm.name).collect());
    volumes(state, &mut found);
    vms(state, &mut found);
    let addresses: BTreeSet<_> = state.ports.values().map(|port| (port.network, port.ip)).collect();
    let macs: BTreeSet<_> = state.ports.values().map(|port| port.mac).collect();
    if addresses.len() != state.ports.len() || macs.len() != state.ports.len() {
        found.push("two ports share an address".to_owned());
    }
    found
}

fn volumes(state: &ClusterState, found: &mut Vec<String>) {
    for volume in state.volumes.values() {
        let name = &volume.name;
        for (index, segment) in volume.segments.iter().enumerate() {
            if segment.in_sync() == 0 {
                found.push(format!("segment {index} of {name} has no complete copy"));
            }
            let nodes: BTreeSet<_> = segment.replicas.iter().map(|replica| replica.node).collect();
            if nodes.len() != usize::from(volume.replicas) || segment.replicas.len() != nodes.len() {
                found.push(format!(
                    "copies of segment {index} of {name} are not on {} nodes",
                    volume.replicas
                ));
            }
            for replica in &segment.replicas {
                if state.disks.get(&replica.disk).is_none_or(|disk| disk.node != replica.node) {
                    found.push(format!("segment {index} of {name} is on an unknown disk"));
                }
            }
        }
        let owned = match volume.owner {
            VolumeOwner::None => true,
            VolumeOwner::Vm(vm) => state.vms.get(&vm).is_some_and(|vm| vm.disks.contains(&volume.id)),
            VolumeOwner::Image(image) => state.images.contains_key(&image),
        };
        if !owned {
            found.push(format!("the owner of {name} is gone"));
        }
        if state.purge.contains_key(&volume.id) {
            found.push(format!("{name} is deleted and there"));
        }
    }
}

fn vms(state: &ClusterState, found: &mut Vec<String>) {
    for vm in state.vms.values() {
        let name = state.subject_name(&Subject::Vm(vm.id));
        if let Some(assignment) = vm.assignment {
            if assignment.epoch != vm.epoch {
                found.push(format!("VM {name} runs in an old epoch"));
            }
            for disk in &vm.disks {
                if state.volumes.get(disk).is_none_or(|volume| volume.coordinator != Some(assignment.node)) {
                    found.push(format!("a disk of VM {name} is not open where the VM runs"));
                }
            }
        }
        if vm.disks.iter().any(|disk| !state.volumes.contains_key(disk)) {
            found.push(format!("a disk of VM {name} is gone"));
        }
        if vm.ports.iter().any(|port| state.ports.get(port).is_none_or(|port| port.vm != vm.id)) {
            found.push(format!("a NIC of VM {name} is gone"));
        }
    }
}
