//! VMs: created with their disks and NICs, assigned to nodes, ended.
//!
//! A VM runs at most once in each run epoch. Assigning raises the epoch and opens its volumes on the same node in the
//! same step; whatever still runs of an older epoch can no longer write.

use std::collections::{BTreeMap, BTreeSet};

use super::{
    Applied, check_free, check_name, cloud_init, conflict,
    devices::{self, MAX_DISKS, MAX_PORTS},
    images, invalid, migration, networks, not_found, renewal, storage, suspension,
};
use crate::state::{
    AfterCrash, Assignment, ClusterState, DesiredRun, DeviceStage, FirmwareVariables, Goal, Growth,
    ImagePart, MAX_MEMORY_BYTES, MAX_VARIABLES, MAX_VCPUS, NodeId, Port, Refusal, RefusalKind, Restart,
    RunEpoch, Severity, Shape, StopMode, Subject, Timestamp, Vm, VmDevice, VmExit, VmId, VolumeFill,
    VolumeId, VolumeOwner,
    command::{AssignReason, NewVm, VmChange},
};

/// Least memory of a VM.
const MIN_MEMORY_BYTES: u64 = 32 << 20;
/// Memory is given in multiples of this.
const MEMORY_STEP: u64 = 1 << 20;

pub(super) fn create(
    state: &mut ClusterState,
    new: &NewVm,
    unreachable: &[NodeId],
    at: Timestamp,
) -> Result<Applied, Refusal> {
    let goal = match new.desired {
        DesiredRun::Running => Goal::VmRuns(new.id, RunEpoch(1)),
        DesiredRun::Stopped(_) => Goal::Applied,
    };
    let done = Applied::now("vm create", Subject::Vm(new.id), &new.name).until(goal);
    if state.vms.contains_key(&new.id) {
        return Ok(done);
    }
    check_shape(state, new)?;

    // Planned on a copy: the second disk must see what the first one takes, and a refusal must leave nothing.
    let mut draft = ClusterState { volumes: state.volumes.clone(), ..light_copy(state) };
    let image_disk = state.images.get(&new.image).and_then(|image| image.disk());
    for (index, disk) in new.disks.iter().enumerate() {
        let fill = match image_disk {
            Some(source) if index == 0 => VolumeFill::CopyOf(source),
            _ => VolumeFill::Blank,
        };
        let owner = VolumeOwner::Vm(new.id);
        let volume = storage::plan_volume(&draft, disk, new.near, unreachable, owner, fill, at)?;
        if let VolumeFill::CopyOf(source) = fill
            && let Some(source) = state.volumes.get(&source)
            && source.size_bytes > volume.size_bytes
        {
            return Err(invalid(
                format!("the disk is smaller than the image's disk of {} bytes", source.size_bytes),
                "use a larger disk: --disk SIZE",
            ));
        }
        if draft.volumes.insert(volume.id, volume).is_some() {
            return Err(invalid("a volume id is used twice", "send the request again"));
        }
    }
    let ports = plan_ports(state, new)?;

    state.volumes = draft.volumes;
    let port_ids = ports.iter().map(|port| port.id).collect();
    state.ports.extend(ports.into_iter().map(|port| (port.id, port)));
    let mut vm = Vm {
        id: new.id,
        name: new.name.clone(),
        vcpus: new.vcpus,
        cpu_model: new.cpu_model,
        memory_bytes: new.memory_bytes,
        image: new.image,
        cmdline: new.cmdline.clone(),
        disks: new.disks.iter().map(|disk| disk.id).collect(),
        ports: port_ids,
        desired: new.desired,
        after_crash: new.after_crash,
        preferred_node: new.preferred_node,
        epoch: RunEpoch(0),
        assignment: None,
        restart: None,
        last_exit: None,
        created: at,
        cloud_init: new.cloud_init.clone(),
        firmware: None,
        paused: None,
        suspension: None,
        migration: None,
        renewal: None,
        devices: BTreeMap::new(),
        growth: new.growth,
        reshaping: None,
    };
    devices::place_all(&mut vm);
    state.vms.insert(new.id, vm);
    Ok(done)
}

