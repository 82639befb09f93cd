//! Plans what happens to VMs.
//!
//! A VM runs at most once in a run epoch, and on the node that it is assigned to only. What runs here without being
//! meant to is killed at once. A run that has ended is told to the cluster until the cluster has taken note; only then
//! are its records removed.
//!
//! A run that was written to a volume must not go on, and is killed. One that goes on with what was written begins only when the cluster has
//! forgotten that (`state/apply/suspension.rs` has the whole order).

use std::time::Duration;

use storage::config::Access;
use vmm::{BalloonConfig, Boot, DeviceConfig, DiskConfig, NicConfig, VmConfig, VsockConfig};

use super::{Action, View, data};
use crate::{
    reconcile::observed::{DataView, Observed, Run, RunPhase, Vcpus},
    state::{
        Assignment, DesiredRun, DeviceStage, ImagePart, Make, PortId, RunEpoch, StopMode, SuspensionStage,
        Vm, VmDevice, VmExit, VmId, VolumeId,
        report::{VmReport, VmRunState},
    },
    vmm_role::record::{Begin, Ended},
};

/// How long a guest may take to shut itself down after its power button was pressed.
pub const SHUTDOWN_GRACE: Duration = Duration::from_secs(60);
/// Most queues of a disk; more bring nothing with one data process thread for each.
const MAX_DISK_QUEUES: u16 = 4;
/// How long a starting VMM waits for its sockets. They are there before it is started.
const BACKEND_TIMEOUT: Duration = Duration::from_secs(30);

/// Kills everything that runs: the lease is gone.
pub fn kill_all(observed: &Observed) -> Vec<Action> {
    let alive = observed.runs.iter().filter(|(_, run)| matches!(run.phase, RunPhase::Alive { .. }));
    alive.map(|(vm, run)| Action::KillVm { vm: *vm, epoch: run.epoch, why: Ended::LeaseLapsed }).collect()
}

/// Plans all VMs.
pub fn plan(view: View<'_>, actions: &mut Vec<Action>) {
    for (vm, run) in &view.observed.runs {
        actions.extend(plan_run(view, *vm, run));
        actions.extend(plan_machine(view, *vm, run));
    }
    for vm in view.state.vms_on(view.me) {
        if let Some(assignment) = vm.assignment
            && !view.observed.runs.contains_key(&vm.id)
        {
            actions.extend(plan_start(view, vm, assignment));
        }
    }
    for (vm, migration) in view.state.vms_arriving(view.me) {
        if !view.observed.runs.contains_key(&vm.id) {
            actions.extend(start(view, vm, migration.epoch, Begin::Saved));
        }
    }
}

/// The VM, if this run of it is the one that is assigned to this node.
fn assigned<'a>(view: View<'a>, vm: VmId, epoch: RunEpoch) -> Option<&'a Vm> {
    let vm = view.state.vms.get(&vm)?;
    let assignment = vm.assignment?;
    (assignment.node == view.me && assignment.epoch == epoch).then_some(vm)
}

/// Whether this run is the one that waits for its guest to arrive.
fn is_arriving(view: View<'_>, vm: VmId, epoch: RunEpoch) -> bool {
    let migration = view.state.vms.get(&vm).and_then(|vm| vm.arriving(view.me));
    migration.is_some_and(|migration| migration.epoch == epoch)
}

/// How a run is to be ended, if it is.
fn stop_mode(vm: &Vm, epoch: RunEpoch) -> Option<StopMode> {
    match vm.desired {
        // What was written, and what has not begun, has nothing to shut down.
        _ if vm.is_written(epoch) => Some(StopMode::Force),
        DesiredRun::Stopped(_) if vm.restoring().is_some() => Some(StopMode::Force),
        DesiredRun::Stopped(mode) => Some(mode),
        DesiredRun::Running => {
            vm.restart.filter(|restart| restart.epoch == epoch).map(|restart| restart.mode)
        }
    }
}

