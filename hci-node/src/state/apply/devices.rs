//! Disks and NICs that VMs get and lose, also while they run, and machines that grow and shrink.
//!
//! While a VM runs, what is asked for and what its machine has are two things. A device is [`DeviceStage::Joining`] until its node says that the
//! machine has it, and [`DeviceStage::Leaving`] until the guest has let go of it, which may be never. Its volume is open where the VM
//! runs from the command on that gives it to the VM, until the one that says that it has left. What is under way when a run
//! ends is done with it: the next machine is made with what there is to be.
//!
//! Nothing is under way while a run is written, or moves: the machine at the other end is made from the same list.

use super::{Applied, conflict, invalid, migration, networks, not_found, storage, tasks};
use crate::state::{
    AfterDetach, Assignment, ClusterState, DesiredRun, DevicePlace, DeviceStage, Goal, NodeId, Port, Refusal,
    RefusalKind, RunEpoch, Severity, Shape, Subject, Timestamp, Vm, VmDevice, VmId, VolumeFill, VolumeId,
    VolumeOwner,
    command::{GivenDisk, NewPort},
};

/// Most disks and NICs of a VM.
pub(super) const MAX_DISKS: usize = 16;
pub(super) const MAX_PORTS: usize = 8;

/// Puts the devices of a new VM into slots: disks, then NICs.
pub(super) fn place_all(vm: &mut Vm) {
    let disks = vm.disks.iter().map(|disk| VmDevice::Disk(*disk));
    let nics = vm.ports.iter().map(|port| VmDevice::Nic(*port));
    let place = |slot| DevicePlace { slot, stage: DeviceStage::Present };
    vm.devices = disks.chain(nics).zip(vmm::DEVICE_SLOTS.map(place)).collect();
}

/// A slot that none of its devices has.
fn free_slot(vm: &Vm) -> Result<u8, Refusal> {
    let taken = |slot: &u8| vm.devices.values().any(|place| place.slot == *slot);
    vmm::DEVICE_SLOTS.into_iter().find(|slot| !taken(slot)).ok_or_else(|| {
        let slots = vmm::DEVICE_SLOTS.len();
        Refusal::new(
            RefusalKind::Capacity,
            format!("VM {} has {slots} disks and NICs, and room for no more", vm.name),
            format!("take one away first: hci vm get {}", vm.name),
        )
    })
}

/// The VM, if its devices can change now, and its run, if there is one that goes on.
fn changeable(state: &ClusterState, id: VmId) -> Result<(&Vm, Option<Assignment>), Refusal> {
    let vm = state.vms.get(&id).ok_or_else(|| not_found("vm", id))?;
    migration::check_none(vm)?;
    if vm.suspension.is_some() {
        return Err(conflict(
            format!("VM {} is suspended, or on its way there or back", vm.name),
            format!("have it go on first: hci vm resume {}", vm.name),
        ));
    }
    if vm.assignment.is_some() && (vm.desired != DesiredRun::Running || vm.restart.is_some()) {
        return Err(conflict(
            format!("VM {} is being stopped", vm.name),
            format!("wait for that: hci vm get {}", vm.name),
        ));
    }
    Ok((vm, vm.assignment))
}

/// When a device has come to where it is to be.
fn goal(id: VmId, device: VmDevice, run: Option<Assignment>) -> Goal {
    run.map_or(Goal::Applied, |_| Goal::DeviceSettled(id, device))
}

/// Gives a VM a device in a free slot.
fn place(state: &mut ClusterState, id: VmId, device: VmDevice, run: Option<Assignment>, slot: u8) {
    let Some(vm) = state.vms.get_mut(&id) else { return };
    let stage = if run.is_some() { DeviceStage::Joining } else { DeviceStage::Present };
    vm.devices.insert(device, DevicePlace { slot, stage });
    match device {
        VmDevice::Disk(disk) => vm.disks.push(disk),
        VmDevice::Nic(port) => vm.ports.push(port),
    }
}