/// What placement needs of the state, without its history.
fn light_copy(state: &ClusterState) -> ClusterState {
    ClusterState {
        nodes: state.nodes.clone(),
        disks: state.disks.clone(),
        purge: state.purge.clone(),
        ..ClusterState::default()
    }
}

fn check_size(vcpus: u8, memory_bytes: u64) -> Result<(), Refusal> {
    if !(1..=MAX_VCPUS).contains(&vcpus) {
        return Err(invalid(format!("a VM cannot have {vcpus} CPUs"), format!("use --cpu 1 to {MAX_VCPUS}")));
    }
    if !(MIN_MEMORY_BYTES..=MAX_MEMORY_BYTES).contains(&memory_bytes)
        || !memory_bytes.is_multiple_of(MEMORY_STEP)
    {
        return Err(invalid(
            format!("a VM cannot have {memory_bytes} bytes of memory"),
            "use whole MiB: --memory 1GiB",
        ));
    }
    Ok(())
}

/// Changes a VM. A run that goes on grows and shrinks with it as far as it can, and keeps the rest of what it was started with.
pub(super) fn set(state: &mut ClusterState, id: VmId, change: VmChange) -> Result<Applied, Refusal> {
    let vm = state.vms.get_mut(&id).ok_or_else(|| not_found("vm", id))?;
    let vcpus = change.vcpus.unwrap_or(vm.vcpus);
    let memory_bytes = change.memory_bytes.unwrap_or(vm.memory_bytes);
    check_size(vcpus, memory_bytes)?;
    let growth = Growth {
        vcpus: change.growth.vcpus.or(vm.growth.vcpus),
        memory_bytes: change.growth.memory_bytes.or(vm.growth.memory_bytes),
    };
    check_growth(growth)?;
    (vm.vcpus, vm.memory_bytes, vm.growth) = (vcpus, memory_bytes, growth);
    vm.cpu_model = change.cpu_model.unwrap_or(vm.cpu_model);
    vm.after_crash = change.after_crash.unwrap_or(vm.after_crash);
    let done = Applied::now("vm set", Subject::Vm(id), &vm.name);
    if change.vcpus.is_some() || change.memory_bytes.is_some() {
        devices::reshape(vm, Shape { vcpus, memory_bytes });
    }
    Ok(if vm.reshaping.is_some() { done.until(Goal::VmReshaped(id)) } else { done })
}

fn check_growth(growth: Growth) -> Result<(), Refusal> {
    let vcpus = growth.vcpus.unwrap_or(1);
    check_size(vcpus, growth.memory_bytes.unwrap_or(MIN_MEMORY_BYTES))
}

fn check_shape(state: &ClusterState, new: &NewVm) -> Result<(), Refusal> {
    check_name("vm", &new.name)?;
    check_free("vm", &new.name, state.vms.values().map(|vm| &vm.name))?;
    check_size(new.vcpus, new.memory_bytes)?;
    check_growth(new.growth)?;
    let devices = new.disks.len() + new.ports.len();
    if devices > vmm::DEVICE_SLOTS.len() {
        return Err(invalid(
            format!("a VM has at most {} disks and NICs together", vmm::DEVICE_SLOTS.len()),
            "use fewer disks or networks",
        ));
    }
    if new.disks.len() > MAX_DISKS || new.ports.len() > MAX_PORTS {
        return Err(invalid(
            format!("a VM has at most {MAX_DISKS} disks and {MAX_PORTS} NICs"),
            "use fewer disks or networks",
        ));
    }
    if let Some(cmdline) = &new.cmdline {
        images::check_cmdline(cmdline)?;
    }
    if let Some(given) = &new.cloud_init {
        cloud_init::check(given)?;
    }
    let image = state.images.get(&new.image).ok_or_else(|| not_found("image", new.image))?;
    if !image.is_ready() {
        return Err(conflict(
            format!("image {} is not complete yet", image.name),
            format!("wait for its import: hci image get {}", image.name),
        ));
    }
    let is_declared = |part| image.parts.contains_key(&part);
    if !is_declared(ImagePart::Kernel) && !is_declared(ImagePart::Disk) {
        return Err(invalid(
            format!("image {} has neither a disk nor a kernel to boot", image.name),
            "import an image with --disk, or with --kernel",
        ));
    }
    for node in new.preferred_node.iter().chain(&new.near) {
        if !state.nodes.contains_key(node) {
            return Err(not_found("node", node));
        }
    }
    Ok(())
}