fn plan_run(view: View<'_>, id: VmId, run: &Run) -> Option<Action> {
    let epoch = run.epoch;
    let kill = Action::KillVm { vm: id, epoch, why: Ended::Killed };
    match (assigned(view, id, epoch), &run.phase) {
        // Its guest is brought by the other node.
        (None, RunPhase::Alive { .. }) if is_arriving(view, id, epoch) => None,
        (None, RunPhase::Ended(ended)) if is_arriving(view, id, epoch) => {
            let exit = match ended {
                Ended::Crashed(why) => VmExit::Crashed(why.clone()),
                Ended::GuestShutdown | Ended::Killed | Ended::LeaseLapsed => VmExit::Stopped,
            };
            Some(Action::ReportExit { vm: id, epoch, exit })
        }
        (None, RunPhase::Alive { .. }) => Some(kill),
        (None, RunPhase::Ended(_)) => Some(Action::ForgetRun { vm: id, epoch }),
        (Some(vm), RunPhase::Ended(ended)) => {
            Some(Action::ReportExit { vm: id, epoch, exit: exit(vm, epoch, ended) })
        }
        (Some(vm), RunPhase::Alive { button_pressed, vcpus }) => match (stop_mode(vm, epoch), button_pressed)
        {
            (None, _) => plan_vcpus(view, vm, epoch, *vcpus),
            (Some(StopMode::Force), _) => Some(kill),
            // A guest that is held cannot do anything.
            (Some(StopMode::Graceful), None) if *vcpus != Some(Vcpus::Running) => {
                Some(Action::SetVcpus { vm: id, epoch, to: Vcpus::Running })
            }
            (Some(StopMode::Graceful), None) => Some(Action::PressPowerButton { vm: id, epoch }),
            (Some(StopMode::Graceful), Some(since)) => (*since >= SHUTDOWN_GRACE).then_some(kill),
        },
    }
}

/// A run that goes on gets what its VM was given since, and loses what was taken from it.
fn plan_machine(view: View<'_>, id: VmId, run: &Run) -> Option<Action> {
    let vm = assigned(view, id, run.epoch).filter(|vm| stop_mode(vm, run.epoch).is_none())?;
    let is_busy = vm.migration.is_some() || vm.renewal.is_some() || vm.suspension.is_some();
    if !matches!(run.phase, RunPhase::Alive { .. }) || is_busy {
        return None;
    }
    let data = view.observed.data.as_ref()?;
    let make = vm.assignment?.make;
    let (mut join, mut leave) = (Vec::new(), Vec::new());
    for (device, place) in vm.devices_under_way() {
        if place.stage != DeviceStage::Joining {
            leave.extend(self::place(vm, device).map(|(_, name)| (device, name)));
            continue;
        }
        // One whose backend is not there yet comes with a later plan.
        let config = match device {
            VmDevice::Disk(volume) => disk(view, data, vm, make, volume).map(DeviceConfig::Disk),
            VmDevice::Nic(port) => nic(data, vm, port).map(DeviceConfig::Nic),
        };
        join.extend(config.map(|config| (device, config)));
    }
    if join.is_empty() && leave.is_empty() && vm.reshaping.is_none() {
        return None;
    }
    Some(Action::AdaptVm { vm: id, epoch: run.epoch, join, leave, shape: vm.reshaping })
}

/// A run that is to go on: held or not, written, or made from what was written.
fn plan_vcpus(view: View<'_>, vm: &Vm, epoch: RunEpoch, vcpus: Option<Vcpus>) -> Option<Action> {
    let id = vm.id;
    if let Some(migration) = vm.migration {
        return Some(Action::MigrateVm { vm: id, migration });
    }
    let to = if vm.paused == Some(epoch) { Vcpus::Held } else { Vcpus::Running };
    if vm.renewal.is_some() {
        // When all of its backends are there.
        let config = Box::new(config(view, vm).ok()?);
        return Some(Action::RenewVm { vm: id, epoch, config, vcpus: to });
    }
    let Some(suspension) = &vm.suspension else {
        return (vcpus != Some(to)).then_some(Action::SetVcpus { vm: id, epoch, to });
    };
    let data = view.observed.data.as_ref()?;
    let volume = view.state.volumes.get(&suspension.volume).filter(|volume| data::is_open(volume, data))?;
    match &suspension.stage {
        SuspensionStage::Saving { task, .. } => Some(Action::SaveVm {
            vm: id,
            epoch,
            volume: volume.id,
            generation: volume.generation,
            memory_bytes: vm.assignment?.make.memory_bytes,
            task: *task,
        }),
        SuspensionStage::Saved(saved) => {
            Some(Action::RestoreVm { vm: id, epoch, volume: volume.id, bytes: saved.bytes })
        }
    }
}

fn exit(vm: &Vm, epoch: RunEpoch, ended: &Ended) -> VmExit {
    match ended {
        Ended::GuestShutdown => VmExit::GuestShutdown,
        Ended::LeaseLapsed => VmExit::NodeLost,
        Ended::Killed => VmExit::Stopped,
        // It was to end anyway.
        Ended::Crashed(_) if stop_mode(vm, epoch).is_some() => VmExit::Stopped,
        Ended::Crashed(why) => VmExit::Crashed(why.clone()),
    }
}