pub(super) fn attach_disk(
    state: &mut ClusterState,
    id: VmId,
    disk: &GivenDisk,
    unreachable: &[NodeId],
    at: Timestamp,
) -> Result<Applied, Refusal> {
    let (vm, run) = changeable(state, id)?;
    let (name, node) = (vm.name.clone(), run.map(|run| run.node));
    if vm.disks.len() >= MAX_DISKS {
        return Err(invalid(
            format!("VM {name} has {MAX_DISKS} disks, the most that there are"),
            "use fewer",
        ));
    }
    let slot = free_slot(vm)?;
    let owner = VolumeOwner::Vm(id);
    let mut volume = match disk {
        GivenDisk::New(new) => {
            storage::plan_volume(state, new, node, unreachable, owner, VolumeFill::Blank, at)?
        }
        GivenDisk::Volume(volume) => {
            let volume = state.volumes.get(volume).ok_or_else(|| not_found("volume", volume))?.clone();
            check_free(state, &volume.name, volume.id, volume.owner)?;
            if !volume.is_filled() {
                return Err(conflict(
                    format!("volume {} is not filled yet", volume.name),
                    format!("wait for the copy: hci volume get {}", volume.name),
                ));
            }
            volume
        }
    };
    volume.owner = owner;
    let volume_id = volume.id;
    let before = state.volumes.insert(volume_id, volume);
    if let Some(node) = node {
        match storage::plan_open(state, volume_id, node, unreachable) {
            Ok(opened) => storage::commit_open(state, opened, at),
            Err(refusal) => {
                match before {
                    Some(before) => state.volumes.insert(volume_id, before),
                    None => state.volumes.remove(&volume_id),
                };
                return Err(refusal);
            }
        }
    }
    let device = VmDevice::Disk(volume_id);
    place(state, id, device, run, slot);
    Ok(Applied::now("vm attach disk", Subject::Vm(id), name).until(goal(id, device, run)))
}

/// Refuses a volume that somebody has.
fn check_free(state: &ClusterState, name: &str, id: VolumeId, owner: VolumeOwner) -> Result<(), Refusal> {
    let user = match owner {
        VolumeOwner::None if state.exports.values().any(|export| export.volume == id) => {
            "is being exported".to_owned()
        }
        VolumeOwner::None => return Ok(()),
        VolumeOwner::Vm(vm) | VolumeOwner::Suspension(vm) => {
            format!("belongs to VM {}", state.subject_name(&Subject::Vm(vm)))
        }
        VolumeOwner::Image(image) => {
            format!("belongs to image {}", state.subject_name(&Subject::Image(image)))
        }
    };
    Err(conflict(format!("volume {name} {user}"), "see who has it: hci volume list"))
}

pub(super) fn attach_nic(state: &mut ClusterState, id: VmId, new: &NewPort) -> Result<Applied, Refusal> {
    let (vm, run) = changeable(state, id)?;
    let name = vm.name.clone();
    if vm.ports.len() >= MAX_PORTS {
        return Err(invalid(format!("VM {name} has {MAX_PORTS} NICs, the most that there are"), "use fewer"));
    }
    let slot = free_slot(vm)?;
    if state.ports.contains_key(&new.id) {
        return Err(invalid("a port id is used twice", "send the request again"));
    }
    let network = state.networks.get(&new.network).ok_or_else(|| not_found("network", new.network))?;
    let ip = networks::free_address(state, network, &Default::default())?;
    let mac = networks::free_mac(state, new.id, &Default::default());
    let port = Port { id: new.id, network: network.id, vm: id, mac, ip };
    state.ports.insert(port.id, port);
    let device = VmDevice::Nic(new.id);
    place(state, id, device, run, slot);
    Ok(Applied::now("vm attach nic", Subject::Vm(id), name).until(goal(id, device, run)))
}

