//! What holds after every command. The property tests check it after each step of random histories.

use std::collections::BTreeSet;

use super::{
    ClusterState, DesiredRun, LayerRef, Segment, Subject, Vm, VmDevice, Volume, VolumeId, VolumeOwner,
    layers::MAX_DEPTH,
};

/// Three copies and as many that replace them.
const MOST_COPIES: usize = 6;

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
    layers(state, &mut found);
    vms(state, &mut found);
    leftovers(state, &mut found);
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
            copies(state, volume, index, segment, found);
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
            VolumeOwner::Suspension(vm) => state.vms.get(&vm).is_some_and(|vm| {
                vm.suspension.as_ref().is_some_and(|suspension| suspension.volume == volume.id)
            }),
        };
        if state.exports.values().any(|export| export.volume == volume.id && !export.is_of(volume)) {
            found.push(format!("{name} is exported and would be dropped with its export"));
        }
        if !owned {
            found.push(format!("the owner of {name} is gone"));
        }
        if state.purge.contains_key(&volume.id) {
            found.push(format!("{name} is deleted and there"));
        }
    }
}

/// Chains are sound, what is being frozen is known on both sides, nothing that is needed is merged away or dead.
fn layers(state: &ClusterState, found: &mut Vec<String>) {
    for volume in state.volumes.values() {
        let (name, layers) = (&volume.name, &volume.layers);
        let chains =
            std::iter::once(&layers.chain).chain(layers.snapshots.iter().map(|snapshot| &snapshot.chain));
        for chain in chains {
            let distinct: BTreeSet<_> = chain.iter().collect();
            if chain.is_empty() || chain.len() > MAX_DEPTH || distinct.len() != chain.len() {
                found.push(format!("{name} has no sound chain"));
            }
        }
        let is_own = |layer: &LayerRef| layer.volume == volume.id && layer.number < layers.next;
        if !layers.chain.first().is_some_and(is_own) {
            found.push(format!("{name} writes to a layer that is not its own"));
        }
        if layers.all().iter().any(|layer| state.dead_layers.contains_key(layer)) {
            found.push(format!("a layer of {name} is dead"));
        }
        let takes_part =
            |id| state.freezes.get(&id).is_some_and(|freeze| freeze.volumes.contains_key(&volume.id));
        if layers.freeze.is_some_and(|pending| !takes_part(pending.id)) {
            found.push(format!("{name} is being frozen by nobody"));
        }
        if let Some(merge) = layers.merge
            && (state.is_shared(merge, volume.id)
                || layers.snapshots.iter().any(|snapshot| snapshot.chain.first() == Some(&merge))
                || layers.chain.iter().skip(1).all(|layer| *layer != merge))
        {
            found.push(format!("a layer of {name} is merged that is needed"));
        }
    }
    for (id, freeze) in &state.freezes {
        let is_pending = |volume: &VolumeId| {
            let volume = state.volumes.get(volume);
            volume.is_some_and(|volume| volume.layers.freeze.is_some_and(|pending| pending.id == *id))
        };
        if !freeze.volumes.keys().all(is_pending) {
            found.push(format!("the freeze {} waits for a volume that knows nothing of it", freeze.name));
        }
    }
}

/// Copies are on distinct disks of distinct nodes, but for one that replaces another; no disk has one where data of a
/// former one are still to be removed.
fn copies(state: &ClusterState, volume: &Volume, index: usize, segment: &Segment, found: &mut Vec<String>) {
    let name = &volume.name;
    let retired = state.retired.get(&volume.id);
    for (number, replica) in segment.replicas.iter().enumerate() {
        for other in &segment.replicas[number + 1..] {
            let related = replica.replaces == Some(other.disk) || other.replaces == Some(replica.disk);
            if replica.disk == other.disk || (replica.node == other.node && !related) {
                found.push(format!("two copies of segment {index} of {name} are in one place"));
            }
        }
        if replica.replaces.is_some_and(|old| old == replica.disk || segment.on(old).is_none()) {
            found.push(format!("a copy of segment {index} of {name} replaces one that is not there"));
        }
        if retired.is_some_and(|disks| disks.contains_key(&replica.disk)) {
            let other = retired.and_then(|disks| disks.get(&replica.disk));
            if other.is_some_and(|other| other.segments.iter().any(|there| there.0 as usize == index)) {
                found.push(format!("segment {index} of {name} is in use and to be removed"));
            }
        }
    }
    if segment.replicas.len() > MOST_COPIES {
        found.push(format!("segment {index} of {name} has too many copies"));
    }
}

/// Disks belong to members, and what is to be removed belongs to disks of the pool and to volumes that are there.
fn leftovers(state: &ClusterState, found: &mut Vec<String>) {
    if state.disks.values().any(|disk| !state.nodes.contains_key(&disk.node)) {
        found.push("a disk is in a node that is no member".to_owned());
    }
    let purged = state.purge.values().flatten();
    if purged
        .chain(state.retired.values().flat_map(|disks| disks.keys()))
        .chain(state.dead_layers.values().flat_map(|dead| &dead.disks))
        .any(|disk| !state.disks.contains_key(disk))
    {
        found.push("data are to be removed from a disk that is not in the pool".to_owned());
    }
    if state.retired.keys().any(|volume| !state.volumes.contains_key(volume)) {
        found.push("copies of a deleted volume are kept apart".to_owned());
    }
    if state.nodes.keys().any(|node| state.removed_nodes.contains(node)) {
        found.push("a removed node is a member".to_owned());
    }
}