/// The firmware of VMs whose image has no kernel: Debian's package `ovmf`, and the variables that a new VM starts with.
const FIRMWARE_CODE: &str = "/usr/share/OVMF/OVMF_CODE_4M.fd";
const FIRMWARE_VARIABLES: &str = "/usr/share/OVMF/OVMF_VARS_4M.fd";

fn plan_start(view: View<'_>, vm: &Vm, assignment: Assignment) -> Option<Action> {
    let epoch = assignment.epoch;
    if stop_mode(vm, epoch).is_some() {
        return Some(Action::ReportExit { vm: vm.id, epoch, exit: VmExit::Stopped });
    }
    if vm.saving() == Some(epoch) {
        let exit = VmExit::Crashed("it vanished while it was being suspended".to_owned());
        return Some(Action::ReportExit { vm: vm.id, epoch, exit });
    }
    start(view, vm, epoch, if vm.restoring().is_some() { Begin::Saved } else { Begin::Boot })
}

fn start(view: View<'_>, vm: &Vm, epoch: RunEpoch, begin: Begin) -> Option<Action> {
    let config = Box::new(config(view, vm).ok()?);
    let (cloud_init, firmware) = (vm.cloud_init.clone(), vm.firmware.clone());
    Some(Action::StartVm { vm: vm.id, epoch, config, cloud_init, firmware, begin })
}

/// What a VMM is told, or what is still missing for it.
fn config(view: View<'_>, vm: &Vm) -> Result<VmConfig, String> {
    let data = view.observed.data.as_ref().ok_or("the data process is away")?;
    let make = vm.assignment.map_or(vm.make(), |run| run.make);
    let stays = |device: &VmDevice| {
        vm.devices.get(device).filter(|place| !matches!(place.stage, DeviceStage::Leaving(_))).is_some()
    };
    let disks = vm.disks.iter().filter(|disk| stays(&VmDevice::Disk(**disk)));
    let disks = disks.map(|volume| disk(view, data, vm, make, *volume));
    let nics = vm.ports.iter().filter(|port| stays(&VmDevice::Nic(**port)));
    let nics = nics.map(|port| nic(data, vm, *port));
    let (boot, files) = (boot(view, vm)?, view.paths.vm(vm.id));
    Ok(VmConfig {
        name: vm.name.clone(),
        id: vm.id.0,
        vcpus: make.vcpus,
        max_vcpus: Some(make.most.vcpus),
        cpu_model: make.cpu_model,
        memory_bytes: make.boot_memory_bytes,
        max_memory_bytes: Some(make.most.memory_bytes),
        plugged_bytes: make.memory_bytes.saturating_sub(make.boot_memory_bytes),
        balloon: Some(BalloonConfig::default()),
        vsock: Some(VsockConfig { cid: vsock_address(vm.id), socket: files.vsock() }),
        // It takes firmware to show anything there.
        display_socket: matches!(boot, Boot::Firmware { .. }).then(|| files.display()),
        boot,
        disks: disks.collect::<Result<_, String>>()?,
        nics: nics.collect::<Result<_, String>>()?,
        seed: vm.cloud_init.is_some().then(|| files.seed()),
        agent_socket: Some(files.agent()),
        console_socket: files.console(),
        backend_timeout_ms: u64::try_from(BACKEND_TIMEOUT.as_millis()).unwrap_or(u64::MAX),
    })
}

/// The address that a guest has among its node's (`AF_VSOCK`), the same wherever it runs. Those below 3 and the last one mean something else.
fn vsock_address(vm: VmId) -> u32 {
    const FIRST: u128 = 3;
    const COUNT: u128 = u32::MAX as u128 - FIRST;
    // The remainder fits.
    (FIRST + vm.0.as_u128() % COUNT) as u32
}

fn boot(view: View<'_>, vm: &Vm) -> Result<Boot, String> {
    let image = view.state.images.get(&vm.image).ok_or("its image is gone")?;
    let file = |part| {
        let Some(file) = image.boot_file(part) else { return Ok(None) };
        if view.observed.boot_files.contains(&file.hash) {
            return Ok(Some(view.paths.boot_file(file.hash)));
        }
        Err(format!("the {} of its image is brought here", part.name()))
    };
    if !image.parts.contains_key(&ImagePart::Kernel) {
        let variables = view.paths.vm(vm.id).variables();
        return Ok(Boot::Firmware {
            code: FIRMWARE_CODE.into(),
            template: FIRMWARE_VARIABLES.into(),
            variables,
        });
    }
    let kernel = file(ImagePart::Kernel)?.ok_or("the kernel of its image is not there yet")?;
    let cmdline = vm.cmdline.clone().unwrap_or_else(|| image.cmdline.clone());
    Ok(Boot::Kernel { kernel, initramfs: file(ImagePart::Initramfs)?, cmdline })
}