pub(super) fn detach(
    state: &mut ClusterState,
    id: VmId,
    device: VmDevice,
    then: AfterDetach,
) -> Result<Applied, Refusal> {
    let (vm, run) = changeable(state, id)?;
    let name = vm.name.clone();
    let what = describe(state, device);
    if !vm.devices.contains_key(&device) {
        return Err(conflict(
            format!("VM {name} does not have {what}"),
            format!("see it: hci vm get {name}"),
        ));
    }
    let boots_from_it = matches!(device, VmDevice::Disk(disk) if vm.disks.first() == Some(&disk));
    if boots_from_it && run.is_some() {
        return Err(conflict(
            format!("VM {name} has booted from {what}"),
            format!("stop it first: hci vm stop {name}"),
        ));
    }
    match run {
        None => remove(state, id, device, then),
        Some(_) => {
            if let Some(place) = state.vms.get_mut(&id).and_then(|vm| vm.devices.get_mut(&device)) {
                place.stage = DeviceStage::Leaving(then);
            }
        }
    }
    let kind = match device {
        VmDevice::Disk(_) => "vm detach disk",
        VmDevice::Nic(_) => "vm detach nic",
    };
    Ok(Applied::now(kind, Subject::Vm(id), name).until(goal(id, device, run)))
}

fn describe(state: &ClusterState, device: VmDevice) -> String {
    match device {
        VmDevice::Disk(disk) => format!("volume {}", state.subject_name(&Subject::Volume(disk))),
        VmDevice::Nic(port) => {
            state.ports.get(&port).map_or("that NIC".to_owned(), |port| format!("the NIC {}", port.mac))
        }
    }
}

/// Takes a device away from a VM whose machine does not have it.
fn remove(state: &mut ClusterState, id: VmId, device: VmDevice, then: AfterDetach) {
    let Some(vm) = state.vms.get_mut(&id) else { return };
    vm.devices.remove(&device);
    match device {
        VmDevice::Disk(disk) => {
            vm.disks.retain(|other| *other != disk);
            match then {
                AfterDetach::Delete => storage::drop_volume(state, disk),
                AfterDetach::Keep => {
                    if let Some(volume) = state.volumes.get_mut(&disk) {
                        volume.owner = VolumeOwner::None;
                    }
                }
            }
        }
        VmDevice::Nic(port) => {
            vm.ports.retain(|other| *other != port);
            state.ports.remove(&port);
        }
    }
}

/// The place of a device that this run has, if the run is the present one.
fn present(state: &ClusterState, id: VmId, epoch: RunEpoch, device: VmDevice) -> Option<DevicePlace> {
    let vm = state.vms.get(&id)?;
    vm.assignment.filter(|run| run.epoch == epoch)?;
    vm.devices.get(&device).copied()
}

pub(super) fn joined(
    state: &mut ClusterState,
    id: VmId,
    epoch: RunEpoch,
    device: VmDevice,
    at: Timestamp,
) -> Result<Applied, Refusal> {
    let place = present(state, id, epoch, device).filter(|place| place.stage == DeviceStage::Joining);
    let Some(place) = place else { return Err(over()) };
    let what = describe(state, device);
    let Some(vm) = state.vms.get_mut(&id) else { return Err(over()) };
    vm.devices.insert(device, DevicePlace { stage: DeviceStage::Present, ..place });
    let name = vm.name.clone();
    tasks::settle(state, &Goal::DeviceSettled(id, device), None, at);
    state.note(at, Severity::Info, "vm-device-added", Subject::Vm(id), format!("VM {name} has {what} now"));
    Ok(Applied::now("vm device joined", Subject::Vm(id), name))
}

pub(super) fn left(
    state: &mut ClusterState,
    id: VmId,
    epoch: RunEpoch,
    device: VmDevice,
    at: Timestamp,
) -> Result<Applied, Refusal> {
    let Some(DevicePlace { stage: DeviceStage::Leaving(then), .. }) = present(state, id, epoch, device)
    else {
        return Err(over());
    };
    let (name, what) = (state.subject_name(&Subject::Vm(id)), describe(state, device));
    remove(state, id, device, then);
    tasks::settle(state, &Goal::DeviceSettled(id, device), None, at);
    let message = format!("VM {name} has let go of {what}");
    state.note(at, Severity::Info, "vm-device-removed", Subject::Vm(id), message);
    Ok(Applied::now("vm device left", Subject::Vm(id), name))
}