fn vms(state: &ClusterState, found: &mut Vec<String>) {
    for vm in state.vms.values() {
        let name = state.subject_name(&Subject::Vm(vm.id));
        if let Some(assignment) = vm.assignment {
            if assignment.epoch > vm.epoch {
                found.push(format!("VM {name} runs in an epoch that was not given away"));
            }
            for disk in &vm.disks {
                if state.volumes.get(disk).is_none_or(|volume| volume.coordinator != Some(assignment.node)) {
                    found.push(format!("a disk of VM {name} is not open where the VM runs"));
                }
            }
        }
        suspension(state, vm, &name, found);
        migration(state, vm, &name, found);
        renewal(vm, &name, found);
        devices(vm, &name, found);
        if vm.disks.iter().any(|disk| !state.volumes.contains_key(disk)) {
            found.push(format!("a disk of VM {name} is gone"));
        }
        if vm.ports.iter().any(|port| state.ports.get(port).is_none_or(|port| port.vm != vm.id)) {
            found.push(format!("a NIC of VM {name} is gone"));
        }
    }
}

/// Each disk and NIC has a slot of its own, and what is under way is so in a run that goes on.
fn devices(vm: &Vm, name: &str, found: &mut Vec<String>) {
    let disks = vm.disks.iter().map(|disk| VmDevice::Disk(*disk));
    let listed: BTreeSet<_> = disks.chain(vm.ports.iter().map(|port| VmDevice::Nic(*port))).collect();
    if listed.len() != vm.disks.len() + vm.ports.len() || !listed.iter().eq(vm.devices.keys()) {
        found.push(format!("VM {name} has devices without a place, or places without a device"));
    }
    let slots: BTreeSet<_> = vm.devices.values().map(|place| place.slot).collect();
    if slots.len() != vm.devices.len() || slots.iter().any(|slot| !vmm::DEVICE_SLOTS.contains(slot)) {
        found.push(format!("two devices of VM {name} are in one slot, or one is in no slot that there is"));
    }
    let Some(run) = vm.assignment else {
        if vm.devices_under_way().next().is_some() || vm.reshaping.is_some() {
            found.push(format!("VM {name} does not run, and its machine is being changed"));
        }
        return;
    };
    if (vm.migration.is_some() || vm.renewal.is_some()) && vm.devices_under_way().next().is_some() {
        found.push(format!("VM {name} moves while its devices come and go"));
    }
    let (make, to) = (run.make, vm.reshaping.unwrap_or(run.make.shape()));
    if to.vcpus > make.most.vcpus
        || to.memory_bytes > make.most.memory_bytes
        || to.memory_bytes < make.boot_memory_bytes
        || to.memory_bytes > make.memory_bytes
    {
        found.push(format!("VM {name} is to become larger than it can, or smaller than it was at its boot"));
    }
}

/// What moves is the present run, to another node, in an epoch of its own.
fn migration(state: &ClusterState, vm: &Vm, name: &str, found: &mut Vec<String>) {
    let Some(migration) = vm.migration else { return };
    match vm.assignment {
        Some(run) if run.epoch == migration.from => {
            if run.node == migration.to || !state.nodes.contains_key(&migration.to) {
                found.push(format!("VM {name} is migrated to where it is, or to nowhere"));
            }
        }
        _ => found.push(format!("a run of VM {name} is migrated that is over")),
    }
    if migration.epoch != vm.epoch || migration.from >= migration.epoch {
        found.push(format!("the epoch that VM {name} is migrated to was not given away last"));
    }
    if vm.suspension.is_some() || vm.restart.is_some() || vm.desired != DesiredRun::Running {
        found.push(format!("VM {name} is migrated and meant to end"));
    }
}

/// What gets a new process is the present run, and nothing else is done to it.
fn renewal(vm: &Vm, name: &str, found: &mut Vec<String>) {
    let Some(renewal) = vm.renewal else { return };
    if vm.assignment.is_none_or(|run| run.epoch != renewal.epoch) {
        found.push(format!("a run of VM {name} gets a new process that is over"));
    }
    let ends = vm.suspension.is_some() || vm.restart.is_some() || vm.desired != DesiredRun::Running;
    if ends || vm.migration.is_some() {
        found.push(format!("VM {name} gets a new process and is meant to end or to move"));
    }
}

/// There is one run that may go on, or one state that a run may be made from.
fn suspension(state: &ClusterState, vm: &Vm, name: &str, found: &mut Vec<String>) {
    if vm.paused.is_some() && vm.paused != vm.assignment.map(|run| run.epoch) {
        found.push(format!("a run of VM {name} is paused that is over"));
    }
    let Some(suspension) = &vm.suspension else { return };
    let Some(volume) = state.volumes.get(&suspension.volume) else {
        return found.push(format!("the state of VM {name} is gone"));
    };
    match vm.saving() {
        Some(epoch) if vm.assignment.is_none_or(|run| run.epoch != epoch) => {
            found.push(format!("a run of VM {name} is being suspended that is over"));
        }
        Some(_) if vm.desired != DesiredRun::Running => {
            found.push(format!("VM {name} is being suspended and stopped"));
        }
        Some(_) => {}
        None if !volume.is_filled() => {
            found.push(format!("VM {name} is suspended to a volume that is not written"));
        }
        None => {}
    }
    if vm.restoring().is_some_and(|run| volume.coordinator != Some(run.node)) {
        found.push(format!("the state of VM {name} is not open where it is resumed"));
    }
}