fn plan_ports(state: &ClusterState, new: &NewVm) -> Result<Vec<Port>, Refusal> {
    let mut ports: BTreeMap<_, Port> = BTreeMap::new();
    let (mut macs, mut addresses) = (BTreeSet::new(), BTreeSet::new());
    let mut ordered = Vec::new();
    for port in &new.ports {
        let network = state.networks.get(&port.network).ok_or_else(|| not_found("network", port.network))?;
        let ip = networks::free_address(state, network, &addresses)?;
        let mac = networks::free_mac(state, port.id, &macs);
        addresses.insert((network.id, ip));
        macs.insert(mac);
        let planned = Port { id: port.id, network: network.id, vm: new.id, mac, ip };
        if state.ports.contains_key(&port.id) || ports.insert(port.id, planned.clone()).is_some() {
            return Err(invalid("a port id is used twice", "send the request again"));
        }
        ordered.push(planned);
    }
    Ok(ordered)
}

pub(super) fn set_desired(
    state: &mut ClusterState,
    id: VmId,
    desired: DesiredRun,
    at: Timestamp,
) -> Result<Applied, Refusal> {
    let vm = state.vms.get(&id).ok_or_else(|| not_found("vm", id))?;
    if desired == DesiredRun::Running && vm.saved().is_some() {
        let resumed = suspension::resume(state, id, at)?;
        return Ok(Applied { kind: "vm start", ..resumed });
    }
    if vm.is_suspended() {
        return Err(conflict(
            format!("VM {} is suspended", vm.name),
            format!(
                "have it go on: hci vm resume {0}; or give its state up: hci vm stop {0} --discard-state",
                vm.name
            ),
        ));
    }
    if let DesiredRun::Stopped(_) = desired {
        suspension::give_up(state, id, "the VM was stopped", at);
        migration::give_up(state, id, "the VM was stopped", at);
        renewal::give_up(state, id, "the VM was stopped", at);
    }
    let vm = state.vms.get_mut(&id).ok_or_else(|| not_found("vm", id))?;
    let name = vm.name.clone();
    match desired {
        DesiredRun::Running => {
            if vm.desired == DesiredRun::Running {
                return Err(conflict(
                    match vm.assignment {
                        Some(_) => format!("VM {name} runs already"),
                        None => format!("VM {name} is being started already"),
                    },
                    format!("see it: hci vm get {name}"),
                ));
            }
            vm.desired = desired;
            // Should the last run still be on its way down, it has to end before the next one starts.
            vm.restart = vm.assignment.map(|run| Restart { epoch: run.epoch, mode: StopMode::Graceful });
            let goal = Goal::VmRuns(id, RunEpoch(vm.epoch.0 + 1));
            Ok(Applied::now("vm start", Subject::Vm(id), name).until(goal))
        }
        DesiredRun::Stopped(mode) => {
            if vm.desired == desired && vm.assignment.is_none() {
                return Err(conflict(
                    format!("VM {name} is stopped"),
                    format!("start it: hci vm start {name}"),
                ));
            }
            // A forced stop stays forced, whatever comes later.
            let forced = vm.desired == DesiredRun::Stopped(StopMode::Force) && vm.assignment.is_some();
            vm.desired =
                if forced { DesiredRun::Stopped(StopMode::Force) } else { DesiredRun::Stopped(mode) };
            // A guest that is held cannot shut itself down.
            (vm.restart, vm.paused) = (None, None);
            Ok(Applied::now("vm stop", Subject::Vm(id), name).until(Goal::VmIsStopped(id)))
        }
    }
}