fn over() -> Refusal {
    conflict("this is no longer wanted", "nothing is to be done")
}

/// The run that devices came to and left is over: the next machine is made without those that were to leave, and with the others.
pub(super) fn settle(state: &mut ClusterState, id: VmId, at: Timestamp) {
    let Some(vm) = state.vms.get_mut(&id) else { return };
    vm.reshaping = None;
    let under_way: Vec<_> = vm.devices_under_way().collect();
    for (device, place) in under_way {
        match place.stage {
            DeviceStage::Leaving(then) => remove(state, id, device, then),
            DeviceStage::Joining | DeviceStage::Present => {
                if let Some(vm) = state.vms.get_mut(&id) {
                    vm.devices.insert(device, DevicePlace { stage: DeviceStage::Present, ..place });
                }
            }
        }
        tasks::settle(state, &Goal::DeviceSettled(id, device), None, at);
    }
    tasks::settle(state, &Goal::VmReshaped(id), None, at);
}

/// Refuses what needs a machine that stays as it is, while a device comes or goes or processors come.
pub(super) fn check_settled(vm: &Vm) -> Result<(), Refusal> {
    let more_vcpus =
        vm.reshaping.is_some_and(|to| vm.assignment.is_some_and(|run| run.make.vcpus != to.vcpus));
    if vm.devices_under_way().next().is_none() && !more_vcpus {
        return Ok(());
    }
    Err(conflict(
        format!("VM {} gets or loses a device or processors just now", vm.name),
        format!("wait for that: hci vm get {}", vm.name),
    ))
}

/// Has the present run become what is wanted from now on, as far as a machine that runs can: [`Vm::reshaping`] says to what.
pub(super) fn reshape(vm: &mut Vm, wanted: Shape) {
    let goes_on = vm.desired == DesiredRun::Running
        && vm.restart.is_none()
        && vm.suspension.is_none()
        && vm.migration.is_none()
        && vm.renewal.is_none();
    let Some(run) = vm.assignment.as_mut().filter(|_| goes_on) else { return };
    let make = &mut run.make;
    let before = make.shape();
    // In whole blocks beyond what it has booted with.
    let more = wanted.memory_bytes.saturating_sub(make.boot_memory_bytes);
    let memory_bytes = make.boot_memory_bytes + more.next_multiple_of(vmm::MEMORY_BLOCK);
    let to = Shape {
        vcpus: wanted.vcpus.clamp(make.vcpus, make.most.vcpus),
        memory_bytes: memory_bytes.min(make.most.memory_bytes),
    };
    // What it may take is its own from now on; what it gives back is when it has.
    make.memory_bytes = make.memory_bytes.max(to.memory_bytes);
    vm.reshaping = (to != before || vm.reshaping.is_some()).then_some(to);
}

pub(super) fn reshaped(
    state: &mut ClusterState,
    id: VmId,
    epoch: RunEpoch,
    shape: Shape,
    at: Timestamp,
) -> Result<Applied, Refusal> {
    let vm = state.vms.get_mut(&id).ok_or_else(|| not_found("vm", id))?;
    let run = vm.assignment.as_mut().filter(|run| run.epoch == epoch && vm.reshaping == Some(shape));
    let Some(run) = run else { return Err(over()) };
    (run.make.vcpus, run.make.memory_bytes) = (shape.vcpus, shape.memory_bytes);
    vm.reshaping = None;
    let name = vm.name.clone();
    tasks::settle(state, &Goal::VmReshaped(id), None, at);
    let message =
        format!("VM {name} has {} CPUs and {} MiB of memory now", shape.vcpus, shape.memory_bytes >> 20);
    state.note(at, Severity::Info, "vm-reshaped", Subject::Vm(id), message);
    Ok(Applied::now("vm reshaped", Subject::Vm(id), name))
}