/// The slot of a device of a VM, and what its VMM calls it.
fn place(vm: &Vm, device: VmDevice) -> Result<(u8, String), String> {
    let slot = vm.devices.get(&device).ok_or("one of its devices has no slot")?.slot;
    Ok(match device {
        VmDevice::Disk(_) => (slot, format!("disk{slot}")),
        VmDevice::Nic(_) => (slot, format!("nic{slot}")),
    })
}

fn nic(data: &DataView, vm: &Vm, port: PortId) -> Result<NicConfig, String> {
    let (slot, id) = place(vm, VmDevice::Nic(port))?;
    let applied = data.applied.as_ref().map(|config| &config.overlay).ok_or("its network ports are made")?;
    let port =
        applied.ports.iter().find(|there| there.id == port.into()).ok_or("its network ports are made")?;
    let mtu = applied.networks.iter().find(|network| network.vni == port.vni).map(|network| network.mtu);
    let mac = vmm::MacAddr(port.mac.octets());
    Ok(NicConfig { id, socket: port.socket.clone(), mac, mtu, slot: Some(slot) })
}

fn disk(
    view: View<'_>,
    data: &DataView,
    vm: &Vm,
    make: Make,
    volume: VolumeId,
) -> Result<DiskConfig, String> {
    let (slot, id) = place(vm, VmDevice::Disk(volume))?;
    let volume = view.state.volumes.get(&volume).ok_or("one of its volumes is gone")?;
    let config = |socket| DiskConfig {
        id,
        socket,
        // As many for the whole run: where it moves to, the disk has to be the same.
        queues: u16::from(make.most.vcpus).clamp(1, MAX_DISK_QUEUES),
        readonly: false,
        slot: Some(slot),
    };
    if volume.coordinator != Some(view.me) {
        let standby = data.applied.as_ref().map_or(&[][..], |config| &config.storage.standby);
        let there = standby.iter().find(|there| there.id == volume.id.into());
        return there
            .map(|there| config(there.socket.clone()))
            .ok_or_else(|| format!("volume {} is not expected here yet", volume.name));
    }
    let applied = data.applied.as_ref().map_or(&[][..], |config| &config.storage.volumes);
    let socket = applied.iter().find_map(|there| match &there.access {
        Access::VhostUser { socket }
            if there.id == volume.id.into() && there.generation == volume.generation.into() =>
        {
            Some(socket.clone())
        }
        _ => None,
    });
    match socket {
        Some(socket) if data::is_open(volume, data) => Ok(config(socket)),
        _ => Err(format!("volume {} is opened", volume.name)),
    }
}

/// What the VMs here do.
pub fn reports(view: View<'_>) -> Vec<VmReport> {
    let mut reports: Vec<_> = view
        .observed
        .runs
        .iter()
        .map(|(vm, run)| {
            let meant = assigned(view, *vm, run.epoch);
            let stopping = meant.is_none_or(|vm| stop_mode(vm, run.epoch).is_some());
            let state = match run.phase {
                RunPhase::Ended(_) => VmRunState::Exited,
                RunPhase::Alive { .. } if is_arriving(view, *vm, run.epoch) => {
                    VmRunState::Waiting("it is on its way here".to_owned())
                }
                RunPhase::Alive { .. } if stopping => VmRunState::Stopping,
                RunPhase::Alive { .. } if meant.is_some_and(|vm| vm.restoring().is_some()) => {
                    VmRunState::Waiting("its state is read back".to_owned())
                }
                RunPhase::Alive { vcpus: Some(Vcpus::Held), .. } => VmRunState::Paused,
                RunPhase::Alive { .. } => VmRunState::Running,
            };
            VmReport { vm: *vm, epoch: run.epoch, state, agent: None, executable: Default::default() }
        })
        .collect();
    for vm in view.state.vms_on(view.me) {
        if let Some(assignment) = vm.assignment
            && !view.observed.runs.contains_key(&vm.id)
        {
            let why = config(view, vm).err().unwrap_or_else(|| "its VMM starts".to_owned());
            reports.push(VmReport {
                vm: vm.id,
                epoch: assignment.epoch,
                state: VmRunState::Waiting(why),
                agent: None,
                executable: Default::default(),
            });
        }
    }
    reports
}