pub(super) fn restart(state: &mut ClusterState, id: VmId, mode: StopMode) -> Result<Applied, Refusal> {
    let vm = state.vms.get_mut(&id).ok_or_else(|| not_found("vm", id))?;
    let name = vm.name.clone();
    let Some(assignment) = vm.assignment.filter(|_| vm.desired == DesiredRun::Running) else {
        return Err(conflict(format!("VM {name} does not run"), format!("start it: hci vm start {name}")));
    };
    if vm.suspension.is_some() {
        return Err(conflict(
            format!("VM {name} is being suspended or resumed"),
            format!("wait for that: hci vm get {name}"),
        ));
    }
    migration::check_none(vm)?;
    // A guest that is held cannot shut itself down.
    vm.paused = None;
    // A forced end stays forced, whatever is asked later.
    let forced = vm.restart == Some(Restart { epoch: assignment.epoch, mode: StopMode::Force });
    let mode = if forced { StopMode::Force } else { mode };
    vm.restart = Some(Restart { epoch: assignment.epoch, mode });
    let goal = Goal::VmRuns(id, RunEpoch(vm.epoch.0 + 1));
    Ok(Applied::now("vm restart", Subject::Vm(id), name).until(goal))
}

pub(super) fn delete(state: &mut ClusterState, id: VmId) -> Result<Applied, Refusal> {
    let vm = state.vms.get(&id).ok_or_else(|| not_found("vm", id))?;
    let name = vm.name.clone();
    if vm.assignment.is_some() || vm.desired == DesiredRun::Running {
        return Err(conflict(format!("VM {name} runs"), format!("stop it first: hci vm stop {name}")));
    }
    let (disks, ports) = (vm.disks.clone(), vm.ports.clone());
    for disk in disks {
        storage::drop_volume(state, disk);
    }
    for port in ports {
        state.ports.remove(&port);
    }
    suspension::drop_state(state, id);
    state.vms.remove(&id);
    Ok(Applied::now("vm delete", Subject::Vm(id), name))
}

pub(super) fn assign(
    state: &mut ClusterState,
    id: VmId,
    node: NodeId,
    expected: RunEpoch,
    reason: AssignReason,
    unreachable: &[NodeId],
    at: Timestamp,
) -> Result<Applied, Refusal> {
    let vm = state.vms.get(&id).ok_or_else(|| not_found("vm", id))?;
    let name = vm.name.clone();
    if vm.epoch != expected {
        return Err(Refusal::new(
            RefusalKind::Fenced,
            format!("run epoch {} of VM {name} is not current", expected.0),
            "look again",
        ));
    }
    if vm.desired != DesiredRun::Running {
        return Err(conflict(
            format!("VM {name} is not meant to run"),
            format!("start it: hci vm start {name}"),
        ));
    }
    if let Some(assignment) = vm.assignment
        && !unreachable.contains(&assignment.node)
    {
        return Err(conflict(format!("VM {name} still runs"), "wait until that run has ended"));
    }
    if unreachable.contains(&node) {
        return Err(invalid("the node cannot be reached", "choose another node"));
    }
    let make = vm.make();
    let mut opened = Vec::new();
    // A run that goes on with a saved one needs that too.
    let saved = vm.suspension.as_ref().filter(|_| vm.saved().is_some()).map(|suspension| &suspension.volume);
    let leaves = |disk: &VolumeId| {
        let place = vm.devices.get(&VmDevice::Disk(*disk));
        place.is_some_and(|place| matches!(place.stage, DeviceStage::Leaving(_)))
    };
    for disk in vm.disks.iter().filter(|disk| !leaves(disk)).chain(saved) {
        let volume = storage::plan_open(state, *disk, node, unreachable)?;
        if !volume.is_filled() {
            return Err(conflict(format!("volume {} is not filled yet", volume.name), "wait for the copy"));
        }
        opened.push(volume);
    }
    let node_name = state.nodes.get(&node).ok_or_else(|| not_found("node", node))?.name.clone();
    for volume in opened {
        storage::commit_open(state, volume, at);
    }
    suspension::give_up(state, id, "the VM's node was lost", at);
    migration::give_up(state, id, "the VM's node was lost", at);
    renewal::give_up(state, id, "the VM's node was lost", at);
    devices::settle(state, id, at);
    let from = state.vms.get(&id).and_then(|vm| vm.assignment).map(|assignment| assignment.node);
    if let Some(vm) = state.vms.get_mut(&id) {
        vm.epoch = RunEpoch(expected.0 + 1);
        vm.assignment = Some(Assignment { node, epoch: vm.epoch, since: at, make });
        (vm.restart, vm.paused) = (None, None);
        if from.is_some() {
            vm.last_exit = Some(VmExit::NodeLost);
        }
    }
    match reason {
        AssignReason::Start => {}
        AssignReason::Failover => {
            let from = from
                .map_or_else(|| "a lost node".to_owned(), |from| state.subject_name(&Subject::Node(from)));
            let message = format!("VM {name} is started again on {node_name}, was on {from}");
            state.note(at, Severity::Warning, "vm-restarted", Subject::Vm(id), message);
        }
        AssignReason::Crash => {
            let message = format!("VM {name} is started again on {node_name} after a crash");
            state.note(at, Severity::Warning, "vm-restarted", Subject::Vm(id), message);
        }
    }
    Ok(Applied::now("vm assign", Subject::Vm(id), name))
}

/// The run's firmware has stored something.
pub(super) fn store_variables(
    state: &mut ClusterState,
    id: VmId,
    epoch: RunEpoch,
    variables: &FirmwareVariables,
) -> Result<Applied, Refusal> {
    let vm = state.vms.get_mut(&id).ok_or_else(|| not_found("vm", id))?;
    if vm.assignment.is_none_or(|assignment| assignment.epoch != epoch) {
        return Err(conflict("this run of the VM is over", "nothing is to be done"));
    }
    if variables.kept() > MAX_VARIABLES {
        return Err(invalid("its firmware keeps too much", "remove boot entries in the guest"));
    }
    vm.firmware = Some(variables.clone());
    Ok(Applied::now("vm firmware", Subject::Vm(id), &vm.name))
}

pub(super) fn exited(
    state: &mut ClusterState,
    id: VmId,
    epoch: RunEpoch,
    exit: &VmExit,
    at: Timestamp,
) -> Result<Applied, Refusal> {
    let vm = state.vms.get_mut(&id).ok_or_else(|| not_found("vm", id))?;
    let done = Applied::now("vm exited", Subject::Vm(id), &vm.name);
    if vm.migration.is_some_and(|migration| migration.epoch == epoch) {
        let why = match exit {
            VmExit::Crashed(reason) => format!("it could not be made there: {reason}"),
            VmExit::GuestShutdown | VmExit::Stopped | VmExit::NodeLost => "its run there ended".to_owned(),
        };
        migration::give_up(state, id, &why, at);
        return Ok(done);
    }
    if vm.assignment.is_none_or(|assignment| assignment.epoch != epoch) {
        return Ok(done);
    }
    let asked_to_restart = vm.restart.is_some_and(|restart| restart.epoch == epoch);
    // One that was written was to end; one that was to go on with a saved one has not begun.
    let (is_written, is_restored) = (vm.is_written(epoch), vm.restoring().is_some());
    vm.assignment = None;
    (vm.restart, vm.paused) = (None, None);
    vm.last_exit = Some(if is_written { VmExit::Stopped } else { exit.clone() });
    let name = vm.name.clone();
    match exit {
        _ if is_written => {}
        VmExit::Crashed(reason) if is_restored => {
            vm.desired = DesiredRun::Stopped(StopMode::Force);
            let message = format!("VM {name} could not be resumed and stays suspended: {reason}");
            state.note(at, Severity::Critical, "vm-not-resumed", Subject::Vm(id), message);
        }
        // A guest that shuts itself down stays down, unless a restart asked for it.
        VmExit::GuestShutdown if !asked_to_restart && vm.desired == DesiredRun::Running => {
            vm.desired = DesiredRun::Stopped(StopMode::Graceful);
            state.note(
                at,
                Severity::Info,
                "vm-shut-down",
                Subject::Vm(id),
                format!("VM {name} shut itself down"),
            );
        }
        VmExit::Crashed(reason) => {
            let mut message = format!("VM {name} crashed: {reason}");
            if vm.after_crash == AfterCrash::Stop && !asked_to_restart && vm.desired == DesiredRun::Running {
                vm.desired = DesiredRun::Stopped(StopMode::Force);
                message.push_str("; it stays off, as it is set to");
            }
            state.note(at, Severity::Critical, "vm-crashed", Subject::Vm(id), message);
        }
        _ => {}
    }
    suspension::give_up(state, id, "its run ended before it was suspended", at);
    migration::give_up(state, id, "its run ended before it was migrated", at);
    renewal::give_up(state, id, "its run ended meanwhile", at);
    devices::settle(state, id, at);
    Ok(done)
}
